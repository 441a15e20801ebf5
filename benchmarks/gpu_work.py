"""What `gpu.py` times: for each operator a size that fills the chip, its rivals, and the fewest bytes and operations it needs."""

from collections.abc import Callable
from functools import partial
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


def compared(f: Callable[..., Any], g: Callable[..., Any], args: tuple[Any, ...]) -> dict[str, Callable[[], Any]]:
    """The operator, the same formula in eager torch, and that formula compiled."""
    compiled = torch.compile(g)
    return {"fds": lambda: f(*args), "eager": lambda: g(*args), "compiled": lambda: compiled(*args)}


def backwards(f: Callable[..., Tensor], g: Callable[..., Tensor], leaves: list[Tensor]) -> dict[str, Callable[[], Any]]:
    """The same for the gradient alone."""
    leaves = [x.requires_grad_() for x in leaves]
    found: dict[str, Callable[[], Any]] = {}
    for name, h in (("fds", f), ("eager", g), ("compiled", torch.compile(g))):
        out = h(*leaves)
        cotangent = torch.randn_like(out)
        found[name] = lambda out=out, cotangent=cotangent: torch.autograd.grad(
            out, leaves, cotangent, retain_graph=True
        )
    return found


def plain_rms(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * w


def rms(backward: bool) -> tuple[dict[str, Callable[[], Any]], Floor]:
    x, w = randn(16384, 4096), randn(4096)
    f = partial(fds.kernels.rms_norm, eps=1e-6)
    if backward:
        return backwards(f, plain_rms, [x, w]), Floor(3 * x.nbytes)
    return compared(f, plain_rms, (x, w)), Floor(2 * x.nbytes)


def layer(backward: bool) -> tuple[dict[str, Callable[[], Any]], Floor]:
    x, w, b = randn(16384, 4096), randn(4096), randn(4096)

    def plain(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.layer_norm(x, (4096,), w, b, 1e-5)

    f = partial(fds.kernels.layer_norm, eps=1e-5)
    if backward:
        return backwards(f, plain, [x, w, b]), Floor(3 * x.nbytes)
    return compared(f, plain, (x, w, b)), Floor(2 * x.nbytes)


def gated(backward: bool) -> tuple[dict[str, Callable[[], Any]], Floor]:
    gate, up = randn(16384, 14336), randn(16384, 14336)

    def plain(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    if backward:
        return backwards(fds.kernels.swiglu, plain, [gate, up]), Floor(5 * gate.nbytes)
    return compared(fds.kernels.swiglu, plain, (gate, up)), Floor(3 * gate.nbytes)


def rotary() -> tuple[dict[str, Callable[[], Any]], Floor]:
    q, k = randn(1, 32, 16384, 128), randn(1, 8, 16384, 128)
    frequencies = 1e4 ** -(torch.arange(64, device="cuda") / 64)
    cos, sin = fds.kernels.rope_angles(torch.arange(16384, device="cuda")[None], frequencies, dtype=LOW)
    full = [torch.cat([t, t], -1)[:, None] for t in (cos, sin)]

    def turned(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * full[0] + torch.cat([-b, a], -1) * full[1]

    def plain(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return turned(q), turned(k)

    return compared(lambda q, k: fds.kernels.rope(q, k, cos, sin), plain, (q, k)), Floor(2 * (q.nbytes + k.nbytes))


def fused() -> tuple[dict[str, Callable[[], Any]], Floor]:
    w, a, b = randn(8192, 8192), randn(16, 8192), randn(8192, 16)

    def plain(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return (w.float() + 0.5 * (b.float() @ a.float())).to(w.dtype)

    return compared(lambda w, a, b: fds.kernels.lora_fuse(w, a, b, 0.5), plain, (w, a, b)), Floor(2 * w.nbytes)


def beside(tokens: int) -> tuple[dict[str, Callable[[], Any]], Floor]:
    x, w, a, b = randn(tokens, 8192), randn(8192, 8192), randn(16, 8192), randn(8192, 16)

    def plain(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return x @ w.T + 0.5 * ((x @ a.T) @ b.T)

    return compared(partial(fds.kernels.lora_linear, scale=0.5), plain, (x, w, a, b)), Floor(
        w.nbytes + a.nbytes + b.nbytes
    )


def many(tokens: int, adapters: int) -> tuple[dict[str, Callable[[], Any]], Floor]:
    x, w = randn(tokens, 8192), randn(8192, 8192)
    a, b = randn(adapters, 16, 8192), randn(adapters, 8192, 16)
    index = torch.arange(tokens, device="cuda") % adapters
    scale = torch.full((adapters,), 0.5, device="cuda")

    def plain(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        own = torch.einsum("tr,tnr->tn", torch.einsum("tk,trk->tr", x, a[index]), b[index])
        return x @ w.T + 0.5 * own

    f = partial(fds.kernels.lora_linear, scale=scale, index=index)
    return compared(f, plain, (x, w, a, b)), Floor(w.nbytes + a.nbytes + b.nbytes)


WORK: list[Work] = [
    Work("loss and gradient, 8192 x 4096, 131072 words, bf16", "linear_cross_entropy_sum", head),
    Work("log-probabilities, 8192 x 4096, 131072 words, bf16", "linear_cross_entropy", head_rows),
    Work("adapter fused, 8192 x 8192, r = 16, bf16", "lora_fuse", fused),
    Work("adapter beside, 1 token, 8192 x 8192, r = 16, bf16", "lora_linear", lambda: beside(1)),
    Work("adapter beside, 16 tokens, 8192 x 8192, r = 16, bf16", "lora_linear", lambda: beside(16)),
    Work("8 adapters beside, 16 tokens, 8192 x 8192, r = 16, bf16", "lora_linear_many", lambda: many(16, 8)),
    Work("RMSNorm, 16384 x 4096, bf16", "rms_norm", lambda: rms(False)),
    Work("RMSNorm backward, 16384 x 4096, bf16", "rms_norm", lambda: rms(True)),
    Work("LayerNorm, 16384 x 4096, bf16", "layer_norm", lambda: layer(False)),
    Work("LayerNorm backward, 16384 x 4096, bf16", "layer_norm", lambda: layer(True)),
    Work("SwiGLU, 16384 x 14336, bf16", "gated_linear_unit", lambda: gated(False)),
    Work("SwiGLU backward, 16384 x 14336, bf16", "gated_linear_unit", lambda: gated(True)),
    Work("RoPE, 40 heads of 128, 16384 tokens, bf16", "rope", rotary),
]
