"""Tokens drawn from logits: temperature, top-k, top-p, min-p (in this order), without a sort and without waiting for the device.

    w_i = floor(2^40 exp((x_i - max x) / T)),  W(t) = sum of w_i over x_i >= t
    top-k: the largest t with #{x_i >= t} >= k;  top-p: the largest t with W(t) >= p W(top-k);  min-p: w_i >= min_p 2^40

A draw is the first token in the order of the vocabulary whose sum of kept weights exceeds r = floor(u W / 2^62), with u from Philox keyed by
the seed, at the counter (stream, position). So it depends on its row alone, whatever else is in the batch.

Equal logits are treated alike: of a tie at the boundary, all are kept. That is the rule of Hugging Face for top-k; for top-p there, the order
in a sort decides. Everything after ``(max x - x) / T`` is arithmetic on integers, exact and in any order: reference and kernel, CPU and GPU, keep
the same tokens and draw the same ones. A token below 2^-40 of the most likely one has no weight.

The kernel has a program for each row. One pass over the logits keeps the four largest of each of 2048 lanes: whatever exceeds the largest of
all fourth ones is in these lists. A threshold is searched on the ordered bits of floats, in registers where the lists reach far enough, and
else by passes over the row, two bits a pass. Holtzman et al. 2020, arXiv:1904.09751 (top-p); Nguyen et al. 2024, arXiv:2407.01082 (min-p);
Salmon et al. 2011, doi:10.1145/2063384.2063405 (Philox).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fds.kernels.registry import Configured, define
from fds.kernels.rounding import philox
from fds.kernels.triton_or_not import jit, launch, tl

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TILE, _WARPS, _MOST = 2048, 16, 512  # lanes, and tiles in a row at most
_RATE = 48408812.0  # 2^25 log2(e): exponents of 2 with 25 bits behind the point
_LIMIT = 41.0 * 2**25
# 2^-f on [0, 1], alternating signs, of 2^31: equal at both ends, relative error 1.3e-7, falling.
_POLYNOMIAL = (2147483648, 1488515800, 515791228, 118771735, 19791210, 2036727)


# --- reference ---


def _random(seed: Tensor, stream: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """Two numbers below 2^31 for each row."""
    key, low, high = (((n & 0xFFFFFFFF), (n >> 32) & 0xFFFFFFFF) for n in (seed, stream, position))
    a, b, _, _ = philox(key, (*low, *high))
    return a >> 1, b >> 1


def _weights(x: Tensor, best: Tensor, temperature: Tensor) -> Tensor:
    """2^40 exp((x - best) / temperature) as int64; at temperature 0, of the best alone."""
    rate = torch.full_like(temperature, _RATE) / temperature.abs()  # of -0 as of 0
    u = ((best - x) * rate).masked_fill(x == best, 0.0).clamp(max=_LIMIT).long()
    f, y = (u & 0x1FFFFFF) << 6, torch.full_like(u, _POLYNOMIAL[-1])
    for c in _POLYNOMIAL[-2::-1]:
        y = c - ((f * y) >> 31)
    return (y << 9) >> (u >> 25)


def _share(total: Tensor, part: Tensor) -> Tensor:
    """floor(part total), at least 1; `part` in 24 bits."""
    of = (part * 2.0**24).long()
    return ((total >> 24) * of + (((total & 0xFFFFFF) * of) >> 24)).clamp(min=1)


def _threshold(x: Tensor, w: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The least logit [B, 1] that top-k and top-p keep."""
    n = x.shape[-1]
    values, order = x.sort(-1, descending=True)
    kth = values.gather(1, torch.where((top_k > 0) & (top_k < n), top_k - 1, n - 1)[:, None])
    w = w.gather(1, order).masked_fill(values < kth, 0)
    before = w.cumsum(-1) - w
    inside = (before < _share(w.sum(-1), top_p)[:, None]) | (top_p >= 1.0)[:, None]
    return values.masked_fill(~inside | (values < kth), torch.inf).amin(-1, keepdim=True)


def _sample(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor, stream: Tensor, position: Tensor, truncated: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    x = logits.float()
    best = x.amax(-1)
    fine = (best > -torch.inf) & (temperature >= 0) & (temperature < torch.inf) & (top_k >= 0) & (top_p > 0) & (top_p <= 1) & (min_p >= 0) & (min_p <= 1)  # fmt: skip
    x, best = x.masked_fill(~fine[:, None], 0.0), best.masked_fill(~fine, 0.0)
    w = _weights(x, best[:, None], temperature.masked_fill(~fine, 1.0)[:, None])
    keep = w >= (min_p.masked_fill(~fine, 0.0) * 2.0**40).long().clamp(min=1)[:, None]
    if truncated:
        keep = keep & (x >= _threshold(x, w, top_k.masked_fill(~fine, 0), top_p.masked_fill(~fine, 1.0)))
    sums = w.masked_fill(~keep, 0).cumsum(-1)
    total, (a, b) = sums[:, -1], _random(seed, stream, position)
    high, low = total >> 31, total & 0x7FFFFFFF
    drawn = high * a + ((high * b + low * a + ((low * b) >> 31)) >> 31)
    token = (sums <= drawn.masked_fill(temperature == 0, 0)[:, None]).sum(-1)
    kept, least = keep.sum(-1), x.masked_fill(~keep, torch.inf).amin(-1)
    return token.masked_fill(~fine, -1), kept.masked_fill(~fine, 0), least.masked_fill(~fine, torch.nan)


# --- kernel ---


@jit
def ordered(x):
    """int32 in the order of floats, from their bits; -0 as 0, a NaN above all."""
    bits = x.to(tl.int32, bitcast=True)
    key = tl.where(x == 0.0, 0, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return tl.where(x != x, 0x7FFFFFFF, key)


@jit
def unordered(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@jit
def weight(x, best, rate):
    """`_weights`."""
    u = tl.minimum(tl.where(x == best, 0.0, (best - x) * rate), 1375731712.0).to(tl.int32)
    f = (u & 0x1FFFFFF).to(tl.uint32) << 7
    y = 19791210 - tl.umulhi(f, tl.full(f.shape, 2036727, tl.uint32))
    y = 118771735 - tl.umulhi(f, y)
    y = 515791228 - tl.umulhi(f, y)
    y = 1488515800 - tl.umulhi(f, y)
    y = 2147483648 - tl.umulhi(f, y)
    return (y.to(tl.int64) << 9) >> (u >> 25).to(tl.int64)


@jit
def above(k0, k1, k2, k3, w0, w1, w2, w3, bound):
    """What is listed at keys of at least `bound`: a number (weights 1) or a weight."""
    part = (
        tl.where(k0 >= bound, w0, 0)
        + tl.where(k1 >= bound, w1, 0)
        + tl.where(k2 >= bound, w2, 0)
        + tl.where(k3 >= bound, w3, 0)
    )
    return tl.sum(part, 0).to(tl.int64)


@jit
def search_lists(k0, k1, k2, k3, w0, w1, w2, w3, low, high, target, SHIFT: tl.constexpr):
    """The largest t with at least `target` at keys >= t 2^SHIFT, between low, where that holds, and high, where it does not.

    Keys are on a grid of 2^SHIFT. Where `target` is met exactly, no larger t keeps anything else.
    """
    found = target + 1
    while (high - low > 1) & (found != target):
        middle = (low + high) >> 1
        found = above(k0, k1, k2, k3, w0, w1, w2, w3, (middle << SHIFT).to(tl.int32))
        low, high = tl.where(found >= target, middle, low), tl.where(found >= target, high, middle)
    return low


@jit
def load(X, start, columns, TILE: tl.constexpr):
    at = start + tl.arange(0, TILE)
    return tl.load(X + at, mask=at < columns, other=-float("inf")).to(tl.float32)


@jit
def search_row(X, columns, best, rate, low, high, target, MASS: tl.constexpr, SHIFT: tl.constexpr, TILE: tl.constexpr):
    """`search_lists`, over the whole row, at three points a pass."""
    found = target + 1
    while (high - low > 1) & (found != target):
        step = high - low
        a, b, c = low + (step >> 2), low + (step >> 1), low + ((3 * step) >> 2)
        in_a, in_b, in_c = tl.zeros([TILE], tl.int64), tl.zeros([TILE], tl.int64), tl.zeros([TILE], tl.int64)
        for start in tl.range(0, columns, TILE, num_stages=4):  # pyright: ignore[reportGeneralTypeIssues]
            x = load(X, start, columns, TILE)
            key = ordered(x)
            w = weight(x, best, rate) if MASS else tl.full([TILE], 1, tl.int64)
            in_a += tl.where(key >= (a << SHIFT).to(tl.int32), w, 0)
            in_b += tl.where(key >= (b << SHIFT).to(tl.int32), w, 0)
            in_c += tl.where(key >= (c << SHIFT).to(tl.int32), w, 0)
        na, nb, nc = tl.sum(in_a, 0), tl.sum(in_b, 0), tl.sum(in_c, 0)
        high = tl.where(nc >= target, high, tl.where(nb >= target, c, tl.where(na >= target, b, a)))
        low = tl.where(nc >= target, c, tl.where(nb >= target, b, tl.where(na >= target, a, low)))
        found = tl.where(nc >= target, nc, tl.where(nb >= target, nb, tl.where(na >= target, na, found)))
    return low


@jit
def mass_row(X, columns, best, rate, bound, TILE: tl.constexpr):
    total = tl.zeros([TILE], tl.int64)
    for start in tl.range(0, columns, TILE, num_stages=4):  # pyright: ignore[reportGeneralTypeIssues]
        x = load(X, start, columns, TILE)
        total += tl.where(ordered(x) >= bound, weight(x, best, rate), 0)
    return tl.sum(total, 0).to(tl.int64)


@jit
def sample_kernel(X, TEMPERATURE, TOP_K, TOP_P, MIN_P, SEED, STREAM, POSITION, TOKEN, KEPT, LEAST, columns,
                  TRUNCATED: tl.constexpr, SHIFT: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr):  # fmt: skip
    LOWEST: tl.constexpr = tl.constexpr(-2139095041)  # the key of -inf
    row = tl.program_id(0).to(tl.int64)
    X += row * columns
    k0 = tl.full([TILE], LOWEST, tl.int32)
    k1, k2, k3 = k0, k0, k0
    for start in tl.range(0, columns, TILE, num_stages=4):  # pyright: ignore[reportGeneralTypeIssues]
        key = ordered(load(X, start, columns, TILE))
        if TRUNCATED:
            key, k0 = tl.minimum(key, k0), tl.maximum(key, k0)
            key, k1 = tl.minimum(key, k1), tl.maximum(key, k1)
            key, k2 = tl.minimum(key, k2), tl.maximum(key, k2)
            k3 = tl.maximum(key, k3)
        else:
            k0 = tl.maximum(key, k0)
    top = k0.max(0)
    best = unordered(top)
    temperature, k = tl.load(TEMPERATURE + row), tl.load(TOP_K + row)
    p, min_p = tl.load(TOP_P + row), tl.load(MIN_P + row)
    fine = (top > LOWEST) & (top <= 0x7F800000) & (temperature >= 0.0) & (temperature < float("inf")) & (k >= 0)
    fine = fine & (p > 0.0) & (p <= 1.0) & (min_p >= 0.0) & (min_p <= 1.0)
    rate = tl.div_rn(48408812.0, tl.abs(temperature))  # infinite at temperature 0: only the best have a weight

    cut = tl.full([], LOWEST >> SHIFT, tl.int64)
    if TRUNCATED:
        high = (top.to(tl.int64) >> SHIFT) + 1
        # Everything from here on is in the lists.
        full = tl.where(columns <= 4 * TILE, LOWEST, k3.max(0) + 1).to(tl.int64)
        full = tl.minimum((full + 2**SHIFT - 1) >> SHIFT, high)
        if fine & (temperature > 0.0) & (k > 0) & (k < columns):
            if above(k0, k1, k2, k3, 1, 1, 1, 1, (full << SHIFT).to(tl.int32)) >= k:
                cut = search_lists(k0, k1, k2, k3, 1, 1, 1, 1, full, high, k, SHIFT)
            else:
                cut = search_row(X, columns, best, rate, cut, full, k, False, SHIFT, TILE)
        if fine & (temperature > 0.0) & (p < 1.0):
            w0, w1 = weight(unordered(k0), best, rate), weight(unordered(k1), best, rate)
            w2, w3 = weight(unordered(k2), best, rate), weight(unordered(k3), best, rate)
            low = tl.maximum(cut, full)
            listed = above(k0, k1, k2, k3, w0, w1, w2, w3, (low << SHIFT).to(tl.int32))
            total = listed
            if cut < full:
                total = mass_row(X, columns, best, rate, (cut << SHIFT).to(tl.int32), TILE)
            part = (p * 16777216.0).to(tl.int64)
            target = tl.maximum((total >> 24) * part + (((total & 0xFFFFFF) * part) >> 24), 1)
            if listed >= target:
                cut = search_lists(k0, k1, k2, k3, w0, w1, w2, w3, low, high, target, SHIFT)
            else:
                cut = search_row(X, columns, best, rate, cut, low, target, True, SHIFT, TILE)

    bound = (cut << SHIFT).to(tl.int32)
    smallest = tl.maximum((min_p * 1099511627776.0).to(tl.int64), 1)
    tiles = tl.arange(0, TILES)
    sums, kept, least = tl.zeros([TILES], tl.int64), tl.zeros([TILE], tl.int32), tl.full([TILE], float("inf"), tl.float32)  # fmt: skip
    for start in tl.range(0, columns, TILE, num_stages=4):  # pyright: ignore[reportGeneralTypeIssues]
        x = load(X, start, columns, TILE)
        reached = ordered(x) >= bound
        if reached.to(tl.int32).max(0) > 0:
            w = weight(x, best, rate)
            keep = reached & (w >= smallest)
            sums = tl.where(tiles == start // TILE, tl.sum(tl.where(keep, w, 0), 0), sums)
            kept += keep.to(tl.int32)
            least = tl.minimum(least, tl.where(keep, x, float("inf")))

    total = sums.sum(0)
    stream, position = tl.load(STREAM + row), tl.load(POSITION + row)
    a, b, _, _ = tl.philox(tl.load(SEED + row), stream.to(tl.uint32), (stream >> 32).to(tl.uint32), position.to(tl.uint32), (position >> 32).to(tl.uint32))  # fmt: skip
    a, b = (a >> 1).to(tl.int64), (b >> 1).to(tl.int64)
    wide, low_bits = total >> 31, total & 0x7FFFFFFF
    drawn = wide * a + ((wide * b + low_bits * a + ((low_bits * b) >> 31)) >> 31)
    drawn = tl.where(temperature == 0.0, 0, drawn)
    tile = tl.sum((tl.cumsum(sums, 0) <= drawn).to(tl.int32), 0)
    tile = tl.where(fine, tile, 0)
    rest = drawn - tl.sum(tl.where(tiles < tile, sums, 0), 0)
    x = load(X, tile * TILE, columns, TILE)
    w = weight(x, best, rate)
    inside = tl.cumsum(tl.where((ordered(x) >= bound) & (w >= smallest), w, 0), 0)
    token = tile * TILE + tl.sum((inside <= rest).to(tl.int32), 0)
    tl.store(TOKEN + row, tl.where(fine, token, -1).to(tl.int64))
    tl.store(KEPT + row, tl.where(fine, tl.sum(kept, 0), 0).to(tl.int64))
    tl.store(LEAST + row, tl.where(fine, tl.min(least, 0), float("nan")))


def _shapes(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows = len(logits)
    token, kept = (logits.new_empty(rows, dtype=torch.int64) for _ in range(2))
    return token, kept, logits.new_empty(rows, dtype=torch.float32)


def _sample_triton(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    out, (rows, columns) = _shapes(logits), logits.shape
    # float16 is rare: a copy in float32, which draws the same, rather than one more form of the kernel.
    logits = logits.float() if logits.dtype == torch.float16 else logits
    shift = 16 if logits.dtype == torch.bfloat16 else 0  # low bits of its float32 form that are zero
    constants = dict(TRUNCATED=rest[-1], SHIFT=shift, TILE=_TILE, TILES=_MOST)
    launch(sample_kernel, (rows,), logits, *rest[:-1], *out, columns, **constants, num_warps=_WARPS)
    return out


def _configurations() -> Iterator[Configured]:
    per_row = {"TEMPERATURE": "*fp32", "TOP_P": "*fp32", "MIN_P": "*fp32", "LEAST": "*fp32", "columns": "i32"}
    per_row |= dict.fromkeys(("TOP_K", "SEED", "STREAM", "POSITION", "TOKEN", "KEPT"), "*i64")
    for name, shift in (("*fp32", 0), ("*bf16", 16)):
        for truncated in (True, False):
            constants = dict(TRUNCATED=truncated, SHIFT=shift, TILE=_TILE, TILES=_MOST)
            wide = shift == 0  # of 16 bits a thread has four: 64-bit loads; arithmetic is what takes the time
            yield Configured(sample_kernel, {"X": name} | per_row, constants, _WARPS, wide_loads=wide, aligned=("columns",))  # fmt: skip


# --- operator ---


def _check_logits(logits: Any) -> None:
    if logits.dim() != 2 or not 1 <= logits.shape[1] <= _TILE * _MOST:
        want = f"[rows, vocabulary], 1 <= vocabulary <= {_TILE * _MOST}"
        raise ValueError(f"sample: logits {tuple(logits.shape)}, required {want}; use logits[:, -1] of a sequence")
    if logits.dtype not in _DTYPES:
        raise ValueError(f"sample: logits {logits.dtype}, required float32, bfloat16 or float16; cast them to float32")


def _supports(logits: Any, temperature: Any, top_k: Any, top_p: Any, min_p: Any, seed: Any, stream: Any, position: Any, truncated: bool) -> None:  # fmt: skip
    _check_logits(logits)
    for name, value, dtype in (
        ("temperature", temperature, torch.float32), ("top_k", top_k, torch.int64), ("top_p", top_p, torch.float32), ("min_p", min_p, torch.float32),
        ("seed", seed, torch.int64), ("stream", stream, torch.int64), ("position", position, torch.int64),
    ):  # fmt: skip
        if value.shape != logits.shape[:1] or value.dtype != dtype or value.device != logits.device:
            got = f"{tuple(value.shape)} {value.dtype} on {value.device}"
            raise ValueError(
                f"sample: {name} {got}, required a number, or () or ({len(logits)},) {dtype} on {logits.device}"
            )


def _example(seed: int, dtype: torch.dtype) -> tuple[Any, ...]:
    logits = 3 * torch.randn(5, 37, generator=torch.Generator().manual_seed(seed))
    logits = logits.to(dtype if dtype in _DTYPES else torch.float32)
    temperature, top_p = torch.tensor([0.0, 1.0, 0.7, 1.3, 1.0]), torch.tensor([1.0, 1.0, 1.0, 0.8, 0.9])
    top_k, min_p = torch.tensor([0, 0, 5, 0, 20]), torch.tensor([0.0, 0.0, 0.0, 0.0, 0.1])
    return logits, temperature, top_k, top_p, min_p, torch.full((5,), seed), torch.arange(5), torch.full((5,), 7), True


_draw = define(
    "sample",
    "(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seed, Tensor stream, Tensor position, bool truncated) -> (Tensor, Tensor, Tensor)",
    formula="token, number of tokens kept, least logit kept; after temperature, top-k, top-p, min-p",
    why="reads logits two to four times, 2 or 4 bytes an element each; a sort of 152k logits and its indices are read and written at each of its passes",
    reference=_sample,
    kernel=_sample_triton,
    fake=_shapes,
    supports=_supports,
    example=_example,
    kernels=tuple(_configurations()),
    inline=False,
)  # fmt: skip


def sample(
    logits: Tensor,
    *,
    temperature: Tensor | float = 1.0,
    top_k: Tensor | int = 0,
    top_p: Tensor | float = 1.0,
    min_p: Tensor | float = 0.0,
    seed: Tensor | int = 0,
    position: Tensor | int = 0,
    stream: Tensor | None = None,
) -> Tensor:
    """Draw a token of every row: logits [B, V] -> int64 [B]. Every option is a number, or a tensor: [B] with one for each row, or 0-D.

    Law: a row's token is a function of its own logits, options, seed, stream and position, whatever the rest of the batch and the device.

    Args:
        logits: float32, bfloat16 or float16. No gradient flows.
        temperature: float32; 0 takes the first of the largest logits.
        top_k: int64; tokens kept, and all that equal the last of them; 0 for no limit.
        top_p: float32 in (0, 1]; a token is kept where those that are likelier have less than this share of what top-k keeps.
        min_p: float32 in [0, 1]; least probability, as a share of the largest one.
        seed, position: int64; `position` counts the draws of a row, so that no two use the same random number.
        stream: int64 [B], a number of a row that stays with it while the batch changes. Default: its place in the batch.

    A row with a NaN, without any logit above -inf, or with an option out of its range in a tensor, gives -1. Of logits that are +inf each is
    equally likely. Raises `ValueError` for a number out of range, for other dtypes and shapes.

    >>> logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, 0.0, 0.0]])
    >>> sample(logits, temperature=0.0).tolist()
    [1, 0]
    >>> sample(logits, top_k=torch.tensor([1, 3]), top_p=0.9, seed=4).tolist()
    [1, 0]
    """
    _check_logits(logits)
    for name, value, fine, want in (
        ("temperature", temperature, lambda v: 0.0 <= v < float("inf"), ">= 0 and finite"), ("top_k", top_k, lambda v: v >= 0, ">= 0"),
        ("top_p", top_p, lambda v: 0.0 < v <= 1.0, "0 < top_p <= 1"), ("min_p", min_p, lambda v: 0.0 <= v <= 1.0, "0 <= min_p <= 1"),
    ):  # fmt: skip
        if not isinstance(value, Tensor) and not fine(value):
            raise ValueError(f"sample: {name}={value!r}, required {want}")

    def each(value: Any, dtype: torch.dtype) -> Tensor:
        """A number as one for each row."""
        if isinstance(value, Tensor):
            return value.expand(logits.shape[:1]) if value.dim() == 0 else value
        return logits.new_full(logits.shape[:1], value, dtype=dtype)

    stream = torch.arange(len(logits), device=logits.device) if stream is None else stream
    real, whole = torch.float32, torch.int64
    options = each(temperature, real), each(top_k, whole), each(top_p, real), each(min_p, real)
    truncated = isinstance(top_k, Tensor) or isinstance(top_p, Tensor) or top_k > 0 or top_p < 1.0
    arguments = logits.detach(), *options, each(seed, whole), stream, each(position, whole), truncated
    if isinstance(temperature, Tensor) or temperature > 0:
        return _draw(*arguments)[0]
    _supports(*arguments)
    best = arguments[0].max(-1)
    return best.indices.masked_fill(~(best.values > -torch.inf), -1)
