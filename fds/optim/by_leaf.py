"""`sharded` for optimizers that look at leaves as wholes: every rank has the state of some leaves, of each all of it."""

from typing import Any

import optree
import torch
from torch import Tensor

from fds import tree
from fds.optim.base import Axis, Member, Norm, Optimizer, check_like
from fds.sharding import collectives
from fds.sharding.zero import pieces


def owners(sizes: list[int], ranks: int) -> list[list[int]]:
    """The numbers of each rank's leaves, ascending: the largest first, each to the rank that has the least so far.

    >>> owners([5, 1, 1, 4], 2)
    [[0, 1], [2, 3]]
    """
    found: list[list[int]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        r = load.index(min(load))
        found[r].append(i)
        load[r] += sizes[i]
    return [sorted(own) for own in found]


def sharded_by_leaf(tx: Optimizer, axis: Axis, bucket_bytes: int) -> Optimizer:
    """See `sharded`. Between `reduce` and the update a rank's gradients are one buffer for each dtype, as long as the longest of the ranks'."""

    def reduce(grads: Any) -> dict[str, Tensor]:
        plans = _plans(grads, axis)
        leaves = optree.tree_leaves(grads)
        return {k: _scattered(leaves, plan, axis, bucket_bytes) for k, plan in plans.items()}

    def init(params: Any) -> Any:
        return tx.init(_own(params, _plans(params, axis), axis))

    def inner(grads: dict[str, Tensor], params: Any, norm: Norm) -> tuple[Any, Any, Norm]:
        """This rank's gradients and parameters as `tx` takes them, and the norm of the former."""
        plans = _plans(params, axis)
        check_shards(grads, {k: (p.size,) for k, p in plans.items()})
        mine = _own(params, plans, axis)
        leaves = optree.tree_leaves(params)
        parts: list[Any] = [()] * len(leaves)
        for k, plan in plans.items():
            own = plan.owners[axis.rank]
            sizes = [leaves[i].numel() for i in own]
            for i, part in zip(own, grads[k].split([*sizes, plan.size - sum(sizes)]), strict=False):
                parts[i] = part.view(leaves[i].shape)
        given = optree.tree_unflatten(optree.tree_structure(params), parts)

        def known(g: Any) -> Tensor:
            return norm(grads if g is given else _buffers(g, params, plans, axis))

        check_like(given, mine)
        return given, mine, known

    def norm_over(grads: dict[str, Tensor]) -> Tensor:
        return axis.sum(tree.square_sum(tree.leaves(grads))).sqrt()

    def gathered(new: Any, params: Any) -> Any:
        """The whole tree, of each rank's own leaves."""
        leaves, spec = optree.tree_flatten(params)
        plans = _plans(params, axis)
        for k, flat in _buffers(new, params, plans, axis).items():
            rows = _gathered(flat, axis, bucket_bytes)
            for row, own in zip(rows, plans[k].owners, strict=True):
                sizes = [leaves[i].numel() for i in own]
                for i, part in zip(own, row.split([*sizes, plans[k].size - sum(sizes)]), strict=False):
                    leaves[i] = part.view(leaves[i].shape)
        return optree.tree_unflatten(spec, leaves)

    def update(grads: dict[str, Tensor], state: Any, params: Any, *, norm: Norm = norm_over) -> tuple[Any, Any]:
        given, mine, known = inner(grads, params, norm)
        updates, state = tx.update(given, state, mine, norm=known)
        return gathered(tree.map(lambda u, p: u.to(p.dtype), updates, mine), params), state

    def step(grads: dict[str, Tensor], state: Any, params: Any, *, norm: Norm, ok: Tensor, donated: bool) -> tuple[Any, Any] | None:  # fmt: skip
        given, mine, known = inner(grads, params, norm)
        done = None if tx.step is None else tx.step(given, state, mine, norm=known, ok=ok, donated=donated)
        return None if done is None else (gathered(done[0], params), done[1])

    def members(params: Any) -> list[Member]:
        return [Member((), "", tx, _own(params, _plans(params, axis), axis))]

    return Optimizer(init, update, reduce, axis, step if tx.step is not None else None, tx.stream, members)


class _Plan:
    """Of the leaves of one dtype: which rank has which, and the elements of a rank's buffer."""

    def __init__(self, numbers: list[int], sizes: list[int], ranks: int) -> None:
        self.owners = [[numbers[k] for k in own] for own in owners(sizes, ranks)]
        of = dict(zip(numbers, sizes, strict=True))
        self.size = max(sum(of[i] for i in own) for own in self.owners)


def _plans(params: Any, axis: Axis) -> dict[str, _Plan]:
    """By dtype; `params` may be parts (`fds.layout.Part`)."""
    groups: dict[str, tuple[list[int], list[int]]] = {}
    for i, leaf in enumerate(optree.tree_leaves(params)):
        numbers, sizes = groups.setdefault(str(leaf.dtype).removeprefix("torch."), ([], []))
        numbers.append(i)
        sizes.append((leaf if isinstance(leaf, Tensor) else leaf.held).numel())
    return {k: _Plan(*each, axis.size) for k, each in groups.items()}


def _own(params: Any, plans: dict[str, _Plan], axis: Axis) -> Any:
    """The tree with nothing, ``()``, in place of other ranks' leaves."""
    leaves, spec = optree.tree_flatten(params)
    mine = {i for plan in plans.values() for i in plan.owners[axis.rank]}
    return optree.tree_unflatten(spec, [leaf if i in mine else () for i, leaf in enumerate(leaves)])


def _buffers(own: Any, params: Any, plans: dict[str, _Plan], axis: Axis) -> dict[str, Tensor]:
    """This rank's leaves, a buffer for each dtype of the parameters."""
    mine = sorted(i for plan in plans.values() for i in plan.owners[axis.rank])
    found = dict(zip(mine, tree.leaves(own), strict=True))
    leaves = optree.tree_leaves(params)
    out: dict[str, Tensor] = {}
    for k, plan in plans.items():
        parts = [found[i] for i in plan.owners[axis.rank]]
        like = parts[0] if parts else leaves[plan.owners[0][0]]
        out[k] = _run(parts or [like.reshape(-1)[:0]], 0, plan.size)
    return out


def _run(leaves: list[Tensor], start: int, stop: int) -> Tensor:
    """Elements start to stop of the concatenation of leaves, and zeros behind the end."""
    return torch.cat([leaves[0].reshape(-1)[:0], *pieces(leaves, start, stop)])


def messages(size: int, itemsize: int, axis: Axis, bucket_bytes: int) -> list[tuple[int, int]]:
    """From which to which element of every rank's buffer a message has, for all messages."""
    width = max(bucket_bytes // (itemsize * axis.size), 1)
    return [(a, min(a + width, size)) for a in range(0, size, width)]


def _scattered(leaves: list[Tensor], plan: _Plan, axis: Axis, bucket_bytes: int) -> Tensor:
    """This rank's leaves of the mean over ranks."""
    first = leaves[plan.owners[0][0]]
    each = [[leaves[i] for i in own] or [first.reshape(-1)[:0]] for own in plan.owners]
    parts = [first.new_empty(0)]
    for a, b in messages(plan.size, first.element_size(), axis, bucket_bytes):
        message = torch.cat([_run(own, a, b) for own in each])
        parts.append(collectives.scatter(message, axis, reduce="mean"))
    return torch.cat(parts)


def _gathered(flat: Tensor, axis: Axis, bucket_bytes: int) -> Tensor:
    """The ranks' buffers: [ranks, size]."""
    parts = [
        collectives.gather(flat[a:b], axis).view(axis.size, b - a)
        for a, b in messages(flat.numel(), flat.element_size(), axis, bucket_bytes)
    ]
    return torch.cat(parts, 1) if parts else flat.view(1, 0).expand(axis.size, 0)


def check_shards(grads: Any, want: dict[str, tuple[int, ...]]) -> None:
    """Raise `ValueError` unless gradients are what `reduce` makes."""
    got = {k: tuple(v.shape) for k, v in grads.items() if isinstance(v, Tensor)}
    if got != want:
        raise ValueError(
            f"sharded: gradients {got or sorted(grads)}, required shards {want}; pass tx.reduce(grads), of gradients in the parameters' dtypes"
        )
