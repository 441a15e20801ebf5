"""`sharded` for optimizers that look at leaves as wholes: every rank has the state of some leaves, of each all of it."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fds import tree
from fds._torch import opaque_operator
from fds.optim.base import Axis, Member, Norm, Optimizer, by_name, check_like, guarded_step, refilled
from fds.sharding import collectives
from fds.sharding.zero import pieces


def owners(sizes: list[int], ranks: int) -> list[list[int]]:
    """The numbers of each rank's leaves, ascending: the largest first, each to the rank that has the least so far.

    >>> owners([5, 1, 1, 4], 2)
    [[0, 2], [1, 3]]
    """
    found: list[list[int]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        r = load.index(min(load))
        found[r].append(i)
        load[r] += sizes[i]
    return [sorted(own) for own in found]


def sharded_by_leaf(tx: Optimizer, axis: Axis, bucket_bytes: int, sum_dtype: torch.dtype | None = None) -> Optimizer:
    """See `sharded`. Between `reduce` and the update a rank's gradients are one buffer for each dtype, as long as the longest of the ranks'."""

    def reduce(grads: Any) -> dict[str, Tensor]:
        plans = _plans(grads, axis)
        leaves = [leaf for _, leaf in by_name(grads)]
        return {k: _scattered(leaves, plan, axis, bucket_bytes, sum_dtype) for k, plan in plans.items()}

    def init(params: Any) -> Any:
        return tx.init(_own(params, _plans(params, axis), axis))

    def inner(grads: dict[str, Tensor], params: Any, norm: Norm) -> tuple[Any, Any, Norm, list[Tensor]]:
        """This rank's gradients and parameters as `tx` takes them, the norm of the former, and a list that will have all norms that are asked for."""
        asked: list[Tensor] = []
        plans = _plans(params, axis)
        check_shards(grads, {k: (p.size,) for k, p in plans.items()})
        mine = _own(params, plans, axis)
        leaves = by_name(params)
        parts: dict[str, Tensor] = {}  # not dict[str, Tensor](): Dynamo cannot call that
        for k, plan in plans.items():
            parts |= _cut(grads[k], [leaves[i] for i in plan.owners[axis.rank]])
        given = refilled(params, parts)

        def known(g: Any) -> Tensor:
            asked.append(norm(grads if g is given else _buffers(g, params, plans, axis)))
            return asked[-1]

        check_like(given, mine)
        return given, mine, known, asked

    def norm_over(grads: dict[str, Tensor]) -> Tensor:
        return axis.sum(tree.square_sum(tree.leaves(grads))).sqrt()

    def buffers(new: Any, params: Any, plans: dict[str, _Plan], asked: list[Tensor]) -> dict[str, Tensor]:
        """What this rank sends. A rank without leaves has no use for a norm, and a compiler would leave out its reduction, which others wait for:
        so what is sent depends on it."""
        found = _buffers(new, params, plans, axis)
        return {k: _AFTER(x, asked) for k, x in found.items()} if asked and axis.size > 1 else found

    def gathered(new: Any, params: Any, asked: list[Tensor]) -> Any:
        """The whole tree, of each rank's own leaves."""
        plans, leaves = _plans(params, axis), by_name(params)
        found: dict[str, Tensor] = {}
        for k, flat in buffers(new, params, plans, asked).items():
            for row, own in zip(_gathered(flat, axis, bucket_bytes).unbind(), plans[k].owners, strict=True):
                found |= _cut(row, [leaves[i] for i in own])
        return refilled(params, found)

    def update(grads: dict[str, Tensor], state: Any, params: Any, *, norm: Norm = norm_over) -> tuple[Any, Any]:
        given, mine, known, asked = inner(grads, params, norm)
        updates, state = tx.update(given, state, mine, norm=known)
        return gathered(tree.map(lambda u, p: u.to(p.dtype), updates, mine), params, asked), state

    def step(grads: dict[str, Tensor], state: Any, params: Any, *, norm: Norm, ok: Tensor, donated: bool) -> tuple[Any, Any]:  # fmt: skip
        given, mine, known, asked = inner(grads, params, norm)
        new, state = guarded_step(tx, given, state, mine, norm=known, ok=ok, donated=donated)
        if not donated or not all(x.is_contiguous() for x in tree.leaves(params)):
            return gathered(new, params, asked), state
        plans, leaves = _plans(params, axis), by_name(params)
        for k, flat in buffers(new, params, plans, asked).items():
            each = [[leaves[i][1] for i in own] for own in plans[k].owners]
            for a, b in messages(flat.numel(), flat.element_size(), axis, bucket_bytes):
                message = collectives.gather(flat[a:b], axis).view(axis.size, b - a)
                _fill([x for own in each for x in own], [len(own) for own in each], message, a)
        return params, state

    def members(params: Any) -> list[Member]:
        return [Member((), "", tx, _own(params, _plans(params, axis), axis))]

    return Optimizer(init, update, reduce, axis, step, tx.stream, members)


class _Plan:
    """Of the leaves of one dtype: which rank has which, and the elements of a rank's buffer."""

    def __init__(self, numbers: list[int], sizes: list[int], ranks: int) -> None:
        self.owners = [[numbers[k] for k in own] for own in owners(sizes, ranks)]
        of = dict(zip(numbers, sizes, strict=True))
        self.size = max(sum(of[i] for i in own) for own in self.owners)


def _plans(params: Any, axis: Axis) -> dict[str, _Plan]:
    """By dtype; `params` may be parts (`fds.layout.Part`)."""
    groups: dict[str, tuple[list[int], list[int]]] = {}
    for i, (_, leaf) in enumerate(by_name(params)):
        numbers, sizes = groups.setdefault(str(leaf.dtype).removeprefix("torch."), ([], []))
        numbers.append(i)
        sizes.append((leaf if isinstance(leaf, Tensor) else leaf.held).numel())
    return {k: _Plan(*each, axis.size) for k, each in groups.items()}


def _own(params: Any, plans: dict[str, _Plan], axis: Axis) -> Any:
    """The tree with nothing, ``()``, in place of other ranks' leaves."""
    mine = {i for plan in plans.values() for i in plan.owners[axis.rank]}
    return refilled(params, {name: leaf for i, (name, leaf) in enumerate(by_name(params)) if i in mine})


def _cut(flat: Tensor, like: list[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Views of a buffer by name; what is behind them is padding."""
    sizes = [leaf.numel() for _, leaf in like]
    parts = torch.split(flat, [*sizes, flat.numel() - sum(sizes)])
    return {name: part.view(leaf.shape) for (name, leaf), part in zip(like, parts, strict=False)}


def _buffers(own: Any, params: Any, plans: dict[str, _Plan], axis: Axis) -> dict[str, Tensor]:
    """This rank's leaves, a buffer for each dtype of the parameters."""
    found, leaves = dict(by_name(own)), by_name(params)
    out: dict[str, Tensor] = {}
    for k, plan in plans.items():
        parts = [found[leaves[i][0]] for i in plan.owners[axis.rank]]
        like = parts[0] if parts else leaves[plan.owners[0][0]][1]
        out[k] = _run(parts or [like.reshape(-1)[:0]], 0, plan.size)
    return out


def _run(leaves: list[Tensor], start: int, stop: int) -> Tensor:
    """Elements start to stop of the concatenation of leaves, and zeros behind the end."""
    return torch.cat([leaves[0].reshape(-1)[:0], *pieces(leaves, start, stop)])


def messages(size: int, itemsize: int, axis: Axis, bucket_bytes: int) -> list[tuple[int, int]]:
    """From which to which element of every rank's buffer a message has, for all messages."""
    width = max(bucket_bytes // (itemsize * axis.size), 1)
    return [(a, min(a + width, size)) for a in range(0, size, width)]


def _scattered(leaves: list[Tensor], plan: _Plan, axis: Axis, bucket_bytes: int, sum_dtype: torch.dtype | None) -> Tensor:  # fmt: skip
    """This rank's leaves of the mean over ranks."""
    first = leaves[plan.owners[0][0]]
    wire = first.dtype if sum_dtype is None or sum_dtype.itemsize <= first.dtype.itemsize else sum_dtype
    each = [[leaves[i] for i in own] or [first.reshape(-1)[:0]] for own in plan.owners]
    parts = [first.new_empty(0, dtype=wire)]
    for a, b in messages(plan.size, wire.itemsize, axis, bucket_bytes):
        message = torch.cat([_run(own, a, b) for own in each])
        parts.append(collectives.scatter(message.to(wire), axis, reduce="mean"))
    return torch.cat(parts)


def _gathered(flat: Tensor, axis: Axis, bucket_bytes: int) -> Tensor:
    """The ranks' buffers: [ranks, size]."""
    parts = [
        collectives.gather(flat[a:b], axis).view(axis.size, b - a)
        for a, b in messages(flat.numel(), flat.element_size(), axis, bucket_bytes)
    ]
    return torch.cat(parts, 1) if parts else flat.view(1, 0).expand(axis.size, 0)


def _fill_rows(leaves: list[Tensor], counts: list[int], message: Tensor, start: int) -> None:
    """Row r of a message [ranks, width] is what rank r's buffer has from `start` on; the first counts[0] leaves are rank 0's, and so on."""
    rest = iter(leaves)
    with torch.no_grad():
        for row, count in zip(message, counts, strict=True):
            own = [next(rest) for _ in range(count)]
            end = min(start + len(row), sum(x.numel() for x in own))  # behind it, padding
            for piece, values in _aligned(pieces(own, start, end) if start < end else [], row):
                piece.copy_(values)


def _aligned(parts: list[Tensor], row: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    at = 0
    for part in parts:
        yield part, row[at : at + len(part)]
        at += len(part)


def _same(x: Tensor, after: list[Tensor]) -> Tensor:
    return x.clone()


def _same_shape(x: Tensor, after: list[Tensor]) -> Tensor:
    return torch.empty_like(x)


_AFTER = opaque_operator("after", "(Tensor x, Tensor[] after) -> Tensor", _same, _same_shape)
_fill = opaque_operator(
    "fill_rows", "(Tensor(a!)[] leaves, int[] counts, Tensor message, SymInt start) -> ()", _fill_rows
)


def check_shards(grads: Any, want: dict[str, tuple[int, ...]]) -> None:
    """Raise `ValueError` unless gradients are what `reduce` makes."""
    got = {k: tuple(v.shape) for k, v in grads.items() if isinstance(v, Tensor)}
    if got != want:
        raise ValueError(
            f"sharded: gradients {got or sorted(grads)}, required shards {want}; pass tx.reduce(grads), of gradients in the parameters' dtypes"
        )
