"""Rotary position embedding of queries and keys.

    (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)

x1 and x2 are the halves of the first R columns of a head, which are rotated by position times frequency; columns after them pass. The
derivative is the rotation back, by -sin. Computed in float32, rounded once.

Frequencies are those of `config.rope_parameters` in transformers: plain, linear (position interpolation), llama3, YaRN.
Su et al. 2021, arXiv:2104.09864; Chen et al. 2023, arXiv:2306.15595; Peng et al. 2023, arXiv:2309.00071; Dubey et al. 2024, arXiv:2407.21783.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fds import tree
from fds.kernels.registry import Configured, define
from fds.kernels.triton_or_not import jit, launch, tl

TILE = 1024  # numbers of each half in one program: 8 a thread, 128 bits of bfloat16
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


# --- frequencies ---


def rope_frequencies(
    parameters: Mapping[str, Any], *, head_dim: int, max_position_embeddings: int | None = None
) -> tuple[Tensor, float]:
    """Inverse frequencies [R / 2] in float32, and the factor that cos and sin are multiplied by.

    Args:
        parameters: as in ``config.rope_parameters`` of transformers: ``rope_type`` (default, linear, llama3 or yarn), ``rope_theta``,
            ``partial_rotary_factor`` (R = head_dim times it), ``factor``, ``low_freq_factor``, ``high_freq_factor``,
            ``original_max_position_embeddings``, ``beta_fast``, ``beta_slow``, ``attention_factor``, ``mscale``, ``mscale_all_dim``, ``truncate``.
        max_position_embeddings: for YaRN without a factor: its ratio to the original length is the factor.

    `ValueError` for other types, and for parameters that a type lacks.

    >>> rope_frequencies({"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}, head_dim=4)
    (tensor([0.5000, 0.0050]), 1.0)
    """
    kind = parameters.get("rope_type", "default")
    if kind not in _TYPES:
        raise ValueError(f"rope_frequencies: rope_type {kind!r}; {tree.suggest(str(kind), _TYPES)}")
    lacking = [k for k in ("rope_theta", *_TYPES[kind]) if parameters.get(k) is None]
    if lacking:
        raise ValueError(
            f"rope_frequencies: rope_type {kind!r} requires {', '.join(lacking)}; given {', '.join(parameters)}"
        )
    columns = int(head_dim * (parameters.get("partial_rotary_factor") or 1.0))
    if columns % 2 or not columns:
        raise ValueError(f"rope_frequencies: {columns} rotated columns of {head_dim}, required an even number >= 2")
    plain = 1.0 / parameters["rope_theta"] ** (torch.arange(0, columns, 2, dtype=torch.float32) / columns)
    if kind == "linear":
        return plain / parameters["factor"], 1.0
    if kind == "llama3":
        return _llama3(plain, parameters), 1.0
    return _yarn(plain, columns, parameters, max_position_embeddings) if kind == "yarn" else (plain, 1.0)


_LENGTH = "original_max_position_embeddings"
_TYPES = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _LENGTH),
    "yarn": (_LENGTH,),
}


def _llama3(plain: Tensor, p: Mapping[str, Any]) -> Tensor:
    """Slow frequencies are divided by the factor, fast ones stay, those between are blended by their turns within the trained length."""
    turns = p[_LENGTH] * plain / (2 * math.pi)
    low, high = p["low_freq_factor"], p["high_freq_factor"]
    share = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return torch.where(share == 1.0, plain, (1.0 - share) * plain / p["factor"] + share * plain)


def _yarn(plain: Tensor, columns: int, p: Mapping[str, Any], longest: int | None) -> tuple[Tensor, float]:
    """Blended over columns, between those that make `beta_fast` and `beta_slow` turns; and the temperature of the attention."""
    length = p[_LENGTH]
    if p.get("factor") is None and longest is None:
        raise ValueError("rope_frequencies: yarn requires a factor, or max_position_embeddings to compute it from")
    factor = float(p.get("factor") or (longest or length) / length)
    ends = [
        columns * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(p["rope_theta"]))
        for turns in (p.get("beta_fast") or 32, p.get("beta_slow") or 1)
    ]
    if p.get("truncate", True):
        ends = [math.floor(ends[0]), math.ceil(ends[1])]
    first, last = max(ends[0], 0), min(ends[1], columns - 1)
    last = last + 0.001 if first == last else last
    slow = ((torch.arange(columns // 2, dtype=torch.float32) - first) / (last - first)).clamp(0.0, 1.0)
    scaling = p.get("attention_factor")
    if scaling is None:
        m, all_dim = p.get("mscale"), p.get("mscale_all_dim")
        scaling = (
            _temperature(factor, m) / _temperature(factor, all_dim) if m and all_dim else _temperature(factor, 1.0)
        )
    return plain / factor * slow + plain * (1.0 - slow), float(scaling)


def _temperature(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def rope_angles(positions: Tensor, frequencies: Tensor, scaling: float = 1.0, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:  # fmt: skip
    """cos and sin [..., length, R / 2] of `positions` [..., length] times `frequencies` [R / 2], both times `scaling`.

    Angles are computed in float32. Transformers' cos and sin have each of these columns twice.

    >>> cos, sin = rope_angles(torch.arange(3), torch.tensor([0.0]))
    >>> cos.flatten(), sin.flatten()
    (tensor([1., 1., 1.]), tensor([0., 0., 0.]))
    """
    angles = positions[..., None].float() * frequencies.float()
    return (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)


# --- reference ---


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, token_first: bool, sign: float) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 or cos.dtype == torch.float64 else torch.float32
    heads = 2 if token_first else 1
    c, s = cos.to(wide).unsqueeze(heads), sign * sin.to(wide).unsqueeze(heads)
    half = cos.shape[-1]
    x1, x2, rest = x[..., :half].to(wide), x[..., half : 2 * half].to(wide), x[..., 2 * half :]
    return torch.cat([(x1 * c - x2 * s).to(x.dtype), (x2 * c + x1 * s).to(x.dtype), rest], -1)


def _both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, token_first: bool) -> tuple[Tensor, Tensor]:
    return _rotated(q, cos, sin, token_first, 1.0), _rotated(k, cos, sin, token_first, 1.0)


# --- kernel ---


@jit
def rotate_kernel(Q, K, COS, SIN, OUT_Q, OUT_K, q_blocks, q_rows, k_rows, q_heads, k_heads, tokens, angle_rows, columns, half, sign,
                  TOKEN_FIRST: tl.constexpr, PASS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """ROWS rows of q, or of k after the last of q. A row is one head of one token; PASS: columns that are not rotated, at most."""
    block = tl.program_id(0)
    if block < q_blocks:
        rotate_rows(Q, COS, SIN, OUT_Q, block, q_rows, q_heads, tokens, angle_rows, columns, half, sign, TOKEN_FIRST, PASS, ROWS, BLOCK)  # fmt: skip
    else:
        rotate_rows(K, COS, SIN, OUT_K, block - q_blocks, k_rows, k_heads, tokens, angle_rows, columns, half, sign, TOKEN_FIRST, PASS, ROWS, BLOCK)  # fmt: skip


@jit
def rotate_rows(X, COS, SIN, OUT, block, rows, heads, tokens, angle_rows, columns, half, sign,
                TOKEN_FIRST: tl.constexpr, PASS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    first = tl.cast(block, tl.int64) * ROWS
    r, c = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    row = block * ROWS + r
    # One table of angles for all sequences, or one for each.
    angle = (row // heads if TOKEN_FIRST else row // (heads * tokens) * tokens + row % tokens) % angle_rows
    angle = tl.cast(angle, tl.int64)[:, None] * half + c[None, :]
    X += first * columns
    OUT += first * columns
    live = (r < rows - first)[:, None] & (c < half)[None, :]
    cos = tl.load(COS + angle, mask=live, other=0.0).to(tl.float32)
    sin = tl.load(SIN + angle, mask=live, other=0.0).to(tl.float32) * sign
    at = r[:, None] * columns + c[None, :]
    x1 = tl.load(X + at, mask=live, other=0.0).to(tl.float32)
    x2 = tl.load(X + at + half, mask=live, other=0.0).to(tl.float32)
    tl.store(OUT + at, (x1 * cos - x2 * sin).to(OUT.dtype.element_ty), mask=live)
    tl.store(OUT + at + half, (x2 * cos + x1 * sin).to(OUT.dtype.element_ty), mask=live)
    if PASS:
        p = 2 * half + tl.arange(0, PASS)
        still = (r < rows - first)[:, None] & (p < columns)[None, :]
        at = r[:, None] * columns + p[None, :]
        tl.store(OUT + at, tl.load(X + at, mask=still), mask=still)


def _launch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, token_first: bool, sign: float = 1.0) -> tuple[Tensor, Tensor]:  # fmt: skip
    out_q, out_k = torch.empty_like(q), torch.empty_like(k)
    columns, half = q.shape[-1], cos.shape[-1]
    q_rows, k_rows, token, head = q.numel() // columns, k.numel() // columns, *((1, 2) if token_first else (2, 1))
    tile, rest = _tile(half), columns - 2 * half
    blocks = -(-q_rows // tile["ROWS"])
    launch(
        rotate_kernel, (blocks + -(-k_rows // tile["ROWS"]),), q, k, cos, sin, out_q, out_k, blocks, q_rows, k_rows, q.shape[head], k.shape[head],
        q.shape[token], cos.numel() // half, columns, half, sign, TOKEN_FIRST=token_first, PASS=_power(rest) if rest else 0, **tile,
    )  # fmt: skip
    return out_q, out_k


def _tile(half: int) -> dict[str, int]:
    block = max(16, _power(half))
    return {"ROWS": max(1, TILE // block), "BLOCK": block}


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _configurations() -> Iterator[Configured]:
    sizes = ("q_blocks", "q_rows", "k_rows", "q_heads", "k_heads", "tokens", "angle_rows", "columns", "half")
    cases = [(d, 64, 0, True) for d in ("bf16", "fp16", "fp32")] + [("bf16", half, 0, True) for half in (16, 32, 128)]
    for d, half, rest, token_first in [*cases, ("bf16", 64, 0, False), ("bf16", 32, 64, True)]:
        types = dict.fromkeys(("Q", "K", "OUT_Q", "OUT_K"), f"*{d}") | {"COS": "*fp32", "SIN": "*fp32", "sign": "fp32"}
        types |= dict.fromkeys(sizes, "i32")
        constants = {"TOKEN_FIRST": token_first, "PASS": rest, **_tile(half)}
        rounding = {"bf16": ("cvt.rn.bf16",), "fp16": ("cvt.rn.f16",), "fp32": ()}[d]
        yield Configured(rotate_kernel, types, constants, aligned=("columns", "half"), contains=rounding)


# --- operator ---


def _backward(cotangents: Any, inputs: Any, outputs: Any, needs: list[bool]) -> tuple[Tensor | None, ...]:
    _, _, cos, sin, token_first = inputs
    return tuple(
        _rotated(g, cos, sin, token_first, -1.0) if n and g is not None else None
        for g, n in zip(cotangents, needs, strict=True)
    )


def _launch_backward(cotangents: Any, inputs: Any, outputs: Any, needs: list[bool]) -> tuple[Tensor | None, ...]:
    q, k, cos, sin, token_first = inputs
    wanted = [n and g is not None for g, n in zip(cotangents, needs, strict=True)]
    gq, gk = (g if w else x[:0] for g, x, w in zip(cotangents, (q, k), wanted, strict=True))  # no rows, no programs
    done = _launch(gq, gk, cos, sin, token_first, -1.0)
    return tuple(g if w else None for g, w in zip(done, wanted, strict=True))


def _supports(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, token_first: bool) -> None:
    token = 1 if token_first else 2
    layout = "[B, tokens, heads, D]" if token_first else "[B, heads, tokens, D]"
    if q.dim() != 4 or k.dim() != 4 or any(q.shape[i] != k.shape[i] for i in (0, token, 3)) or not q.shape[3]:
        raise ValueError(
            f"rope: q {tuple(q.shape)}, k {tuple(k.shape)}; required {layout}, alike but for the heads (token_first={token_first})"
        )
    if cos.shape != sin.shape or cos.dim() != 3 or cos.shape[0] not in (1, len(q)) or cos.shape[1] != q.shape[token]:
        want = f"({len(q)} or 1, {q.shape[token]}, R / 2)"
        raise ValueError(
            f"rope: cos {tuple(cos.shape)}, sin {tuple(sin.shape)}; required {want} for q {tuple(q.shape)}"
        )
    if not 2 <= 2 * cos.shape[2] <= q.shape[3]:
        raise ValueError(f"rope: cos and sin have {cos.shape[2]} columns, required half of those rotated, 1 to {q.shape[3] // 2}; of transformers' use cos[..., :{cos.shape[2] // 2}]")  # fmt: skip
    for name, t in (("q", q), ("k", k), ("cos", cos), ("sin", sin)):
        if t.dtype not in _DTYPES or (t.is_cuda and t.dtype == torch.float64):
            allowed = "float32, bfloat16 or float16, and float64 on a CPU alone"
            raise ValueError(
                f"rope: {name} is {t.dtype} on {t.device.type}, required {allowed}; the nearest is float32"
            )
        if t.device != q.device:
            raise ValueError(f"rope: {name} is on {t.device}, required {q.device}, where q is")
    if q.dtype != k.dtype or cos.dtype != sin.dtype:
        raise ValueError(
            f"rope: q {q.dtype}, k {k.dtype}, cos {cos.dtype}, sin {sin.dtype}; required q like k, cos like sin; cast one"
        )


def _example(seed: int, dtype: torch.dtype) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(2, 3, h, 10, generator=g).to(dtype) for h in (4, 2))
    cos, sin = rope_angles(torch.arange(3)[None], torch.tensor([1.0, 0.1, 0.01, 0.001]), dtype=dtype)
    return q, k, cos, sin, True


_rope = define(
    "rope",
    "(Tensor q, Tensor k, Tensor cos, Tensor sin, bool token_first) -> (Tensor, Tensor)",
    formula="(x1 cos - x2 sin, x2 cos + x1 sin) of the halves x1, x2 of each head of q and k",
    why="2 (q + k) bytes in one launch (70 microseconds for 40 heads x 128 x 16384 tokens on an H200). Kept until measured: a compiler makes "
    "one or two kernels of it, and fuses what is before; what decides is decoding, where launches count, and the backward pass",
    reference=_both,
    kernel=_launch,
    backward=_backward,
    backward_kernel=_launch_backward,
    differentiable=("q", "k"),
    forgets=("q", "k"),
    supports=_supports,
    example=_example,
    kernels=tuple(_configurations()),
)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the halves of every head of q and k by the angles of its token; new tensors in q's dtype and memory order.

    Args:
        q: [B, heads, tokens, D]; k: the same with heads of its own. A transposed [B, tokens, heads, D] is taken as it lies, without a copy.
        cos, sin: [B or 1, tokens, R / 2] from `rope_angles`, R <= D; columns from R on pass.

    Differentiable in q and k. `ValueError` for other shapes and dtypes. Su et al. 2021, arXiv:2104.09864, equation 34.

    >>> cos, sin = rope_angles(torch.arange(2)[None], torch.tensor([torch.pi / 2]))
    >>> q, k = rope(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2), cos, sin)
    >>> q[0, 0].round()
    tensor([[ 1.,  1.],
            [-1.,  1.]])
    """
    if q.dim() == k.dim() == 4 and q.transpose(1, 2).is_contiguous() and not q.is_contiguous():
        q, k = _rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin, True)
        return q.transpose(1, 2), k.transpose(1, 2)
    return _rope(q, k, cos, sin, False)
