"""The core: programs and lenses.

A `Program` is a pure function of *stored* parameters, with the maps between stored and logical parameters. A `Lens` is a change of
representation. What makes one program from another is in `transform.py`. Everything else in fds is built from these.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import attrs
from torch import Tensor, nn

from fds import tree
from fds.frame import Apply, Draws, scoped
from fds.layout import Held, Layout
from fds.tree import Params, Stored

if TYPE_CHECKING:
    from fds.transform import Transform


class Lens(NamedTuple):
    """A change of representation of the parameters at one site.

    Law: ``get(put(p)) == p``, bitwise, or within `tol` (relative to the largest element) where that is declared.

    * `put`: logical -> stored. Runs once, without gradients, and on meta tensors to find the stored shapes. A leaf that `put` detaches is
      frozen from then on.
    * `get`: stored -> logical. Runs in every call and is traced; its derivative is the gradient's way back.
    * `restore`: stored -> logical, exactly, outside of training (export, relayout). Default: `get`.
    * `axes`: the mesh axes over which a stored leaf is split; sums over the whole leaf reduce over them.
    * `handles`: stored leaves that stand for tensors elsewhere, and where those are (`fds.offload`). No later lens can change them.
    * `layout`: of a lens that moves elements and changes none: from what the leaves that go in hold to what the stored ones do (`fds.layout`).
      States are saved as they were before such lenses, so that they can be restored under others. None: the lens changes more than that.
    * `host`: stored leaves that are in host memory, whatever the device of those that go in.
    * `carries`: stored leaves that are no parameters but what the lens keeps from one step to the next, and how each goes on:
      ``f(values, cotangents) -> next value``, given those of all such leaves at the site. Their "gradient" is what backward has to say, by an
      operator's rule; it never goes to an optimizer. Later lenses pass them by, as they do buffers.
    """

    put: Callable[[Params], Params]
    get: Callable[[Params], Params]
    tol: float = 0.0
    restore: Callable[[Params], Params] | None = None
    axes: Mapping[str, tuple["Axis", ...]] = {}
    handles: Mapping[str, Any] = {}
    layout: Callable[[Held], Held] | None = None
    host: frozenset[str] = frozenset()
    carries: Mapping[str, "Carry"] = {}


Carry = Callable[[Params, Params], Tensor]


class Axis(Protocol):
    """A mesh axis, as far as the core has to know one."""

    @property
    def size(self) -> int: ...
    @property
    def rank(self) -> int: ...
    @property
    def stride(self) -> int: ...
    def sum(self, x: Tensor) -> Tensor: ...


class Core(Protocol):
    """Where the calls of a program land: the module behind it (see `functional.py`)."""

    head: str | None

    @property
    def sites(self) -> list[str]: ...
    @property
    def module(self) -> nn.Module: ...
    def first_name(self, name: str) -> str: ...
    def part(self, path: str) -> nn.Module: ...
    def modules(self, site: str) -> list[str]: ...
    def intercept(self, path: str) -> None: ...
    def with_training(self, training: bool) -> "Program": ...


class Mutated(NamedTuple):
    """The output of a site whose forward updated buffers, with their new values."""

    out: Any
    updates: dict[str, Tensor]


def same(x: Any) -> Any:
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
    place: Callable[[Mapping[str, Tensor]], Any]  # logical -> stored; asks for the leaves site by site
    apply: Apply  # (stored, *args, **kwargs) -> out; pure and traceable
    restore: Callable[[Any], Params]  # stored -> logical
    sites: Mapping[str, "Program"] = {}
    history: tuple["Transform", ...] = ()  # what was applied, innermost first
    marks: Mapping[
        str, frozenset[str]
    ] = {}  # leaves by property: "buffer", "transient" (not saved), "transposed" ([in, out] weights)
    axes: Mapping[str, tuple[Axis, ...]] = {}  # of one site: the axes over which a stored leaf is split
    handles: Mapping[str, Any] = {}  # of one site: stored leaves that stand for tensors in a store -> where those are
    layout: Layout | None = None  # of one site: what its stored leaves hold; None: each itself
    carries: Mapping[str, Carry] = {}  # of one site: leaves that a lens keeps from step to step -> how they go on
    data_axes: tuple[Axis, ...] = ()  # the axes over which ranks see different rows of the batch, in the mesh's order
    stack: tuple["Transform", ...] = ()  # of one site: the transforms that changed its representation
    tol: float = 0.0
    order: tuple[str, ...] = ()  # the logical leaves, in the module's order
    core: Core | None = None
    inner: "Program | None" = None  # the program before the last transformation
    peel: Callable[[Any], Any] = same  # stored -> stored of `inner`
    push: Callable[[Any], Any] = same  # stored of `inner` -> stored
    memo: dict[Any, Any] = attrs.field(init=False, factory=dict[Any, Any])  # what was compiled for this program

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
        return reduce(lambda p, t: t(p), transforms, self.origin)

    @property
    def origin(self) -> "Program":
        """The program before all transformations, as `functionalize` returned it."""
        return self if self.inner is None else self.inner.origin

    def train(self, mode: bool = True) -> "Program":
        """The same program over the module in training mode (dropout active, BatchNorm on batch statistics)."""
        if self.origin.core is None:
            raise ValueError("train/eval: this program was not made from a module")
        return reduce(lambda p, t: t(p), self.history, self.origin.core.with_training(mode))

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
        return {
            s: {k: v for k, v in part.items() if self.spec[s][k].requires_grad and k not in self.sites[s].carries}
            for s, part in stored.items()
        }

    def carry(self, stored: Stored, grads: Stored) -> Stored:
        """The next values of the leaves that lenses keep from step to step (`Lens.carries`), and of no others, after a backward pass.

        `train_step` does this. A loop of your own goes on with ``{s: {**stored[s], **next.get(s, {})} for s in stored}``.
        """
        out: Stored = {}
        for s, p in self.sites.items():
            values, cotangents = ({k: t[s][k] for k in p.carries} for t in (stored, grads))
            if p.carries:
                out[s] = {k: f(values, cotangents) for k, f in p.carries.items()}
        return out

    def __repr__(self) -> str:
        leaves = tree.named(self.spec) if self.sites else self.spec
        trained = tree.named(self.trainable(self.spec)) if self.sites else leaves
        train = sum(x.numel() for x in trained.values() if x.requires_grad)
        total = sum(x.numel() for x in leaves.values())
        head = f"Program({self.core!r}, {max(len(self.sites) - 1, 0)} sites, {len(leaves)} leaves, {_count(train)} of {_count(total)} elements trainable, {tree.nbytes(self.spec):,} bytes stored"
        return head + "".join(f"\n  | {t!r}" for t in self.history) + ("\n)" if self.history else ")")


def _count(n: int) -> str:
    return f"{n / 1e6:.1f}M" if n >= 1e5 else f"{n:,}"


def assemble(
    sites: Mapping[str, Program], like: Program, history: tuple["Transform", ...] = (), data_axes: tuple[Axis, ...] = ()
) -> Program:
    """The whole program made of the programs of its sites; ``sites[""]`` is the root, which calls the others."""
    root, names = sites[""], list(sites)

    def place(params: Mapping[str, Tensor]) -> Stored:
        _check_names(params, logical)
        return {s: sites[s].place({k: params[k] for k in owned[s]}) for s in names}

    def apply(stored: Stored, *args: Any, **kwargs: Any) -> Any:
        check_stored(stored, spec)
        bound = {s: (sites[s].apply, stored[s]) for s in names if s}
        with scoped(sites=bound, calls={}, draws=Draws(), pending={}, wraps={}) as frame:
            out = root.apply(stored[""], *args, **kwargs)
        out, pending = (
            (out.out, {**frame.pending, "": out.updates}) if isinstance(out, Mutated) else (out, frame.pending)
        )
        if frame.updates is not None:
            for s, updates in pending.items():
                frame.updates.setdefault(s, {}).update(updates)
        return out

    def restore(stored: Stored) -> Params:
        check_stored(stored, spec)
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
        like, spec=spec, place=place, apply=apply, restore=restore, sites=dict(sites), history=history, data_axes=in_mesh_order(data_axes),
        tol=max(p.tol for p in sites.values()), inner=like if history else None, peel=peel, push=push,
    )  # fmt: skip


def in_mesh_order(axes: Iterable[Axis]) -> tuple[Axis, ...]:
    """Axes, each once, in the order in which the mesh counts its ranks: so do the rows of the global batch, whatever a chain names first."""
    return tuple(sorted(dict.fromkeys(axes), key=lambda a: -a.stride))


def _check_names(params: Mapping[str, Tensor], logical: list[str]) -> None:
    unknown = [k for k in params if k not in set(logical)]
    missing = [k for k in logical if k not in params]
    if unknown or missing:
        name = (unknown or missing)[0]
        raise ValueError(
            f"place: leaf {name!r} is {'unknown' if unknown else 'missing'} ({len(missing)} missing, {len(unknown)} unknown of {len(logical)}); {tree.suggest(name, missing if unknown else params)}"
        )


def check_stored(stored: Any, spec: Stored) -> None:
    """Names only, and donated leaves: shapes may carry a batch dimension under vmap."""
    if (
        not tree.is_mapping(stored)
        or stored.keys() != spec.keys()
        or any(stored[s].keys() != spec[s].keys() for s in spec)
    ):
        if not tree.is_mapping(stored) or not all(tree.is_mapping(v) for v in stored.values()):
            raise ValueError("stored: not a stored tree {site: {leaf: tensor}}; make one with program.place(params)")
        tree.check_like(stored, spec, what="stored (made for another program?)")
    for s, part in spec.items():
        for name, leaf in part.items():
            if stored[s][name].numel() == 0 and leaf.numel() > 0:
                tree.check_leaf(tree.qualified(s, name), stored[s][name], leaf, what="stored")
