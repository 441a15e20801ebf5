"""Blocks of a tensor as small integers or 8-bit floats: what goes over a wire, lies in a file, or waits in host memory.

    int8, int4:  s = bf16(max |x| / m), q = round(x / s) in [-m, m], x ~ q s;  m = 127, 7
    e4m3, e5m2:  s = 2^k, the least with max |x| / s in the format's range, q = fp8(x / s)

A block is `block` neighbours in the last dimension; the last block of a row is short where the row is not a multiple of it, and nothing is
padded (int4 alone fills up a byte). Flatten a tensor for blocks that run over its rows.

Scales are bfloat16, which has the range of float32: gradients of 1e-9 would vanish with float16. They are normal numbers, also of zeros.
A rounded scale keeps the promises of an exact one: it is off by at most 2^-8 / (1 + 2^-8), and 127 / 127.5 leaves room for that. So

* ``|x - q s| <= s / 2`` for integers, exactly, and half a step of the format for 8-bit floats; zeros stay zeros;
* the largest code is always m (fp8: in the same range), so that quantising again what was dequantised gives the same codes and scales;
* q s is exact in float32 (7 bits times 8), so that no result depends on whether a compiler fuses multiply and add.

A block with a NaN or an infinity has a NaN for its scale and is NaN as a whole when it comes back: never a finite number.
Dettmers et al. 2022, arXiv:2110.02861 (blocks); Wang et al. 2023, arXiv:2306.10209 (collectives); Micikevicius et al. 2022,
arXiv:2209.05433 (8-bit floats); Rouhani et al. 2023, arXiv:2310.10537 (powers of two as scales).
"""

from collections.abc import Iterator
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from fds import tree
from fds.kernels.registry import Configured, define
from fds.kernels.triton_or_not import jit, launch, tl


@attrs.frozen
class Format:
    """A format of codes: integers up to `limit`, or 8-bit floats, numbers of torch's dtype `real`."""

    dtype: torch.dtype = torch.uint8
    limit: int = 0
    packed: bool = False  # two codes to a byte, the first one in the low half
    real: torch.dtype = torch.float32
    mantissa: int = 0  # bits
    top: int = 0  # largest exponent
    carry: int = 0  # what takes the bits of a maximum that rounds beyond `top` to the next power of two


FORMATS = {
    "int8": Format(torch.int8, limit=127),
    "int4": Format(limit=7, packed=True),
    # Scaled maxima in (232, 464] round to [240, 448]; 464 lies halfway between 448 and the 480 that there is not.
    "e4m3": Format(real=torch.float8_e4m3fn, mantissa=3, top=8, carry=0x17FFFF),
    # Scaled maxima in [30720, 61440) round to [32768, 57344].
    "e5m2": Format(real=torch.float8_e5m2, mantissa=2, top=15, carry=0x100000),
}
BLOCKS = (32, 64, 128, 256, 512, 1024)
_INF, _NAN, _LEAST = 0x7F800000, 0x7FC00000, 0x00800000  # float32: infinity, NaN, the least normal number
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


# --- reference ---


def _encode(x: Tensor, f: Format) -> tuple[Tensor, Tensor]:
    """Codes [..., block] and scales [..., 1] of float32 blocks. Arithmetic on the bits is exact, and the same in a kernel."""
    most = (x.view(torch.int32) & 0x7FFFFFFF).amax(-1, keepdim=True)
    broken = most >= _INF
    most, x = most.clamp(max=_INF - 1), x.masked_fill(broken, 0.0)
    if f.limit:
        s = most.view(torch.float32)
        s = (s / torch.full_like(s, f.limit)).view(torch.int32)  # CUDA would multiply by the inverse of a number
        s = (s + 0x7FFF + ((s >> 16) & 1)) & -0x10000  # bfloat16, to nearest
    else:
        s = ((most + f.carry) & -0x800000) - (f.top << 23)
    s = s.clamp(min=_LEAST)
    scale = s.view(torch.float32)
    codes = _nearest(x, scale) if f.limit else (x * scale.reciprocal()).to(f.real).view(torch.uint8)
    return codes, (s.masked_fill(broken, _NAN) >> 16).to(torch.int16).view(torch.bfloat16)


def _nearest(x: Tensor, scale: Tensor) -> Tensor:
    """The integer nearest to x / scale, ties to even. The rest is exact in float32, and mends a quotient that was rounded across a tie."""
    near = (x * scale.reciprocal()).round()
    rest, half, codes = x - near * scale, 0.5 * scale, near.int()
    off = (rest.abs() > half) | ((rest.abs() == half) & (codes & 1 == 1))
    return codes + torch.where(off, torch.where(rest > 0, 1, -1), 0)


def _parts(x: Tensor, block: int) -> list[Tensor]:
    """The whole blocks of rows [..., count, block], and the short one [..., 1, rest], where there are any."""
    # No padding: where a flattened view is cut inside a block, Inductor (torch 2.13, CPU) drops what follows the last whole block.
    count, whole = x.shape[-1] // block, x.shape[-1] // block * block
    parts = (x[..., :whole].unflatten(-1, (count, block)), x[..., whole:].unsqueeze(-2))
    return [p for p in parts if p.shape[-1] and p.shape[-2]]


def _quantize(x: Tensor, format: str, block: int) -> tuple[Tensor, Tensor]:
    f = FORMATS[format]
    if not x.shape[-1]:
        return _shapes(x, format, block)
    encoded = [_encode(part, f) for part in _parts(x.float(), block)]
    codes = torch.cat([c.flatten(-2) for c, _ in encoded], -1)
    if f.packed:
        low, high = F.pad(codes & 15, (0, codes.shape[-1] % 2)).unflatten(-1, (-(-codes.shape[-1] // 2), 2)).unbind(-1)
        codes = low | (high << 4)
    return codes.to(f.dtype).contiguous(), torch.cat([s[..., 0] for _, s in encoded], -1)


def _dequantize(codes: Tensor, scales: Tensor, length: int, format: str, block: int, dtype: torch.dtype) -> Tensor:
    f = FORMATS[format]
    if not length:
        return codes.new_empty((*codes.shape[:-1], 0), dtype=dtype)
    if f.packed:
        codes = codes.int()
        codes = torch.stack([((codes & 15) ^ 8) - 8, ((codes >> 4) ^ 8) - 8], -1).flatten(-2)[..., :length]
    values = (codes if f.limit else codes.view(f.real)).float()
    steps = [s for s in (scales[..., : length // block], scales[..., length // block :]) if s.shape[-1]]
    parts = [v * s.float()[..., None] for v, s in zip(_parts(values, block), steps, strict=True)]
    return torch.cat([p.flatten(-2) for p in parts], -1).to(dtype)


def _sum(codes: Tensor, scales: Tensor, format: str, block: int) -> tuple[Tensor, Tensor]:
    length = _codes(codes, format)
    parts = [_dequantize(c, s, length, format, block, torch.float32) for c, s in zip(codes, scales, strict=True)]
    return _quantize(sum(parts[1:], parts[0]), format, block)


# --- kernels ---


@jit
def encode(x, LIMIT: tl.constexpr, MANTISSA: tl.constexpr):
    """`_encode` of a tile [blocks, block]. 8-bit floats by their bits: some chips, and the interpreter, cannot convert them."""
    most = (x.to(tl.int32, bitcast=True) & 0x7FFFFFFF).max(1, keep_dims=True)
    broken = most >= 0x7F800000
    most, x = tl.minimum(most, 0x7F7FFFFF), tl.where(broken, 0.0, x)
    if LIMIT > 0:
        s = tl.div_rn(most.to(tl.float32, bitcast=True), LIMIT * 1.0).to(tl.int32, bitcast=True)
        s = (s + 0x7FFF + ((s >> 16) & 1)) & -0x10000
    else:
        s = ((most + (0x17FFFF if MANTISSA == 3 else 0x100000)) & -0x800000) - ((8 if MANTISSA == 3 else 15) << 23)
    s = tl.maximum(s, 0x00800000)
    scale = s.to(tl.float32, bitcast=True)
    y = x * tl.div_rn(1.0, scale)
    if LIMIT > 0:
        shifted = y + 12582912.0  # 1.5 * 2^23: the integer nearest to y is in the low bits
        near = shifted.to(tl.int32, bitcast=True)
        rest = x - (shifted - 12582912.0) * scale
        # Ties go to even: from an odd integer already at half a step, from an even one beyond it.
        far = ((0.5 * scale).to(tl.int32, bitcast=True) - (near & 1)).to(tl.float32, bitcast=True)
        codes = tl.where(tl.abs(rest) > far, near + tl.where(rest > 0, 1, -1), near)
    else:
        CUT: tl.constexpr = 23 - MANTISSA
        BIAS: tl.constexpr = 2 ** (6 - MANTISSA) - 1
        a = tl.abs(y)
        # A power of two so much larger that the sum keeps MANTISSA bits of a, fewer below the least normal number.
        power = tl.maximum(a.to(tl.int32, bitcast=True) & 0x7F800000, (128 - BIAS) << 23) + (CUT << 23)
        kept = (a + power.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True) - power
        kept += (power >> CUT) - ((CUT + 128 - BIAS) << MANTISSA)
        codes = kept | ((y.to(tl.int32, bitcast=True) >> 24) & 0x80)
    return codes, tl.where(broken, 0x7FC00000, s).to(tl.float32, bitcast=True)


@jit
def decode(codes, LIMIT: tl.constexpr, MANTISSA: tl.constexpr):
    """float32 values of codes (int32), without their scales."""
    if LIMIT > 0:
        value = codes.to(tl.float32)
    elif MANTISSA == 2:
        value = (codes << 8).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)  # float16, cut off
    else:
        half = ((codes & 0x80) << 8) | ((codes & 0x7F) << 7)  # float16 has one more bit of exponent
        value = half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        value = tl.where((codes & 0x7F) == 0x7F, float("nan"), value)
    return value


@jit
def places(number, exists, width, blocks, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    """Where the blocks with these numbers lie in rows of `width`: offsets and mask [numbers, BLOCK]. EVEN: no block is short."""
    at, mask, start = tl.arange(0, BLOCK)[None, :], exists[:, None], number.to(tl.int64) * BLOCK
    if not EVEN:
        row = number // blocks  # in 32 bits: a division in 64 takes longer than all the rest
        inside = (number - row * blocks).to(tl.int64) * BLOCK
        start, mask = row.to(tl.int64) * width + inside, mask & (at < (width - inside)[:, None])
    return start[:, None] + at, mask


@jit
def load_codes(CODES, number, exists, width, blocks, EVEN: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr):
    at, mask = places(number, exists, width, blocks, EVEN, BLOCK // 2 if PACKED else BLOCK)
    codes = tl.load(CODES + at, mask=mask, other=0).to(tl.int32)
    if PACKED:
        codes = tl.interleave(((codes & 15) ^ 8) - 8, ((codes >> 4) ^ 8) - 8)
    return codes


@jit
def store_codes(CODES, codes, number, exists, width, blocks, EVEN: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    at, mask = places(number, exists, width, blocks, EVEN, BLOCK // 2 if PACKED else BLOCK)
    if PACKED:
        low, high = tl.split((codes & 15).reshape(codes.shape[0], BLOCK // 2, 2))
        codes = low | (high << 4)
    tl.store(CODES + at, codes.to(CODES.dtype.element_ty), mask=mask)


@jit
def quantize_kernel(X, CODES, SCALES, columns, width, blocks, first, end,
                    LIMIT: tl.constexpr, PACKED: tl.constexpr, MANTISSA: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    number = first + tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    exists = number < end
    at, mask = places(number, exists, columns, blocks, EVEN, BLOCK)
    codes, scale = encode(tl.load(X + at, mask=mask, other=0.0).to(tl.float32), LIMIT, MANTISSA)
    store_codes(CODES, codes, number, exists, width, blocks, EVEN, PACKED, BLOCK)
    tl.store(SCALES + number, scale.reshape(GROUP).to(SCALES.dtype.element_ty), mask=exists)


@jit
def dequantize_kernel(CODES, SCALES, OUT, columns, width, blocks, first, end,
                      LIMIT: tl.constexpr, PACKED: tl.constexpr, MANTISSA: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    number = first + tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    exists = number < end
    codes = load_codes(CODES, number, exists, width, blocks, EVEN, PACKED, BLOCK)
    scale = tl.load(SCALES + number, mask=exists, other=0.0).to(tl.float32)
    at, mask = places(number, exists, columns, blocks, EVEN, BLOCK)
    tl.store(OUT + at, (decode(codes, LIMIT, MANTISSA) * scale[:, None]).to(OUT.dtype.element_ty), mask=mask)


@jit
def sum_kernel(IN, IN_SCALES, CODES, SCALES, shards, stride, scale_stride, width, blocks, first, end,
               LIMIT: tl.constexpr, PACKED: tl.constexpr, MANTISSA: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Shards are added in their order, in float32; they are `stride` bytes apart, and `scale_stride` scales."""
    number = first + tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    exists = number < end
    x = tl.zeros([GROUP, BLOCK], tl.float32)
    for _ in range(shards):
        codes = load_codes(IN, number, exists, width, blocks, EVEN, PACKED, BLOCK)
        scale = tl.load(IN_SCALES + number, mask=exists, other=0.0).to(tl.float32)
        x += decode(codes, LIMIT, MANTISSA) * scale[:, None]
        IN += stride
        IN_SCALES += scale_stride
    codes, scale = encode(x, LIMIT, MANTISSA)
    store_codes(CODES, codes, number, exists, width, blocks, EVEN, PACKED, BLOCK)
    tl.store(SCALES + number, scale.reshape(GROUP).to(SCALES.dtype.element_ty), mask=exists)


def _constants(format: str, block: int, even: bool) -> dict[str, Any]:
    """Where rows have any length, elements have masks and no wide loads: fewer of them in a program, or registers do not suffice."""
    f, elements = FORMATS[format], 4096 if even else 1024
    return dict(LIMIT=f.limit, PACKED=f.packed, MANTISSA=f.mantissa, EVEN=even, GROUP=elements // block, BLOCK=block)


def _launch(kernel: Any, tensors: tuple[Tensor, ...], sizes: tuple[int, ...], scales: Tensor, length: int, format: str, block: int) -> None:  # fmt: skip
    total, blocks = scales.numel(), scales.shape[-1]
    if total > 2**31 - 4096:
        raise ValueError(f"block quantisation: {total} blocks, required at most 2^31 - 4096; split the tensor")
    whole = total if length % block == 0 else total - 1 if total == blocks else 0  # of one row the last is short
    for first, end, even in ((0, whole, True), (whole, total, False)):
        constants = _constants(format, block, even)
        grid = (-(-(end - first) // constants["GROUP"]),)
        launch(kernel, grid, *tensors, *sizes, blocks, first, end, **constants, num_warps=4)


def _quantize_triton(x: Tensor, format: str, block: int) -> tuple[Tensor, Tensor]:
    codes, scales = _shapes(x, format, block)
    _launch(quantize_kernel, (x, codes, scales), (x.shape[-1], codes.shape[-1]), scales, x.shape[-1], format, block)
    return codes, scales


def _dequantize_triton(codes: Tensor, scales: Tensor, length: int, format: str, block: int, dtype: torch.dtype) -> Tensor:  # fmt: skip
    out = codes.new_empty((*codes.shape[:-1], length), dtype=dtype)
    _launch(dequantize_kernel, (codes, scales, out), (length, codes.shape[-1]), scales, length, format, block)
    return out


def _sum_triton(codes: Tensor, scales: Tensor, format: str, block: int) -> tuple[Tensor, Tensor]:
    out, steps = torch.empty_like(codes[0]), torch.empty_like(scales[0])
    sizes, length = (len(codes), out.numel(), steps.numel(), out.shape[-1]), _codes(out, format)
    _launch(sum_kernel, (codes, scales, out, steps), sizes, steps, length, format, block)
    return out, steps


def _configurations(kernel: Any, *chosen: tuple[str, int, str, bool]) -> Iterator[Configured]:
    for format, block, dtype, even in chosen:
        code, constants = "*i8" if FORMATS[format].dtype == torch.int8 else "*u8", _constants(format, block, even)
        types = {"X": dtype, "OUT": dtype, "IN": code, "CODES": code, "IN_SCALES": "*bf16", "SCALES": "*bf16"}
        types = {n: types.get(n, "i32") for n in kernel.arg_names if n not in constants}
        contains = ("cvt.rn.bf16",) if kernel is dequantize_kernel and dtype == "*bf16" else ()
        aligned = ("columns", "width", "stride") if even else ()
        yield Configured(kernel, types, constants, wide_loads=even, aligned=aligned, contains=contains)


# --- shapes ---


def _shapes(x: Tensor, format: str, block: int) -> tuple[Tensor, Tensor]:
    f, n = FORMATS[format], x.shape[-1]
    codes = x.new_empty((*x.shape[:-1], (n + 1) // 2 if f.packed else n), dtype=f.dtype)
    return codes, x.new_empty((*x.shape[:-1], -(-n // block)), dtype=torch.bfloat16)


def _codes(codes: Any, format: str) -> int:
    """How many codes there may be in a row."""
    return codes.shape[-1] * (2 if FORMATS[format].packed else 1)


# --- operators ---


def _check_format(name: str, format: str, block: int) -> None:
    if format not in FORMATS:
        raise ValueError(f"{name}: format={format!r}; {tree.suggest(format, FORMATS)}")
    if block not in BLOCKS:
        near = min(BLOCKS, key=lambda b: abs(b - block))
        raise ValueError(f"{name}: block={block}, required one of {', '.join(map(str, BLOCKS))}; use {near}")


def _supports_quantize(x: Any, format: str, block: int) -> None:
    _check_format("block_quantize", format, block)
    if x.dim() < 1:
        raise ValueError("block_quantize: a 0-D tensor, required at least one dimension; use x.reshape(1)")
    if x.dtype not in _FLOATS:
        raise ValueError(f"block_quantize: {x.dtype}, required float32, bfloat16 or float16; cast it to float32")


def _supports_codes(name: str, codes: Any, scales: Any, format: str, block: int, length: int | None, lead: int) -> None:
    """Whether codes and scales belong together; `lead` dimensions come before those of one tensor; `length` None for what the codes say."""
    _check_format(name, format, block)
    f, shapes = FORMATS[format], f"codes {tuple(codes.shape)}, scales {tuple(scales.shape)}"
    if codes.dtype != f.dtype or scales.dtype != torch.bfloat16:
        raise ValueError(f"{name}: codes {codes.dtype}, scales {scales.dtype}; {format} has {f.dtype}, torch.bfloat16")
    if codes.dim() <= lead or (lead and not len(codes)):
        raise ValueError(f"{name}: {shapes}, required {'[shards >= 1, ..., n]' if lead else '[..., n]'}")
    n = _codes(codes, format)
    length = n if length is None else length
    if not n - f.packed <= length <= n:
        raise ValueError(f"{name}: length={length}, but rows of {codes.shape[-1]} bytes hold {n} codes of {format}")
    if scales.shape != (want := (*codes.shape[:-1], -(-length // block))):
        raise ValueError(f"{name}: {shapes}; required scales {want}, one for each block of {block}")


def _supports_dequantize(codes: Any, scales: Any, length: int, format: str, block: int, dtype: torch.dtype) -> None:
    _supports_codes("block_dequantize", codes, scales, format, block, length, 0)
    if dtype not in _FLOATS:
        raise ValueError(f"block_dequantize: dtype={dtype}, required float32, bfloat16 or float16; use float32")


def _example(seed: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(5, 75, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype if dtype in _FLOATS else torch.float32)


_BYTES = "1.016 bytes an element in int8 and fp8, 0.516 in int4"  # in blocks of 128: 2 bytes of scale for each
_quantize_op = define(
    "block_quantize",
    "(Tensor x, str format, int block) -> (Tensor, Tensor)",
    formula="codes round(x / s) and scales s = max |x| / m, for each block",
    why=f"reads x once and writes {_BYTES}; stands between collectives and copies, where nothing is compiled",
    reference=_quantize,
    kernel=_quantize_triton,
    fake=_shapes,
    supports=_supports_quantize,
    example=lambda seed, dtype: (_example(seed, dtype), "int8", 32),
    kernels=tuple(_configurations(
        quantize_kernel, ("int8", 128, "*bf16", True), ("int8", 1024, "*fp32", True), ("int4", 64, "*bf16", True), ("e4m3", 128, "*bf16", True),
        ("e5m2", 256, "*fp16", True), ("int4", 32, "*fp32", False),
    )),
)  # fmt: skip

_dequantize_op = define(
    "block_dequantize",
    "(Tensor codes, Tensor scales, int length, str format, int block, ScalarType dtype) -> Tensor",
    formula="x = q s, for each block",
    why=f"reads {_BYTES} and writes x once; as block_quantize",
    reference=_dequantize,
    kernel=_dequantize_triton,
    fake=lambda codes, scales, length, format, block, dtype: codes.new_empty((*codes.shape[:-1], length), dtype=dtype),
    supports=_supports_dequantize,
    example=lambda seed, dtype: (*_quantize(_example(seed, torch.float32), "int4", 32), 75, "int4", 32, dtype if dtype in _FLOATS else torch.float32),
    kernels=tuple(_configurations(
        dequantize_kernel, ("int8", 128, "*bf16", True), ("int4", 64, "*bf16", True), ("e4m3", 128, "*fp32", True), ("e5m2", 32, "*fp16", False),
    )),
)  # fmt: skip

_sum_op = define(
    "block_quantized_sum",
    "(Tensor codes, Tensor scales, str format, int block) -> (Tensor, Tensor)",
    formula="quantised sum_k q_k s_k, for each block",
    why=f"reads and writes {_BYTES}; the float32 sum, 4 bytes an element, stays in registers",
    reference=_sum,
    kernel=_sum_triton,
    fake=lambda codes, scales, *_: (torch.empty_like(codes[0]), torch.empty_like(scales[0])),
    supports=lambda codes, scales, format, block: _supports_codes("block_quantized_sum", codes, scales, format, block, None, 1),
    example=lambda seed, dtype: (*_quantize(_example(seed, torch.float32), "int8", 32), "int8", 32),
    kernels=tuple(_configurations(sum_kernel, ("int8", 128, "", True), ("int4", 64, "", True), ("e4m3", 128, "", False), ("e5m2", 256, "", True))),
)  # fmt: skip


def block_quantize(x: Tensor, *, format: str = "int8", block: int = 128) -> tuple[Tensor, Tensor]:
    """Quantise blocks of the last dimension: [..., n] -> codes [..., n], scales [..., ceil(n / block)] bfloat16.

    Law: ``|x - block_dequantize(codes, scales)| <= scale / 2`` for integers, and quantising the result again changes nothing.

    Args:
        x: float32, bfloat16 or float16. No gradient flows.
        format: ``"int8"`` (codes int8), ``"int4"`` (uint8 [..., ceil(n / 2)], the first of two codes in the low half), ``"e4m3"`` or
            ``"e5m2"`` (uint8; ``codes.view(torch.float8_e4m3fn)`` are the numbers).
        block: 32, 64, ..., 1024. A row's last block may be shorter.

    A block that has a NaN or an infinity has the scale NaN, and comes back as NaN. Raises `ValueError` for other dtypes, formats or blocks.

    >>> codes, scales = block_quantize(torch.tensor([0.0, 1.0, -127.0]))
    >>> codes.tolist(), scales.tolist()
    ([0, 1, -127], [1.0])
    """
    return _quantize_op(x.detach(), format, block)


def block_dequantize(
    codes: Tensor, scales: Tensor, *, format: str = "int8", block: int = 128, length: int | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:  # fmt: skip
    """What `block_quantize` made codes of: [..., length] of `dtype`, rounded once from float32.

    Args:
        length: of a row; only int4 with rows of odd length has to have it.
        dtype: float32, bfloat16 or float16. Where half a scale beyond the largest x is out of its range, the result may be infinite.

    Raises `ValueError` where codes, scales, `format`, `block` and `length` do not fit together.

    >>> codes, scales = block_quantize(torch.tensor([0.0, 3.5, -7.0]), format="int4")
    >>> block_dequantize(codes, scales, format="int4", length=3)
    tensor([ 0.,  4., -7.])
    """
    _check_format("block_dequantize", format, block)
    length = _codes(codes, format) if length is None and codes.dim() else length
    return _dequantize_op(codes, scales.detach(), length or 0, format, block, dtype)


def block_quantized_sum(codes: Tensor, scales: Tensor, *, format: str = "int8", block: int = 128) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The sum over shards, quantised: codes [shards, ..., n], scales [shards, ..., blocks] -> codes [..., n], scales [..., blocks].

    The reduction step of a quantised all-reduce: shards are added in float32, in their order, and rounded once.
    Formats and errors as in `block_quantize`. One NaN among the scales makes the block's scale NaN.

    >>> parts = [block_quantize(torch.tensor([0.0, 1.0, -127.0])), block_quantize(torch.tensor([127.0, 1.0, 0.0]))]
    >>> codes, scales = block_quantized_sum(*map(torch.stack, zip(*parts)))
    >>> block_dequantize(codes, scales)
    tensor([ 127.,    2., -127.])
    """
    return _sum_op(codes, scales.detach(), format, block)
