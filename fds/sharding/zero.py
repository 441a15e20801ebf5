"""`shard`: parameters stored as one flat shard per site (ZeRO-3), `replicate`: stored whole, gradients reduced (data parallel), and `zero`: both by stage."""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fds import tree
from fds.frame import FRAME
from fds.layout import Boxes, Held, joined
from fds.program import Lens, Program, same
from fds.sharding import collectives
from fds.sharding.mesh import Axis, check_axis
from fds.transform import Split, Transform, chain, direct, parameters, through
from fds.tree import Params

if TYPE_CHECKING:
    from fds.optim import Optimizer


@direct
def shard(
    axis: Axis, *, reduce: str = "mean", threshold: int = 0, groups: Mapping[str, Iterable[str]] | None = None
) -> Transform:
    """Store 1/n of every site's parameters on each of the n ranks of `axis`; gather them where they are used (ZeRO-3).

    One flat buffer per site, dtype and trainability, padded to a multiple of n; so one gather per site and call, and one
    reduce-scatter per site in backward. Frozen parameters have a buffer of their own, which no gradient comes back to. Buffers of the module stay whole.

    Over two axes, a shard of a shard: ``chain(shard(local), shard(node))`` gathers over `node` first and then over `local`, so that a rank gets only
    1/local of the parameters from other nodes. What of that is gathered again in backward says the place of `checkpoint`: before a `shard`,
    it keeps what that one gathers. ``chain(shard(local), checkpoint(), shard(node))`` keeps the shard of the node (hpZ, the secondary partition
    of ZeRO++; Wang et al. 2023, arXiv:2306.10209, section 3.2). ``chain(shard(local), replicate(node))`` is HSDP or MiCS (Zhang et al. 2022,
    arXiv:2205.00119): sharded inside of a node, the same on all of them.

    Args:
        axis: a mesh axis, ``mesh["dp"]``; every rank gives its own rows of the batch.
        reduce: "mean" (the default): the gradient of local mean losses is that of the mean over the global batch. "sum": of their sum.
        threshold: leaves of fewer elements stay whole on every rank (their gradients are all-reduced). 0: none; flat buffers
            make small leaves cost no message of their own.
        groups: patterns of leaves by name: leaves of different groups do not share a buffer, for an optimizer that treats them differently
            (`optim.grouped`). A gather for each.

    Law: ``restore(place(p)) == p``; over n ranks values and gradients equal one process on the global batch.
    Rajbhandari et al. 2020, arXiv:1910.02054, section 5.3.
    """
    check_axis("shard", axis)
    collectives.is_mean(reduce)  # an unknown one fails here, not in the first call
    if type(threshold) is not int or threshold < 0:
        raise ValueError(f"shard: threshold={threshold!r}, required a number of elements >= 0")
    options: dict[str, Any] = {"axis": axis, "reduce": reduce}
    if threshold:
        options["threshold"] = threshold
    apart = {g: (p,) if isinstance(p, str) else tuple(p) for g, p in (groups or {}).items()}
    if apart:
        options["groups"] = apart
    return Transform(
        "shard",
        tuple(options.items()),
        lens=lambda p: _flat_lens(parameters(p), axis, reduce, threshold, p.axes, apart),
        provides=frozenset(["flat", "layout"]),
        check=partial(_check_groups, apart) if apart else None,
        conflicts=frozenset(["whole"]),
        axes=(axis,),
        hold=partial(_gathered, axis),
        reduction=partial(_reduced, axis, reduce),
    )


@direct
def replicate(axis: Axis, *, reduce: str = "mean") -> Transform:
    """Store the same on every rank of `axis`, and reduce the gradients over it in backward (plain data parallelism).

    After `shard` over another axis it is that shard which is the same on every rank, and its gradient that is reduced.

    Where no later transformation changes what is stored, and `reduce` is "mean", a `train_step` reduces once per step instead, after its
    last microbatch, and one message per site. Else it is in the order of the chain: ``chain(replicate(axis), cast("bfloat16"))`` sends
    bfloat16, after every microbatch.
    """
    check_axis("replicate", axis)
    collectives.is_mean(reduce)

    def make(spec: Params) -> Lens | None:
        def get(stored: Params) -> Params:
            if axis in FRAME.get().deferred:
                return stored
            return {k: collectives.replicate(v, axis, reduce=reduce) for k, v in stored.items()}

        return Lens(same, get, restore=same, layout=same) if spec else None

    options: dict[str, Any] = {"axis": axis, "reduce": reduce}
    reduction = partial(_reduced, axis, reduce) if reduce == "mean" else None
    return through(make, name="replicate", options=options, provides=["layout"], conflicts=["whole"], axes=(axis,), reduction=reduction)  # fmt: skip


def _check_groups(groups: Mapping[str, tuple[str, ...]], program: Program) -> None:
    """Raise `ValueError` for a group that names no trainable leaf of the program."""
    names = [k for p in (program.sites or {"": program}).values() for k, x in parameters(p).items() if x.requires_grad]
    for group, patterns in groups.items():
        if not any(tree.group_of(k, groups) == group for k in names):
            tree.select(names, patterns, what=f"shard: group {group!r}")  # an error, with the nearest names
            raise ValueError(f"shard: group {group!r} ({', '.join(patterns)}) has no leaf that groups before it do not name; leave it out, or name it first")  # fmt: skip


def _gathered(axis: Axis, split: Split, stored: Params) -> Params:
    """What of a site is split over the axis, gathered."""
    return {k: collectives.gather(v, axis) if axis in split.get(k, ()) else v for k, v in stored.items()}


def _reduced(axis: Axis, reduce: str, split: Split, grads: Params) -> Params:
    """Gradients reduced over the axis: to this rank's part of what is split over it; of the rest, one all-reduce for all of one dtype and device."""
    out = {k: collectives.scatter(g, axis, reduce=reduce) if axis in split.get(k, ()) else g for k, g in grads.items()}
    groups: dict[Any, list[str]] = {}
    for k, g in grads.items():
        if axis not in split.get(k, ()) and axis.size > 1:
            groups.setdefault((g.dtype, g.device), []).append(k)
    for names in groups.values():
        flat = torch.cat([grads[k].reshape(-1) for k in names])
        out |= unflatten(collectives.total(flat, axis, reduce=reduce), {k: grads[k].shape for k in names})
    return out


class Zero(NamedTuple):
    """A stage of ZeRO: what it does to a program, and what to its optimizer."""

    transform: Transform
    place: Callable[["Optimizer"], "Optimizer"]


def zero(stage: int, axis: Axis, *, replicas: Axis | None = None) -> Zero:
    """A stage of ZeRO over the ranks of `axis`, as the pair that it is made of: ``transform(program)`` and ``place(tx)``.

    | stage | `transform` | `place` | parameters, gradients, state on a rank |
    |---|---|---|---|
    | 0 | `replicate(axis)` | nothing | all, all, all |
    | 1, 2 | nothing | `optim.sharded(tx, axis)` | all, all until the step's one reduce-scatter, 1/n |
    | 3 | `shard(axis)` | nothing | 1/n and the sites in use, 1/n, 1/n |

    It is a pair, since stages 1 and 2 belong to the optimizer and the others to the program, and other transformations go before and after.

    Stages 1 and 2 are the same here. A gradient is a value that dies in the update, so there is none to keep in parts; and gradients are reduced
    once per step, to which every microbatch's belongs, so each rank adds up whole ones until then. To hold 1/n of them, reduce in every
    microbatch: that is stage 3 without `checkpoint` after it. With one microbatch it sends the same bytes as stage 2.

    Args:
        stage: 0 to 3.
        axis: of the mesh: its ranks share the work of holding.
        replicas: another axis, over whose ranks all this is repeated (HSDP; MiCS at stage 3): gradients are reduced inside of `axis` first,
            and what is left of them, 1/n from stage 1 on, across `replicas`, once per step if `transform` is the last of the
            chain that changes what is stored.

    Raises `ValueError` for another stage, or for something else than an axis of a mesh.

    Law: n ranks follow one process on the global batch.
    Rajbhandari et al. 2020, arXiv:1910.02054, section 5.

    >>> import fds, torch
    >>> transform, place = zero(3, fds.sharding.mesh(dp=1)["dp"])
    >>> transform
    chain(shard(axis=Axis(name='dp', size=1), reduce='mean'))
    >>> program, params = fds.functionalize(torch.nn.Linear(2, 2))
    >>> step = fds.train_step(transform(program), place(fds.optim.adamw(1e-3)))
    """
    from fds.optim.placement import sharded  # the front of a cycle: it shards by this file

    for a in (axis, *([] if replicas is None else [replicas])):
        if not isinstance(a, Axis):
            raise ValueError(f"zero: got {a!r}, required an axis of a mesh, as in zero({stage!r}, mesh['dp'])")
    if type(stage) is not int or not 0 <= stage <= 3:
        raise ValueError(f"zero: stage={stage!r}, required 0 (nothing), 1 or 2 (optimizer state), or 3 (parameters)")
    own = {0: replicate(axis), 3: shard(axis)}.get(stage, chain())
    again = chain() if replicas is None else replicate(replicas)
    return Zero(chain(own, again), partial(sharded, axis=axis) if stage in (1, 2) else same)


def _flat_lens(spec: Params, axis: Axis, reduce: str, threshold: int, split: Mapping[str, tuple[Any, ...]] = {}, apart: Mapping[str, tuple[str, ...]] = {}) -> Lens | None:  # fmt: skip
    """`split`: the axes over which leaves are split already; those that are not have a buffer of their own, for norms count them once."""
    groups: dict[str, list[str]] = {}
    axes: dict[str, tuple[Any, ...]] = {}
    for name, leaf in spec.items():
        if leaf.numel() >= threshold:
            over = split.get(name, ())
            parts = ["shard", str(leaf.dtype).removeprefix("torch."), *(a.name for a in over), *([] if leaf.requires_grad else ["frozen"])]  # fmt: skip
            group = tree.group_of(name, apart) if apart and leaf.requires_grad else None
            end = [] if group is None else [group]
            key = ".".join([*parts, *end])
            key = ".".join([*parts, axis.name, *end]) if key in spec else key  # a shard over an axis of one rank
            groups.setdefault(key, []).append(name)
            axes[key] = (*over, axis) if axis.size > 1 else over
    if not spec:
        return None
    flat = {n for names in groups.values() for n in names}

    def put(params: Params) -> Params:
        shards = {key: shard_of([params[n] for n in names], axis) for key, names in groups.items()}
        return {**shards, **{n: params[n] for n in spec if n not in flat}}

    def get(stored: Params) -> Params:
        held = axis in FRAME.get().deferred  # then the caller has gathered, and will reduce
        out = {
            n: stored[n] if held or not spec[n].requires_grad else collectives.replicate(stored[n], axis, reduce=reduce)
            for n in spec
            if n not in flat
        }
        for key, names in groups.items():
            whole = stored[key] if held else collectives.gather(stored[key], axis, reduce=reduce)
            out |= unflatten(whole, {n: spec[n].shape for n in names})
        return {n: out[n] for n in spec}

    def layout(held: Held) -> Held:
        shards = {key: shard_boxes([(spec[n].numel(), held[n]) for n in names], axis) for key, names in groups.items()}
        return {**shards, **{n: held[n] for n in spec if n not in flat}}

    return Lens(put, get, axes={k: v for k, v in axes.items() if v}, layout=layout)


def shard_boxes(tensors: list[tuple[int, Boxes]], axis: Any) -> Boxes:
    """What this rank's 1/n of a concatenation holds, given the length of each tensor and what it holds."""
    size = -(-sum(n for n, _ in tensors) // axis.size)
    return joined(tensors, axis.rank * size, (axis.rank + 1) * size)


def shard_of(leaves: list[Tensor], axis: Any) -> Tensor:
    """This rank's 1/n of the concatenation of `leaves`, a copy."""
    size = -(-sum(t.numel() for t in leaves) // axis.size)
    # An empty piece of the first leaf keeps dtype, device and trainability on a rank that holds only padding.
    return torch.cat([*pieces(leaves, axis.rank * size, (axis.rank + 1) * size), leaves[0].reshape(-1)[:0]])


def pieces(leaves: list[Tensor], start: int, stop: int) -> list[Tensor]:
    """Elements start to stop of the concatenation of `leaves`, which is never made: views of those that overlap, and zeros behind the end."""
    found: list[Tensor] = []  # not list[Tensor](): Dynamo cannot call that
    at = 0
    for t in leaves:
        a, b = max(start - at, 0), min(stop - at, t.numel())
        if a < b:
            found.append(t.reshape(-1)[a:b])
        at += t.numel()
    padding = stop - max(start, at)
    return [*found, leaves[0].new_zeros(padding)] if padding > 0 else found


def unflatten(flat: Tensor, shapes: dict[str, torch.Size]) -> Params:
    """Views of a flat buffer by name, in order; the padding at its end is left over."""
    sizes = [math.prod(s) for s in shapes.values()]
    parts = flat.split([*sizes, flat.numel() - sum(sizes)])
    return {n: part.view(shape) for (n, shape), part in zip(shapes.items(), parts, strict=False)}
