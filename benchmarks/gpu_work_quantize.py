"""What `gpu.py` times of block quantisation and sampling: sizes, rivals, floors. Joined to its list by ``from gpu_work_quantize import WORK``."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu_work import LOW, Floor, Work, compared, randn
from torch import Tensor

import fds.kernels
from fds.kernels.quantize import FORMATS

ELEMENTS, BLOCK, SHARDS, WORDS = 2**26, 128, 8, 128256


def coded(format: str) -> tuple[Tensor, Tensor, Tensor]:
    x = randn(ELEMENTS)
    return x, *fds.kernels.block_quantize(x, format=format, block=BLOCK)


def quantized(format: str) -> tuple[dict[str, Callable[[], Any]], Floor]:
    x, codes, scales = coded(format)
    reference = fds.kernels.operators()["block_quantize"].reference

    def plain(x: Tensor) -> tuple[Tensor, Tensor]:
        return reference(x, format, BLOCK)

    f = partial(fds.kernels.block_quantize, format=format, block=BLOCK)
    return compared(f, plain, (x,)), Floor(x.nbytes + codes.nbytes + scales.nbytes)


def dequantized(format: str) -> tuple[dict[str, Callable[[], Any]], Floor]:
    x, codes, scales = coded(format)
    reference = fds.kernels.operators()["block_dequantize"].reference

    def plain(codes: Tensor, scales: Tensor) -> Tensor:
        return reference(codes, scales, ELEMENTS, format, BLOCK, LOW)

    f = partial(fds.kernels.block_dequantize, format=format, block=BLOCK, dtype=LOW)
    return compared(f, plain, (codes, scales)), Floor(x.nbytes + codes.nbytes + scales.nbytes)


def summed(format: str) -> tuple[dict[str, Callable[[], Any]], Floor]:
    """The reduction of a quantised all-reduce over 8 ranks, each with an eighth of the elements."""
    parts = [t.unflatten(0, (SHARDS, -1)) for t in coded(format)[1:]]
    reference = fds.kernels.operators()["block_quantized_sum"].reference

    def plain(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        return reference(codes, scales, format, BLOCK)

    f = partial(fds.kernels.block_quantized_sum, format=format, block=BLOCK)
    return compared(f, plain, tuple(parts)), Floor((1 + 1 / SHARDS) * sum(t.nbytes for t in parts))


def by_sorting(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """The usual sampler: a sort, a cumulative sum, and a draw by the largest quotient with exponentials."""
    values, order = (logits.float() / temperature).sort(-1, descending=True)
    values = values.masked_fill(torch.arange(values.shape[-1], device=values.device) >= top_k, -torch.inf) if top_k else values  # fmt: skip
    p = values.softmax(-1)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0) if top_p < 1 else p
    return order.gather(-1, (p / torch.empty_like(p).exponential_()).argmax(-1, keepdim=True))


def plainly(logits: Tensor, temperature: float) -> Tensor:
    """Without top-k and top-p no sort is needed."""
    p = (logits.float() / temperature).softmax(-1)
    return (p / torch.empty_like(p).exponential_()).argmax(-1)


def sampled(rows: int, dtype: torch.dtype, top_k: int, top_p: float) -> tuple[dict[str, Callable[[], Any]], Floor]:
    """Logits are read once at least, to know the largest."""
    logits = randn(rows, WORDS, dtype=dtype, scale=3.0)
    whole = top_k == 0 and top_p == 1
    plain = partial(plainly, temperature=0.8) if whole else partial(by_sorting, temperature=0.8, top_k=top_k, top_p=top_p)  # fmt: skip
    f = partial(fds.kernels.sample, temperature=0.8, top_k=top_k, top_p=top_p)
    found = compared(f, plain, (logits,))
    op, number = fds.kernels.operators()["sample"], torch.zeros(rows, dtype=torch.int64, device=logits.device)
    stream = torch.arange(rows, device=logits.device)
    real = [torch.full((rows,), v, device=logits.device) for v in (0.8, top_p, 0.0)]
    arguments = logits, real[0], number + top_k, real[1], real[2], number, stream, number, not whole
    return found | {"reference": lambda: op.reference(*arguments)}, Floor(logits.nbytes)


SAMPLED = [(0, 1.0, "all"), (50, 0.9, "top-k 50, top-p 0.9"), (50, 1.0, "top-k 50"), (0, 0.9, "top-p 0.9")]
WORK: list[Work] = [
    *(Work(f"quantise to {f}, 64 M, bf16", "block_quantize", partial(quantized, f)) for f in FORMATS),
    *(Work(f"dequantise {f}, 64 M, bf16", "block_dequantize", partial(dequantized, f)) for f in FORMATS),
    *(Work(f"sum of 8 in {f}, 8 M each", "block_quantized_sum", partial(summed, f)) for f in ("int8", "int4")),
    *(
        Work(f"sample {name}, {rows} x {WORDS}, fp32", "sample", partial(sampled, rows, torch.float32, k, p))
        for rows, chosen in ((1, SAMPLED[:2]), (64, SAMPLED[:2]), (256, SAMPLED))
        for k, p, name in chosen
    ),
    Work(f"sample top-k 50, top-p 0.9, 256 x {WORDS}, bf16", "sample", partial(sampled, 256, LOW, 50, 0.9)),
]
