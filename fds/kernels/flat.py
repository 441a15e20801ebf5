"""What updates of flat buffers share: how a parameter is kept, Adam's arithmetic, checks of arguments."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fds.kernels.rounding import check_key, cut, number, random_bits, rounded
from fds.kernels.triton_or_not import jit, tl

Scalar = float | Tensor
KEEP = "Tensor count, str copy, Tensor? seed, int leaf"  # the last arguments of every update: how the new parameter is kept
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
COPIES = {"": None, "bfloat16": torch.bfloat16, "float16": torch.float16}  # by the name that operators take
ROUNDING = {"bf16": ("cvt.rn.bf16",), "fp16": ("cvt.rn.f16",), "fp32": ()}  # what the PTX of a rounding contains


def wide(dtype: torch.dtype) -> torch.dtype:
    """What moments are kept and updates computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def whole(*tensors: Tensor) -> list[Tensor]:
    """Contiguous, so that what is computed of them is."""
    return [t.contiguous() for t in tensors]


def lower(terms: Sequence[Tensor], param: Tensor) -> list[Tensor]:
    """Hyperparameters in the dtype that the update is computed in."""
    return [t.to(wide(param.dtype)) for t in terms]


def stored(p: Tensor, param: Tensor, copy: str, seed: Tensor | None, count: Tensor, leaf: int) -> tuple[Tensor, Tensor]:
    """The new parameter in its own dtype, and the copy; whichever is bfloat16 is rounded at random with a seed."""

    def to(dtype: torch.dtype) -> Tensor:
        if seed is None or dtype != torch.bfloat16:
            return p.to(dtype)
        return rounded(p, random_bits(p.numel(), seed, count, leaf))

    low = COPIES[copy]
    return to(param.dtype), p.new_empty(0) if low is None else to(low)


# --- Adam's arithmetic: reference ---


def mass(b: Tensor, count: Tensor) -> Tensor:
    """``1 - b**count``: the weights that an average holds after `count` updates."""
    return -torch.expm1(count * b.log())


def adam_terms(hyper: Sequence[Tensor], count: Tensor) -> list[Tensor]:
    """What AdamW makes of its hyperparameters."""
    rate, b1, b2, eps, weight_decay = hyper
    first, second = mass(b1, count), mass(b2, count).sqrt()
    return [1 - b1, b2, 1 - b2, second, eps, rate / first, rate * weight_decay]


def moments(grad: Tensor, mu: Tensor, nu: Tensor, c: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The new averages of the gradient and of its square."""
    g = grad.to(mu.dtype)
    return mu + c[0] * (g - mu), c[1] * nu + c[2] * (g * g)


def _root(nu: Tensor) -> Tensor:
    """sqrt, whose derivative at 0 is taken as 0: there g is 0 too, and the gradient through it would be 0 / 0."""
    none = nu <= 0
    return nu.where(~none, 1.0).sqrt().where(~none, 0.0)


def direction(mu: Tensor, nu: Tensor, c: Sequence[Tensor]) -> Tensor:
    """``mu / (sqrt(nu) / second + eps)``."""
    return mu / (_root(nu) / c[3] + c[4])


def step(p: Tensor, mu: Tensor, nu: Tensor, c: Sequence[Tensor]) -> Tensor:
    """AdamW's step from `p`, of the new moments. Its own square root, as `_root` is some percent of the time of a compiled update."""
    return p + (-c[5] * (mu / (nu.clamp(min=0.0).sqrt() / c[3] + c[4])) - c[6] * p)


def arrived(new: Tensor | None, low: Tensor | None, like: Tensor) -> Tensor:
    """The cotangent of the new parameter, by itself and by its copy: a rounding passes it on."""
    given = [c.to(like.dtype) for c in (new, low) if c is not None and c.shape == like.shape]
    return given[0] + given[1] if len(given) == 2 else (given or [torch.zeros_like(like)])[0]


def pull_direction(g: Tensor, mu: Tensor, nu: Tensor, c: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """From the cotangent of `direction`, those of the moments."""
    root = _root(nu)
    scale = root / c[3] + c[4]
    dmu = g / scale
    slope = torch.where(root > 0, 0.5 / root.where(root > 0, 1.0), 0.0)
    return dmu, -dmu * (mu / scale) * slope / c[3]


def pull_moments(dmu: Tensor, dnu: Tensor, grad: Tensor, c: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """From the cotangents of the new moments, those of the gradient and the old ones."""
    return c[0] * dmu + 2 * c[2] * grad.to(dmu.dtype) * dnu, (1 - c[0]) * dmu, c[1] * dnu


# --- the same in kernels ---


@jit
def divide(x, y):
    return tl.div_rn(x, y) if x.dtype == tl.float32 else x / y


@jit
def root(x):
    x = tl.where(x <= 0, 0.0, x)
    return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)


@jit
def averaged(m, v, g, C):
    """`moments`."""
    m = m + tl.load(C) * (g - m)
    v = tl.load(C + 1) * v + tl.load(C + 2) * (g * g)
    return m, v


@jit
def toward(m, v, C):
    """`direction`."""
    return divide(m, divide(root(v), tl.load(C + 3)) + tl.load(C + 4))


@jit
def stepped(p, m, v, C):
    """`step`."""
    return p + (-tl.load(C + 5) * toward(m, v, C) - tl.load(C + 6) * p)


@jit
def keep(P, COPY, at, p, noise, mask, COPIED: tl.constexpr, STOCHASTIC: tl.constexpr):
    """`stored`."""
    if STOCHASTIC and not COPIED:
        tl.store(P + at, cut(p, noise), mask=mask)
    else:
        tl.store(P + at, p.to(P.dtype.element_ty), mask=mask)
    if COPIED:
        if STOCHASTIC:
            tl.store(COPY + at, cut(p, noise), mask=mask)
        else:
            tl.store(COPY + at, p.to(COPY.dtype.element_ty), mask=mask)


# --- arguments ---


def check(name: str, param: Tensor, grad: Tensor, kept: dict[str, Tensor | None], hyper: Iterable[tuple[str, Any]], rest: Sequence[Any]) -> None:  # fmt: skip
    """Raise `ValueError` unless shapes, dtypes and devices fit together, and what is asked for is possible."""
    count, copy, seed, leaf = rest
    if param.dtype not in _DTYPES:
        raise ValueError(f"{name}: param {param.dtype}, required a floating dtype; the nearest is torch.float32")
    for n, t in {"grad": grad, **kept}.items():
        if t is not None and (t.shape != param.shape or t.device != param.device):
            want = f"{tuple(param.shape)} on {param.device}, as the parameter"
            raise ValueError(f"{name}: {n} {tuple(t.shape)} on {t.device}, required {want}")
    if grad.dtype not in _DTYPES:
        raise ValueError(f"{name}: grad {grad.dtype}, required a floating dtype; the nearest is torch.float32")
    for n, t in kept.items():
        if t is not None and t.dtype != wide(param.dtype):
            raise ValueError(f"{name}: {n} {t.dtype}, required {wide(param.dtype)} beside a parameter of {param.dtype}")
    for n, t in hyper:
        if t.dim() != 0 or not t.is_floating_point() or t.device != param.device:
            got = f"{tuple(t.shape)} {t.dtype} on {t.device}"
            raise ValueError(f"{name}: {n} {got}, required a number, or a 0-D floating tensor on {param.device}")
    check_key(name, param, seed, count, leaf)
    check_copy(name, param, copy, seed)


def check_copy(name: str, param: Tensor, copy: str, seed: Tensor | None) -> None:
    """Raise `ValueError` for a copy that is none, and for a seed without anything to round."""
    if copy not in COPIES:
        raise ValueError(f"{name}: copy={copy!r}, required torch.bfloat16, torch.float16 or None")
    if copy and param.dtype != torch.float32:
        raise ValueError(f"{name}: a copy in {copy} of a parameter in {param.dtype}, required a float32 parameter")
    if seed is not None and torch.bfloat16 not in (param.dtype, COPIES[copy]):
        got = f"param {param.dtype}, copy {copy or None}"
        raise ValueError(f"{name}: a seed, and nothing to round at random in {got}; use torch.bfloat16, or seed=None")


def name_of(copy: torch.dtype | None) -> str:
    """A dtype as operators take it."""
    return "" if copy is None else str(copy).removeprefix("torch.")


def keeping(param: Tensor, count: int | Tensor, copy: torch.dtype | None, seed: int | Tensor | None, leaf: int) -> tuple[Any, ...]:  # fmt: skip
    """The last arguments of every operator here."""
    key = None if seed is None else number(seed, param, torch.int64)
    return number(count, param, torch.int64), name_of(copy), key, leaf


def example_tensors(seed: int, dtype: torch.dtype, count: int) -> list[Tensor]:
    """A parameter, a gradient, and moments of one shape, the last one positive."""
    g = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(5, 13, generator=g) for _ in range(count)]
    tensors[-1] = tensors[-1].abs() + 0.5
    return [t.to(dtype if i < 2 else wide(dtype)) for i, t in enumerate(tensors)]


def scalars(*values: float) -> list[Tensor]:
    """0-D float64 tensors."""
    return [torch.tensor(v, dtype=torch.float64) for v in values]
