"""Low-rank adapters: fused into a weight, or beside it while decoding.

    fuse:    W' = W + s B A                                  W [N, K], A [r, K], B [N, r]
    linear:  y = x W^T + s (x A^T) B^T + bias                one adapter for all tokens
             y_t = x_t W^T + s_i (x_t A_i^T) B_i^T + bias    i = index[t]: every token its own, or none

Sums are in float32 and rounded once. Merged into bfloat16 an adapter loses a part of itself to that (17 % of a delta that is 1 % of W);
beside the weight it loses nothing, for r (N + K) / (N K) more bytes: 0.8 % at r = 16 and 4096 x 4096.

The decode linear is two kernels: `shrink_kernel` for s x A^T, which is small and kept in float32, and `linear_kernel`, which reads W once and
adds the rest while its sums are still in registers. More tokens than `DECODE` are not a decode step, and go to the matrix library.
Hu et al. 2021, arXiv:2106.09685; Chen et al. 2023, arXiv:2310.18547; Sheng et al. 2023, arXiv:2311.03285.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fds.kernels.registry import Configured, define
from fds.kernels.triton_or_not import jit, launch, tl

DECODE = 64  # tokens that one program of `linear_kernel` holds; with more, reading W is no longer what takes the time
_LOW = (torch.bfloat16, torch.float16)
_DTYPES = (torch.float64, torch.float32, *_LOW)
Product = Callable[[Tensor, Tensor], Tensor]


# --- reference ---


def _wide(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _exact(x: Tensor, y: Tensor) -> Tensor:
    """x @ y in float32, or in float64 where one of them is."""
    wide = _wide(x, y)
    return x.to(wide) @ y.to(wide)


def _library(x: Tensor, y: Tensor) -> Tensor:
    """The same by matrix units, where they take the operands as they are: products of two low-precision numbers are exact in float32."""
    if x.is_cuda and x.dtype == y.dtype and x.dtype in _LOW:
        return torch.mm(x, y, out_dtype=torch.float32)  # pyright: ignore[reportCallIssue]
    return _exact(x, y)


def _fuse(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    wide = _wide(weight, a, b)
    return (weight.to(wide) + scale * _exact(b, a)).to(weight.dtype).contiguous()


def _beside(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, *, product: Product = _exact) -> Tensor:  # fmt: skip
    y = product(x, weight.mT) + product(scale * product(x, a.mT), b.mT)
    return (y if bias is None else y + bias.to(y.dtype)).to(x.dtype)


def _each_beside(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: Tensor, index: Tensor, *, product: Product = _exact) -> Tensor:  # fmt: skip
    low = _by_token if len(a) > len(x) else _by_adapter
    y = product(x, weight.mT) + low(x, a, b, scale, index, product)
    y = y if bias is None else y + bias.to(y.dtype)
    return y.where(_known(index, len(a))[:, None], float("nan")).to(x.dtype)


def _known(index: Tensor, adapters: int) -> Tensor:
    """Where the index is one; elsewhere the result is NaN, as looking at it from Python would wait for the device."""
    return (index >= -1) & (index < adapters)


def _by_adapter(x: Tensor, a: Tensor, b: Tensor, scale: Tensor, index: Tensor, product: Product) -> Tensor:
    """Every adapter on all tokens; chosen by `where`, so that an infinity in one adapter stays with its tokens."""
    out = x.new_zeros((len(x), b.shape[1]), dtype=_wide(x, a, b))
    for i in range(len(a)):
        low = scale[i].to(out.dtype) * product(x, a[i].mT)
        out = torch.where((index == i)[:, None], product(low, b[i].mT), out)
    return out


def _by_token(x: Tensor, a: Tensor, b: Tensor, scale: Tensor, index: Tensor, product: Product) -> Tensor:
    """Every token's own adapter, for fewer tokens than adapters; T r (N + K) numbers are copied."""
    wide, own = _wide(x, a, b), index.long().clamp(0, len(a) - 1)
    low = (a[own].to(wide) @ x.to(wide)[:, :, None]) * scale[own].to(wide)[:, None, None]
    return (b[own].to(wide) @ low)[:, :, 0].where((index >= 0)[:, None], 0)


# --- kernels ---


@jit
def fuse_kernel(W, A, B, OUT, rows, columns, rank, scale,
                EXACT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr):  # fmt: skip
    """A tile of W + s B A. EXACT: the operands of the product are made float32 first."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    n = tl.arange(0, BLOCK_N)[:, None]
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    inside = (n < rows - first) & (k < columns)
    w = tl.load(W + first * columns + n * columns + k, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in range(0, rank, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        b = tl.load(B + first * rank + n * rank + r[None, :], mask=(n < rows - first) & (r[None, :] < rank), other=0.0)
        a = tl.load(A + r[:, None].to(tl.int64) * columns + k, mask=(r[:, None] < rank) & (k < columns), other=0.0)
        if EXACT:
            b, a = b.to(tl.float32), a.to(tl.float32)
        total = tl.dot(b, a, total, input_precision="ieee")
    tl.store(OUT + first * columns + n * columns + k, (w + scale * total).to(OUT.dtype.element_ty), mask=inside)


@jit
def shrink_kernel(X, A, SCALE, INDEX, LOW, adapters, rank, width, scale,
                  MANY: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """s A x for one token and BLOCK_R rows of A; 0 for a token without an adapter."""
    token = tl.program_id(0).to(tl.int64)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = r < rank
    if MANY:
        adapter = tl.load(INDEX + token).to(tl.int64)
        found = (adapter >= 0) & (adapter < adapters)
        adapter = tl.where(found, adapter, 0)
        live = r < tl.where(found, rank, 0)  # the interpreter's `live & found` is no mask
        A += adapter * rank * width
        scale = tl.load(SCALE + adapter).to(tl.float32)
    total = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for start in range(0, width, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(X + token * width + k, mask=k < width, other=0.0).to(tl.float32)
        at = r[:, None].to(tl.int64) * width + k[None, :]
        total += tl.load(A + at, mask=live[:, None] & (k[None, :] < width), other=0.0).to(tl.float32) * x[None, :]
    low = tl.where(live, scale * tl.sum(total, 1), 0.0)
    tl.store(LOW + token * rank + r, low, mask=r < rank)


@jit
def linear_kernel(X, W, BIAS, B, INDEX, LOW, Y, adapters, tokens, rows, width, rank, HAS_BIAS: tl.constexpr, MANY: tl.constexpr,
                  BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr):  # fmt: skip
    """BLOCK_N outputs of all tokens: W is read once, and what `shrink_kernel` left is added before the one rounding."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    t, n = tl.arange(0, BLOCK_T)[:, None], tl.arange(0, BLOCK_N)
    live, row = (n < rows - first)[:, None], n[:, None]
    W += first * width
    B += first * rank
    total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for start in range(0, width, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)[None, :]
        x = tl.load(X + t * width + k, mask=(t < tokens) & (k < width), other=0.0)
        w = tl.load(W + row * width + k, mask=live & (k < width), other=0.0)
        total = tl.dot(x, tl.trans(w), total, input_precision="ieee")
    if MANY:
        for i in range(tokens):
            adapter = tl.load(INDEX + i).to(tl.int64)
            if (adapter >= 0) & (adapter < adapters):
                more = tl.zeros([BLOCK_N], tl.float32)
                for start in range(0, rank, BLOCK_R):
                    r = start + tl.arange(0, BLOCK_R)[None, :]
                    low = tl.load(LOW + i * rank + r, mask=r < rank, other=0.0)
                    b = tl.load(B + adapter * rows * rank + row * rank + r, mask=live & (r < rank), other=0.0)
                    more += tl.sum(b.to(tl.float32) * low, 1)
                total += tl.where(t == i, more[None, :], 0.0)
            wrong = tl.where((adapter < -1) | (adapter >= adapters), float("nan"), 0.0)
            total += tl.where(t == i, wrong, 0.0)
    else:
        for start in range(0, rank, BLOCK_R):
            r = start + tl.arange(0, BLOCK_R)[None, :]
            low = tl.load(LOW + t * rank + r, mask=(t < tokens) & (r < rank), other=0.0)
            b = tl.load(B + row * rank + r, mask=live & (r < rank), other=0.0).to(tl.float32)
            total = tl.dot(low, tl.trans(b), total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(BIAS + first + n, mask=n < rows - first, other=0.0).to(tl.float32)[None, :]
    at = t * rows + first + n[None, :]
    tl.store(Y + at, total.to(Y.dtype.element_ty), mask=(t < tokens) & (n < rows - first)[None, :])


# --- launchers ---

_BLOCKS = ("BLOCK_N", "BLOCK_K", "BLOCK_R")
_FUSE = {exact: dict(zip(_BLOCKS, b, strict=True)) for exact, b in ((False, (64, 128, 32)), (True, (32, 64, 16)))}
_SHRINK = {"BLOCK_R": 4, "BLOCK_K": 512}


def _tile(low: bool, tokens: int, rows: int) -> dict[str, int]:
    """Few rows at a time where there are few, so that there is a program for every multiprocessor; a product in float32 has short steps."""
    t, n = (16 if tokens <= 16 else DECODE), (16 if rows <= 8192 or not low else 64)
    return {"BLOCK_T": t, "BLOCK_N": n, "BLOCK_K": (256 if t == 16 else 128) if low else 32, "BLOCK_R": 16}


def _launch_fuse(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    out, (rows, columns) = torch.empty_like(weight), weight.shape
    exact = not (a.dtype == b.dtype and a.dtype in _LOW)
    block = _FUSE[exact]
    grid = (-(-rows // block["BLOCK_N"]), -(-columns // block["BLOCK_K"]))
    launch(fuse_kernel, grid, weight, a, b, out, rows, columns, len(a), scale, EXACT=exact, **block)
    return out


def _launch(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: Any, index: Any = None) -> Tensor:  # fmt: skip
    if len(x) > DECODE:
        low = (x, weight, bias, a, b, scale)
        return _beside(*low, product=_library) if index is None else _each_beside(*low, index, product=_library)
    (tokens, width), rows, rank, many = x.shape, len(weight), a.shape[-2], index is not None
    low, y = x.new_empty((tokens, rank), dtype=torch.float32), x.new_empty((tokens, rows))
    adapters, factor, at = (len(a), scale, index) if many else (1, x, x)  # x stands for what is not there
    launch(
        shrink_kernel, (tokens, -(-rank // _SHRINK["BLOCK_R"])), x, a, factor, at, low,
        adapters, rank, width, 1.0 if many else scale, MANY=many, **_SHRINK,
    )  # fmt: skip
    tile = _tile(x.dtype in _LOW, tokens, rows)
    launch(
        linear_kernel, (-(-rows // tile["BLOCK_N"]) if tokens else 0,), x, weight, x if bias is None else bias, b, at, low, y,
        adapters, tokens, rows, width, rank, HAS_BIAS=bias is not None, MANY=many, **tile, num_warps=4, num_stages=4,
    )  # fmt: skip
    return y


_ROUNDING = {"bf16": ("cvt.rn.bf16",), "fp16": ("cvt.rn.f16",), "fp32": ()}


def _fuse_configurations() -> Iterator[Configured]:
    for w, ab in (("bf16", "bf16"), ("fp16", "fp16"), ("bf16", "fp32"), ("fp32", "fp32")):
        types = {"W": f"*{w}", "OUT": f"*{w}", "A": f"*{ab}", "B": f"*{ab}", "scale": "fp32"}
        types |= dict.fromkeys(("rows", "columns", "rank"), "i32")
        constants = {"EXACT": ab == "fp32", **_FUSE[ab == "fp32"]}
        yield Configured(fuse_kernel, types, constants, aligned=("columns", "rank"), contains=_ROUNDING[w])


def _linear_configurations(many: bool) -> Iterator[Configured]:
    sizes = ((16, 4096), (64, 4096), (16, 16384), (64, 16384))  # one of each tile
    for d, ab in (("bf16", "bf16"), ("fp16", "fp16"), ("bf16", "fp32"), ("fp32", "fp32")):
        # The other low-precision cases have the code of bfloat16 but for a conversion: their largest tile stands for all.
        some = sizes if d == ab == "bf16" else sizes[:2] if d == "fp32" else sizes[3:]
        types = dict.fromkeys(("X", "W", "BIAS", "Y"), f"*{d}") | dict.fromkeys(("A", "B"), f"*{ab}")
        types |= {"INDEX": "*i64", "SCALE": "*fp32", "LOW": "*fp32", "scale": "fp32"}
        types |= dict.fromkeys(("adapters", "tokens", "rows", "width", "rank"), "i32")
        yield Configured(shrink_kernel, types, {"MANY": many, **_SHRINK}, aligned=("width",))
        for tokens, rows in some:
            constants = {"HAS_BIAS": True, "MANY": many, **_tile(d != "fp32", tokens, rows)}
            yield Configured(linear_kernel, types, constants, 4, 4, aligned=("width", "rank"), contains=_ROUNDING[d])


# --- gradients ---


def _fuse_backward(cotangents: Any, inputs: Any, outputs: Any, needs: list[bool], product: Product = _exact) -> tuple[Tensor | None, ...]:  # fmt: skip
    (g,), (_, a, b, scale) = cotangents, inputs
    da = scale * product(b.mT, g) if needs[1] else None
    db = scale * product(g, a.mT) if needs[2] else None
    return g.clone() if needs[0] else None, da, db


def _plain(g: Tensor, x: Tensor, weight: Tensor, needs: list[bool], product: Product) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of the layer without adapters."""
    dw, db = product(g.mT, x) if needs[1] else None, g.sum(0, dtype=_wide(g)) if needs[2] else None
    return product(g, weight) if needs[0] else None, dw, db


def _beside_backward(cotangents: Any, inputs: Any, outputs: Any, needs: list[bool], product: Product = _exact) -> tuple[Tensor | None, ...]:  # fmt: skip
    (g,), (x, weight, _, a, b, scale) = cotangents, inputs
    dx, dw, dbias = _plain(g, x, weight, needs, product)
    back = scale * product(g, b)  # [T, r]
    dx = None if dx is None else dx + product(back, a)
    da = product(back.mT, x) if needs[3] else None
    return dx, dw, dbias, da, product(g.mT, scale * product(x, a.mT)) if needs[4] else None


def _each_beside_backward(cotangents: Any, inputs: Any, outputs: Any, needs: list[bool], product: Product = _exact) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Adapter by adapter, each from its own tokens alone: no sum depends on the order in which tokens arrive at it."""
    (g,), (x, weight, _, a, b, scale, index) = cotangents, inputs
    g = g.where(_known(index, len(a))[:, None], 0)
    dx, dw, dbias = _plain(g, x, weight, needs, product)
    da, db = [], []
    for i in range(len(a)):
        own = (index == i)[:, None]
        gi, xi, s = g.where(own, 0), x.where(own, 0), scale[i].to(_wide(x, a, b))
        back = (s * product(gi, b[i])).where(own, 0)
        if dx is not None:
            dx = torch.where(own, dx + product(back, a[i]), dx)
        if needs[3]:
            da.append(product(back.mT, xi))
        if needs[4]:
            db.append(product(gi.mT, (s * product(xi, a[i].mT)).where(own, 0)))
    return dx, dw, dbias, torch.stack(da) if needs[3] else None, torch.stack(db) if needs[4] else None


# --- operators ---


def _supports(name: str, tensors: dict[str, tuple[Tensor | None, tuple[int, ...]]], *same: tuple[str, str]) -> None:
    """Shapes as required, floating dtypes of which some are the same, one device."""
    given = {n: (t, want) for n, (t, want) in tensors.items() if t is not None}
    device = given["weight"][0].device
    for n, (t, want) in given.items():
        if tuple(t.shape) != want:
            raise ValueError(f"{name}: {n} {tuple(t.shape)}, required {want} beside the other arguments")
        if t.dtype not in _DTYPES or (t.is_cuda and t.dtype == torch.float64):
            allowed = "float32, bfloat16 or float16, and float64 on a CPU alone"
            raise ValueError(f"{name}: {n} is {t.dtype} on {t.device.type}, required {allowed}; the nearest is float32")
        if t.device != device:
            raise ValueError(f"{name}: {n} is on {t.device}, required {device}, where weight is")
    for n, m in same:
        a, b = given[n][0].dtype, given[m][0].dtype
        if a != b:
            raise ValueError(f"{name}: {n} is {a}, {m} is {b}; required one dtype of both; cast one of them")


def _supports_fuse(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    if weight.dim() != 2 or a.dim() != 2:
        raise ValueError(f"lora_fuse: weight {tuple(weight.shape)}, a {tuple(a.shape)}; required [N, K] and [r, K]")
    (n, k), r = weight.shape, len(a)
    _supports("lora_fuse", {"weight": (weight, (n, k)), "a": (a, (r, k)), "b": (b, (n, r))})


def _supports_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, *rest: Any) -> None:
    name, many = ("lora_linear_many", 1) if len(rest) == 2 else ("lora_linear", 0)
    if x.dim() != 2 or weight.dim() != 2 or a.dim() != 2 + many:
        shapes = f"x {tuple(x.shape)}, weight {tuple(weight.shape)}, a {tuple(a.shape)}"
        raise ValueError(f"{name}: {shapes}; required [T, K], [N, K], [{'n, ' * many}r, K]")
    (n, k), t, r, each = weight.shape, len(x), a.shape[-2], tuple(a.shape[:many])
    tensors = {"x": (x, (t, k)), "weight": (weight, (n, k)), "a": (a, (*each, r, k)), "b": (b, (*each, n, r))}
    tensors |= {"bias": (bias, (n,)), "scale": (rest[0] if many else None, each)}
    _supports(name, tensors, ("weight", "x"), ("b", "a"))
    index = rest[-1]  # or the scale
    if not many:
        return
    if index.shape != (t,) or index.dtype not in (torch.int64, torch.int32) or index.device != x.device:
        got = f"{tuple(index.shape)} {index.dtype} on {index.device}"
        raise ValueError(f"{name}: index {got}, required {(t,)} torch.int64 or torch.int32 on {x.device}")
    if not each[0]:
        raise ValueError(f"{name}: no adapter in a {tuple(a.shape)}; use torch.nn.functional.linear without any")


def _randn(seed: int, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g).to(dtype) for s in shapes]


def _example_many(seed: int, dtype: torch.dtype) -> tuple[Any, ...]:
    tensors = _randn(seed, dtype, (5, 16), (7, 16), (7,), (3, 2, 16), (3, 7, 2))
    return *tensors, torch.tensor([0.5, 2.0, -1.0]), torch.tensor([0, 2, -1, 2, 0])


_WHY_LINEAR = (
    "a decode step is bound by the bytes of W, and the adapter adds r (N + K) / (N K) to them (0.8 % at r = 16 and 4096 x 4096); a "
    "compiler makes three products of it, and rounds between them. Kept until measured: against the library's product with two more beside "
    "it in a CUDA graph, and, for r <= 16, against one kernel that computes x A^T again in every program"
)

_fused = define(
    "lora_fuse",
    "(Tensor weight, Tensor a, Tensor b, float scale) -> Tensor",
    formula="W + s B A, rounded once",
    why="4 bytes a weight in bfloat16 (0.83 ms for 1e9 on an H200) where B A in float32 beside it takes 16; a compiler writes the product out",
    reference=_fuse,
    kernel=_launch_fuse,
    backward=_fuse_backward,
    backward_kernel=partial(_fuse_backward, product=_library),
    differentiable=("weight", "a", "b"),
    supports=_supports_fuse,
    example=lambda seed, dtype: (*_randn(seed, dtype, (7, 16), (3, 16), (7, 3)), 0.5),
    kernels=tuple(_fuse_configurations()),
)

_one = define(
    "lora_linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, float scale) -> Tensor",
    formula="x W^T + s (x A^T) B^T + bias, rounded once",
    why=_WHY_LINEAR,
    reference=_beside,
    kernel=_launch,
    backward=_beside_backward,
    backward_kernel=partial(_beside_backward, product=_library),
    differentiable=("x", "weight", "bias", "a", "b"),
    supports=_supports_linear,
    example=lambda seed, dtype: (*_randn(seed, dtype, (5, 16), (7, 16), (7,), (3, 16), (7, 3)), 0.5),
    kernels=tuple(_linear_configurations(many=False)),
)

_many = define(
    "lora_linear_many",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, Tensor scale, Tensor index) -> Tensor",
    formula="x_t W^T + s_i (x_t A_i^T) B_i^T + bias with i = index_t, none where it is -1; rounded once",
    why=_WHY_LINEAR,
    reference=_each_beside,
    kernel=_launch,
    backward=_each_beside_backward,
    backward_kernel=partial(_each_beside_backward, product=_library),
    differentiable=("x", "weight", "bias", "a", "b"),
    supports=_supports_linear,
    example=_example_many,
    kernels=tuple(_linear_configurations(many=True)),
)


def lora_fuse(weight: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """W + scale * B @ A as a new tensor in W's dtype: the product in float32, one rounding. W is never written.

    Args:
        weight: [N, K]; a: [r, K]; b: [N, r]; any r; float32, bfloat16 or float16 each, float64 on a CPU too.

    Differentiable in all three. `ValueError` for other shapes and dtypes. Hu et al. 2021, arXiv:2106.09685, equation 3.

    >>> w, a, b = torch.zeros(3, 4), torch.ones(2, 4), torch.ones(3, 2)
    >>> lora_fuse(w, a, b, 0.5)[0]
    tensor([1., 1., 1., 1.])
    """
    return _fused(weight, a, b, scale)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    scale: float | Tensor = 1.0,
    bias: Tensor | None = None,
    index: Tensor | None = None,
) -> Tensor:
    """``x W^T + scale (x A^T) B^T + bias`` with sums in float32 and one rounding: a linear layer with its adapter beside it, for decoding.

    Args:
        x: [..., K]; weight: [N, K]; bias: [N]. `x` and `weight` have one dtype, `a` and `b` one of theirs.
        a: [r, K]; b: [N, r]: one adapter. With `index`, a: [n, r, K] and b: [n, N, r]: n of them, of one rank (pad with zeros).
        scale: a number; with `index` also [n], one for each adapter. No gradient flows to it.
        index: [...] of int64 or int32: each token's adapter, -1 for none. Others give NaN.

    Returns: [..., N] in x's dtype. Differentiable in x, weight, bias, a, b; the same bits every time. `ValueError` for other shapes and dtypes.

    >>> x, w = torch.ones(3, 4), torch.zeros(2, 4)
    >>> a, b = torch.ones(2, 1, 4), torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])
    >>> lora_linear(x, w, a, b, scale=0.5, index=torch.tensor([0, -1, 1]))
    tensor([[2., 4.],
            [0., 0.],
            [6., 8.]])
    """
    flat = x.reshape(-1, x.shape[-1])
    if index is None:
        if isinstance(scale, Tensor):
            raise ValueError(
                "lora_linear: scale is a tensor, required a number without an index; use scale=float(scale)"
            )
        return _one(flat, weight, bias, a, b, float(scale)).view(*x.shape[:-1], len(weight))
    each = scale if isinstance(scale, Tensor) else x.new_full((len(a),), scale, dtype=torch.float32)
    return _many(flat, weight, bias, a, b, each, index.reshape(-1)).view(*x.shape[:-1], len(weight))
