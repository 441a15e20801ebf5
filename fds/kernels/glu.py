"""Gated linear units: act(gate) * up, where act is SiLU (SwiGLU) or GELU (GeGLU), exact or by tanh.

    silu:       x S(x)                       S(x) = 1 / (1 + exp(-x));            derivative  S (1 + x (1 - S))
    gelu:       x P(x)                       P, p: normal distribution, density;  derivative  P + x p
    gelu_tanh:  x S(2 c (x + 0.044715 x^3))  c = sqrt(2 / pi);                    derivative  S + x S (1 - S) 2 c (1 + 0.134145 x^2)

The backward pass computes the activation again from the gate: nothing but the two inputs is kept. In float32, rounded once.
Shazeer 2020, arXiv:2002.05202; Hendrycks and Gimpel 2016, arXiv:1606.08415.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fds import tree
from fds.kernels.registry import Configured, define
from fds.kernels.triton_or_not import jit, launch, tl

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
BLOCK = 1024  # numbers of one program: 8 a thread, 128 bits of bfloat16
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_C, _CUBIC = math.sqrt(2 / math.pi), 0.044715


# --- reference ---


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _activated(x: Tensor, activation: str) -> Tensor:
    if activation == "gelu":
        return x * _normal(x)
    return F.silu(x) if activation == "silu" else F.gelu(x, approximate="tanh")


def _normal(x: Tensor) -> Tensor:
    """The normal distribution, 6e-8 off in float32 as the kernel's. `F.gelu` has the same error, and makes NaN of infinity on a CPU."""
    return 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))


def _slope(x: Tensor, activation: str) -> Tensor:
    """The activation's derivative."""
    if activation == "gelu":
        return _normal(x) + x * (-0.5 * x * x).exp() * (0.5 * _C)
    inner = x if activation == "silu" else 2 * _C * (x + _CUBIC * x * x * x)
    s = inner.sigmoid()
    by_inner = x if activation == "silu" else x * (2 * _C * (1 + 3 * _CUBIC * x * x))
    return s * (1 + by_inner * (1 - s))


def _glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    wide = _wide(gate)
    return (_activated(gate.to(wide), activation) * up.to(wide)).to(gate.dtype).contiguous()


def _backward(cotangents: Any, inputs: Any, outputs: Any, needs: list[bool]) -> tuple[Tensor | None, ...]:
    (g,), (gate, up, activation) = cotangents, inputs
    wide = _wide(gate)
    x, g = gate.to(wide), g.to(wide)
    by_gate = g * up.to(wide) * _slope(x, activation) if needs[0] else None
    return by_gate, g * _activated(x, activation) if needs[1] else None


# --- kernels ---


@jit
def parts(x, ACTIVATION: tl.constexpr):
    """The factor of x in the activation, and the derivative."""
    if ACTIVATION == "gelu":
        s = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        slope = s + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    else:
        inner = x
        more = x
        if ACTIVATION == "gelu_tanh":
            inner = 1.5957691216057308 * (x + 0.044715 * x * x * x)
            more = x * (1.5957691216057308 * (1 + 0.134145 * x * x))
        s = 1 / (1 + tl.exp(-inner))
        slope = s * (1 + more * (1 - s))
    return s, slope


@jit
def forward_kernel(GATE, UP, OUT, n, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(GATE + at, mask=at < n, other=0.0).to(tl.float32)
    u = tl.load(UP + at, mask=at < n, other=0.0).to(tl.float32)
    s, _ = parts(x, ACTIVATION)
    tl.store(OUT + at, (x * s * u).to(OUT.dtype.element_ty), mask=at < n)


@jit
def backward_kernel(GATE, UP, G, BY_GATE, BY_UP, n, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(GATE + at, mask=at < n, other=0.0).to(tl.float32)
    u = tl.load(UP + at, mask=at < n, other=0.0).to(tl.float32)
    g = tl.load(G + at, mask=at < n, other=0.0).to(tl.float32)
    s, slope = parts(x, ACTIVATION)
    tl.store(BY_GATE + at, (g * u * slope).to(BY_GATE.dtype.element_ty), mask=at < n)
    tl.store(BY_UP + at, (g * x * s).to(BY_UP.dtype.element_ty), mask=at < n)


def _launch(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    out = torch.empty_like(gate)
    launch(forward_kernel, (-(-out.numel() // BLOCK),), gate, up, out, out.numel(), ACTIVATION=activation, BLOCK=BLOCK)
    return out


def _launch_backward(cotangents: Any, inputs: Any, outputs: Any, needs: list[bool]) -> tuple[Tensor | None, ...]:
    (g,), (gate, up, activation), n = cotangents, inputs, inputs[0].numel()
    out = torch.empty_like(gate), torch.empty_like(up)
    launch(backward_kernel, (-(-n // BLOCK),), gate, up, g, *out, n, ACTIVATION=activation, BLOCK=BLOCK)
    return out


def _configurations() -> Iterator[Configured]:
    for d in ("bf16", "fp16", "fp32"):
        types = dict.fromkeys(("GATE", "UP", "OUT", "G", "BY_GATE", "BY_UP"), f"*{d}") | {"n": "i32"}
        rounding = {"bf16": ("cvt.rn.bf16",), "fp16": ("cvt.rn.f16",), "fp32": ()}[d]
        for activation in ACTIVATIONS if d == "bf16" else ACTIVATIONS[:1]:
            for kernel in (forward_kernel, backward_kernel):
                yield Configured(
                    kernel, types, {"ACTIVATION": activation, "BLOCK": BLOCK}, aligned=("n",), contains=rounding
                )


# --- operator ---


def _supports(gate: Tensor, up: Tensor, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"gated_linear_unit: activation {activation!r}; {tree.suggest(activation, ACTIVATIONS)}")
    if gate.shape != up.shape or gate.dtype != up.dtype or gate.device != up.device:
        got = ", ".join(f"{n} {tuple(t.shape)} {t.dtype} on {t.device}" for n, t in (("gate", gate), ("up", up)))
        raise ValueError(f"gated_linear_unit: {got}; required two tensors alike")
    if gate.dtype not in _DTYPES or (gate.is_cuda and gate.dtype == torch.float64):
        allowed = "float32, bfloat16 or float16, and float64 on a CPU alone"
        raise ValueError(
            f"gated_linear_unit: {gate.dtype} on {gate.device.type}, required {allowed}; the nearest is float32"
        )


def _example(seed: int, dtype: torch.dtype) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(seed)
    return *(torch.randn(5, 16, generator=g).to(dtype) for _ in range(2)), ACTIVATIONS[seed % 3]


_unit = define(
    "gated_linear_unit",
    "(Tensor gate, Tensor up, str activation) -> Tensor",
    formula="act(gate) up; act is silu, gelu or gelu_tanh",
    why="3 M I bytes times the size of a number forward, 5 backward (294 and 489 microseconds for 16384 x 14336 in bfloat16 on an H200), and the "
    "activation is not kept. Kept until measured: a compiler makes the same kernels, and a program that is compiled needs this one in no case; "
    "what decides is eager code, where it saves two launches forward and three backward",
    reference=_glu,
    kernel=_launch,
    backward=_backward,
    backward_kernel=_launch_backward,
    differentiable=("gate", "up"),
    supports=_supports,
    example=_example,
    kernels=tuple(_configurations()),
)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, in float32, rounded once to their dtype; both of one shape and dtype. Only they are kept for the backward pass.

    `ValueError` for other shapes and dtypes. Shazeer 2020, arXiv:2002.05202, equation 6.

    >>> swiglu(torch.zeros(2), torch.ones(2)), swiglu(torch.tensor([100.0]), torch.tensor([2.0]))
    (tensor([0., 0.]), tensor([200.]))
    """
    return _unit(gate, up, "silu")


def geglu(gate: Tensor, up: Tensor, *, approximate: Literal["none", "tanh"] = "none") -> Tensor:
    """``gelu(gate) * up``, in float32, rounded once to their dtype; both of one shape and dtype. Only they are kept for the backward pass.

    `approximate` is as in `torch.nn.functional.gelu` (Gemma: "tanh"). `ValueError` for other shapes and dtypes. Shazeer 2020,
    arXiv:2002.05202, equation 6.

    >>> geglu(torch.tensor([-100.0, 0.0, 100.0]), torch.full((3,), 2.0))
    tensor([ -0.,   0., 200.])
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"geglu: approximate={approximate!r}; {tree.suggest(str(approximate), ('none', 'tanh'))}")
    return _unit(gate, up, "gelu" if approximate == "none" else "gelu_tanh")
