"""Root-mean-square and layer normalisation of rows, with the sum of a residual stream in front.

    s = x + residual                                 rounded, as it goes on through the model
    rms:    y = s r (w + o),          r = (mean(s^2) + eps)^(-1/2);   o = 1 for Gemma, whose weights start at 0
    layer:  y = (s - m) r w + b,      m = mean(s),  r = (mean((s - m)^2) + eps)^(-1/2)

    backward, with n = (s - m) r and d = g (w + o):  ds = r (d - mean(d) - n mean(d n)), where mean(d) is there for layer alone;
    dw = sum_rows g n,  db = sum_rows g, in two stages: every program sums its own rows, then the programs' sums are added in their order.

The statistics are saved in float32; all is rounded once.
Zhang and Sennrich 2019, arXiv:1910.07467; Ba et al. 2016, arXiv:1607.06450.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fds.kernels.registry import Configured, define
from fds.kernels.triton_or_not import jit, launch, tl

WIDEST = 8192  # columns: a program holds whole rows in registers; wider ones take the reference
PROGRAMS = 256  # of a backward pass, whatever the chip: the sums have the same order, so the same bits, on all of them
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


# --- reference ---


def _wide(*tensors: Tensor | None) -> torch.dtype:
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def _rms(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    wide = _wide(x, weight)
    s = x if residual is None else (x + residual).contiguous()
    h = s.to(wide)
    rstd = (h.square().mean(-1) + eps).rsqrt()
    y = (h * rstd[..., None] * (weight.to(wide) + offset)).to(x.dtype).contiguous()
    return y, x.new_empty(0) if residual is None else s, rstd


def _layer(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    wide = _wide(x, weight)
    s = x if residual is None else (x + residual).contiguous()
    mean = s.to(wide).mean(-1)
    h = s.to(wide) - mean[..., None]
    rstd = (h.square().mean(-1) + eps).rsqrt()
    y = h * rstd[..., None] * weight.to(wide)
    y = (y if bias is None else y + bias.to(wide)).to(x.dtype).contiguous()
    return y, x.new_empty(0) if residual is None else s, mean, rstd


def _rows(s: Tensor, weight: Tensor, g: Tensor, gs: Tensor | None, mean: Tensor | None, rstd: Tensor, offset: float, layer: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients by s, weight and bias."""
    wide = rstd.dtype
    r = rstd[..., None]
    n, g = (s.to(wide) if mean is None else s.to(wide) - mean[..., None]) * r, g.to(wide)
    d = g * (weight.to(wide) + offset)
    ds = d - n * (d * n).mean(-1, keepdim=True)
    ds = r * (ds - d.mean(-1, keepdim=True) if layer else ds)
    return ds if gs is None else ds + gs, (g * n).reshape(-1, n.shape[-1]).sum(0), g.reshape(-1, n.shape[-1]).sum(0)


# --- kernels ---


@jit
def forward_kernel(X, RESIDUAL, WEIGHT, BIAS, Y, SUM, MEAN, RSTD, rows, columns, eps, offset,
                   LAYER: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """ROWS whole rows, normalised."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, c = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    seen, there = row < rows - first, c < columns
    live = seen[:, None] & there[None, :]
    at = first * columns + row[:, None] * columns + c[None, :]
    s = tl.load(X + at, mask=live, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        s = (s + tl.load(RESIDUAL + at, mask=live, other=0.0).to(tl.float32)).to(SUM.dtype.element_ty)
        tl.store(SUM + at, s, mask=live)
        s = s.to(tl.float32)
    if LAYER:
        mean = tl.sum(s, 1) / columns
        tl.store(MEAN + first + row, mean, mask=seen)
        s = tl.where(there[None, :], s - mean[:, None], 0.0)
    rstd = 1 / tl.sqrt_rn(tl.sum(s * s, 1) / columns + eps)
    tl.store(RSTD + first + row, rstd, mask=seen)
    w = tl.load(WEIGHT + c, mask=there, other=0.0).to(tl.float32) + offset
    y = s * rstd[:, None] * w[None, :]
    if HAS_BIAS:
        y += tl.load(BIAS + c, mask=there, other=0.0).to(tl.float32)[None, :]
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=live)


@jit
def backward_kernel(S, WEIGHT, G, GS, MEAN, RSTD, DX, DRESIDUAL, DWEIGHT, DBIAS, rows, columns, offset,
                    LAYER: tl.constexpr, HAS_GS: tl.constexpr, BOTH: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Every so-many-th ROWS rows: their gradient, and one sum of the weight's and the bias's over all of them."""
    row, c = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    there = c < columns
    dw = tl.zeros([ROWS, BLOCK], tl.float32)
    db = tl.zeros([ROWS, BLOCK], tl.float32)
    for passed in range(0, rows, tl.num_programs(0) * ROWS):
        first = tl.program_id(0).to(tl.int64) * ROWS + passed
        seen = row < rows - first
        live = seen[:, None] & there[None, :]
        at = first * columns + row[:, None] * columns + c[None, :]
        rstd = tl.load(RSTD + first + row, mask=seen, other=0.0)
        n = tl.load(S + at, mask=live, other=0.0).to(tl.float32)
        g = tl.load(G + at, mask=live, other=0.0).to(tl.float32)
        if LAYER:
            n -= tl.load(MEAN + first + row, mask=seen, other=0.0)[:, None]
        n = tl.where(live, n * rstd[:, None], 0.0)
        w = (
            tl.load(WEIGHT + c, mask=there, other=0.0).to(tl.float32) + offset
        )  # again: held, it costs spilled registers
        d = g * w[None, :]
        ds = d - n * (tl.sum(d * n, 1) / columns)[:, None]
        if LAYER:
            ds -= (tl.sum(d, 1) / columns)[:, None]
        ds *= rstd[:, None]
        if HAS_GS:
            ds += tl.load(GS + at, mask=live, other=0.0).to(tl.float32)
        tl.store(DX + at, ds.to(DX.dtype.element_ty), mask=live)
        if BOTH:
            tl.store(DRESIDUAL + at, ds.to(DX.dtype.element_ty), mask=live)
        dw += g * n
        if HAS_BIAS:
            db += g
    part = tl.program_id(0).to(tl.int64) * columns + c
    tl.store(DWEIGHT + part, tl.sum(dw, 0), mask=there)
    if HAS_BIAS:
        tl.store(DBIAS + part, tl.sum(db, 0), mask=there)


# --- launchers ---


def _tile(columns: int) -> dict[str, int]:
    """Whole rows in a power of two of columns, several where they are short; 8 numbers a thread, 128 bits of bfloat16."""
    block = max(128, 1 << (columns - 1).bit_length())
    return {"ROWS": max(1, 1024 // block), "BLOCK": block, "num_warps": max(4, block // 256)}


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, offset: float, layer: bool) -> tuple[Tensor, ...]:  # fmt: skip
    tile, columns = _tile(x.shape[-1]), x.shape[-1]
    y, s = torch.empty_like(x), x.new_empty(0) if residual is None else torch.empty_like(x)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    launch(
        forward_kernel, (-(-rstd.numel() // tile["ROWS"]),), x, x if residual is None else residual, weight, weight if bias is None else bias,
        y, s, mean, rstd, rstd.numel(), columns, eps, offset, LAYER=layer, HAS_RESIDUAL=residual is not None, HAS_BIAS=bias is not None, **tile,
    )  # fmt: skip
    return (y, s, mean, rstd) if layer else (y, s, rstd)


def _rms_launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, ...]:
    if x.shape[-1] > WIDEST:
        return _rms(x, residual, weight, eps, offset)
    return _launch(x, residual, weight, None, eps, offset, False)


def _layer_launch(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:  # fmt: skip
    if x.shape[-1] > WIDEST:
        return _layer(x, residual, weight, bias, eps)
    return _launch(x, residual, weight, bias, eps, 0.0, True)


def _launch_backward(s: Tensor, weight: Tensor, g: Tensor, gs: Tensor | None, mean: Tensor | None, rstd: Tensor, offset: float, both: bool, bias: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    tile, columns, rows = _tile(s.shape[-1]), s.shape[-1], rstd.numel()
    programs = min(PROGRAMS, -(-rows // tile["ROWS"]))
    dx, dr = torch.empty_like(s), torch.empty_like(s) if both else s
    dw = s.new_empty((programs, columns), dtype=torch.float32)
    db = torch.empty_like(dw) if bias else dw
    launch(
        backward_kernel, (programs,), s, weight, g, s if gs is None else gs, rstd if mean is None else mean, rstd, dx, dr, dw, db,
        rows, columns, offset, LAYER=mean is not None, HAS_GS=gs is not None, BOTH=both, HAS_BIAS=bias, **tile,
    )  # fmt: skip
    return dx, dr, dw.sum(0), db.sum(0) if bias else dw


def _configurations(layer: bool) -> Iterator[Configured]:
    """Forward and backward with everything on; float16 has the code of bfloat16 but for a conversion."""
    widths = (128, 4096, WIDEST) if layer else (128, 256, 512, 1024, 2048, 4096, WIDEST)
    rows = ("X", "RESIDUAL", "Y", "SUM", "S", "G", "GS", "DX", "DRESIDUAL", "WEIGHT", "BIAS")
    for d, columns in [("bf16", w) for w in widths] + [("fp32", 4096), ("fp32", WIDEST)]:
        tile = _tile(columns)
        warps = tile.pop("num_warps")
        types = dict.fromkeys(rows, f"*{d}") | dict.fromkeys(("MEAN", "RSTD", "DWEIGHT", "DBIAS"), "*fp32")
        types |= {"rows": "i32", "columns": "i32", "eps": "fp32", "offset": "fp32"}
        for kernel, flags in ((forward_kernel, ("HAS_RESIDUAL",)), (backward_kernel, ("HAS_GS", "BOTH"))):
            constants = {"LAYER": layer, **dict.fromkeys(flags, True), "HAS_BIAS": layer, **tile}
            rounding = ("cvt.rn.bf16",) if d == "bf16" else ()
            yield Configured(kernel, types, constants, warps, aligned=("columns",), contains=rounding)


# --- gradients ---


def _backward(launched: bool, cotangents: Any, x: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor, mean: Tensor | None, rstd: Tensor, offset: float, needs: list[bool]) -> Any:  # fmt: skip
    """By x, residual, weight, bias, of y and of the sum. The saved sum is empty where there is no residual."""
    g, gs = cotangents[:2]
    if not s.numel():
        s, gs = x, None
    g = torch.zeros_like(s) if g is None else g
    both = needs[0] and needs[1]
    if launched and x.shape[-1] <= WIDEST:
        dx, dr, dw, db = _launch_backward(s, weight, g, gs, mean, rstd, offset, both, bias is not None)
        return dx, dr if both else dx, dw, db
    ds, dw, db = _rows(s, weight, g, gs, mean, rstd, offset, mean is not None)
    return ds, ds.clone() if both else ds, dw, db


def _rms_backward(cotangents: Any, inputs: Any, outputs: Any, needs: list[bool], launched: bool = False) -> Any:
    (x, _, weight, _, offset), (_, s, rstd) = inputs, outputs
    return _backward(launched, cotangents, x, weight, None, s, None, rstd, offset, needs)[:3]


def _layer_backward(cotangents: Any, inputs: Any, outputs: Any, needs: list[bool], launched: bool = False) -> Any:
    (x, _, weight, bias, _), (_, s, mean, rstd) = inputs, outputs
    return _backward(launched, cotangents, x, weight, bias, s, mean, rstd, 0.0, needs)


# --- operators ---


def _supports(name: str, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None) -> None:
    if not x.dim() or not x.shape[-1]:
        raise ValueError(f"{name}: x {tuple(x.shape)}, required [..., H] with H >= 1")
    shapes = {
        "residual": (residual, tuple(x.shape)),
        "weight": (weight, (x.shape[-1],)),
        "bias": (bias, (x.shape[-1],)),
    }
    for n, (t, want) in {"x": (x, tuple(x.shape)), **shapes}.items():
        if t is None:
            continue
        if tuple(t.shape) != want:
            raise ValueError(f"{name}: {n} {tuple(t.shape)}, required {want} for x {tuple(x.shape)}")
        if t.dtype not in _DTYPES or (t.is_cuda and t.dtype == torch.float64):
            allowed = "float32, bfloat16 or float16, and float64 on a CPU alone"
            raise ValueError(f"{name}: {n} is {t.dtype} on {t.device.type}, required {allowed}; the nearest is float32")
        if t.device != x.device:
            raise ValueError(f"{name}: {n} is on {t.device}, required {x.device}, where x is")
    if residual is not None and residual.dtype != x.dtype:
        raise ValueError(
            f"{name}: residual is {residual.dtype}, x is {x.dtype}; required one dtype of both; cast one of them"
        )


def _example(layer: bool, seed: int, dtype: torch.dtype) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(seed)
    x, residual, weight, bias = (torch.randn(s, generator=g).to(dtype) for s in ((5, 16), (5, 16), (16,), (16,)))
    return (x, residual, weight, bias, 1e-5) if layer else (x, residual, weight, 1e-5, 1.0)


_WHY = (
    "2 M H bytes times the size of a number forward and 3 backward, 4 and 5 with a residual; {0} is bound by them. Kept until measured: a "
    "compiler makes one kernel forward too, so what decides is the backward pass, where dw is a sum over the other axis, on an H200 "
    "against torch.compile at 16384 x 4096 (56 and 84 microseconds are the floors)"
)

_rms_norm = define(
    "rms_norm",
    "(Tensor x, Tensor? residual, Tensor weight, float eps, float offset) -> (Tensor, Tensor, Tensor)",
    formula="s r (w + o) with s = x + residual, r = (mean(s^2) + eps)^(-1/2); s; r",
    why=_WHY.format("root-mean-square normalisation"),
    reference=_rms,
    kernel=_rms_launch,
    backward=_rms_backward,
    backward_kernel=partial(_rms_backward, launched=True),
    first_order=(0, 1),
    differentiable=("x", "residual", "weight"),
    supports=lambda x, residual, weight, eps, offset: _supports("rms_norm", x, residual, weight, None),
    example=lambda seed, dtype: _example(False, seed, dtype),
    kernels=tuple(_configurations(layer=False)),
)

_layer_norm = define(
    "layer_norm",
    "(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    formula="(s - m) r w + b with s = x + residual, m = mean(s), r = (mean((s - m)^2) + eps)^(-1/2); s; m; r",
    why=_WHY.format("layer normalisation"),
    reference=_layer,
    kernel=_layer_launch,
    backward=_layer_backward,
    backward_kernel=partial(_layer_backward, launched=True),
    first_order=(0, 1),
    differentiable=("x", "residual", "weight", "bias"),
    supports=lambda x, residual, weight, bias, eps: _supports("layer_norm", x, residual, weight, bias),
    example=lambda seed, dtype: _example(True, seed, dtype),
    kernels=tuple(_configurations(layer=True)),
)


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float = 1e-6, residual: Tensor | None = None, offset: float = 0.0
) -> Any:
    """``s / sqrt(mean(s^2) + eps) * (weight + offset)`` of each row, with ``s = x + residual``; in float32, rounded once.

    Args:
        x: [..., H]; weight: [H], of any floating dtype; residual: like x, in its dtype.
        offset: 1.0 where weights are stored less one (Gemma).

    Returns: [..., H] in x's dtype; with a residual the pair of that and s, which is the next residual. Differentiable in all three tensors.
    `ValueError` for other shapes and dtypes. Zhang and Sennrich 2019, arXiv:1910.07467.

    >>> x, w = torch.tensor([[3.0, 4.0]]), torch.ones(2)
    >>> rms_norm(x, w, eps=0.0) * 12.5**0.5
    tensor([[3., 4.]])
    >>> y, s = rms_norm(x, w, residual=-2 * x)
    >>> s
    tensor([[-3., -4.]])
    """
    y, s, _ = _rms_norm(x, residual, weight, eps, offset)
    return y if residual is None else (y, s)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5, residual: Tensor | None = None
) -> Any:
    """``(s - mean(s)) / sqrt(var(s) + eps) * weight + bias`` of each row, with ``s = x + residual``; in float32, rounded once.

    Args:
        x: [..., H]; weight and bias: [H], of any floating dtype; residual: like x, in its dtype.

    Returns: [..., H] in x's dtype; with a residual the pair of that and s, which is the next residual. Differentiable in all tensors.
    `ValueError` for other shapes and dtypes. Ba et al. 2016, arXiv:1607.06450.

    >>> layer_norm(torch.tensor([[1.0, 3.0]]), torch.ones(2), torch.tensor([5.0, 5.0]), eps=0.0)
    tensor([[4., 6.]])
    """
    y, s, _, _ = _layer_norm(x, residual, weight, bias, eps)
    return y if residual is None else (y, s)
