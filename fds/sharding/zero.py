"""`shard`: parameters stored as one flat shard per site (ZeRO-3), and `replicate`: stored whole, gradients reduced (data parallel)."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fds.layout import Boxes, Held, joined
from fds.program import Lens, same
from fds.sharding import collectives
from fds.sharding.mesh import Axis
from fds.transform import Transform, direct, parameters, through
from fds.tree import Params


@direct
def shard(axis: Axis, *, reduce: str = "mean", threshold: int = 0) -> Transform:
    """Store 1/n of every site's parameters on each of the n ranks of `axis`; gather them where they are used (ZeRO-3).

    One flat buffer per site, dtype and trainability, padded to a multiple of n; so one gather per site and call, and one
    reduce-scatter per site in backward. Frozen parameters have a buffer of their own, which no gradient comes back to. Buffers of the module stay whole.

    Args:
        axis: a mesh axis, ``mesh["dp"]``; every rank gives its own rows of the batch.
        reduce: "mean" (the default): the gradient of local mean losses is that of the mean over the global batch. "sum": of their sum.
        threshold: leaves of fewer elements stay whole on every rank (their gradients are all-reduced). 0: none; flat buffers
            make small leaves cost no message of their own.

    Law: ``restore(place(p)) == p``; over n ranks values and gradients equal one process on the global batch.
    Rajbhandari et al. 2020, arXiv:1910.02054, section 5.3.
    """
    collectives.gather(
        torch.zeros(0), Axis("", 1, 0), reduce=reduce
    )  # an unknown `reduce` fails here, not in the first call
    if threshold < 0:
        raise ValueError(f"shard: threshold {threshold}, required a number of elements >= 0")
    options: dict[str, Any] = {"axis": axis, "reduce": reduce}
    if threshold:
        options["threshold"] = threshold
    return Transform(
        "shard",
        tuple(options.items()),
        lens=lambda p: _flat_lens(parameters(p), axis, reduce, threshold, p.axes),
        provides=frozenset(["flat", "layout"]),
        conflicts=frozenset(["flat", "whole"]),
        axes=(axis,),
    )


@direct
def replicate(axis: Axis, *, reduce: str = "mean") -> Transform:
    """Keep parameters whole on every rank and reduce their gradients over `axis` in backward (plain data parallelism)."""

    def make(spec: Params) -> Lens | None:
        def get(stored: Params) -> Params:
            return {k: collectives.replicate(v, axis, reduce=reduce) for k, v in stored.items()}

        return Lens(same, get, restore=same, layout=same) if spec else None

    options: dict[str, Any] = {"axis": axis, "reduce": reduce}
    return through(make, name="replicate", options=options, provides=["layout"], conflicts=["whole"], axes=(axis,))


def _flat_lens(spec: Params, axis: Axis, reduce: str, threshold: int, split: Mapping[str, tuple[Any, ...]] = {}) -> Lens | None:  # fmt: skip
    """`split`: the axes over which leaves are split already; those that are not have a buffer of their own, for norms count them once."""
    groups: dict[str, list[str]] = {}
    axes: dict[str, tuple[Any, ...]] = {}
    for name, leaf in spec.items():
        if leaf.numel() >= threshold:
            over = split.get(name, ())
            key = ".".join(["shard", str(leaf.dtype).removeprefix("torch."), *(a.name for a in over), *([] if leaf.requires_grad else ["frozen"])])  # fmt: skip
            groups.setdefault(key, []).append(name)
            axes[key] = (*over, axis) if axis.size > 1 else over
    if not spec:
        return None
    flat = {n for names in groups.values() for n in names}

    def put(params: Params) -> Params:
        shards = {key: _shard_of([params[n] for n in names], axis) for key, names in groups.items()}
        return {**shards, **{n: params[n] for n in spec if n not in flat}}

    def get(stored: Params, reduce: str = reduce) -> Params:
        out = {
            n: collectives.replicate(stored[n], axis, reduce=reduce) if spec[n].requires_grad else stored[n]
            for n in spec
            if n not in flat
        }
        for key, names in groups.items():
            out |= unflatten(collectives.gather(stored[key], axis, reduce=reduce), {n: spec[n].shape for n in names})
        return {n: out[n] for n in spec}

    def layout(held: Held) -> Held:
        shards = {key: shard_boxes([(spec[n].numel(), held[n]) for n in names], axis) for key, names in groups.items()}
        return {**shards, **{n: held[n] for n in spec if n not in flat}}

    return Lens(put, get, axes={k: v for k, v in axes.items() if v}, layout=layout)


def shard_boxes(tensors: list[tuple[int, Boxes]], axis: Any) -> Boxes:
    """What this rank's 1/n of a concatenation holds, given the length of each tensor and what it holds."""
    size = -(-sum(n for n, _ in tensors) // axis.size)
    return joined(tensors, axis.rank * size, (axis.rank + 1) * size)


def _shard_of(leaves: list[Tensor], axis: Axis) -> Tensor:
    """This rank's 1/n of the concatenation of `leaves`, a copy. Built from overlapping pieces only, so that the whole never exists."""
    total = sum(t.numel() for t in leaves)
    size = -(-total // axis.size)
    start, pieces, at = axis.rank * size, list[Tensor](), 0
    for t in leaves:
        a, b = max(start - at, 0), min(start + size - at, t.numel())
        if a < b:
            pieces.append(t.reshape(-1)[a:b])
        at += t.numel()
    held = sum(p.numel() for p in pieces)
    # An empty piece of the first leaf keeps dtype, device and trainability on a rank that holds only padding.
    return F.pad(torch.cat([*pieces, leaves[0].reshape(-1)[:0]]), (0, size - held))


def unflatten(flat: Tensor, shapes: dict[str, torch.Size]) -> Params:
    """Views of a flat buffer by name, in order; the padding at its end is left over."""
    sizes = [math.prod(s) for s in shapes.values()]
    parts = flat.split([*sizes, flat.numel() - sum(sizes)])
    return {n: part.view(shape) for (n, shape), part in zip(shapes.items(), parts, strict=False)}
