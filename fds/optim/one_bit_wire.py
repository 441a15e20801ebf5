"""Means over ranks in one bit an element: signs, and a scale for each BLOCK of them, with error feedback on both ways.

Each rank sends signs of what it has, and keeps what they miss; each averages its part of the signs of all, sends signs of that, and keeps what
those miss. So what was sent adds up to what was to be sent: nothing is lost, some of it is late. A scale is the mean of the absolute values,
the best one for given signs: then ``|x - Q(x)| < |x|`` for every x but zero, which keeps the errors bounded.

    bits an element: 2 (1 + 32 / BLOCK), for both ways; an exact mean in float32 takes 64

Blocks do not cross leaves, whose sizes of gradients may differ by orders of magnitude.
Seide et al. 2014 (one bit); Karimireddy et al. 2019, arXiv:1901.09847 (scale and error feedback); Tang et al. 2021, arXiv:2102.02888 (two ways).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fds._torch import opaque_operator
from fds.optim.base import Axis
from fds.sharding.collectives import collective, gather_op, total_op

BLOCK = 1024
EXACT, SIGNS, NOTHING = 0, 1, 2  # how a mean is made; NOTHING: each rank keeps its own


def row_count(sizes: Sequence[int], ranks: int) -> int:
    """Blocks of leaves of these sizes, the same number for each rank.

    >>> row_count([1, 1024, 1025], 2), row_count([1], 2)
    (4, 2)
    """
    return -(-sum(-(-n // BLOCK) for n in sizes) // ranks) * ranks


def to_rows(leaves: Sequence[Tensor], ranks: int, dtype: torch.dtype) -> Tensor:
    """Leaves as [rows, BLOCK], each from the start of a row on, with zeros behind."""
    parts: list[Tensor] = []
    for x in leaves:
        parts += [x.reshape(-1).to(dtype), x.new_zeros(-x.numel() % BLOCK, dtype=dtype)]
    missing = row_count([x.numel() for x in leaves], ranks) - sum(-(-x.numel() // BLOCK) for x in leaves)
    return torch.cat([*parts, leaves[0].new_zeros(missing * BLOCK, dtype=dtype)]).view(-1, BLOCK)


def from_rows(rows: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Leaves of the shapes and dtypes of `like`."""
    found: list[Tensor] = []
    at = 0
    flat = rows.reshape(-1)
    for x in like:
        found.append(flat[at : at + x.numel()].view(x.shape).to(x.dtype))
        at += -(-x.numel() // BLOCK) * BLOCK
    return found


def encode(x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Signs [rows, BLOCK / 8] uint8 and scales [rows]. What is not `valid` does not count."""
    scales = (x.abs() * valid).sum(1) / valid.sum(1).clamp(min=1)
    bits = (x >= 0).view(len(x), -1, 8).to(torch.uint8)
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=x.device)
    return (bits * weights).sum(-1, dtype=torch.uint8), scales


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """[..., rows, BLOCK] of signs [..., rows, BLOCK / 8] and scales [..., rows]."""
    places = torch.arange(8, dtype=torch.uint8, device=codes.device)
    bits = (codes.unsqueeze(-1) >> places & 1).flatten(-2)
    return (2 * bits.to(scales.dtype) - 1) * scales.unsqueeze(-1)


def _message(codes: Tensor, scales: Tensor, parts: int) -> Tensor:
    return torch.cat([x.contiguous().view(torch.uint8).reshape(parts, -1) for x in (codes, scales)], 1)


def _apart(message: Tensor, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes [parts, rows, BLOCK / 8] and scales [parts, rows] of so many messages."""
    width = rows * BLOCK // 8
    codes, scales = message[:, :width], message[:, width:].contiguous().view(dtype)
    return codes.reshape(len(message), rows, -1), scales.view(len(message), rows)


def _mean(x: Tensor, worker: Tensor, server: Tensor, valid: Tensor, how: Tensor, n: int, rank: int, group: str) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    mode = int(how)
    if mode == NOTHING:
        return x.clone(), worker.clone(), server.clone()
    if mode == EXACT:
        return total_op(x, n, group, True), worker.clone(), server.clone()
    rows = len(server)  # of this rank
    x = x + worker
    codes, scales = encode(x, valid)
    worker = (x - decode(codes, scales)).where(valid, 0.0)
    message = _message(codes, scales, n)
    got = torch.empty_like(message)
    with collective("all_to_all", message, group) as ranks:
        dist.all_to_all_single(got.view(-1), message.view(-1), group=ranks)  # pyright: ignore[reportUnknownMemberType]
    mine = valid[rank * rows : (rank + 1) * rows]
    part = decode(*_apart(got, rows, x.dtype)).mean(0) + server
    codes, scales = encode(part, mine)
    server = (part - decode(codes, scales)).where(mine, 0.0)
    whole = gather_op(_message(codes, scales, 1).view(-1), n, group, False).view(n, -1)
    return decode(*_apart(whole, rows, x.dtype)).view(x.shape).where(valid, 0.0), worker, server


def _shapes(x: Tensor, worker: Tensor, server: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(worker), torch.empty_like(server)


_MEAN = opaque_operator(
    "one_bit_mean",
    "(Tensor x, Tensor worker, Tensor server, Tensor valid, Tensor how, int n, int rank, str group) -> (Tensor, Tensor, Tensor)",
    _mean,
    _shapes,
)


def errors(sizes: Sequence[int], dtype: torch.dtype, device: torch.device, axis: Axis) -> dict[str, Tensor]:
    """What was never sent so far, nothing: of this rank's own values, and of the means that it makes. Empty for one rank."""
    if axis.size == 1 or not sizes:
        return {}
    rows = row_count(sizes, axis.size)
    return {
        "worker": torch.zeros((rows, BLOCK), dtype=dtype, device=device),
        "server": torch.zeros((rows // axis.size, BLOCK), dtype=dtype, device=device),
    }


def mean(leaves: list[Tensor], kept: dict[str, Tensor], valid: Sequence[Tensor], how: Tensor, axis: Axis) -> tuple[list[Tensor], dict[str, Tensor]]:  # fmt: skip
    """The means over ranks of leaves, in their dtypes, and the errors after; on one rank the leaves themselves.

    * `valid`: bool, in the leaves' shapes and the same on all ranks. With SIGNS, what is not valid is zero in the result: a sign has no zero.
    * `how`: 0-D int64, EXACT, SIGNS or NOTHING; the same on all ranks. It is read when the mean is made, so that a graph has all three.
    """
    if not kept:
        return leaves, kept
    worker, server = kept["worker"], kept["server"]
    x, allowed = (to_rows(each, axis.size, d) for each, d in ((leaves, worker.dtype), (valid, torch.bool)))
    out, worker, server = _MEAN(x, worker, server, allowed, how, axis.size, axis.rank, axis.group)
    return from_rows(out, leaves), {"worker": worker, "server": server}
