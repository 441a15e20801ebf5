"""Stochastic rounding of float32 to bfloat16, by counter-based random bits.

    x lies between neighbours lo < hi of bfloat16: the result is hi with probability (x - lo) / (hi - lo), else lo, so its mean is x.

float32 has 16 more bits of mantissa than bfloat16: add 16 random bits to them and cut them off. Numbers of bfloat16 stay as they are, NaN and
inf too, and no finite number becomes inf. An update below half a step of bfloat16 (2^-9 of the parameter) is lost by rounding to the nearest,
and is there on average here (Gupta et al. 2015, arXiv:1502.02551; Zamirai et al. 2020, arXiv:2010.06192).

The bits are those of Philox-4x32-10 (Salmon et al. 2011, doi:10.1145/2063384.2063405), a function of (seed, step, leaf, place of the element):
the same in the reference and the kernel, in every order of programs, and with nothing to store. One call gives the bits of 8 elements.

    key = seed, low and high word; counter = (place // 8 low, place // 8 high + 2^30 stream, step, leaf); element 8 i + j takes half j of the words
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fds._torch import opaque_operator
from fds.kernels.registry import Configured, define
from fds.kernels.triton_or_not import jit, launch, tl

_WORD = 0xFFFFFFFF
_LARGEST = (
    0x7F7F0000  # the largest finite number of bfloat16, as float32's bits; what lies above is cut off, or is NaN or inf
)


# --- reference ---


def _product(constant: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of the product of two words, in int64 without overflow."""
    low = constant * (x & 0xFFFF)
    high = constant * (x >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(key: tuple[Tensor, Tensor], counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Philox-4x32-10: four random words from a key of two and a counter of four, all int64 in [0, 2^32)."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(10):
        (high0, low0), (high1, low1) = _product(0xD2511F53, c0), _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def _random_bits(n: int, seed: Tensor, step: Tensor, leaf: int, stream: int) -> Tensor:
    group = torch.arange(-(-n // 8), device=seed.device)
    zero = torch.zeros_like(group)
    counter = (group & _WORD, (group >> 32) + (stream << 30), zero + (step & _WORD), zero + leaf)
    a, b, c, d = philox((seed & _WORD, (seed >> 32) & _WORD), counter)
    halves = [h for w in (a, b, c, d) for h in (w & 0xFFFF, w >> 16)]
    return torch.stack(halves, 1).view(-1)[:n].to(torch.int32)


def _random_bits_shape(n: int, seed: Tensor, step: Tensor, leaf: int, stream: int) -> Tensor:
    return seed.new_empty(n, dtype=torch.int32)


# A compiler calls it as it is: written out in its loops, Philox took 20 s to compile for every leaf.
_RANDOM_BITS = opaque_operator(
    "random_bits",
    "(SymInt n, Tensor seed, Tensor step, int leaf, int stream) -> Tensor",
    _random_bits,
    _random_bits_shape,
)


def random_bits(n: int, seed: Tensor, step: Tensor, leaf: int, stream: int = 0) -> Tensor:
    """16 random bits for each of n elements, int32 in [0, 2^16)."""
    return _RANDOM_BITS(n, seed, step, leaf, stream)


def rounded(x: Tensor, bits: Tensor) -> Tensor:
    """float32 `x` in bfloat16, up where its last 16 bits and the random ones carry. Derivative: that of a cast."""
    own = x.detach().contiguous().view(torch.int32)
    noise = bits.view(x.shape).to(torch.int32).where((own & 0x7FFFFFFF) < _LARGEST, 0)
    new = ((own + noise) & -0x10000).view(torch.float32)
    exact = (x.detach() - new).where(x.isfinite(), 0.0)  # the difference of numbers so near has no rounding of its own
    return torch.where(new == 0, 0.0 * x, x - exact).to(torch.bfloat16)


def _reference(x: Tensor, seed: Tensor, step: Tensor, leaf: int) -> Tensor:
    return rounded(x, random_bits(x.numel(), seed, step, leaf))


# --- kernel ---


@jit
def draw(SEED, STEP, leaf, start, STREAM: tl.constexpr, BLOCK: tl.constexpr):
    """`random_bits` of the BLOCK elements from `start`, a multiple of BLOCK."""
    group = start // 8
    first = group.to(tl.uint32) + tl.arange(0, BLOCK // 8).to(tl.uint32)
    zero = first * 0
    second = (group >> 32).to(tl.uint32) + STREAM * 0x40000000 + zero
    step, seed = tl.load(STEP).to(tl.uint32), tl.load(SEED)
    a, b, c, d = tl.philox(seed, first, second, step + zero, zero + leaf)
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [BLOCK // 2])
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), [BLOCK]).to(tl.int32)


@jit
def cut(x, noise):
    """`rounded` of a block."""
    own = x.to(tl.int32, bitcast=True)
    noise = tl.where((own & 0x7FFFFFFF) < 0x7F7F0000, noise, 0)
    new = ((own + noise) & -0x10000).to(tl.float32, bitcast=True)
    return tl.where(x == x, new, x).to(tl.bfloat16)


@jit
def round_kernel(X, Y, SEED, STEP, n, leaf, BLOCK: tl.constexpr):
    """One block. A whole one has no mask, so that its loads are wide whatever n is."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    noise = draw(SEED, STEP, leaf, start, 0, BLOCK)
    if start + BLOCK <= n:
        tl.store(Y + start + i, cut(tl.load(X + start + i), noise))
    else:
        inside = i < n - start
        tl.store(Y + start + i, cut(tl.load(X + start + i, mask=inside), noise), mask=inside)


BLOCK = 1024  # 8 elements a thread: one call of Philox, 16 bytes of bfloat16


def _launch(x: Tensor, seed: Tensor, step: Tensor, leaf: int) -> Tensor:
    y = torch.empty_like(x, dtype=torch.bfloat16)
    launch(round_kernel, (-(-x.numel() // BLOCK),), x, y, seed, step, x.numel(), leaf, BLOCK=BLOCK)
    return y


def _configurations() -> Iterator[Configured]:
    types = {"X": "*fp32", "Y": "*bf16", "SEED": "*i64", "STEP": "*i64", "n": "i32", "leaf": "i32"}
    yield Configured(round_kernel, types, {"BLOCK": BLOCK})


# --- operator ---


def number(value: float | Tensor, like: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """A 0-D tensor of a number, filled in on the device: nothing waits for it."""
    return value if isinstance(value, Tensor) else torch.full((), value, dtype=dtype, device=like.device)


def check_key(name: str, like: Tensor, seed: Tensor | None, step: Tensor, leaf: int) -> None:
    """Raise `ValueError` unless these are a key of random bits."""
    for n, t in (("seed", seed), ("step", step)):
        if t is not None and (t.dim() != 0 or t.dtype != torch.int64 or t.device != like.device):
            got = f"{tuple(t.shape)} {t.dtype} on {t.device}"
            raise ValueError(f"{name}: {n} {got}, required a number, or a 0-D torch.int64 tensor on {like.device}")
    if not 0 <= leaf < 2**31:
        raise ValueError(f"{name}: leaf={leaf}, required 0 <= leaf < 2^31; number the leaves from 0")


def _supports(x: Tensor, seed: Tensor, step: Tensor, leaf: int) -> None:
    if x.dtype != torch.float32:
        raise ValueError(f"stochastic_round: x {x.dtype}, required torch.float32; use x.float()")
    check_key("stochastic_round", x, seed, step, leaf)


def _example(seed: int, dtype: torch.dtype) -> tuple[Any, ...]:
    x = torch.randn(5, 13, generator=torch.Generator().manual_seed(seed))
    return x, torch.tensor(seed), torch.tensor(3), 1


_round = define(
    "stochastic_round",
    "(Tensor x, Tensor seed, Tensor step, int leaf) -> Tensor",
    formula="one of x's two neighbours in bfloat16, x on average",
    why="6 bytes an element, 1.25 ms for 1e9 on an H200; a compiler makes one call of a random generator for each element, not for 8",
    reference=_reference,
    kernel=_launch,
    supports=_supports,
    example=_example,
    kernels=tuple(_configurations()),
)


def stochastic_round(x: Tensor, seed: int | Tensor, *, step: int | Tensor = 0, leaf: int = 0) -> Tensor:
    """float32 to bfloat16, up or down at random, so that the mean of the result is `x`.

    Args:
        x: float32, any shape.
        seed: 64 bits; step: which rounding of this tensor it is; leaf: number of the tensor. Numbers, or 0-D int64 tensors on x's device (not
            leaf). The same three give the same bits, on every device.

    Numbers of bfloat16, inf and NaN are kept, and a finite number stays finite. No derivative. `ValueError` for another dtype.
    Gupta et al. 2015, arXiv:1502.02551, section 3.1.

    >>> x = torch.full((4096,), 1.0 + 2.0**-9)  # a quarter of the way from 1 to the next number of bfloat16
    >>> y = stochastic_round(x, seed=0)
    >>> y.unique().tolist(), round(float((y > 1).float().mean()), 2)
    ([1.0, 1.0078125], 0.25)
    """
    return _round(x, number(seed, x, torch.int64), number(step, x, torch.int64), leaf)
