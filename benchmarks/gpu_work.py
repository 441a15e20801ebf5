"""What `gpu.py` times: for each operator a size that fills the chip, its rivals, and the fewest bytes and operations it needs."""

from collections.abc import Callable
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

import fds.kernels

LOW = torch.bfloat16


@attrs.frozen
class Floor:
    """Each input read once, each output written once; multiply-adds count twice."""

    bytes: float
    flops: float = 0.0


@attrs.frozen
class Work:
    label: str
    operator: str
    build: Callable[[], tuple[dict[str, Callable[[], Any]], Floor]]


def randn(*shape: int, dtype: torch.dtype = LOW, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, device="cuda")).to(dtype)


def head() -> tuple[dict[str, Callable[[], Any]], Floor]:
    rows, width, words = 8192, 4096, 131072
    hidden, weight = randn(rows, width), randn(words, width, scale=width**-0.5)
    target = torch.randint(words, (rows,), device="cuda")
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    scale = torch.full((rows,), 1 / rows, device="cuda")

    def fused() -> Any:
        return torch.autograd.grad(fds.kernels.linear_cross_entropy(hidden, weight, target, scale=scale), leaves)

    def plain() -> Any:
        return torch.autograd.grad(F.cross_entropy((hidden @ weight.T).float(), target), leaves)

    contenders = {"fds": fused, "eager": plain, "compiled": plain_loss(hidden, weight, target, leaves)}
    liger = liger_head(hidden, weight, target, leaves)
    return contenders | ({"liger": liger} if liger else {}), Floor(
        2 * (hidden.nbytes + weight.nbytes), 6 * rows * width * words
    )


def plain_loss(hidden: Tensor, weight: Tensor, target: Tensor, leaves: list[Tensor]) -> Callable[[], Any]:
    loss = torch.compile(lambda h, w: F.cross_entropy((h @ w.T).float(), target))
    return lambda: torch.autograd.grad(loss(hidden, weight), leaves)


def liger_head(hidden: Tensor, weight: Tensor, target: Tensor, leaves: list[Tensor]) -> Callable[[], Any] | None:
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return None
    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda: torch.autograd.grad(loss(weight, hidden, target), leaves)


def head_rows() -> tuple[dict[str, Callable[[], Any]], Floor]:
    rows, width, words = 8192, 4096, 131072
    hidden, weight = randn(rows, width), randn(words, width, scale=width**-0.5)
    target = torch.randint(words, (rows,), device="cuda")

    def fused() -> Any:
        with torch.no_grad():
            return fds.kernels.linear_log_probabilities(hidden, weight, target)

    return {"fds": fused}, Floor(hidden.nbytes + weight.nbytes, 2 * rows * width * words)


WORK: list[Work] = [
    Work("loss and gradient, 8192 x 4096, 131072 words, bf16", "linear_cross_entropy_sum", head),
    Work("log-probabilities, 8192 x 4096, 131072 words, bf16", "linear_cross_entropy", head_rows),
]
