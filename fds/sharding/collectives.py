"""Collectives as differentiable operators: gather, scatter, replicate, total; and fan_out, fan_in, join, split.

All are linear, so nothing is saved for backward; each one's gradient is another one. They are operators by the recipe of
`fds/_torch.py`: they work under autograd, `torch.func`, `vmap`, and the compiler, where each is one node of the graph.

The first four are for ranks with a loss each, whose mean or sum is differentiated (data parallelism). The others are for ranks that compute
*one* loss together (tensor parallelism): a value that every rank holds whole has a gradient that every rank holds whole.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from fds import tree
from fds._torch import linear_operator, opaque_operator
from fds.sharding.comms_log import Traffic, listened, observed, record
from fds.sharding.liveness import explained

__all__ = ["Traffic", "collective", "gather", "process_group", "record", "replicate", "scatter", "total"]

# Renamed in torch 2.13; the old names warn there.
_ALL_GATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _Axis(Protocol):
    @property
    def size(self) -> int: ...
    @property
    def rank(self) -> int: ...
    @property
    def group(self) -> str: ...


class Gatherable(Protocol):
    """What brings its own way over the wire to `gather`, in place of a tensor."""

    def gathered(self, axis: _Axis, mean: bool) -> Tensor: ...


def process_group(name: str) -> Any:
    """The process group of this name."""
    return dist.distributed_c10d._resolve_process_group(name)  # pyright: ignore[reportArgumentType]


@contextmanager
def collective(name: str, buffer: Tensor, group: str) -> Iterator[Any]:
    """The process group called `group`, for one collective inside of the block: it is counted, timed if a `CommsLogger` listens, and its
    failure names the ranks that are gone. `buffer` is the whole buffer; `name` one of `fds.sharding.comms_log`.
    """
    handle = process_group(group)
    size = buffer.numel() * buffer.element_size()
    with explained(name), observed(name, size, group, lambda: dist.get_process_group_ranks(handle), buffer.device):
        yield handle


# --- gather and scatter: each the other's transpose ---


def _gather(x: Tensor, n: int, group: str, mean: bool) -> Tensor:
    out = x.new_empty(x.numel() * n)
    with collective("gather", out, group) as ranks:
        if x.device.type == "cuda":
            _ALL_GATHER(out, x.contiguous(), group=ranks)
        else:
            for work in _broadcasts(out, x, ranks):
                work.wait()
    return out


def _broadcasts(out: Tensor, x: Tensor, group: Any) -> list[Any]:
    """Every rank's `x` [m] into its part of `out` [n*m]: one broadcast for each, all at once.

    gloo's own all-gather passes the parts round a ring, in turns: 0.5 GB/s where these have 1.7, for 16 MiB between two ranks of one machine (and 0.5
    to 1.3 between four).
    """
    parts = out.view(group.size(), -1)
    parts[group.rank()].copy_(x.reshape(-1))
    return [dist.broadcast(part, group=group, group_src=i, async_op=True) for i, part in enumerate(parts)]


def _scatter(x: Tensor, n: int, group: str, mean: bool) -> Tensor:
    out = x.new_empty(x.numel() // n)
    with collective("scatter", x, group) as ranks:
        _reduce_scatter(out, x.contiguous().view(-1), n, ranks)
    if mean:
        out /= n
    return out


def _reduce_scatter(out: Tensor, x: Tensor, n: int, group: Any) -> None:
    """Sum of every rank's part for this rank.

    On gloo an all-to-all and a local sum in float32: one rounding of the wire's dtype instead of one per rank, and no low-precision
    arithmetic inside gloo's ring.
    """
    if x.device.type == "cuda":
        _REDUCE_SCATTER(out, x, group=group)
        return
    parts = torch.empty_like(x)
    dist.all_to_all_single(parts, x, group=group)
    _add_parts(out, parts, n)


def _add_parts(out: Tensor, parts: Tensor, n: int) -> None:
    if n == 2 and parts.dtype == torch.float32:
        torch.add(parts[: out.numel()], parts[out.numel() :], out=out)
        return
    low = parts.is_floating_point() and parts.dtype != torch.float64
    out.copy_(parts.view(n, -1).sum(0, dtype=torch.float32 if low else parts.dtype))


def _gather_batch(x: Tensor, *c: Any) -> Tensor:
    """[B, m] -> [B, n*m]: one collective for the whole batch; ranks come out in front and are moved beside m."""
    n = c[0]
    out = gather_op(x.reshape(-1), *c).view(n, *x.shape)
    return out.movedim(0, -2).reshape(*x.shape[:-1], -1)


def _scatter_batch(x: Tensor, *c: Any) -> Tensor:
    n = c[0]
    parts = x.view(*x.shape[:-1], n, -1).movedim(-2, 0)
    return scatter_op(parts.reshape(-1), *c).view(parts.shape[1:])


gather_op = linear_operator(
    "gather",
    "Tensor x, int n, str group, bool mean",
    primitive=lambda x, n, group, mean: _gather(x, n, group, mean),
    fake=lambda x, n, group, mean: x.new_empty(x.numel() * n),
    transpose=lambda g, n, group, mean: scatter_op(g, n, group, mean),
    batch=_gather_batch,
)
scatter_op = linear_operator(
    "scatter",
    "Tensor x, int n, str group, bool mean",
    primitive=lambda x, n, group, mean: _scatter(x, n, group, mean),
    fake=lambda x, n, group, mean: x.new_empty(x.numel() // n),
    transpose=lambda g, n, group, mean: gather_op(g, n, group, mean) / n if mean else gather_op(g, n, group, mean),
    batch=_scatter_batch,
)


# --- gather and scatter, begun and ended apart (schedule.py) ---

_LATER: Any = torch.ops._c10d_functional  # collectives that return at once, and `wait_tensor`
_register: Any = torch._C._distributed_c10d._register_work  # pyright: ignore[reportAttributeAccessIssue]  # of a tensor that `wait_tensor` is to wait for


def _begin_gather(x: Tensor, n: int, group: str) -> Tensor:
    with collective("gather", x.expand(n, *x.shape), group) as ranks:
        if x.device.type == "cuda":
            return _timed(_LATER.all_gather_into_tensor(x.contiguous(), n, group))
        out = x.new_empty(x.numel() * n)
        for work in _broadcasts(out, x, ranks):
            _register(out, work)
        return _timed(out)


def _begin_scatter(x: Tensor, n: int, group: str) -> Tensor:
    with collective("scatter", x, group):
        if x.device.type == "cuda":
            return _timed(_LATER.reduce_scatter_tensor(x.contiguous(), "sum", n, group))
        part = [x.numel() // n] * n
        return _timed(_LATER.all_to_all_single(x.contiguous().view(-1), part, part, group))


def _timed(out: Tensor) -> Tensor:
    """`out`, which a logger has to see the whole latency of."""
    return _LATER.wait_tensor(out) if listened() else out


def _finish(out: Tensor, x: Tensor, after: list[Tensor], name: str) -> None:
    with explained(name):
        _LATER.wait_tensor(out)


def _reduced(parts: Tensor, n: int, mean: bool) -> Tensor:
    if parts.device.type == "cuda":  # reduced on the way
        return parts / n if mean else parts.clone()
    out = parts.new_empty(parts.numel() // n)
    _add_parts(out, parts, n)
    if mean:
        out /= n
    return out


BEGIN_GATHER = opaque_operator(
    "begin_gather",
    "(Tensor x, int n, str group) -> Tensor",
    _begin_gather,
    lambda x, n, group: x.new_empty(x.numel() * n),
)
BEGIN_SCATTER = opaque_operator(
    "begin_scatter",
    "(Tensor x, int n, str group) -> Tensor",
    _begin_scatter,
    lambda x, n, group: x.new_empty(x.numel() // (n if x.device.type == "cuda" else 1)),
)
# `x` is what is sent, which lives until then; `after` are tensors that have to be there first.
FINISH = opaque_operator("finish", "(Tensor(a!) out, Tensor x, Tensor[] after, str name) -> ()", _finish)
REDUCED = opaque_operator(
    "reduced",
    "(Tensor parts, int n, bool mean) -> Tensor",
    _reduced,
    lambda parts, n, mean: parts.new_empty(parts.numel() // (1 if parts.device.type == "cuda" else n)),
)


# --- replicate and total ---


def _total(x: Tensor, n: int, group: str, mean: bool) -> Tensor:
    low = x.dtype in (torch.bfloat16, torch.float16)
    if low and x.device.type != "cuda":
        return _total_of_low(x, n, group, mean)
    out = (x.float() if low else x.clone()).contiguous()
    with collective("total", out, group) as ranks:
        dist.all_reduce(out, group=ranks)
    return (out / n if mean else out).to(x.dtype)


def _total_of_low(x: Tensor, n: int, group: str, mean: bool) -> Tensor:
    """Each rank sums a part in float32, of what came in the wire's dtype, and sends it rounded, once: the bytes of an all-reduce in that dtype."""
    size = x.numel()
    out = x.new_zeros(-(-size // n) * n)
    out[:size] = x.reshape(-1)
    with collective("total", x, group) as ranks:
        parts = torch.empty_like(out)
        dist.all_to_all_single(parts, out, group=ranks)
        own = parts.view(n, -1).sum(0, dtype=torch.float32)
        for work in _broadcasts(out, (own / n if mean else own).to(x.dtype), ranks):
            work.wait()
    return out[:size].view(x.shape)


def _replicate_batch(x: Tensor, *c: Any) -> Tensor:
    return replicate_op(x, *c)


total_op = linear_operator(
    "total",
    "Tensor x, int n, str group, bool mean",
    primitive=_total,
    fake=lambda x, n, group, mean: torch.empty_like(x, memory_format=torch.contiguous_format),
    transpose=lambda g, n, group, mean: total_op(g, n, group, mean),
    batch=lambda x, *c: total_op(x, *c),
)
replicate_op = linear_operator(
    "replicate",
    "Tensor x, int n, str group, bool mean",
    primitive=lambda x, n, group, mean: x.clone(),
    fake=lambda x, n, group, mean: torch.empty_like(x),
    transpose=lambda g, n, group, mean: total_op(g, n, group, mean),
    batch=_replicate_batch,
)


# --- one loss on all ranks ---


fan_in_op = linear_operator(
    "fan_in",
    "Tensor x, int n, str group",
    primitive=lambda x, n, group: _total(x, n, group, False),
    fake=lambda x, n, group: torch.empty_like(x, memory_format=torch.contiguous_format),
    transpose=lambda g, n, group: fan_out_op(g, n, group),
    batch=lambda x, *c: fan_in_op(x, *c),
)
fan_out_op = linear_operator(
    "fan_out",
    "Tensor x, int n, str group",
    primitive=lambda x, n, group: x.clone(),
    fake=lambda x, n, group: torch.empty_like(x),
    transpose=lambda g, n, group: fan_in_op(g, n, group),
    batch=lambda x, *c: fan_out_op(x, *c),
)


def _join_batch(x: Tensor, n: int, rank: int, group: str) -> Tensor:
    out = join_op(x.reshape(-1), n, rank, group).view(n, *x.shape)
    return out.movedim(0, -2).reshape(*x.shape[:-1], -1)


join_op = linear_operator(
    "join",
    "Tensor x, int n, int rank, str group",
    primitive=lambda x, n, rank, group: _gather(x, n, group, False),
    fake=lambda x, n, rank, group: x.new_empty(x.numel() * n),
    transpose=lambda g, n, rank, group: split_op(g, n, rank, group),
    batch=_join_batch,
)
split_op = linear_operator(
    "split",
    "Tensor x, int n, int rank, str group",
    primitive=lambda x, n, rank, group: x.reshape(n, -1)[rank].clone(),
    fake=lambda x, n, rank, group: x.new_empty(x.numel() // n),
    transpose=lambda g, n, rank, group: join_op(g, n, rank, group),
    batch=lambda x, n, rank, group: x.reshape(x.shape[0], n, -1)[:, rank],
)


def is_mean(reduce: str) -> bool:
    """Whether `reduce` says "mean". `ValueError` for what is neither that nor "sum"."""
    if reduce not in ("mean", "sum"):
        raise ValueError(f"reduce: {reduce!r} is unknown; {tree.suggest(reduce, ['mean', 'sum'])}")
    return reduce == "mean"


def _silent(x: Tensor, axis: _Axis) -> bool:
    """Whether there is nobody to talk to, or nothing to say (a shard of leaves without elements)."""
    return axis.size == 1 or x.numel() == 0


def gather(x: Tensor | Gatherable, axis: _Axis, *, reduce: str = "mean") -> Tensor:
    """Concatenate the ranks' vectors: [m] -> [n*m]. Its gradient is `scatter` with the same `reduce`.

    With "mean" the gradient that comes back is the mean over ranks: every rank's loss is a mean over its own rows, and the result is
    the gradient of the mean over all rows.
    """
    mean = is_mean(reduce)
    if not isinstance(x, Tensor):
        return x.gathered(axis, mean)
    return x if _silent(x, axis) else gather_op(x, axis.size, axis.group, mean)


def scatter(x: Tensor, axis: _Axis, *, reduce: str = "mean") -> Tensor:
    """Reduce over ranks and keep this rank's part: [n*m] -> [m] (reduce-scatter). Its gradient is `gather`, divided by n for "mean"."""
    mean = is_mean(reduce)
    return x if _silent(x, axis) else scatter_op(x, axis.size, axis.group, mean)


def replicate(x: Tensor, axis: _Axis, *, reduce: str = "mean") -> Tensor:
    """`x` itself, which every rank holds whole; its gradient is reduced over the axis (data parallelism)."""
    mean = is_mean(reduce)
    return x if _silent(x, axis) else replicate_op(x, axis.size, axis.group, mean)


def total(x: Tensor, axis: _Axis, *, reduce: str = "sum") -> Tensor:
    """The reduction of `x` over the axis, on every rank (all-reduce; low precision is summed in float32)."""
    mean = is_mean(reduce)
    return x if _silent(x, axis) else total_op(x, axis.size, axis.group, mean)


def fan_out(x: Tensor, axis: _Axis) -> Tensor:
    """`x`, which every rank holds whole, for work of which each rank does a part. Its gradient is `fan_in`: the parts' gradients add up.

    The operator f of Shoeybi et al. 2019, arXiv:1909.08053, section 3.
    """
    return x if axis.size == 1 else fan_out_op(x, axis.size, axis.group)


def fan_in(x: Tensor, axis: _Axis) -> Tensor:
    """The sum over ranks of each rank's part, whole on every rank (all-reduce). Its gradient is `fan_out`: no communication.

    The operator g of Shoeybi et al. 2019, arXiv:1909.08053, section 3.
    """
    return x if axis.size == 1 else fan_in_op(x, axis.size, axis.group)


def join(x: Tensor, axis: _Axis, *, dim: int, sizes: Sequence[int] | None = None) -> Tensor:
    """Concatenate the ranks' parts along `dim`; the whole is then one value on all ranks, so its gradient is `split`.

    `sizes`: of the parts, by rank, where they differ; shorter ones are padded on the wire.
    """
    if axis.size == 1:
        return x
    widest = x.shape[dim] if sizes is None else max(sizes)
    x = _padded(x, dim, widest)
    parts = join_op(x.reshape(-1), axis.size, axis.rank, axis.group).view(axis.size, *x.shape)
    if sizes is None or min(sizes) == widest:
        return _side_by_side(parts, dim)
    return torch.cat([p.narrow(dim, 0, k) for p, k in zip(parts.unbind(), sizes, strict=True)], dim)


def split(x: Tensor, axis: _Axis, *, dim: int, sizes: Sequence[int] | None = None) -> Tensor:
    """This rank's part along `dim` of a value that every rank holds whole. Its gradient is `join`.

    `sizes`: of the parts, by rank; default: equal parts.
    """
    if axis.size == 1:
        return x
    sizes = [x.shape[dim] // axis.size] * axis.size if sizes is None else sizes
    widest = max(sizes)
    parts = torch.stack([_padded(p, dim, widest) for p in x.split(list(sizes), dim)])
    mine = split_op(parts.reshape(-1), axis.size, axis.rank, axis.group).view(parts.shape[1:])
    return mine.narrow(dim, 0, sizes[axis.rank])


def gather_along(x: Tensor, axis: _Axis, dim: int) -> Tensor:
    """The ranks' equal parts along `dim`, for work of which each rank does a part: all-gather; its gradient is `scatter_along`."""
    if axis.size == 1:
        return x
    return _side_by_side(gather(x.reshape(-1), axis, reduce="sum").view(axis.size, *x.shape), dim)


def scatter_along(x: Tensor, axis: _Axis, dim: int) -> Tensor:
    """This rank's part along `dim` of the sum over ranks (reduce-scatter); its gradient is `gather_along`."""
    if axis.size == 1:
        return x
    parts = torch.stack(x.chunk(axis.size, dim))
    return scatter(parts.reshape(-1), axis, reduce="sum").view(parts.shape[1:])


def _side_by_side(parts: Tensor, dim: int) -> Tensor:
    """[n, ..., m, ...] -> [..., n*m, ...]."""
    dim %= parts.dim() - 1
    return parts.movedim(0, dim).flatten(dim, dim + 1)


def _padded(x: Tensor, dim: int, size: int) -> Tensor:
    missing = size - x.shape[dim]
    if not missing:
        return x
    shape = list(x.shape)
    shape[dim] = missing
    return torch.cat([x, x.new_zeros(shape)], dim)
