"""Optimizer updates of flat buffers: AdamW, Lion, SGD. Every buffer is read once and written once.

    AdamW:  m' = m + (1 - b1) (g - m);  v' = b2 v + (1 - b2) g^2
            p' = p - rate / (1 - b1^t) m' / (sqrt(v') / sqrt(1 - b2^t) + eps) - rate wd p
    Lion:   p' = p - rate sign(b1 m + (1 - b1) g) - rate wd p;  m' = b2 m + (1 - b2) g
    SGD:    h = g + wd p;  m' = momentum m + h;  p' = p - rate m', with Nesterov p - rate (h + momentum m')

t counts from 1. Numerics of `torch.optim.AdamW` and `SGD`: all in float32 (float64 for float64), one rounding at the end. Parameters are
float32, with a copy in low precision where one is wanted, or low precision themselves; that rounding is stochastic where there is a seed.
What depends on hyperparameters alone is computed once, in their float64, by operations on 0-D tensors: a new value is new data. A kernel may
fuse a product with a sum, so that its last bit may be another than the reference's; its divisions and roots are rounded as the reference's.

Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2; Chen et al. 2023, arXiv:2302.06675, algorithm 2.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fds.kernels.flat import (
    COPIES,
    KEEP,
    ROUNDING,
    Scalar,
    adam_terms,
    arrived,
    averaged,
    check,
    direction,
    example_tensors,
    keep,
    keeping,
    lower,
    mass,
    moments,
    pull_direction,
    pull_moments,
    scalars,
    step,
    stepped,
    stored,
    whole,
    wide,
)
from fds.kernels.registry import Configured, define
from fds.kernels.rounding import draw, number
from fds.kernels.triton_or_not import jit, launch, tl

# --- reference ---


def _adamw(param: Tensor, grad: Tensor, mu: Tensor, nu: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *hyper, count, copy, seed, leaf = rest
    param, grad, mu, nu = whole(param, grad, mu, nu)
    c = lower(adam_terms(hyper, count), param)
    mu, nu = moments(grad, mu, nu, c)
    new, low = stored(step(param.to(mu.dtype), mu, nu, c), param, copy, seed, count, leaf)
    return new, mu, nu, low


def _sign(x: Tensor) -> Tensor:
    """NaN stays, which `torch.sign` makes 0."""
    return torch.where(x > 0, 1.0, torch.where(x < 0, -1.0, 0.0 * x))


def _lion_terms(hyper: Sequence[Tensor]) -> list[Tensor]:
    rate, b1, b2, weight_decay = hyper
    return [b1, 1 - b1, b2, 1 - b2, rate, rate * weight_decay]


def _lion(param: Tensor, grad: Tensor, mu: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *hyper, count, copy, seed, leaf = rest
    param, grad, mu = whole(param, grad, mu)
    c = lower(_lion_terms(hyper), param)
    p, g = param.to(mu.dtype), grad.to(mu.dtype)
    p = p + (-c[4] * _sign(c[0] * mu + c[1] * g) - c[5] * p)
    new, low = stored(p, param, copy, seed, count, leaf)
    return new, c[2] * mu + c[3] * g, low


def _sgd_step(param: Tensor, grad: Tensor, buffer: Tensor | None, c: Sequence[Tensor], nesterov: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The parameter, the new buffer, the direction."""
    p = param.to(wide(param.dtype))
    h = grad.to(p.dtype) + c[2] * p
    m = h if buffer is None else c[1] * buffer + h
    return p, m, h + c[1] * m if nesterov else m


def _sgd(param: Tensor, grad: Tensor, buffer: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *hyper, nesterov, count, copy, seed, leaf = rest
    param, grad = whole(param, grad)
    c = lower(hyper, param)
    p, m, d = _sgd_step(param, grad, None if buffer is None else buffer.contiguous(), c, nesterov)
    new, low = stored(p + -c[0] * d, param, copy, seed, count, leaf)
    return new, p.new_empty(0) if buffer is None else m, low


# --- gradients ---


def _adamw_backward(cotangents: Any, inputs: Any, outputs: Any, needs: list[bool]) -> tuple[Tensor | None, ...]:
    param, grad, mu, nu, rate, *rest, count, _, _, _ = inputs
    c = lower(adam_terms((rate, *rest), count), param)
    mu, nu = moments(grad, mu, nu, c)
    g, p = arrived(cotangents[0], cotangents[3], mu), param.to(mu.dtype)
    dmu, dnu = pull_direction(-c[5] * g, mu, nu, c)
    dmu, dnu = (d if extra is None else d + extra for d, extra in zip((dmu, dnu), cotangents[1:3], strict=True))
    dgrad, dmu, dnu = pull_moments(dmu, dnu, grad, c)
    first, decay = mass(rest[0], count).to(p.dtype), rest[3].to(p.dtype)
    drate = -(g * (direction(mu, nu, c) / first + decay * p)).sum() if needs[4] else None
    ddecay = -(g * p).sum() * rate.to(p.dtype) if needs[5] else None
    return g - c[6] * g, dgrad, dmu, dnu, drate, ddecay


def _lion_backward(cotangents: Any, inputs: Any, outputs: Any, needs: list[bool]) -> tuple[Tensor | None, ...]:
    param, grad, mu, *hyper, _, _, _, _ = inputs
    c = lower(_lion_terms(hyper), param)
    g, p, d = arrived(cotangents[0], cotangents[2], mu), param.to(mu.dtype), cotangents[1]
    d = torch.zeros_like(mu) if d is None else d
    sign = _sign(c[0] * mu + c[1] * grad.to(mu.dtype))
    rate, decay = lower((hyper[0], hyper[3]), param)
    return g - c[5] * g, c[3] * d, c[2] * d, -(g * (sign + decay * p)).sum(), -(g * p).sum() * rate


def _sgd_backward(cotangents: Any, inputs: Any, outputs: Any, needs: list[bool]) -> tuple[Tensor | None, ...]:
    param, grad, buffer, *hyper, nesterov, _, _, _, _ = inputs
    c = lower(hyper, param)
    p, m, d = _sgd_step(param, grad, buffer, c, nesterov)
    g = arrived(cotangents[0], cotangents[2], p)
    back = -c[0] * g  # of the direction
    dm = c[1] * back if nesterov else back
    dm = dm + cotangents[1] if cotangents[1] is not None and buffer is not None else dm
    dh = dm + back if nesterov else dm
    drate = -(g * d).sum()
    dmomentum = None if buffer is None else (dm * buffer).sum() + ((back * m).sum() if nesterov else 0.0)
    dbuffer = None if buffer is None else c[1] * dm
    return g + c[2] * dh, dh, dbuffer, drate, dmomentum, (dh * p).sum()


# --- kernels ---


@jit
def _block(P, G, M, V, C, SEED, STEP, NEW_P, NEW_M, NEW_V, COPY, start, n, leaf, RULE: tl.constexpr,
           COPIED: tl.constexpr, STOCHASTIC: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    i = tl.arange(0, BLOCK)
    mask = None
    if MASKED:
        mask = i < n - start
    dtype = C.dtype.element_ty
    p = tl.load(P + start + i, mask=mask).to(dtype)
    g = tl.load(G + start + i, mask=mask).to(dtype)
    if RULE == "adamw":
        m, v = averaged(tl.load(M + start + i, mask=mask), tl.load(V + start + i, mask=mask), g, C)
        tl.store(NEW_M + start + i, m, mask=mask)
        tl.store(NEW_V + start + i, v, mask=mask)
        p = stepped(p, m, v, C)
    elif RULE == "lion":
        m = tl.load(M + start + i, mask=mask)
        x = tl.load(C) * m + tl.load(C + 1) * g
        sign = tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0 * x))
        tl.store(NEW_M + start + i, tl.load(C + 2) * m + tl.load(C + 3) * g, mask=mask)
        p = p + (-tl.load(C + 4) * sign - tl.load(C + 5) * p)
    else:
        h = g + tl.load(C + 2) * p
        if RULE != "sgd":
            m = tl.load(C + 1) * tl.load(M + start + i, mask=mask) + h
            tl.store(NEW_M + start + i, m, mask=mask)
            h = h + tl.load(C + 1) * m if RULE == "nesterov" else m
        p = p + -tl.load(C) * h
    noise = draw(SEED, STEP, leaf, start, 0, BLOCK) if STOCHASTIC else 0
    keep(NEW_P, COPY, start + i, p, noise, mask, COPIED, STOCHASTIC)


@jit
def update_kernel(P, G, M, V, C, SEED, STEP, NEW_P, NEW_M, NEW_V, COPY, n, leaf,
                  RULE: tl.constexpr, COPIED: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One block of a buffer. A whole one has no mask, so that its loads are wide whatever n is."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    if start + BLOCK <= n:
        _block(P, G, M, V, C, SEED, STEP, NEW_P, NEW_M, NEW_V, COPY, start, n, leaf, RULE, COPIED, STOCHASTIC, False, BLOCK)  # fmt: skip
    else:
        _block(P, G, M, V, C, SEED, STEP, NEW_P, NEW_M, NEW_V, COPY, start, n, leaf, RULE, COPIED, STOCHASTIC, True, BLOCK)  # fmt: skip


# --- launcher ---

BLOCK = 1024


def launched(rule: str, tensors: Sequence[Tensor | None], terms: Sequence[Tensor], count: Tensor, copy: str, seed: Tensor | None, leaf: int) -> tuple[Tensor, ...]:  # fmt: skip
    """The new parameter, first and second moment, and copy; empty where there is none. `tensors`: parameter, gradient, moments."""
    param, grad, mu, nu = tensors
    assert param is not None and grad is not None
    c = torch.stack(lower(terms, param))
    low = COPIES[copy]
    new = [None if t is None else torch.empty_like(t) for t in (param, mu, nu)]
    new.append(None if low is None else torch.empty_like(param, dtype=low))
    n = param.numel()
    at = [param if t is None else t for t in (param, grad, mu, nu, c, count if seed is None else seed, count, *new)]
    flags = {"COPIED": low is not None, "STOCHASTIC": seed is not None}
    launch(update_kernel, (-(-n // BLOCK),), *at, n, leaf, RULE=rule, **flags, BLOCK=BLOCK)
    return tuple(c.new_empty(0) if t is None else t for t in new)


def _launch_adamw(param: Tensor, grad: Tensor, mu: Tensor, nu: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *hyper, count, copy, seed, leaf = rest
    return launched("adamw", (param, grad, mu, nu), adam_terms(hyper, count), count, copy, seed, leaf)


def _launch_lion(param: Tensor, grad: Tensor, mu: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *hyper, count, copy, seed, leaf = rest
    new, m, _, low = launched("lion", (param, grad, mu, None), _lion_terms(hyper), count, copy, seed, leaf)
    return new, m, low


def _launch_sgd(param: Tensor, grad: Tensor, buffer: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    *hyper, nesterov, count, copy, seed, leaf = rest
    rule = "sgd" if buffer is None else "nesterov" if nesterov else "momentum"
    new, m, _, low = launched(rule, (param, grad, buffer, None), hyper, count, copy, seed, leaf)
    return new, m, low


_KINDS = {  # dtypes of parameter, gradient and copy, and whether it is rounded at random
    "plain": ("fp32", "fp32", "", False),
    "copy": ("fp32", "bf16", "bf16", False),
    "half copy": ("fp32", "fp16", "fp16", False),
    "random copy": ("fp32", "bf16", "bf16", True),
    "low": ("bf16", "bf16", "", False),
    "random": ("bf16", "bf16", "", True),
}


def _configurations(*rules: str, kinds: Sequence[str] = tuple(_KINDS)) -> Iterator[Configured]:
    for rule in rules:
        for param, grad, copy, stochastic in (_KINDS[k] for k in kinds):
            types = dict.fromkeys(("M", "V", "C", "NEW_M", "NEW_V"), "*fp32") | {"n": "i32", "leaf": "i32"}
            types |= {"P": f"*{param}", "NEW_P": f"*{param}", "G": f"*{grad}", "COPY": f"*{copy or param}"}
            types |= {"SEED": "*i64", "STEP": "*i64"}
            flags = {"RULE": rule, "COPIED": bool(copy), "STOCHASTIC": stochastic, "BLOCK": BLOCK}
            yield Configured(update_kernel, types, flags, contains=ROUNDING[copy or param])


# --- operators ---


def _supports_adamw(param: Tensor, grad: Tensor, mu: Tensor, nu: Tensor, *rest: Any) -> None:
    hyper = zip(("rate", "b1", "b2", "eps", "weight_decay"), rest[:5], strict=True)
    check("adamw_update", param, grad, {"mu": mu, "nu": nu}, hyper, rest[5:])


def _supports_lion(param: Tensor, grad: Tensor, mu: Tensor, *rest: Any) -> None:
    hyper = zip(("rate", "b1", "b2", "weight_decay"), rest[:4], strict=True)
    check("lion_update", param, grad, {"mu": mu}, hyper, rest[4:])


def _supports_sgd(param: Tensor, grad: Tensor, buffer: Tensor | None, *rest: Any) -> None:
    hyper = zip(("rate", "momentum", "weight_decay"), rest[:3], strict=True)
    check("sgd_update", param, grad, {"buffer": buffer}, hyper, rest[4:])


def _example(moments: int, *values: float, flags: Sequence[Any] = ()) -> Any:
    def example(seed: int, dtype: torch.dtype) -> tuple[Any, ...]:
        tensors = example_tensors(seed, dtype, 2 + moments)
        return *tensors, *scalars(*values), *flags, torch.tensor(3), "", None, 0

    return example


_WHY = (
    "and, beside a compiler, that parameters in bfloat16 can be rounded at random, with a draw of Philox for 8 elements"
)

_adamw_update = define(
    "adamw_update",
    f"(Tensor param, Tensor grad, Tensor mu, Tensor nu, Tensor rate, Tensor b1, Tensor b2, Tensor eps, Tensor weight_decay, {KEEP}) -> (Tensor, Tensor, Tensor, Tensor)",
    formula="AdamW's parameter, moments, and copy in low precision",
    why=f"28 bytes a parameter (float32 parameter and moments, bfloat16 gradient and copy), 5.83 ms for 1e9 on an H200, in one launch; {_WHY}",
    reference=_adamw,
    kernel=_launch_adamw,
    backward=_adamw_backward,
    differentiable=("param", "grad", "mu", "nu", "rate", "weight_decay"),
    supports=_supports_adamw,
    example=_example(2, 1e-2, 0.9, 0.99, 1e-8, 0.1),
    kernels=tuple(_configurations("adamw")),
)

_lion_update = define(
    "lion_update",
    f"(Tensor param, Tensor grad, Tensor mu, Tensor rate, Tensor b1, Tensor b2, Tensor weight_decay, {KEEP}) -> (Tensor, Tensor, Tensor)",
    formula="Lion's parameter, moment, and copy in low precision",
    why=f"20 bytes a parameter (float32 parameter and moment, bfloat16 gradient and copy), 4.2 ms for 1e9 on an H200; {_WHY}",
    reference=_lion,
    kernel=_launch_lion,
    backward=_lion_backward,
    differentiable=("param", "grad", "mu", "rate", "weight_decay"),
    supports=_supports_lion,
    example=_example(1, 1e-2, 0.9, 0.99, 0.1),
    kernels=tuple(_configurations("lion", kinds=("plain", "copy", "random copy", "random"))),
)

_sgd_update = define(
    "sgd_update",
    f"(Tensor param, Tensor grad, Tensor? buffer, Tensor rate, Tensor momentum, Tensor weight_decay, bool nesterov, {KEEP}) -> (Tensor, Tensor, Tensor)",
    formula="SGD's parameter, momentum buffer, and copy in low precision",
    why=f"20 bytes a parameter with momentum, 12 without (float32, with bfloat16 gradient and copy), 4.2 and 2.5 ms for 1e9 on an H200; {_WHY}",
    reference=_sgd,
    kernel=_launch_sgd,
    backward=_sgd_backward,
    differentiable=("param", "grad", "buffer", "rate", "momentum", "weight_decay"),
    supports=_supports_sgd,
    example=_example(1, 1e-2, 0.9, 0.1, flags=(True,)),
    kernels=tuple(_configurations("sgd", "momentum", "nesterov", kinds=("copy", "random"))),
)


def adamw_update(
    param: Tensor,
    grad: Tensor,
    mu: Tensor,
    nu: Tensor,
    *,
    rate: Scalar,
    count: int | Tensor,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 0.0,
    copy: torch.dtype | None = None,
    seed: int | Tensor | None = None,
    leaf: int = 0,
) -> tuple[Tensor, ...]:
    """One update of AdamW: the new ``(param, mu, nu)``, and with `copy` the parameter in that dtype as a fourth. Nothing is written over.

    Args:
        param, grad, mu, nu: one shape, any. `param` is float32, bfloat16, float16 or float64, `grad` of any floating dtype, the moments
            are float32 (float64 beside float64).
        rate, b1, b2, eps, weight_decay: numbers, or 0-D tensors beside `param`, float64 so that 1 - b2 keeps its digits. A tensor's new
            value does not recompile.
        count: which update it is, from 1; a number or a 0-D int64 tensor.
        copy: torch.bfloat16 or float16, of a float32 parameter.
        seed, leaf: round what is bfloat16 at random, see `stochastic_round`; the step of the key is `count`.

    Differentiable in param, grad, mu, nu, rate and weight_decay; every rounding passes gradients as a cast does.
    `ValueError` for shapes, dtypes and devices that do not fit. Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2.

    >>> zero = torch.zeros(2)
    >>> p, mu, nu, low = adamw_update(torch.ones(2), torch.tensor([3.0, -0.5]), zero, zero, rate=0.5, count=1, copy=torch.bfloat16)
    >>> low
    tensor([0.5000, 1.5000], dtype=torch.bfloat16)
    """
    hyper = [number(v, param) for v in (rate, b1, b2, eps, weight_decay)]
    out = _adamw_update(param, grad, mu, nu, *hyper, *keeping(param, count, copy, seed, leaf))
    return out[: 3 if copy is None else 4]


def lion_update(
    param: Tensor,
    grad: Tensor,
    mu: Tensor,
    *,
    rate: Scalar,
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    weight_decay: Scalar = 0.0,
    count: int | Tensor = 0,
    copy: torch.dtype | None = None,
    seed: int | Tensor | None = None,
    leaf: int = 0,
) -> tuple[Tensor, ...]:
    """One update of Lion: the new ``(param, mu)``, and with `copy` the parameter in that dtype as a third.

    Arguments as in `adamw_update`; `count` is of use to the random rounding only. Chen et al. 2023, arXiv:2302.06675, algorithm 2.

    >>> lion_update(torch.ones(2), torch.tensor([3.0, -0.5]), torch.zeros(2), rate=0.5)[0]
    tensor([0.5000, 1.5000])
    """
    hyper = [number(v, param) for v in (rate, b1, b2, weight_decay)]
    out = _lion_update(param, grad, mu, *hyper, *keeping(param, count, copy, seed, leaf))
    return out[: 2 if copy is None else 3]


def sgd_update(
    param: Tensor,
    grad: Tensor,
    buffer: Tensor | None,
    *,
    rate: Scalar,
    momentum: Scalar = 0.0,
    weight_decay: Scalar = 0.0,
    nesterov: bool = False,
    count: int | Tensor = 0,
    copy: torch.dtype | None = None,
    seed: int | Tensor | None = None,
    leaf: int = 0,
) -> tuple[Tensor | None, ...]:
    """One update of SGD: the new ``(param, buffer)``, and with `copy` the parameter in that dtype as a third.

    `buffer` is the momentum, zeros at first, so that it begins with the gradient; None for none, and then it comes back as None. Other
    arguments as in `lion_update`. Numerics of `torch.optim.SGD`.

    >>> sgd_update(torch.ones(2), torch.tensor([3.0, -0.5]), None, rate=0.5)[0]
    tensor([-0.5000,  1.2500])
    """
    if buffer is None and (nesterov or not isinstance(momentum, int | float) or momentum):
        raise ValueError(
            f"sgd_update: momentum={momentum!r}, nesterov={nesterov} without a buffer; give zeros, as float32"
        )
    hyper = [number(v, param) for v in (rate, momentum, weight_decay)]
    new, m, low = _sgd_update(param, grad, buffer, *hyper, nesterov, *keeping(param, count, copy, seed, leaf))
    kept = (new, None if buffer is None else m)
    return kept if copy is None else (*kept, low)
