"""LAMB on a flat buffer of many leaves: every leaf's step is as long as the leaf.

    m' and v' as in AdamW;  r = m' / (1 - b1^t) / (sqrt(v') / sqrt(1 - b2^t) + eps) + wd p
    p' = p - rate |p| / |r| r,  with the norms of the leaf; the quotient is 1 where one of them is 0

Two operators, since the norms have to be known before the first step is taken, and may have to be summed over ranks in between:
`lamb_moments` gives m', v' and the squared norms, `lamb_apply` computes r again and applies it. Norms are sums of a fixed order: a program
sums SPAN elements of a leaf, and one program sums what the others left of it. No atomics.

You et al. 2019, arXiv:1904.00962, algorithm 2, with phi(z) = z.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fds.kernels.flat import (
    COPIES,
    KEEP,
    ROUNDING,
    Scalar,
    arrived,
    averaged,
    check,
    direction,
    divide,
    example_tensors,
    keep,
    keeping,
    lower,
    mass,
    moments,
    pull_direction,
    pull_moments,
    scalars,
    stored,
    toward,
    whole,
)
from fds.kernels.registry import Configured, define
from fds.kernels.rounding import draw, number
from fds.kernels.triton_or_not import jit, launch, tl

# --- reference ---


def _terms(hyper: Sequence[Tensor], count: Tensor) -> list[Tensor]:
    b1, b2, eps, weight_decay = hyper
    return [1 - b1, b2, 1 - b2, mass(b2, count).sqrt(), eps, mass(b1, count), weight_decay]


def _bounds(starts: Tensor, n: int) -> Tensor:
    """[L + 1] ascending from 0 to n, whatever `starts` holds: every element is in one leaf."""
    ends = starts.new_full((1,), n)
    return torch.cat([ends - n, starts[1:].clamp(0, n).cummax(0).values, ends])


def _leaf_of(starts: Tensor, n: int) -> Tensor:
    place = torch.arange(n, device=starts.device)
    return torch.searchsorted(_bounds(starts, n)[1:-1].contiguous(), place, right=True)


def _whole_step(p: Tensor, mu: Tensor, nu: Tensor, c: Sequence[Tensor]) -> Tensor:
    """r."""
    return direction(mu, nu, c) / c[5] + c[6] * p


def _moments(param: Tensor, grad: Tensor, mu: Tensor, nu: Tensor, starts: Tensor, *hyper: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    param, grad, mu, nu = whole(param, grad, mu, nu)
    c = lower(_terms(hyper[:-1], hyper[-1]), param)
    mu, nu = moments(grad, mu, nu, c)
    p = param.to(mu.dtype)
    both = torch.stack([p, _whole_step(p, mu, nu, c)]).view(2, -1).double().square()
    zeros = both.new_zeros((2, len(starts)))
    return mu, nu, zeros.index_add(1, _leaf_of(starts, p.numel()), both).to(mu.dtype)


def _ratio(squares: Tensor) -> Tensor:
    """|p| / |r|, [L]; 1 where one of them is 0, NaN where one is NaN."""
    p, r = squares.where(_moving(squares), 1.0).sqrt()
    return p / r


def _moving(squares: Tensor) -> Tensor:
    return ~(squares <= 0).any(0)


def _apply(param: Tensor, mu: Tensor, nu: Tensor, squares: Tensor, starts: Tensor, rate: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:  # fmt: skip
    *hyper, count, copy, seed, leaf = rest
    param, mu, nu = whole(param, mu, nu)
    c = lower(_terms(hyper, count), param)
    p = param.to(mu.dtype)
    speed = (rate.to(p.dtype) * _ratio(squares))[_leaf_of(starts, p.numel())].view(p.shape)
    return stored(p - speed * _whole_step(p, mu, nu, c), param, copy, seed, count, leaf)


# --- gradients ---


def _moments_backward(cotangents: Any, inputs: Any, outputs: Any, needs: list[bool]) -> tuple[Tensor | None, ...]:
    param, grad, mu, nu, starts, *hyper = inputs
    c = lower(_terms(hyper[:-1], hyper[-1]), param)
    mu, nu = moments(grad, mu, nu, c)
    p = param.to(mu.dtype)
    dmu, dnu, dsquares = (torch.zeros_like(o) if d is None else d for o, d in zip(outputs, cotangents, strict=True))
    each = 2 * dsquares[:, _leaf_of(starts, p.numel())].view(2, *p.shape)
    dr = each[1] * _whole_step(p, mu, nu, c)
    more = pull_direction(dr / c[5], mu, nu, c)
    dgrad, dmu, dnu = pull_moments(dmu + more[0], dnu + more[1], grad, c)
    return each[0] * p + c[6] * dr, dgrad, dmu, dnu, (dr * p).sum()


def _apply_backward(cotangents: Any, inputs: Any, outputs: Any, needs: list[bool]) -> tuple[Tensor | None, ...]:
    param, mu, nu, squares, starts, rate, *hyper, count, _, _, _ = inputs
    c = lower(_terms(hyper, count), param)
    p, leaf_of = param.to(mu.dtype), _leaf_of(starts, param.numel())
    g, r, ratio = arrived(cotangents[0], cotangents[1], mu), _whole_step(p, mu, nu, c), _ratio(squares)
    dratio = torch.zeros_like(ratio).index_add(0, leaf_of, -(g * r).view(-1))  # of rate * ratio
    dr = -g * (rate.to(p.dtype) * ratio)[leaf_of].view(p.shape)
    dmu, dnu = pull_direction(dr / c[5], mu, nu, c)
    slopes = 0.5 * ratio / squares.where(_moving(squares), 1.0)
    slopes = torch.stack([slopes[0], -slopes[1]]).where(_moving(squares), 0.0)
    return g + c[6] * dr, dmu, dnu, rate.to(p.dtype) * dratio * slopes, (dratio * ratio).sum(), (dr * p).sum()


# --- kernels ---


@jit
def whole_step(p, m, v, C):
    """r."""
    return divide(toward(m, v, C), tl.load(C + 5)) + tl.load(C + 6) * p


@jit
def extent(LEAF, SPAN_OF, BOUNDS, SPAN: tl.constexpr):
    """The elements that this program has of its leaf."""
    program = tl.program_id(0)
    span = tl.load(SPAN_OF + program)
    bounds = BOUNDS + tl.load(LEAF + program)
    return tl.maximum(tl.load(bounds), span * SPAN), tl.minimum(tl.load(bounds + 1), (span + 1) * SPAN)


@jit
def _moments_tile(P, G, M, V, C, NEW_M, NEW_V, start, first, last, MASKED: tl.constexpr, TILE: tl.constexpr):
    i = tl.arange(0, TILE)
    mask = None
    if MASKED:
        mask = (i >= first - start) & (i < last - start)
    p = tl.load(P + start + i, mask=mask).to(C.dtype.element_ty)
    g = tl.load(G + start + i, mask=mask).to(C.dtype.element_ty)
    m, v = averaged(tl.load(M + start + i, mask=mask), tl.load(V + start + i, mask=mask), g, C)
    tl.store(NEW_M + start + i, m, mask=mask)
    tl.store(NEW_V + start + i, v, mask=mask)
    r = whole_step(p, m, v, C)
    if MASKED:
        p, r = tl.where(mask, p, 0.0), tl.where(mask, r, 0.0)
    return p * p, r * r


@jit
def moments_kernel(P, G, M, V, C, LEAF, SPAN_OF, BOUNDS, NEW_M, NEW_V, PARTS, SPAN: tl.constexpr, TILE: tl.constexpr):
    """New moments of a span of one leaf, and its part of the leaf's squared norms. Tiles are aligned; whole ones have no mask."""
    first, last = extent(LEAF, SPAN_OF, BOUNDS, SPAN)
    own = tl.zeros([TILE], C.dtype.element_ty)
    change = tl.zeros([TILE], C.dtype.element_ty)
    for tile in range(first // TILE, (last + TILE - 1) // TILE):
        start = tile * TILE
        if (start >= first) & (start + TILE <= last):
            p, r = _moments_tile(P, G, M, V, C, NEW_M, NEW_V, start, first, last, False, TILE)
        else:
            p, r = _moments_tile(P, G, M, V, C, NEW_M, NEW_V, start, first, last, True, TILE)
        own += p
        change += r
    tl.store(PARTS + 2 * tl.program_id(0), tl.sum(own, 0))
    tl.store(PARTS + 2 * tl.program_id(0) + 1, tl.sum(change, 0))


@jit
def squares_kernel(PARTS, ENDS, SQUARES, leaves, BLOCK: tl.constexpr):
    """Squared norms of one leaf, of the parts of its programs."""
    leaf = tl.program_id(0)
    before = tl.load(ENDS + leaf - 1, mask=leaf > 0, other=0)
    last = tl.load(ENDS + leaf)
    own = tl.zeros([BLOCK], SQUARES.dtype.element_ty)
    change = tl.zeros([BLOCK], SQUARES.dtype.element_ty)
    for start in range(before, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        own += tl.load(PARTS + 2 * at, mask=at < last, other=0.0)
        change += tl.load(PARTS + 2 * at + 1, mask=at < last, other=0.0)
    tl.store(SQUARES + leaf, tl.sum(own, 0))
    tl.store(SQUARES + leaves + leaf, tl.sum(change, 0))


@jit
def _apply_tile(P, M, V, C, SEED, STEP, NEW_P, COPY, start, first, last, speed, leaf,
                COPIED: tl.constexpr, STOCHASTIC: tl.constexpr, MASKED: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    i = tl.arange(0, TILE)
    mask = None
    if MASKED:
        mask = (i >= first - start) & (i < last - start)
    p = tl.load(P + start + i, mask=mask).to(C.dtype.element_ty)
    r = whole_step(p, tl.load(M + start + i, mask=mask), tl.load(V + start + i, mask=mask), C)
    noise = draw(SEED, STEP, leaf, start, 0, TILE) if STOCHASTIC else 0
    keep(NEW_P, COPY, start + i, p - speed * r, noise, mask, COPIED, STOCHASTIC)


@jit
def apply_kernel(P, M, V, C, SPEED, LEAF, SPAN_OF, BOUNDS, SEED, STEP, NEW_P, COPY, leaf,
                 COPIED: tl.constexpr, STOCHASTIC: tl.constexpr, SPAN: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """A span of one leaf, stepped with the leaf's own speed."""
    first, last = extent(LEAF, SPAN_OF, BOUNDS, SPAN)
    speed = tl.load(SPEED + tl.load(LEAF + tl.program_id(0)))
    for tile in range(first // TILE, (last + TILE - 1) // TILE):
        start = tile * TILE
        if (start >= first) & (start + TILE <= last):
            _apply_tile(P, M, V, C, SEED, STEP, NEW_P, COPY, start, first, last, speed, leaf, COPIED, STOCHASTIC, False, TILE)  # fmt: skip
        else:
            _apply_tile(P, M, V, C, SEED, STEP, NEW_P, COPY, start, first, last, speed, leaf, COPIED, STOCHASTIC, True, TILE)  # fmt: skip


# --- launchers ---

_SIZES = {"SPAN": 8192, "TILE": 1024}


def _programs(starts: Tensor, n: int) -> tuple[int, Tensor, Tensor, Tensor, Tensor]:
    """How many programs there may be, the leaf and the span of each, the bounds of the leaves, and the end of each leaf's programs.

    A program has what one leaf has of one span. All of it stays on the device; programs too many have an empty extent.
    """
    bounds, span = _bounds(starts, n), _SIZES["SPAN"]
    first, last = bounds[:-1], bounds[1:]
    count = torch.where(last > first, (last + span - 1) // span - first // span, 0)
    ends = count.cumsum(0)
    program = torch.arange(-(-n // span) + len(starts), device=starts.device)
    leaf = torch.searchsorted(ends, program, right=True).clamp(max=len(starts) - 1)
    spans = (first // span - (ends - count))[leaf] + program
    return len(program), leaf, spans, bounds, ends


def _launch_moments(param: Tensor, grad: Tensor, mu: Tensor, nu: Tensor, starts: Tensor, *hyper: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    c = torch.stack(lower(_terms(hyper[:-1], hyper[-1]), param))
    new_mu, new_nu, squares = torch.empty_like(mu), torch.empty_like(nu), c.new_zeros((2, len(starts)))
    n = param.numel()
    if n and len(starts):
        count, leaf, spans, bounds, ends = _programs(starts, n)
        parts = c.new_empty((count, 2))
        at = (param, grad, mu, nu, c, leaf, spans, bounds, new_mu, new_nu, parts)
        launch(moments_kernel, (count,), *at, **_SIZES)
        launch(squares_kernel, (len(starts),), parts, ends, squares, len(starts), BLOCK=1024)
    return new_mu, new_nu, squares


def _launch_apply(param: Tensor, mu: Tensor, nu: Tensor, squares: Tensor, starts: Tensor, rate: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:  # fmt: skip
    *hyper, step, copy, seed, number_of = rest
    c, low, n = torch.stack(lower(_terms(hyper, step), param)), COPIES[copy], param.numel()
    new, copied = torch.empty_like(param), None if low is None else torch.empty_like(param, dtype=low)
    if n and len(starts):
        count, leaf, spans, bounds, _ = _programs(starts, n)
        speed = rate.to(c.dtype) * _ratio(squares)
        key = (step if seed is None else seed, step)
        at = (param, mu, nu, c, speed, leaf, spans, bounds, *key, new, param if copied is None else copied)
        flags = {"COPIED": low is not None, "STOCHASTIC": seed is not None}
        launch(apply_kernel, (count,), *at, number_of, **flags, **_SIZES)
    return new, c.new_empty(0) if copied is None else copied


_TABLES = dict.fromkeys(("LEAF", "SPAN_OF", "BOUNDS", "ENDS", "SEED", "STEP"), "*i64") | {
    "leaf": "i32",
    "leaves": "i32",
}
_WIDE = dict.fromkeys(("M", "V", "C", "SPEED", "NEW_M", "NEW_V", "PARTS", "SQUARES"), "*fp32")


def _moments_configurations() -> Iterator[Configured]:
    for param, grad in (("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "bf16"), ("fp16", "fp16")):
        yield Configured(moments_kernel, {**_TABLES, **_WIDE, "P": f"*{param}", "G": f"*{grad}"}, _SIZES)
    yield Configured(squares_kernel, _TABLES | _WIDE, {"BLOCK": 1024}, wide_loads=False)


def _apply_configurations() -> Iterator[Configured]:
    for param, copy, stochastic in (
        ("fp32", "", False),
        ("fp32", "bf16", False),
        ("fp32", "bf16", True),
        ("bf16", "", True),
    ):
        types = {**_TABLES, **_WIDE, "P": f"*{param}", "NEW_P": f"*{param}", "COPY": f"*{copy or param}"}
        flags = {"COPIED": bool(copy), "STOCHASTIC": stochastic}
        yield Configured(apply_kernel, types, {**flags, **_SIZES}, contains=ROUNDING[copy or param])


# --- operators ---


def _check_starts(name: str, param: Tensor, starts: Tensor) -> None:
    if starts.dim() != 1 or starts.dtype != torch.int64 or starts.device != param.device:
        got = f"{tuple(starts.shape)} {starts.dtype} on {starts.device}"
        raise ValueError(f"{name}: starts {got}, required [leaves] torch.int64 on {param.device}")
    if param.numel() and not len(starts):
        raise ValueError(f"{name}: no leaf in starts, and {param.numel()} parameters; use starts=torch.zeros(1).long()")


def _supports_moments(param: Tensor, grad: Tensor, mu: Tensor, nu: Tensor, starts: Tensor, *rest: Any) -> None:
    hyper = zip(("b1", "b2", "eps", "weight_decay"), rest[:4], strict=True)
    check("lamb_moments", param, grad, {"mu": mu, "nu": nu}, hyper, (rest[4], "", None, 0))
    _check_starts("lamb_moments", param, starts)


def _supports_apply(param: Tensor, mu: Tensor, nu: Tensor, squares: Tensor, starts: Tensor, *rest: Any) -> None:
    hyper = zip(("rate", "b1", "b2", "eps", "weight_decay"), rest[:5], strict=True)
    check("lamb_apply", param, param, {"mu": mu, "nu": nu}, hyper, rest[5:])
    _check_starts("lamb_apply", param, starts)
    if squares.shape != (2, len(starts)) or squares.dtype != mu.dtype or squares.device != mu.device:
        got = f"{tuple(squares.shape)} {squares.dtype} on {squares.device}"
        raise ValueError(f"lamb_apply: squares {got}, required {(2, len(starts))} {mu.dtype} on {mu.device}")


def _example_moments(seed: int, dtype: torch.dtype) -> tuple[Any, ...]:
    starts = torch.tensor([0, 20, 20, 41])
    return *example_tensors(seed, dtype, 4), starts, *scalars(0.9, 0.99, 1e-8, 0.1), torch.tensor(3)


def _example_apply(seed: int, dtype: torch.dtype) -> tuple[Any, ...]:
    (p, _, mu, nu), squares = (
        example_tensors(seed, dtype, 4),
        torch.tensor([[4.0, 0.0, 2.0, 5.0], [1.0, 0.0, 3.0, 2.0]]),
    )
    hyper = scalars(1e-2, 0.9, 0.99, 1e-8, 0.1)
    return p, mu, nu, squares.to(mu.dtype), torch.tensor([0, 20, 20, 41]), *hyper, torch.tensor(3), "", None, 0


_WHY = (
    "40 bytes a parameter with the other half of LAMB (float32 parameter and moments, bfloat16 gradient and copy), 8.3 ms for 1e9 on an H200, "
    "in three launches for any number of leaves; a compiler makes a reduction of every leaf"
)

_lamb_moments = define(
    "lamb_moments",
    "(Tensor param, Tensor grad, Tensor mu, Tensor nu, Tensor starts, Tensor b1, Tensor b2, Tensor eps, Tensor weight_decay, Tensor count) -> (Tensor, Tensor, Tensor)",
    formula="LAMB's moments, and the squared norms [2, leaves] of the parameters and of their steps",
    why=f"22 of the {_WHY}",
    reference=_moments,
    kernel=_launch_moments,
    backward=_moments_backward,
    differentiable=("param", "grad", "mu", "nu", "weight_decay"),
    supports=_supports_moments,
    example=_example_moments,
    kernels=tuple(_moments_configurations()),
)

_lamb_apply = define(
    "lamb_apply",
    f"(Tensor param, Tensor mu, Tensor nu, Tensor squares, Tensor starts, Tensor rate, Tensor b1, Tensor b2, Tensor eps, Tensor weight_decay, {KEEP}) -> (Tensor, Tensor)",
    formula="LAMB's parameter, and copy in low precision, of the new moments and the leaves' squared norms",
    why=f"18 of the {_WHY}",
    reference=_apply,
    kernel=_launch_apply,
    backward=_apply_backward,
    differentiable=("param", "mu", "nu", "squares", "rate", "weight_decay"),
    supports=_supports_apply,
    example=_example_apply,
    kernels=tuple(_apply_configurations()),
)


def lamb_update(
    param: Tensor,
    grad: Tensor,
    mu: Tensor,
    nu: Tensor,
    starts: Tensor,
    *,
    rate: Scalar,
    count: int | Tensor,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-6,
    weight_decay: Scalar = 0.0,
    reduce: Callable[[Tensor], Tensor] = lambda squares: squares,
    copy: torch.dtype | None = None,
    seed: int | Tensor | None = None,
    leaf: int = 0,
) -> tuple[Tensor, ...]:
    """One update of LAMB: the new ``(param, mu, nu)``, and with `copy` the parameter in that dtype as a fourth.

    Args:
        starts: [leaves] int64, ascending from 0: where each leaf begins in the flat buffer; the last one goes to its end, and may have
            padding of zeros there. A leaf without elements here is allowed, as on a rank that has none of it.
        reduce: what to do with the squared norms [2, leaves] of parameters and steps before they are used: their sum over the ranks that
            have parts of the leaves.

    Other arguments, gradients and errors as in `adamw_update`. You et al. 2019, arXiv:1904.00962, algorithm 2.

    >>> p, zero = torch.tensor([3.0, 4.0, 0.0]), torch.zeros(3)
    >>> starts = torch.tensor([0, 2])  # leaves of two and of one element
    >>> lamb_update(p, torch.tensor([1.0, 1.0, 0.1]), zero, zero, starts, rate=0.1, count=1)[0]  # steps of length 0.5, and of 0.1 from a norm of 0
    tensor([ 2.6464,  3.6464, -0.1000])
    """
    hyper = [number(v, param) for v in (b1, b2, eps, weight_decay)]
    rest = keeping(param, count, copy, seed, leaf)
    mu, nu, squares = _lamb_moments(param, grad, mu, nu, starts, *hyper, rest[0])
    new, low = _lamb_apply(param, mu, nu, reduce(squares), starts, number(rate, param), *hyper, *rest)
    return (new, mu, nu) if copy is None else (new, mu, nu, low)
