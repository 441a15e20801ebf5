"""Transformations: maps from programs to programs, and the ways to make and combine them.

`through` lifts a lens, `around` a wrapper of calls, `whole` a function of programs; `at` restricts, `chain` composes, `relayout` goes from
one program's representation to another's.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial, reduce, wraps
from typing import Any, ParamSpec, Protocol, overload

import attrs
import torch

from fds import tree
from fds.frame import FRAME, Wrap, scoped
from fds.layout import Layout
from fds.program import Axis, Lens, Program, assemble, check_stored, same
from fds.tree import Params, Stored

P = ParamSpec("P")
Split = Mapping[str, tuple[Axis, ...]]  # of one site, by leaf: the axes over whose ranks it is split


@attrs.frozen(repr=False)
class Transform:
    """A map from programs to programs. A value: it prints as the call that made it, compares by it, and can be taken out by name.

    Made by `through`, `around`, `at` and `whole`; calling it applies it. `provides`, `requires` and `conflicts` are tags: an order in
    which a requirement is missing or a conflict is present raises `ValueError` with an order that works.
    """

    name: str
    options: tuple[tuple[str, Any], ...] = ()
    lens: Callable[[Program], Lens | None] | None = attrs.field(default=None, eq=False)
    wrap: Wrap | None = attrs.field(default=None, eq=False)
    scope: str = "sites"  # where `wrap` goes: "sites", "root", or a pattern of module paths
    rewrite: Callable[[Program], Program] | None = attrs.field(default=None, eq=False)
    provides: frozenset[str] = frozenset()
    requires: frozenset[str] = frozenset()
    conflicts: frozenset[str] = frozenset()
    axes: tuple[Axis, ...] = ()  # data axes that this transformation introduces
    shared: tuple[Axis, ...] = ()  # axes whose ranks compute one call together, of the same rows
    check: Callable[[Program], None] | None = attrs.field(default=None, eq=False)
    # What a lens over `axes` does, for who does it in its place, once for many calls (`Frame.deferred`). Both get which leaves of a site are split.
    hold: Callable[[Split, Params], Params] | None = attrs.field(
        default=None, eq=False
    )  # its `get`, but for names and shapes; None: nothing
    reduction: Callable[[Split, Params], Params] | None = attrs.field(
        default=None, eq=False
    )  # the transpose of that, on gradients
    parts: tuple["Transform", ...] | None = None  # of a chain

    def __call__(self, program: Program) -> Program:
        if self.parts is not None:
            return reduce(lambda p, t: t(p), self.parts, program)
        _check_order(self, program.history)
        if self.check is not None:
            self.check(program)
        if self.rewrite is not None:
            return self.rewrite(program)
        sites = program.sites or {"": program}
        new = {s: self._on_site(s, p) for s, p in sites.items()}
        return (
            assemble(new, program, (*program.history, self), (*program.data_axes, *self.axes))
            if program.sites
            else new[""]
        )

    def _on_site(self, site: str, p: Program) -> Program:
        new = p if self.lens is None else _through_site(p, self.lens(p), self)
        if self.wrap is not None:
            new = around_site(site, new, self.wrap, self.scope)
        changed = self.lens is not None and new.stack != p.stack
        return attrs.evolve(
            new,
            history=(*p.history, self),
            inner=p,
            peel=new.peel if changed else same,
            push=new.push if changed else same,
        )

    def __repr__(self) -> str:
        if self.parts is not None:
            return f"chain({', '.join(map(repr, self.parts))})"
        return f"{self.name}({', '.join(f'{k}={v!r}' for k, v in self.options)})"


def _check_order(t: Transform, history: tuple[Transform, ...]) -> None:
    provided = frozenset[str]().union(*(h.provides for h in history))
    missing = sorted(t.requires - provided)
    if missing:
        raise ValueError(
            f"{t!r} requires {', '.join(map(repr, missing))} before it; this program has {list(history) or 'no transformations'}; the order that works: chain({missing[0]}(...), {t!r})"
        )
    for i, h in enumerate(history):
        if any(a in h.axes for a in t.axes):
            raise ValueError(
                f"{t!r} cannot follow {h!r}: gradients would be reduced twice over the same ranks; leave one of them out, or give it another axis of the mesh"
            )
        both = [a for a in (*t.axes, *t.shared) if a in (h.shared if a in t.axes else h.axes)]
        if both:
            raise ValueError(
                f"{t!r} cannot follow {h!r}: one gives the ranks of {both[0]!r} rows of their own, the other the same rows; use two axes of a mesh, as mesh(dp=2, tp=2), or leave one of them out"
            )
        clash = h.provides & t.conflicts
        if not clash:
            continue
        if h.name == t.name:
            raise ValueError(
                f"{t!r} cannot follow {h!r}: a program takes one {t.name}; leave one of them out, or use program.without({t.name!r})"
            )
        order = ", ".join(map(repr, (*history[:i], t, *history[i:])))
        raise ValueError(
            f"{t!r} cannot follow {h!r} ({', '.join(sorted(clash))}); the order that works: chain({order})"
        )


def _through_site(p: Program, lens: Lens | None, transform: Transform) -> Program:
    """Program `p` with its parameters stored through `lens`. Buffers are stored as they are."""
    if lens is None:
        return p
    if p.handles:
        raise ValueError(
            f"{transform!r} cannot follow {p.stack[-1]!r}: the parameters are in a store already, and it would change their handles; the order that works: chain(..., {transform!r}, {p.stack[-1]!r})"
        )
    buffers = _passing(p)

    def lift(f: Callable[[Params], Params], stored: Params) -> Params:
        params = {k: v for k, v in stored.items() if k not in buffers}
        return {**f(params), **{k: v for k, v in stored.items() if k in buffers}}

    def push(inner: Params) -> Params:
        with torch.no_grad():
            return lift(lens.put, inner)

    def peel(stored: Params) -> Params:
        with torch.no_grad():
            return lift(lens.restore or lens.get, stored)

    def place(params: Mapping[str, Any]) -> Params:
        return push(p.place(params))

    def apply(stored: Params, *args: Any, **kwargs: Any) -> Any:
        return p.apply(lift(lens.get, stored), *args, **kwargs)

    def restore(stored: Params) -> Params:
        return p.restore(peel(stored))

    with torch.enable_grad():
        spec = {k: v.detach().requires_grad_(v.requires_grad) for k, v in lift(lens.put, p.spec).items()}
    layout, own = p.layout or Layout.plain(parameters(p)), {k: v for k, v in spec.items() if k not in buffers}
    return attrs.evolve(
        p,
        spec=spec,
        place=place,
        apply=apply,
        restore=restore,
        axes={**{k: v for k, v in p.axes.items() if k in spec}, **lens.axes},
        handles=lens.handles,
        carries={**p.carries, **lens.carries},
        layout=layout.after(lens.layout, own, host=lens.host, split=bool(lens.axes)),
        stack=(*p.stack, transform),
        tol=max(p.tol, lens.tol),
        peel=peel,
        push=push,
    )


def around_site(site: str, p: Program, wrap: Wrap, scope: str) -> Program:
    """Program `p` of a site with its call, or the calls of modules inside it, wrapped.

    A wrapper that has a method ``bind(core, path) -> wrap`` is told which module it wraps.
    """
    core, bind = p.core, getattr(wrap, "bind", None)
    if scope == "root" or scope == "sites":
        return attrs.evolve(p, apply=wrap(p.apply)) if (site == "") == (scope == "root") else p
    if site and tree.matches(scope, site):
        return attrs.evolve(p, apply=(bind(core, site) if bind else wrap)(p.apply))
    if core is None:
        return p
    # Not around a module that calls sites: their leaves do not pass through its call, so recompute would differentiate by nothing.
    inside = [m for m in core.modules(site) if not any(s.startswith(m + ".") for s in core.sites)]
    paths = _outermost(m for m in inside if tree.matches(scope, m))
    if not paths:
        return p
    return wrapped_calls(p, {m: bind(core, m) if bind else wrap for m in paths})


def wrapped_calls(p: Program, each: Mapping[str, Wrap]) -> Program:
    """Program `p` of a site with the calls of modules inside of it wrapped, by path."""
    if p.core is None or not each:
        return p
    for path in each:
        p.core.intercept(path)

    def apply(stored: Params, *args: Any, **kwargs: Any) -> Any:
        wraps = FRAME.get().wraps
        with scoped(wraps={**wraps, **{m: (w, *wraps.get(m, ())) for m, w in each.items()}}):
            return p.apply(stored, *args, **kwargs)

    return attrs.evolve(p, apply=apply)


def _outermost(paths: Iterable[str]) -> list[str]:
    kept: list[str] = []
    for path in sorted(paths, key=len):
        if not any(path.startswith(k + ".") for k in kept):
            kept.append(path)
    return kept


class Direct(Protocol[P]):
    """A function that makes a `Transform`, or applies it at once to the program that comes first: ``f(...)(program) == f(program, ...)``."""

    @overload
    def __call__(self, program: Program, /, *args: P.args, **kwargs: P.kwargs) -> Program: ...
    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Transform: ...


def direct(make: Callable[P, Transform]) -> Direct[P]:
    """Let `make` take the program first as well: ``cast(program, "bfloat16")`` is ``cast("bfloat16")(program)``."""

    @wraps(make)
    def run(*args: Any, **kwargs: Any) -> Any:
        return make(*args[1:], **kwargs)(args[0]) if args and isinstance(args[0], Program) else make(*args, **kwargs)

    return run


def through(
    make: Callable[[Params], Lens | None], *, name: str, options: Mapping[str, Any] | None = None, **contract: Any
) -> Transform:
    """Lift a lens to a transformation: the parameters of every site, and the root's own, are stored through it.

    `make(spec)` gets the abstract parameters at a site (meta tensors by name) and returns its `Lens`, or None to leave the site alone.
    `options` are printed and compared; `contract` takes ``provides``, ``requires``, ``conflicts`` (iterables of tags), ``check``.

    >>> import fds, torch
    >>> halves = lambda p: {k: v / 2 for k, v in p.items()}
    >>> double = fds.through(lambda spec: fds.Lens(put=halves, get=lambda s: {k: 2 * v for k, v in s.items()}), name="halved")
    >>> program, params = fds.functionalize(torch.nn.Linear(2, 2))
    >>> stored = double(program).place(params)
    >>> torch.equal(double(program).restore(stored)["weight"], params["weight"])
    True
    """

    def lens(p: Program) -> Lens | None:
        return make(parameters(p))

    return _transform(name, options, contract, lens=lens)


def parameters(p: Program) -> Params:
    """The spec of one site without its buffers: what a lens may change."""
    passing = _passing(p)
    return {k: v for k, v in p.spec.items() if k not in passing}


def _passing(p: Program) -> frozenset[str]:
    """What lenses pass by: buffers, and what an earlier lens keeps from step to step."""
    return p.marks.get("buffer", frozenset()) | p.carries.keys()


def around(
    wrap: Wrap, *, name: str, scope: str = "sites", options: Mapping[str, Any] | None = None, **contract: Any
) -> Transform:
    """Lift a wrapper of calls ``wrap(apply) -> apply`` to a transformation of every site (`scope` "sites") or of the root ("root").

    The wrapper sees ``(leaves, *args, **kwargs)`` and has to be pure. A program without sites is an error for `scope` "sites".
    """
    return _transform(
        name, options, contract, wrap=wrap, scope=scope, check=partial(_needs_sites, name) if scope == "sites" else None
    )


def whole(
    rewrite: Callable[[Program], Program], *, name: str, options: Mapping[str, Any] | None = None, **contract: Any
) -> Transform:
    """Lift a function of whole programs to a transformation; it is recorded as one step of the history."""

    def recorded(program: Program) -> Program:
        return attrs.evolve(rewrite(program), history=(*program.history, t), inner=program, peel=same, push=same)

    t = _transform(name, options, contract, rewrite=recorded)
    return t


def _transform(name: str, options: Mapping[str, Any] | None, contract: dict[str, Any], **fields: Any) -> Transform:
    tags: dict[str, Any] = {k: frozenset(contract.pop(k, ())) for k in ("provides", "requires", "conflicts")}
    return Transform(name, tuple((options or {}).items()), **{**fields, **contract}, **tags)


def _needs_sites(name: str, program: Program) -> None:
    if program.sites and len(program.sites) == 1:
        raise ValueError(
            f"{name}: this program has no sites to act on; name them: functionalize(module, sites='*.block*'), or use at('pattern', {name}(...))"
        )


def chain(*transforms: Transform) -> Transform:
    """Apply transformations in order, first = innermost. ``chain()`` is the identity; chains of chains are flat.

    >>> import fds
    >>> fds.chain(fds.chain(fds.cast("bfloat16")), fds.checkpoint()) == fds.chain(fds.cast("bfloat16"), fds.checkpoint())
    True
    """
    return Transform("chain", parts=tuple(p for t in transforms for p in _parts(t)))


def _parts(t: Any) -> tuple[Transform, ...]:
    if not isinstance(t, Transform):
        raise ValueError(
            f"chain: {t!r} is not a transformation; leave the program out of the call, as in chain(lora(rank=8, targets=...))(program)"
        )
    return t.parts if t.parts is not None else (t,)


def at(pattern: str, transform: Transform) -> Transform:
    """Restrict a transformation to the leaves and the module calls that a shell pattern names.

    Law: ``at(g, chain(t, u)) == chain(at(g, t), at(g, u))``. A pattern that names nothing raises `ValueError`.

    >>> import fds, torch
    >>> fds.at("*.mlp", fds.checkpoint())
    at(pattern='*.mlp', transform=checkpoint())
    """
    if transform.parts is not None:
        return chain(*[at(pattern, t) for t in transform.parts])
    if transform.rewrite is not None:
        raise ValueError(f"at: {transform!r} acts on whole programs and cannot be restricted to {pattern!r}")
    if transform.provides & {"lora", "tensor"}:
        raise ValueError(
            f"at: {transform!r} names its weights itself; write the pattern into its {'targets' if 'lora' in transform.provides else 'plan'}"
        )

    def check(program: Program) -> None:
        what = f"at({pattern!r}, {transform!r})"
        leaves = list(tree.named(program.spec)) if transform.lens else []
        modules = [m for s in program.sites for m in (s, *(program.core.modules(s) if program.core else [])) if m]
        tree.select(leaves + modules if transform.wrap else leaves, pattern, what=what)
        if transform.lens is not None and transform.check is not None:
            transform.check(_restricted(program, pattern))
        for s, p in program.sites.items():
            for k, v in parameters(p).items():
                if transform.axes and v.requires_grad and not tree.matches(pattern, k):
                    raise ValueError(
                        f"{what}: {tree.qualified(s, k)!r} would be left out, and its gradient would come from this rank's rows alone; apply {transform.name} to the whole program (shard has a threshold= for small leaves)"
                    )

    return attrs.evolve(
        transform, name="at", options=(("pattern", pattern), ("transform", transform)), lens=transform.lens and partial(_lens_at, pattern, transform.lens),
        scope=pattern if transform.wrap else transform.scope, check=check, conflicts=transform.conflicts - {transform.name},
    )  # fmt: skip


def _restricted(program: Program, pattern: str) -> Program:
    """`program` with those leaves only that `pattern` names."""

    def chosen(p: Program) -> Program:
        return attrs.evolve(p, spec={k: v for k, v in p.spec.items() if tree.matches(pattern, k)})

    return attrs.evolve(program, sites={s: chosen(p) for s, p in program.sites.items()})


def _lens_at(pattern: str, make: Callable[[Program], Lens | None], p: Program) -> Lens | None:
    """The lens of `p` restricted to the leaves that `pattern` names."""
    chosen = {k for k in parameters(p) if tree.matches(pattern, k)}
    lens = make(attrs.evolve(p, spec={k: v for k, v in p.spec.items() if k in chosen})) if chosen else None
    if lens is None:
        return None
    rest = {k for k in parameters(p) if k not in chosen}

    def lift(f: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda t: {
            **{k: v for k, v in t.items() if k in rest},
            **f({k: v for k, v in t.items() if k not in rest}),
        }

    return lens._replace(
        put=lift(lens.put),
        get=lift(lens.get),
        restore=lens.restore and lift(lens.restore),
        layout=lens.layout and lift(lens.layout),
    )


def relayout(src: Program, dst: Program) -> Callable[[Any], Any]:
    """``relayout(src, dst)(stored)``: the same logical parameters, from `src`'s representation into `dst`'s.

    Runs site by site, by way of the last representation that both programs have in common, so that one site at a time exists in that form. A
    site whose representation is the same in both programs is returned as it is, not copied; `stored` is never written.
    """
    check_same_module(src, dst, what="relayout")

    def run(stored: Stored) -> Stored:
        check_stored(stored, src.spec)
        out: Stored = {}
        for s, p in dst.sites.items():
            down, up = bridge(src.sites[s], p)
            out[s] = tree.compact(up(down(stored[s])), keep=stored[s])
        return out

    return run


def check_same_module(a: Program, b: Program, *, what: str) -> None:
    """Raise `ValueError` unless two programs have the same sites, and the same leaves in them, before all transformations."""
    if a.sites.keys() != b.sites.keys() or any(list(a.sites[s].origin.spec) != list(b.sites[s].origin.spec) for s in a.sites):  # fmt: skip
        raise ValueError(
            f"{what}: the programs have different sites or leaves ({len(a.sites)} and {len(b.sites)} sites); both have to come from one functionalize"
        )


def bridge(src: Program, dst: Program) -> tuple[Callable[[Params], Params], Callable[[Params], Params]]:
    """Of two programs of one site: from `src`'s representation to the last one that both have in common, and from there to `dst`'s."""
    shared = 0
    for a, b in zip(src.stack, dst.stack, strict=False):
        if a != b:
            break
        shared += 1

    def above(p: Program | None) -> list[Program]:
        found: list[Program] = []
        while p is not None and len(p.stack) > shared:
            found.append(p)
            p = p.inner
        return found

    down, up = above(src), above(dst)[::-1]
    return lambda x: reduce(lambda x, p: p.peel(x), down, x), lambda x: reduce(lambda x, p: p.push(x), up, x)
