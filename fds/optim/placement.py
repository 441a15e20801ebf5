"""Where optimizer state lives: split over ranks (`sharded`, ZeRO-1/2), or in host memory (`offloaded`)."""

from typing import Any

import optree
import torch
from torch import Tensor

from fds import tree
from fds._torch import opaque_operator
from fds.layout import Part
from fds.optim.base import Axis, Member, Norm, Optimizer, check_like
from fds.optim.by_leaf import check_shards, messages, sharded_by_leaf
from fds.sharding import collectives
from fds.sharding.mesh import check_axis
from fds.sharding.zero import pieces, shard_boxes, shard_of


def sharded(tx: Optimizer, axis: Axis, *, bucket_bytes: int = 2**25, sum_dtype: torch.dtype | None = None) -> Optimizer:  # fmt: skip
    """Keep 1/n of the state on each of the n ranks, for parameters that every rank holds whole (ZeRO-1; with the reduced gradients, ZeRO-2).

    Gradients come in local to the rank (of its own mean loss) and are reduce-scattered to their mean, one flat shard per dtype; the rank
    updates its shard, and the updates are gathered. Traffic: 2 x parameters per step.
    Rajbhandari et al. 2020, arXiv:1910.02054, section 5.

    `bucket_bytes`: of a message, and so of the copy of gradients or parameters that a step makes for the wire.

    For a `tx` that looks at leaves as wholes (`lamb`, `muon`, `partition`) no leaf is cut: each is one rank's, which the messages are as long as
    the longest of, and the state of that rank has its size.

    `sum_dtype`: gradients of fewer bits cross the wire, and are summed, in it, as float32 for parameters of bfloat16; `tx` gets the sums as they
    are. Default: in their own.

    Law: the size of buckets changes no bit. What a rank holds does not depend on it.

    Raises `ValueError` for a `tx` that is sharded already, and for gradients that did not go through `reduce`.
    """
    check_axis("sharded", axis)
    if bucket_bytes < 1:
        raise ValueError(f"sharded: bucket_bytes={bucket_bytes!r}, required a number of bytes >= 1")
    if sum_dtype is not None and not sum_dtype.is_floating_point:
        raise ValueError(f"sharded: sum_dtype={sum_dtype!r}, required a floating dtype, as torch.float32")
    if tx.axis is not None:
        raise ValueError(
            f"sharded: the optimizer inside {'reduces gradients itself, and keeps whole moments on every rank; leave sharded() out' if tx.local else 'is sharded already; shard it once, outermost: sharded(tx, axis)'}"
        )
    if tx.whole:
        return sharded_by_leaf(tx, axis, bucket_bytes, sum_dtype)

    def reduce(grads: Any) -> dict[str, Tensor]:
        return {k: _scattered(leaves, axis, bucket_bytes, sum_dtype) for k, leaves in _by_dtype(grads).items()}

    def own(params: Any) -> dict[str, Tensor]:
        return {k: shard_of(leaves, axis) for k, leaves in _by_dtype(params).items()}

    def init(params: Any) -> Any:
        return tx.init(own(params))

    def norm_over(grads: Any) -> Tensor:
        return axis.sum(tree.square_sum(tree.leaves(grads))).sqrt()

    def update(grads: dict[str, Tensor], state: Any, params: Any, *, norm: Norm = norm_over) -> tuple[Any, Any]:
        mine = own(params)
        check_shards(grads, {k: tuple(v.shape) for k, v in mine.items()})
        updates, state = tx.update(grads, state, mine, norm=norm)
        gathered = {k: _gathered(u.to(mine[k].dtype), axis, bucket_bytes) for k, u in updates.items()}
        return _unflat(gathered, params), state

    def step(grads: dict[str, Tensor], state: Any, params: Any, *, norm: Norm, ok: Tensor, donated: bool) -> tuple[Any, Any] | None:  # fmt: skip
        mine = own(params)
        check_shards(grads, {k: tuple(v.shape) for k, v in mine.items()})
        done = None if tx.step is None else tx.step(grads, state, mine, norm=norm, ok=ok, donated=donated)
        if done is None:
            return None
        if donated and all(x.is_contiguous() for x in tree.leaves(params)):
            for k, leaves in _by_dtype(params).items():
                _gather_into(leaves, done[0][k], axis, bucket_bytes)
            return params, done[1]
        return _unflat({k: _gathered(v, axis, bucket_bytes) for k, v in done[0].items()}, params), done[1]

    def members(params: Any) -> list[Member]:
        parts: list[Part] = optree.tree_leaves(params)
        return [
            Member((), "", tx, {k: _shard([parts[i] for i in where], k, axis) for k, where in _groups(params).items()})
        ]

    return Optimizer(init, update, reduce, axis, step if tx.step is not None else None, tx.stream, members)


def _shard(parts: list[Part], key: str, axis: Axis) -> Part:
    """What this rank has of the parameters of one dtype."""
    size = -(-sum(p.held.numel() for p in parts) // axis.size)
    own = torch.empty(size, dtype=parts[0].dtype, device="meta")
    boxes = shard_boxes([(p.held.numel(), p.boxes) for p in parts], axis)
    return Part(key, own, own, boxes, f"{axis.rank} of {axis.size}", all(p.host for p in parts))


def _groups(params: Any) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for i, leaf in enumerate(optree.tree_leaves(params)):
        groups.setdefault(str(leaf.dtype).removeprefix("torch."), []).append(i)
    return groups


def _by_dtype(params: Any) -> dict[str, list[Tensor]]:
    leaves = optree.tree_leaves(params)
    return {k: [leaves[i] for i in where] for k, where in _groups(params).items()}


def _scattered(leaves: list[Tensor], axis: Axis, bucket_bytes: int, sum_dtype: torch.dtype | None) -> Tensor:
    """This rank's 1/n of the mean over ranks of the concatenation of `leaves`. Their whole concatenation never exists."""
    size = -(-sum(t.numel() for t in leaves) // axis.size)
    own = leaves[0].dtype
    wire = own if sum_dtype is None or sum_dtype.itemsize <= own.itemsize else sum_dtype
    parts = [leaves[0].new_empty(0, dtype=wire)]
    for a, b in messages(size, wire.itemsize, axis, bucket_bytes):
        message = torch.cat([p for r in range(axis.size) for p in pieces(leaves, r * size + a, r * size + b)])
        parts.append(collectives.scatter(message.to(wire), axis, reduce="mean"))
    return parts[-1] if len(parts) < 3 else torch.cat(parts)


def _gathered(shard: Tensor, axis: Axis, bucket_bytes: int) -> Tensor:
    """The concatenation of the ranks' shards."""
    buckets = messages(shard.numel(), shard.element_size(), axis, bucket_bytes)
    if len(buckets) == 1:
        return collectives.gather(shard, axis)
    out = shard.new_empty(axis.size, shard.numel())
    for a, b in buckets:
        out[:, a:b] = collectives.gather(shard[a:b], axis).view(axis.size, -1)
    return out.view(-1)


def _gather_into(leaves: list[Tensor], shard: Tensor, axis: Axis, bucket_bytes: int) -> None:
    """Write the ranks' shards over the leaves that they are the concatenation of: nothing is there twice but a message."""
    for a, b in messages(shard.numel(), shard.element_size(), axis, bucket_bytes):
        _fill(leaves, collectives.gather(shard[a:b], axis).view(axis.size, b - a), a, shard.numel())


def _fill_leaves(leaves: list[Tensor], message: Tensor, start: int, size: int) -> None:
    """Row r of a message [ranks, width] is what rank r's shard, of `size` elements, has from `start` on."""
    with torch.no_grad():
        for r, row in enumerate(message):
            at = 0
            for piece in pieces(leaves, r * size + start, r * size + start + len(row)):  # behind the last leaf, padding
                piece.copy_(row[at : at + len(piece)])
                at += len(piece)


_fill = opaque_operator(
    "fill_leaves", "(Tensor(a!)[] leaves, Tensor message, SymInt start, SymInt size) -> ()", _fill_leaves
)


def _unflat(flat: dict[str, Tensor], params: Any) -> Any:
    leaves, spec = optree.tree_flatten(params)
    for k, where in _groups(params).items():
        sizes = [leaves[i].numel() for i in where]
        parts = torch.split(flat[k], [*sizes, flat[k].numel() - sum(sizes)])
        for i, part in zip(where, parts, strict=False):
            leaves[i] = part.view(leaves[i].shape)
    return optree.tree_unflatten(spec, leaves)


def offloaded(tx: Optimizer, device: str = "cpu") -> Optimizer:
    """Keep the state in host memory (page-locked beside CUDA); each leaf's state visits the device for its own update.

    `tx` has to treat leaves independently, apart from the norm it is given; all rules of `fds.optim` do. A `sharded` one goes outside:
    ``sharded(offloaded(tx), axis)``. On a machine without an accelerator the host is the device, and nothing moves.
    """
    if device != "cpu":
        raise ValueError(f"offloaded: device {device!r} is unknown; {tree.suggest(device, ['cpu'])}")
    if tx.axis is not None:
        raise ValueError(
            "offloaded: an optimizer inside that reduces gradients itself, whose messages are of all leaves; leave offloaded() out"
            if tx.local
            else "offloaded: a sharded optimizer inside; turn it round: sharded(offloaded(tx), axis)"
        )
    if tx.named:
        raise ValueError(
            "offloaded: a partition inside, which has to see the names of all leaves; turn it round: partition({label: offloaded(tx), ...}, labels)"
        )

    def init(params: Any) -> list[Any]:
        return [tree.map(_host, tx.init(p)) for p in optree.tree_leaves(params)]

    def update(grads: Any, state: list[Any], params: Any, *, norm: Norm = tree.norm) -> tuple[Any, list[Any]]:
        check_like(grads, params)
        flat, spec = optree.tree_flatten(params)
        known = norm(grads)
        updates: list[Tensor] = []
        states: list[Any] = []
        for p, g, s in zip(flat, optree.tree_leaves(grads), state, strict=True):
            u, s = tx.update(g, tree.map(lambda t, d=p.device: t.to(d, non_blocking=True), s), p, norm=lambda _: known)
            updates.append(u)
            states.append(tree.map(_host, s))
        return optree.tree_unflatten(spec, updates), states

    def members(params: Any) -> list[Member]:
        return [Member((i,), "", tx, p, host=True) for i, p in enumerate(optree.tree_leaves(params))]

    return Optimizer(init, update, members=members, whole=tx.whole)


def _host(x: Tensor) -> Tensor:
    """`x` in host memory; counts and hyperparameters too: every piece of state has one home. Page-locked, except inside of a compiled region."""
    if x.is_meta:
        return x
    if x.is_cuda and not torch.compiler.is_compiling():
        return torch.empty_like(x, device="cpu", pin_memory=True).copy_(x)
    return x.to("cpu")
