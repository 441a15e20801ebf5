"""Collectives as differentiable operators: gather, scatter, replicate, total.

All four are linear, so nothing is saved for backward; each one's gradient is another one. They are operators by the recipe of
`fds/_torch.py`: they work under autograd, `torch.func`, `vmap`, and the compiler, where each is one node of the graph.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from fds import tree
from fds._torch import linear_operator
from fds.sharding.comms_log import Traffic, observed, record
from fds.sharding.liveness import explained

__all__ = ["Traffic", "collective", "gather", "process_group", "record", "replicate", "scatter", "total"]

# Renamed in torch 2.13; the old names warn there.
_ALL_GATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _Axis(Protocol):
    @property
    def size(self) -> int: ...
    @property
    def group(self) -> str: ...


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
    with explained(name), observed(name, size, lambda: dist.get_process_group_ranks(handle), buffer.device):
        yield handle


# --- gather and scatter: each the other's transpose ---


def _gather(x: Tensor, n: int, group: str, mean: bool) -> Tensor:
    out = x.new_empty(x.numel() * n)
    with collective("gather", out, group) as ranks:
        _ALL_GATHER(out, x.contiguous(), group=ranks)
    return out


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
    if n == 2 and x.dtype == torch.float32:
        torch.add(parts[: out.numel()], parts[out.numel() :], out=out)
    else:
        out.copy_(
            parts.view(n, -1).sum(
                0, dtype=torch.float32 if x.is_floating_point() and x.dtype != torch.float64 else x.dtype
            )
        )


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


# --- replicate and total ---


def _total(x: Tensor, n: int, group: str, mean: bool) -> Tensor:
    out = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x.clone()
    out = out.contiguous()
    with collective("total", x, group) as ranks:
        dist.all_reduce(out, group=ranks)
    return (out / n if mean else out).to(x.dtype)


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


def _is_mean(reduce: str) -> bool:
    if reduce not in ("mean", "sum"):
        raise ValueError(f"reduce: {reduce!r} is unknown; {tree.suggest(reduce, ['mean', 'sum'])}")
    return reduce == "mean"


def gather(x: Tensor, axis: _Axis, *, reduce: str = "mean") -> Tensor:
    """Concatenate the ranks' vectors: [m] -> [n*m]. Its gradient is `scatter` with the same `reduce`.

    With "mean" the gradient that comes back is the mean over ranks: every rank's loss is a mean over its own rows, and the result is
    the gradient of the mean over all rows.
    """
    mean = _is_mean(reduce)
    return x if axis.size == 1 else gather_op(x, axis.size, axis.group, mean)


def scatter(x: Tensor, axis: _Axis, *, reduce: str = "mean") -> Tensor:
    """Reduce over ranks and keep this rank's part: [n*m] -> [m] (reduce-scatter). Its gradient is `gather`, divided by n for "mean"."""
    mean = _is_mean(reduce)
    return x if axis.size == 1 else scatter_op(x, axis.size, axis.group, mean)


def replicate(x: Tensor, axis: _Axis, *, reduce: str = "mean") -> Tensor:
    """`x` itself, which every rank holds whole; its gradient is reduced over the axis (data parallelism)."""
    mean = _is_mean(reduce)
    return x if axis.size == 1 else replicate_op(x, axis.size, axis.group, mean)


def total(x: Tensor, axis: _Axis, *, reduce: str = "sum") -> Tensor:
    """The reduction of `x` over the axis, on every rank (all-reduce; low precision is summed in float32)."""
    mean = _is_mean(reduce)
    return x if axis.size == 1 else total_op(x, axis.size, axis.group, mean)
