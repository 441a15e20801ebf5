"""AdamW whose moments take a byte each, with a float32 scale for every block of 256.

    mu:  s sign(q) (q / 127)^4,    q in [-127, 127], s = max |mu| of the block; rounded to the nearest q
    nu:  s 2^((q - 255) / 8),      q in [1, 255], 0 for 0, s = max nu of the block; rounded at random, so that its mean is nu

A code has to resolve numbers far below the largest of their block. That of mu has steps of 3 % at the top and ends at 3.8e-9 s; of the powers
2 to 6 it is near the best wherever scales within a block differ by less than three orders of magnitude. That of nu has steps of 9 % everywhere
down to 2.8e-10 s, where it ends: smaller numbers, but for 0, count as that one. None becomes 0, which would make a step without bound (Li et
al. 2023, arXiv:2309.01507, section 4.1). The average of squares moves by 1 - b2, 0.1 % of itself, in an update: less than half a step of any
code of 8 bits, so that with the nearest code it would stand still, and never fall. Hence the random rounding.

Both codes are a few multiplications: with log2 and exp2 as functions the kernel had a third more instructions. m^8 of a mantissa m in [1, 2)
has the exponent floor(8 log2 m), and u < (x - low) / (high - low), for neighbours low and high = 2^(1/8) low, is
(x / low)^8 > (1 + u (2^(1/8) - 1))^8.

The moments of a step are those before they are rounded. Dettmers et al. 2022, arXiv:2110.02861, for blocks and codes that are not linear.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fds.kernels.flat import (
    COPIES,
    KEEP,
    ROUNDING,
    Scalar,
    adam_terms,
    averaged,
    check,
    example_tensors,
    keep,
    keeping,
    lower,
    moments,
    scalars,
    step,
    stepped,
    stored,
    whole,
)
from fds.kernels.registry import Configured, define
from fds.kernels.rounding import check_key, draw, number, random_bits
from fds.kernels.triton_or_not import jit, launch, tl

BLOCK = 256  # elements that share a scale
_STEP = 2.0**0.125 - 1  # from one code of nu to the next, of the number


# --- reference ---


def _scaled(x: Tensor) -> tuple[Tensor, Tensor]:
    """[blocks, 256] over the largest of each block, and that [blocks]; a block with inf or NaN has the scale NaN, and is 0 over it."""
    size = x.abs()
    top = size.where(size < torch.inf, torch.inf).amax(1)
    top = top.where(top < torch.inf, torch.nan)
    up = torch.where(top < 2.0**-64, 2.0**64, 1.0)  # the reciprocal of a very small number is inf
    y = x * up[:, None] * (1 / (top * up))[:, None]
    return torch.where(top[:, None] > 0, y, 0.0), top


def encode_mu(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 and scales of [blocks, 256]."""
    y, top = _scaled(x)
    size = (127 * y.abs().sqrt().sqrt() + 0.5).floor()
    return torch.where(y < 0, -size, size).to(torch.int8), top


def decode_mu(q: Tensor, top: Tensor) -> Tensor:
    """What `encode_mu` stands for."""
    y = q.to(top.dtype)
    y = y * y
    return (top / 127**4)[:, None] * torch.where(q < 0, -(y * y), y * y)


def _mantissa(bits: Tensor) -> Tensor:
    """In [1, 2)."""
    return ((bits & 0x7FFFFF) | 0x3F800000).view(torch.float32)


def _eighth(x: Tensor) -> Tensor:
    """x^8."""
    x = x * x
    x = x * x
    return x * x


def encode_nu(x: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 and scales of [blocks, 256], with 16 random bits for each."""
    y, top = _scaled(x)
    own = y.view(torch.int32)
    power = _eighth(_mantissa(own)).view(torch.int32)
    code = 255 + 8 * ((own >> 23) - 127) + ((power >> 23) - 127)
    up = _mantissa(power) > _eighth(1 + (bits.to(x.dtype) + 0.5) * (_STEP / 65536))
    return torch.where(y > 0, (code + up).clamp(min=1), 0).to(torch.uint8), top


def decode_nu(q: Tensor, top: Tensor) -> Tensor:
    """What `encode_nu` stands for."""
    code = q.to(top.dtype)
    return top[:, None] * torch.where(code > 0, ((code - 255) / 8).exp2(), 0.0)


def _blocks(x: Tensor) -> Tensor:
    """[blocks, 256], with zeros at the end."""
    return F.pad(x.reshape(-1), (0, -x.numel() % BLOCK)).view(-1, BLOCK)


def _reference(param: Tensor, grad: Tensor, mu: Tensor, nu: Tensor, mu_scale: Tensor, nu_scale: Tensor, *rest: Any) -> tuple[Tensor, ...]:  # fmt: skip
    *hyper, count, copy, seed, leaf, state_seed = rest
    param, grad, mu, nu = whole(param, grad, mu, nu)
    c, n = lower(adam_terms(hyper, count), param), param.numel()
    m, v = decode_mu(_blocks(mu), mu_scale), decode_nu(_blocks(nu), nu_scale)
    m, v = moments(_blocks(grad), m, v, c)
    bits = random_bits(m.numel(), state_seed, count, leaf, 1).view(m.shape)
    (q, mu_scale), (k, nu_scale) = encode_mu(m), encode_nu(v, bits)
    m, v, q, k = (t.view(-1)[:n].view(param.shape) for t in (m, v, q, k))
    new, low = stored(step(param.to(m.dtype), m, v, c), param, copy, seed, count, leaf)
    return new, q.clone(), k.clone(), mu_scale, nu_scale, low


# --- kernel ---


@jit
def scaled(x):
    """`_scaled` of a tile of blocks. As integers, NaN is above inf, and inf above all numbers."""
    top = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    top = tl.where(top < 0x7F800000, top.to(tl.float32, bitcast=True), float("nan"))  # pyright: ignore
    up = tl.where(top < 5.421010862427522e-20, 1.8446744073709552e19, 1.0)
    y = x * up[:, None] * tl.div_rn(tl.full(top.shape, 1.0, tl.float32), top * up)[:, None]
    return tl.where(top[:, None] > 0, y, 0.0), top


@jit
def mantissa(bits):
    """`_mantissa`."""
    return ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)


@jit
def eighth(x):
    """`_eighth`."""
    x = x * x
    x = x * x
    return x * x


@jit
def mu_of(q, top):
    """`decode_mu`."""
    y = q.to(tl.float32)
    y = y * y
    return tl.div_rn(top, 260144641.0)[:, None] * tl.where(q < 0, -(y * y), y * y)


@jit
def nu_of(q, top):
    """`decode_nu`."""
    code = q.to(tl.float32)
    return top[:, None] * tl.where(code > 0, tl.exp2((code - 255) * 0.125), 0.0)


@jit
def code_of_mu(y):
    """`encode_mu` of scaled numbers."""
    size = tl.floor(127 * tl.sqrt(tl.sqrt(tl.abs(y))) + 0.5)
    return tl.where(y < 0, -size, size).to(tl.int8)


@jit
def code_of_nu(y, noise):
    """`encode_nu` of scaled numbers."""
    own = y.to(tl.int32, bitcast=True)
    power = eighth(mantissa(own)).to(tl.int32, bitcast=True)
    code = 255 + 8 * ((own >> 23) - 127) + ((power >> 23) - 127)
    up = mantissa(power) > eighth(1 + (noise.to(tl.float32) + 0.5) * 1.381038401264308e-06)
    code = tl.maximum(tl.where(up, code + 1, code), 1)
    return tl.where(y > 0, code, 0).to(tl.uint8)


@jit
def _tile(P, G, M, V, MS, VS, C, SEED, STATE_SEED, STEP, NEW_P, NEW_M, NEW_V, NEW_MS, NEW_VS, COPY, start, n, leaf,
          COPIED: tl.constexpr, STOCHASTIC: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    row = tl.arange(0, ROWS)
    i = row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    mask, rows = None, None
    if MASKED:
        mask, rows = i < n - start, row * WIDTH < n - start
    p = tl.load(P + start + i, mask=mask).to(tl.float32)
    g = tl.load(G + start + i, mask=mask).to(tl.float32)
    at = start // WIDTH + row
    m = mu_of(tl.load(M + start + i, mask=mask), tl.load(MS + at, mask=rows))
    v = nu_of(tl.load(V + start + i, mask=mask), tl.load(VS + at, mask=rows))
    m, v = averaged(m, v, g, C)
    p = stepped(p, m, v, C)
    noise = tl.reshape(draw(SEED, STEP, leaf, start, 0, ROWS * WIDTH), [ROWS, WIDTH]) if STOCHASTIC else 0
    keep(NEW_P, COPY, start + i, p, noise, mask, COPIED, STOCHASTIC)
    if MASKED:
        m, v = tl.where(mask, m, 0.0), tl.where(mask, v, 0.0)
    y, top = scaled(m)
    tl.store(NEW_M + start + i, code_of_mu(y), mask=mask)
    tl.store(NEW_MS + at, top, mask=rows)
    y, top = scaled(v)
    noise = tl.reshape(draw(STATE_SEED, STEP, leaf, start, 1, ROWS * WIDTH), [ROWS, WIDTH])
    tl.store(NEW_V + start + i, code_of_nu(y, noise), mask=mask)
    tl.store(NEW_VS + at, top, mask=rows)


@jit
def adamw8bit_kernel(P, G, M, V, MS, VS, C, SEED, STATE_SEED, STEP, NEW_P, NEW_M, NEW_V, NEW_MS, NEW_VS, COPY, n, leaf,
                     COPIED: tl.constexpr, STOCHASTIC: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """ROWS blocks. Whole ones have no mask, so that their loads are wide whatever n is."""
    start = tl.program_id(0).to(tl.int64) * ROWS * WIDTH
    if start + ROWS * WIDTH <= n:
        _tile(P, G, M, V, MS, VS, C, SEED, STATE_SEED, STEP, NEW_P, NEW_M, NEW_V, NEW_MS, NEW_VS, COPY, start, n, leaf,
              COPIED, STOCHASTIC, False, ROWS, WIDTH)  # fmt: skip
    else:
        _tile(P, G, M, V, MS, VS, C, SEED, STATE_SEED, STEP, NEW_P, NEW_M, NEW_V, NEW_MS, NEW_VS, COPY, start, n, leaf,
              COPIED, STOCHASTIC, True, ROWS, WIDTH)  # fmt: skip


_SIZES = {"ROWS": 4, "WIDTH": BLOCK}


def _launch(param: Tensor, grad: Tensor, mu: Tensor, nu: Tensor, mu_scale: Tensor, nu_scale: Tensor, *rest: Any) -> tuple[Tensor, ...]:  # fmt: skip
    *hyper, count, copy, seed, leaf, state_seed = rest
    c, low, n = torch.stack(lower(adam_terms(hyper, count), param)), COPIES[copy], param.numel()
    new = [torch.empty_like(t) for t in (param, mu, nu, mu_scale, nu_scale)]
    copied = c.new_empty(0) if low is None else torch.empty_like(param, dtype=low)
    at = [param, grad, mu, nu, mu_scale, nu_scale, c, state_seed if seed is None else seed, state_seed, count, *new]
    flags = {"COPIED": low is not None, "STOCHASTIC": seed is not None}
    grid = (-(-n // (_SIZES["ROWS"] * BLOCK)),)
    launch(adamw8bit_kernel, grid, *at, param if low is None else copied, n, leaf, **flags, **_SIZES)
    return (*new, copied)


def _configurations() -> Iterator[Configured]:
    wide = ("MS", "VS", "C", "NEW_MS", "NEW_VS")
    types = dict.fromkeys(wide, "*fp32") | dict.fromkeys(("SEED", "STATE_SEED", "STEP"), "*i64")
    types |= {"M": "*i8", "NEW_M": "*i8", "V": "*u8", "NEW_V": "*u8", "n": "i32", "leaf": "i32"}
    for param, copy, stochastic in (
        ("fp32", "", False),
        ("fp32", "bf16", False),
        ("fp32", "bf16", True),
        ("bf16", "", True),
    ):
        each = {"P": f"*{param}", "NEW_P": f"*{param}", "G": "*bf16", "COPY": f"*{copy or param}"}
        flags = {"COPIED": bool(copy), "STOCHASTIC": stochastic}
        yield Configured(adamw8bit_kernel, types | each, {**flags, **_SIZES}, contains=ROUNDING[copy or param])


# --- operator ---


def _supports(param: Tensor, grad: Tensor, mu: Tensor, nu: Tensor, mu_scale: Tensor, nu_scale: Tensor, *rest: Any) -> None:  # fmt: skip
    name, scales = "adamw8bit_update", (-(-param.numel() // BLOCK),)
    hyper = zip(("rate", "b1", "b2", "eps", "weight_decay"), rest[:5], strict=True)
    check(name, param, grad, {}, hyper, rest[5:9])
    check_key(name, param, rest[9], rest[5], rest[8])
    if param.dtype == torch.float64:
        raise ValueError(f"{name}: param {param.dtype}; the nearest supported dtype is torch.float32")
    wanted = {
        "mu": (mu, tuple(param.shape), torch.int8),
        "nu": (nu, tuple(param.shape), torch.uint8),
        "mu_scale": (mu_scale, scales, torch.float32),
        "nu_scale": (nu_scale, scales, torch.float32),
    }
    for n, (t, shape, dtype) in wanted.items():
        if tuple(t.shape) != shape or t.dtype != dtype or t.device != param.device:
            got = f"{tuple(t.shape)} {t.dtype} on {t.device}"
            raise ValueError(f"{name}: {n} {got}, required {shape} {dtype} on {param.device}")


def _example(seed: int, dtype: torch.dtype) -> tuple[Any, ...]:
    p, g, _, nu = example_tensors(seed, torch.float32, 4)
    q, scale = torch.arange(-32, 33, dtype=torch.int8).view(5, 13), nu.amax()[None]
    hyper = scalars(1e-2, 0.9, 0.99, 1e-8, 0.1)
    return p, g, q, (q + 190).to(torch.uint8), scale, scale, *hyper, torch.tensor(3), "", None, 0, torch.tensor(seed)


_update = define(
    "adamw8bit_update",
    "(Tensor param, Tensor grad, Tensor mu, Tensor nu, Tensor mu_scale, Tensor nu_scale, Tensor rate, Tensor b1, Tensor b2, Tensor eps, "
    f"Tensor weight_decay, {KEEP}, Tensor state_seed) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    formula="AdamW's parameter, moments in 8 bits with their scales, and copy in low precision",
    why="16 bytes a parameter (float32 parameter, bfloat16 gradient and copy) instead of 28, 3.3 ms for 1e9 on an H200, and 2 bytes of state "
    "instead of 8; a compiler makes a kernel each of the moments, their largest, and their codes",
    reference=_reference,
    kernel=_launch,
    supports=_supports,
    example=_example,
    kernels=tuple(_configurations()),
    inline=False,
)


def adamw8bit_update(
    param: Tensor,
    grad: Tensor,
    mu: Tensor,
    nu: Tensor,
    mu_scale: Tensor,
    nu_scale: Tensor,
    *,
    rate: Scalar,
    count: int | Tensor,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 0.0,
    state_seed: int | Tensor = 0,
    copy: torch.dtype | None = None,
    seed: int | Tensor | None = None,
    leaf: int = 0,
) -> tuple[Tensor, ...]:
    """One update of AdamW with moments in 8 bits: the new ``(param, mu, nu, mu_scale, nu_scale)``, and with `copy` a copy as a sixth.

    Args:
        param, grad: one shape, any; float32, bfloat16 or float16 each.
        mu: int8, nu: uint8, of that shape; mu_scale, nu_scale: float32 [ceil(n / 256)]. All zeros at first.
        state_seed: the seed of nu's rounding, whose key has `count` and `leaf` too.

    Other arguments as in `adamw_update`. No derivative. A gradient that is not finite makes its block's moments NaN: skip such an update.
    `ValueError` for shapes, dtypes and devices that do not fit.

    >>> q, s = torch.zeros(2, dtype=torch.int8), torch.zeros(1)
    >>> adamw8bit_update(torch.ones(2), torch.tensor([3.0, -0.5]), q, q.to(torch.uint8), s, s, rate=0.5, count=1)[1]
    tensor([127, -81], dtype=torch.int8)
    """
    hyper = [number(v, param) for v in (rate, b1, b2, eps, weight_decay)]
    rest = (*keeping(param, count, copy, seed, leaf), number(state_seed, param, torch.int64))
    out = _update(param, grad, mu, nu, mu_scale, nu_scale, *hyper, *rest)
    return out[: 5 if copy is None else 6]
