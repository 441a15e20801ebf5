"""The core: programs, lenses, and the transformations between programs.

A `Program` is a pure function of *stored* parameters, with the maps between stored and logical parameters. A `Lens` is a change of
representation. A `Transform` makes one program from another: `through` lifts a lens, `around` a wrapper of the call. Everything else in
fds is built from these.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial, reduce
from typing import Any, NamedTuple, Protocol

import attrs
import torch
from torch import Tensor

from fds import tree
from fds.frame import FRAME, Apply, Wrap, scoped
from fds.tree import Params, Stored


class Lens(NamedTuple):
    """A change of representation of the parameters at one site.

    Law: ``get(put(p)) == p``, bitwise, or within `tol` (relative to the largest element) where that is declared.

    * `put`: logical -> stored. Runs once, without gradients, and on meta tensors to find the stored shapes. A leaf that `put` detaches is
      frozen from then on.
    * `get`: stored -> logical. Runs in every call and is traced; its derivative is the gradient's way back.
    * `restore`: stored -> logical, exactly, outside of training (export, relayout). Default: `get`.
    * `axes`: the mesh axes over which a stored leaf is split; sums over the whole leaf reduce over them.
    """

    put: Callable[[Params], Params]
    get: Callable[[Params], Params]
    tol: float = 0.0
    restore: Callable[[Params], Params] | None = None
    axes: Mapping[str, tuple["Axis", ...]] = {}


class Axis(Protocol):
    """A mesh axis, as far as the core has to know one."""

    @property
    def size(self) -> int: ...
    @property
    def rank(self) -> int: ...
    def sum(self, x: Tensor) -> Tensor: ...


class Core(Protocol):
    """Where the calls of a program land: the module behind it (see `functional.py`)."""

    def modules(self, site: str) -> list[str]: ...
    def intercept(self, path: str) -> None: ...
    def with_training(self, training: bool) -> "Program": ...


class Mutated(NamedTuple):
    """The output of a site whose forward updated buffers, with their new values."""

    out: Any
    updates: dict[str, Tensor]


def _same(x: Any) -> Any:
    return x


@attrs.frozen(eq=False, repr=False)
class Program:
    """A pure function of stored parameters, and the maps between stored and logical parameters.

    ``program(stored, *args, **kwargs)`` is ``program.apply``. Make one with `functionalize`; change it with transformations; look at it
    with ``print(program)``.

    A whole program keeps its parts in `sites`: one program per transformer block, and ``""`` for the leaves outside of the blocks. Its
    stored tree is ``{site: {leaf: tensor}}``; a site's own is ``{leaf: tensor}``.
    """

    spec: Any  # the abstract stored tree: meta tensors; requires_grad marks the trainable leaves
    place: Callable[[Params], Any]  # logical -> stored
    apply: Apply  # (stored, *args, **kwargs) -> out; pure and traceable
    restore: Callable[[Any], Params]  # stored -> logical
    sites: Mapping[str, "Program"] = {}
    history: tuple["Transform", ...] = ()  # what was applied, innermost first
    marks: Mapping[
        str, frozenset[str]
    ] = {}  # leaves by property: "buffer", "transient" (not saved), "transposed" ([in, out] weights)
    axes: Mapping[str, tuple[Axis, ...]] = {}  # of one site: the axes over which a stored leaf is split
    data_axes: tuple[Axis, ...] = ()  # the axes over which ranks see different rows of the batch
    stack: tuple["Transform", ...] = ()  # of one site: the transforms that changed its representation
    tol: float = 0.0
    order: tuple[str, ...] = ()  # the logical leaves, in the module's order
    core: Core | None = None
    inner: "Program | None" = None  # the program before the last transformation
    peel: Callable[[Any], Any] = _same  # stored -> stored of `inner`
    push: Callable[[Any], Any] = _same  # stored of `inner` -> stored
    memo: dict[str, Any] = attrs.field(init=False, factory=dict)  # what was compiled for this program

    def __call__(self, stored: Any, *args: Any, **kwargs: Any) -> Any:
        return self.apply(stored, *args, **kwargs)

    def without(self, name: str) -> "Program":
        """The same program with every transformation called `name` left out.

        Raises `ValueError` where none is called so.
        """
        if all(t.name != name for t in self.history):
            raise ValueError(
                f"without: no transformation {name!r} in this program; {tree.suggest(name, {t.name for t in self.history})}"
            )
        return self.replay(*[t for t in self.history if t.name != name])

    def replay(self, *transforms: "Transform") -> "Program":
        """These transformations applied to the program that this one was made from."""
        return chain(*transforms)(self.origin)

    @property
    def origin(self) -> "Program":
        """The program before all transformations, as `functionalize` returned it."""
        return self if self.inner is None else self.inner.origin

    def train(self, mode: bool = True) -> "Program":
        """The same program over the module in training mode (dropout active, BatchNorm on batch statistics)."""
        if self.origin.core is None:
            raise ValueError("train/eval: this program was not made from a module")
        return chain(*self.history)(self.origin.core.with_training(mode))

    def eval(self) -> "Program":
        """The same program over the module in evaluation mode."""
        return self.train(False)

    def before(self, name: str, stored: Any) -> tuple["Program", Any]:
        """The program just after transformation `name`, and `stored` in its representation: all later ones undone."""
        if all(t.name != name for t in self.history):
            raise ValueError(
                f"no transformation {name!r} in this program; {tree.suggest(name, {t.name for t in self.history})}"
            )
        program = self
        while program.history[-1].name != name and program.inner is not None:
            stored, program = program.peel(stored), program.inner
        return program, stored

    def after(self, program: "Program", stored: Any) -> Any:
        """The way back from `before`: `stored` of an earlier `program` in this one's representation."""
        if program is self or self.inner is None:
            return stored
        return self.push(self.inner.after(program, stored))

    def trainable(self, stored: Stored) -> Stored:
        """The trainable part of a stored tree (the same tensors)."""
        return {s: {k: v for k, v in part.items() if self.spec[s][k].requires_grad} for s, part in stored.items()}

    def __repr__(self) -> str:
        leaves = tree.named(self.spec) if self.sites else self.spec
        train = sum(x.numel() for x in leaves.values() if x.requires_grad)
        total = sum(x.numel() for x in leaves.values())
        head = f"Program({self.core!r}, {max(len(self.sites) - 1, 0)} sites, {len(leaves)} leaves, {_count(train)} of {_count(total)} elements trainable, {tree.nbytes(self.spec):,} bytes stored"
        return head + "".join(f"\n  | {t!r}" for t in self.history) + ("\n)" if self.history else ")")


def _count(n: int) -> str:
    return f"{n / 1e6:.1f}M" if n >= 1e5 else f"{n:,}"


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
    check: Callable[[Program], None] | None = attrs.field(default=None, eq=False)
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
            new = _around_site(site, new, self.wrap, self.scope)
        changed = self.lens is not None and new.stack != p.stack
        return attrs.evolve(
            new,
            history=(*p.history, self),
            inner=p,
            peel=new.peel if changed else _same,
            push=new.push if changed else _same,
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
    buffers = p.marks.get("buffer", frozenset())

    def lift(f: Callable[[Params], Params], stored: Params) -> Params:
        params = {k: v for k, v in stored.items() if k not in buffers}
        return {**f(params), **{k: v for k, v in stored.items() if k in buffers}}

    def push(inner: Params) -> Params:
        with torch.no_grad():
            return lift(lens.put, inner)

    def peel(stored: Params) -> Params:
        with torch.no_grad():
            return lift(lens.restore or lens.get, stored)

    with torch.enable_grad():
        spec = {k: v.detach().requires_grad_(v.requires_grad) for k, v in lift(lens.put, p.spec).items()}
    return attrs.evolve(
        p,
        spec=spec,
        place=lambda params: push(p.place(params)),
        apply=lambda stored, *args, **kwargs: p.apply(lift(lens.get, stored), *args, **kwargs),
        restore=lambda stored: p.restore(peel(stored)),
        axes={**{k: v for k, v in p.axes.items() if k in spec}, **lens.axes},
        stack=(*p.stack, transform),
        tol=max(p.tol, lens.tol),
        peel=peel,
        push=push,
    )


def _around_site(site: str, p: Program, wrap: Wrap, scope: str) -> Program:
    """Program `p` of a site with its call, or the calls of modules inside it, wrapped."""
    if scope == "root" or scope == "sites":
        return attrs.evolve(p, apply=wrap(p.apply)) if (site == "") == (scope == "root") else p
    if site and tree.matches(scope, site):
        return attrs.evolve(p, apply=wrap(p.apply))
    core = p.core
    paths = _outermost(m for m in (core.modules(site) if core else []) if tree.matches(scope, m))
    if core is None or not paths:
        return p
    for path in paths:
        core.intercept(path)

    def apply(stored: Params, *args: Any, **kwargs: Any) -> Any:
        wraps = FRAME.get().wraps
        with scoped(wraps={**wraps, **{m: (wrap, *wraps.get(m, ())) for m in paths}}):
            return p.apply(stored, *args, **kwargs)

    return attrs.evolve(p, apply=apply)


def _outermost(paths: Iterable[str]) -> list[str]:
    kept: list[str] = []
    for path in sorted(paths, key=len):
        if not any(path.startswith(k + ".") for k in kept):
            kept.append(path)
    return kept


def assemble(
    sites: Mapping[str, Program], like: Program, history: tuple[Transform, ...] = (), data_axes: tuple[Axis, ...] = ()
) -> Program:
    """The whole program made of the programs of its sites; ``sites[""]`` is the root, which calls the others."""
    root, names = sites[""], list(sites)

    def place(params: Params) -> Stored:
        _check_names(params, logical)
        return {s: sites[s].place({k: params[k] for k in owned[s]}) for s in names}

    def apply(stored: Stored, *args: Any, **kwargs: Any) -> Any:
        _check_stored(stored, spec)
        bound = {s: (sites[s].apply, stored[s]) for s in names if s}
        with scoped(sites=bound, calls={}, pending={}, wraps={}) as frame:
            out = root.apply(stored[""], *args, **kwargs)
        out, pending = (
            (out.out, {**frame.pending, "": out.updates}) if isinstance(out, Mutated) else (out, frame.pending)
        )
        if frame.updates is not None:
            for s, updates in pending.items():
                frame.updates.setdefault(s, {}).update(updates)
        return out

    def restore(stored: Stored) -> Params:
        _check_stored(stored, spec)
        flat = {k: v for s in names for k, v in sites[s].restore(stored[s]).items()}
        return {k: flat[k] for k in logical}

    def peel(stored: Stored) -> Stored:
        return {s: sites[s].peel(stored[s]) for s in names}

    def push(inner: Stored) -> Stored:
        return {s: sites[s].push(inner[s]) for s in names}

    spec = {s: p.spec for s, p in sites.items()}
    owned = {s: list(p.origin.spec) for s, p in sites.items()}
    logical = list(like.order)
    return attrs.evolve(
        like, spec=spec, place=place, apply=apply, restore=restore, sites=dict(sites), history=history, data_axes=_distinct(data_axes),
        tol=max(p.tol for p in sites.values()), inner=like if history else None, peel=peel, push=push,
    )  # fmt: skip


def _distinct(axes: Iterable[Axis]) -> tuple[Axis, ...]:
    return tuple(dict.fromkeys(axes))


def _check_names(params: Mapping[str, Tensor], logical: list[str]) -> None:
    unknown = [k for k in params if k not in set(logical)]
    missing = [k for k in logical if k not in params]
    if unknown or missing:
        name = (unknown or missing)[0]
        raise ValueError(
            f"place: leaf {name!r} is {'unknown' if unknown else 'missing'} ({len(missing)} missing, {len(unknown)} unknown of {len(logical)}); {tree.suggest(name, missing if unknown else params)}"
        )


def _check_stored(stored: Any, spec: Stored) -> None:
    """Names only, and donated leaves: shapes may carry a batch dimension under vmap."""
    if (
        not isinstance(stored, Mapping)
        or stored.keys() != spec.keys()
        or any(stored[s].keys() != spec[s].keys() for s in spec)
    ):
        if not isinstance(stored, Mapping) or not all(isinstance(v, Mapping) for v in stored.values()):
            raise ValueError("stored: not a stored tree {site: {leaf: tensor}}; make one with program.place(params)")
        tree.check_like(stored, spec, what="stored (made for another program?)")
    for s, part in spec.items():
        for name, leaf in part.items():
            if stored[s][name].numel() == 0 and leaf.numel() > 0:
                tree.check_leaf(tree.qualified(s, name), stored[s][name], leaf, what="stored")


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
    return _transform(name, options, contract, lens=lambda p: make(parameters(p)))


def parameters(p: Program) -> Params:
    """The spec of one site without its buffers: what a lens may change."""
    buffers = p.marks.get("buffer", frozenset())
    return {k: v for k, v in p.spec.items() if k not in buffers}


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
        return attrs.evolve(rewrite(program), history=(*program.history, t), inner=program, peel=_same, push=_same)

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
    for t in transforms:
        if not isinstance(t, Transform):
            raise ValueError(
                f"chain: {t!r} is not a transformation; leave the program out of the call, as in chain(lora(rank=8, targets=...))(program)"
            )
    parts = tuple(p for t in transforms for p in (t.parts if t.parts is not None else (t,)))
    return Transform("chain", parts=parts)


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

    def check(program: Program) -> None:
        names = list(tree.named(program.spec))
        modules = [m for s in program.sites for m in (program.core.modules(s) if program.core else [])]
        tree.select(names + modules if transform.wrap else names, pattern, what=f"at({pattern!r}, {transform!r})")

    return attrs.evolve(
        transform, name="at", options=(("pattern", pattern), ("transform", transform)), lens=transform.lens and partial(_lens_at, pattern, transform.lens),
        scope=pattern if transform.wrap else transform.scope, check=check, conflicts=transform.conflicts - {transform.name},
    )  # fmt: skip


def _lens_at(pattern: str, make: Callable[[Program], Lens | None], p: Program) -> Lens | None:
    """The lens of `p` restricted to the leaves that `pattern` names."""
    chosen = {k for k in parameters(p) if tree.matches(pattern, k)}
    lens = make(attrs.evolve(p, spec={k: v for k, v in p.spec.items() if k in chosen})) if chosen else None
    if lens is None:
        return None
    rest = {k for k in parameters(p) if k not in chosen}

    def lift(f: Callable[[Params], Params]) -> Callable[[Params], Params]:
        return lambda t: {
            **{k: v for k, v in t.items() if k in rest},
            **f({k: v for k, v in t.items() if k not in rest}),
        }

    return lens._replace(put=lift(lens.put), get=lift(lens.get), restore=lens.restore and lift(lens.restore))


def relayout(src: Program, dst: Program) -> Callable[[Any], Any]:
    """``relayout(src, dst)(stored)``: the same logical parameters, from `src`'s representation into `dst`'s.

    Runs site by site, so that one site at a time exists in logical form. A site whose representation is the same in both programs is
    returned as it is, not copied; `stored` is never written.
    """
    if src.sites.keys() != dst.sites.keys() or any(
        list(src.sites[s].origin.spec) != list(dst.sites[s].origin.spec) for s in src.sites
    ):
        raise ValueError(
            f"relayout: the programs have different sites or leaves ({len(src.sites)} and {len(dst.sites)} sites); both have to come from one functionalize"
        )

    def run(stored: Stored) -> Stored:
        _check_stored(stored, src.spec)
        return {
            s: stored[s] if src.sites[s].stack == p.stack else p.place(src.sites[s].restore(stored[s]))
            for s, p in dst.sites.items()
        }

    return run
