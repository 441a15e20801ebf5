"""Attention of the last tokens of sequences over their key-value caches: decoding, token by token or a few at a time.

    x_ij = c tanh(s q_i . k_j / c) - slope (p_i - j);  out_i = sum_j softmax_j(x_i)_j v_j
    over the keys start <= j <= p_i, j > p_i - window, where token i of Q stands at p_i = length - Q + i

A row's keys are cut into pieces of `SPLIT`, counted from the first key that the row sees and doubled until there are no more than `PIECES`.
Each piece has a maximum, a sum and a weighted sum of values of its own; a second pass combines them in their order. How many programs share
the pieces depends on the sizes of the call, what a piece is on its own row alone: a row has the same bits in every batch, with any padding,
any number of free slots, and any order and size of pages.

Milakov and Gimelshein 2018, arXiv:1805.02867 (online softmax); Dao et al. 2023, "Flash-Decoding" (pieces of keys); Kwon et al. 2023,
arXiv:2309.06180 (pages); Ainslie et al. 2023, arXiv:2305.13245 (query heads that share keys, one tile here: keys are read once).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fds.kernels import attention_kernels
from fds.kernels.registry import define, on_device, one_by_one

# --- reference ---


def _softmax(inputs: tuple[Any, ...], known: Tensor | None = None, clean: bool = False) -> tuple[Tensor, ...]:
    """q [B, Hkv, rows, D], k, v, probabilities [B, Hkv, rows, L], products after their softcap, rows [B, 1, 1, 1] whose length can be.

    `known` [B, L]: keys whose page there is. `clean`: k is zero, as v is, in slots that no token sees: they may hold NaN.
    """
    query, key, value, lengths, starts, slopes, scale, window, softcap = inputs
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    (b, heads, tokens, d), (groups, keys) = query.shape, key.shape[1:3]
    shared = heads // groups
    slot = torch.arange(keys, device=query.device)
    back = (lengths[:, None] - tokens + torch.arange(tokens, device=query.device))[..., None] - slot
    seen = back >= 0
    right = (lengths >= 0) & (lengths <= keys)
    if starts is not None:
        seen, right = seen & (slot >= starts[:, None, None]), right & (starts >= 0)
    if window:
        seen = seen & (back < window)
    filled = seen.any(1)[:, None, :, None]
    k, v = (key.where(filled, 0.0) if clean else key).to(wide), value.where(filled, 0.0).to(wide)
    q = query.to(wide).reshape(b, groups, shared * tokens, d)
    x = q @ k.mT * scale
    x = softcap * (x / softcap).tanh() if softcap else x
    z = x.reshape(b, groups, shared, tokens, keys)
    if slopes is not None:
        z = z - slopes.to(wide).reshape(groups, shared, 1, 1) * back[:, None, None]
    if known is not None:
        z = z.where(known[:, None, None, None], torch.nan)
    some = seen.any(-1)[:, None, None, :, None]
    p = z.where(seen[:, None, None], -torch.inf).where(some, 0.0).softmax(-1).where(some, 0.0)
    return q, k, v, p.reshape(x.shape), x, right[:, None, None, None]


def _attend(*inputs: Any, known: Tensor | None = None) -> Tensor:
    query, value = inputs[0], inputs[2]
    _, _, v, p, _, right = _softmax(inputs, known)
    return (p @ v).reshape(*query.shape[:3], value.shape[-1]).where(right, torch.nan).to(query.dtype)


Gradients = tuple[Tensor | None, ...]


def _gradients(cotangents: Any, inputs: tuple[Any, ...], outputs: Any, needs: list[bool], known: Tensor | None = None) -> Gradients:  # fmt: skip
    query, scale, softcap = inputs[0], inputs[6], inputs[8]
    q, k, v, p, x, right = _softmax(inputs, known, clean=True)
    g = cotangents[0].to(p.dtype).reshape(*q.shape[:3], v.shape[-1]).where(right, 0.0)
    of_p = g @ v.mT
    of_x = p * (of_p - (p * of_p).sum(-1, keepdim=True)) * scale
    of_x = of_x * (1 - (x / softcap).square()) if softcap else of_x
    grads = (lambda: (of_x @ k).reshape(query.shape), lambda: of_x.mT @ q, lambda: p.mT @ g)
    return tuple(f().to(query.dtype) if n else None for f, n in zip(grads, needs, strict=True))


def _gathered(key_pages: Tensor, value_pages: Tensor, page_table: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys and values [B, Hkv, L, *] of the pages, the table with page 0 for what is no page, and which keys [B, L] there are."""
    count, page = key_pages.shape[:2]
    there = (page_table >= 0) & (page_table < count)
    table = page_table.where(there, 0).long()
    key, value = (t[table].flatten(1, 2).transpose(1, 2) for t in (key_pages, value_pages))
    return key, value, table, there.repeat_interleave(page, 1)


def _attend_paged(query: Tensor, key_pages: Tensor, value_pages: Tensor, page_table: Tensor, *rest: Any) -> Tensor:
    key, value, _, known = _gathered(key_pages, value_pages, page_table)
    return _attend(query, key, value, *rest, known=known)


def _gradients_paged(cotangents: Any, inputs: tuple[Any, ...], outputs: Any, needs: list[bool]) -> Gradients:
    query, *pages = inputs[:3]
    key, value, table, known = _gathered(pages[0], pages[1], inputs[3])
    by_query, *by_cache = _gradients(cotangents, (query, key, value, *inputs[4:]), outputs, needs, known)

    def spread(g: Tensor | None, like: Tensor) -> Tensor | None:
        """Rows may share pages: their gradients add up."""
        if g is None:
            return None
        return torch.zeros_like(like).index_put((table,), g.transpose(1, 2).reshape(*table.shape, *like.shape[1:]), accumulate=True)  # fmt: skip

    return by_query, *(spread(g, like) for g, like in zip(by_cache, pages, strict=True))


# --- operators ---


def _on_vmap(name: str, folded: tuple[int, ...], slopes: int) -> Callable[..., Any]:
    """vmap makes more rows, unless it runs over slopes or would copy a cache (arguments 1 and 2) that is one for all."""

    def rule(info: Any, dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        if dims[slopes] is not None or any((dims[i] is None) == (i in folded) for i in (1, 2)):
            return one_by_one(name)(info, dims, *args)
        n, made = info.batch_size, list(args)
        for i in folded:
            if (t := args[i]) is not None:
                d = dims[i]
                made[i] = (t.expand(n, *t.shape) if d is None else t.movedim(d, 0)).flatten(0, 1)
        out = getattr(torch.ops.fds, name).default(*made)
        return out.unflatten(0, (n, len(out) // n)), 0

    return rule


_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int32, torch.int64)
_Declared = dict[str, tuple[Any, str, tuple[torch.dtype, ...]]]  # name -> tensor, letters of its sizes, dtypes


def _sizes(name: str, arguments: _Declared) -> dict[str, int]:
    """Sizes by letters, the same for all arguments. `ValueError` for the first argument that is not what was declared."""
    sizes: dict[str, int] = {}
    device = arguments["query"][0].device
    for what, (t, declared, dtypes) in arguments.items():
        if t is None:
            continue
        letters, shape = declared.split(), [*t.shape]
        right = len(shape) == len(letters) and t.dtype in dtypes and t.device == device
        if not right or any(sizes.setdefault(c, n) != n for c, n in zip(letters, shape, strict=True)):
            wanted = ", ".join(f"{c}={sizes[c]}" if c in sizes else c for c in letters)
            kinds = " or ".join(str(d) for d in dtypes)
            raise ValueError(f"{name}: {what} {shape} {t.dtype} on {t.device}; required [{wanted}] {kinds} on {device}")
    return sizes


def _check(name: str, query: Any, caches: _Declared, lengths: Any, starts: Any, slopes: Any, window: int, softcap: float) -> None:  # fmt: skip
    rows: _Declared = {"lengths": (lengths, "B", _INTEGERS), "starts": (starts, "B", _INTEGERS)}
    options: _Declared = {"alibi_slopes": (slopes, "Hq", _FLOATS)}
    n = _sizes(name, {"query": (query, "B Hq Q D", _FLOATS), **caches, **rows, **options})
    device, widest, keys = on_device(query), max(n["D"], n["Dv"]), n["L"] if "L" in n else n["pages"] * n["page"]
    least = min(n.get(c, 1) for c in ("Hkv", "D", "Dv", "P", "page"))
    for right, text in (
        (least > 0, f"sizes {n}; required at least 1 for Hkv, D, Dv, P, page"),
        (n["Hq"] % max(n["Hkv"], 1) == 0, f"{n['Hq']} query heads, {n['Hkv']} key heads; required a multiple of them"),
        (query.dtype != torch.float64 or not query.is_cuda, "float64 on CUDA; the nearest supported dtype is float32"),
        (widest <= 256 or not device, f"heads of {widest} columns on CUDA; required at most 256"),
        (keys <= attention_kernels.LONGEST or not device, f"{keys} keys in a row on CUDA; required at most 2^30"),
        (n.get("L", 0) * widest < 2**31 or not device, "2^31 elements of keys or values of one head; use pages"),
        (window >= 0, f"window={window!r}, required 0 (none) or a number of keys"),
        (softcap >= 0, f"softcap={softcap!r}, required 0 (none) or a positive number"),
    ):
        if not right:
            raise ValueError(f"{name}: {text}")


def _supports(query: Any, key: Any, value: Any, lengths: Any, starts: Any, slopes: Any, scale: float, window: int, softcap: float) -> None:  # fmt: skip
    caches: _Declared = {"key": (key, "B Hkv L D", (query.dtype,)), "value": (value, "B Hkv L Dv", (query.dtype,))}
    _check("decode_attention", query, caches, lengths, starts, slopes, window, softcap)


def _supports_paged(query: Any, key_pages: Any, value_pages: Any, page_table: Any, *rest: Any) -> None:
    caches: _Declared = {
        "key_pages": (key_pages, "P page Hkv D", (query.dtype,)),
        "value_pages": (value_pages, "P page Hkv Dv", (query.dtype,)),
        "page_table": (page_table, "B pages", (torch.int32,)),
    }
    _check("paged_decode_attention", query, caches, *rest[:3], *rest[4:])


def _example(seed: int, dtype: torch.dtype) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(s, generator=g).to(dtype) for s in ((3, 4, 2, 8), (3, 2, 11, 8), (3, 2, 11, 6)))
    lengths, starts = torch.tensor([11, 5, 0]), torch.tensor([0, 2, 0])
    return query, key, value, lengths, starts, torch.tensor([0.5, 0.25, 0.125, 0.0]).to(dtype), 0.4, 6, 3.0


def _paged_example(seed: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """More keys than a piece has, and no window: kernels take their second pass. Two rows share a page, a third has none."""
    g = torch.Generator().manual_seed(seed)
    query, keys, values = (
        torch.randn(s, generator=g).to(dtype) for s in ((3, 4, 2, 8), (22, 16, 2, 8), (22, 16, 2, 6))
    )
    table = torch.full((3, 20), -1, dtype=torch.int32)
    table[0] = torch.randperm(22, generator=g)[:20]
    table[1, 0] = table[0, 3]
    lengths, starts = torch.tensor([300, 13, 0]), torch.tensor([0, 2, 0])
    return query, keys, values, table, lengths, starts, torch.tensor([0.5, 0.25, 0.125, 0.0]).to(dtype), 0.4, 0, 3.0


_WHY = (
    "one read of the cache, 2 L Hkv D elements for each token, is the floor (15 GB in 3.1 ms on an H200); "
    "a compiler neither splits the keys of a softmax among programs nor reads them once for all query heads"
)
_OPTIONS = "Tensor lengths, Tensor? starts, Tensor? slopes, float scale, int window, float softcap"

_decode = define(
    "decode_attention",
    f"(Tensor query, Tensor key, Tensor value, {_OPTIONS}) -> Tensor",
    formula="softmax(c tanh(s q K^T / c) - slope (p - j)) V over the keys of each row's cache",
    why=_WHY,
    reference=_attend,
    kernel=lambda query, key, value, *rest: attention_kernels.run(query, key, value, None, *rest),
    backward=_gradients,
    differentiable=("query", "key", "value"),
    supports=_supports,
    batch=_on_vmap("decode_attention", (0, 1, 2, 3, 4), 5),
    example=_example,
    kernels=tuple(attention_kernels.configurations(page=0)),
)

_paged = define(
    "paged_decode_attention",
    f"(Tensor query, Tensor key_pages, Tensor value_pages, Tensor page_table, {_OPTIONS}) -> Tensor",
    formula="decode_attention over caches that are lists of pages",
    why=_WHY,
    reference=_attend_paged,
    kernel=attention_kernels.run,
    backward=_gradients_paged,
    differentiable=("query", "key_pages", "value_pages"),
    supports=_supports_paged,
    batch=_on_vmap("paged_decode_attention", (0, 3, 4, 5), 6),
    example=_paged_example,
    kernels=tuple(attention_kernels.configurations(page=16)),
)


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    *,
    starts: Tensor | None = None,
    scale: float | None = None,
    window: int = 0,
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Attention of the last Q tokens of each row over its cache, in which their own keys and values are already.

    Law: a row's result does not depend, in a single bit, on the other rows, on L, or on how far the row is padded (kernels; on a CPU the
    products are the library's).

    Args:
        query: [B, Hq, Q, D]; key: [B, Hkv, L, D]; value: [B, Hkv, L, Dv]: one dtype; Hq a multiple of Hkv, and neighbouring query heads
            share a key head. Low precision is multiplied as it is, float32 as float32 (not tf32); sums are float32. On CUDA a cache that is
            not contiguous is copied, which takes longer than the attention: give the whole cache, and lengths.
        lengths: [B] int32 or int64: one past each row's last key, the place of its last token. A row that sees no key gives zeros, one whose
            length is not in 0..L (or whose start is negative) NaN: a number on the device cannot be an error without waiting for it.
        starts: [B], each row's first key, after its padding on the left. Default 0.
        scale: of the products; default D^-1/2.
        window: a token sees itself and the ``window - 1`` keys before it; 0 for all of them.
        alibi_slopes: [Hq]: ``slope * distance`` is taken off (Press et al. 2022, arXiv:2108.12409). No gradient flows to it.
        softcap: ``c tanh(x / c)`` of the scaled products (Gemma 2); 0 for none.

    Returns: [B, Hq, Q, Dv] in the dtype of `query`. Slots that no token of the row sees may hold anything, NaN included.

    Raises `ValueError` for shapes, dtypes and options other than these.

    >>> q, k, v = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    >>> out = decode_attention(q, k, v, torch.tensor([5, 3]))
    >>> want = torch.nn.functional.scaled_dot_product_attention(q[1:], k[1:, :, :3], v[1:, :, :3], enable_gqa=True)
    >>> torch.allclose(out[1:], want, atol=1e-6)
    True
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _decode(query, key, value, lengths, starts, alibi_slopes, scale, window, softcap)


def paged_decode_attention(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    *,
    starts: Tensor | None = None,
    scale: float | None = None,
    window: int = 0,
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """`decode_attention` over caches in pages: key j of row b is ``key_pages[page_table[b, j // page], j % page]``.

    Law: equal to `decode_attention` over the same keys in one piece, and the same for every order and size of pages (kernels: bit by bit).

    Args:
        key_pages: [P, page, Hkv, D]; value_pages: [P, page, Hkv, Dv]. Rows may share pages.
        page_table: [B, pages] int32. Entries behind a row's last key, before its first one or out of its window may be anything; one that is
            looked at and is not in 0..P-1 gives NaN.

    All else as in `decode_attention`, with L = pages x page.

    >>> q, pages = torch.randn(1, 2, 1, 8), torch.randn(3, 4, 2, 8)
    >>> out = paged_decode_attention(q, pages, pages, torch.tensor([[2, 0]], dtype=torch.int32), torch.tensor([6]))
    >>> whole = torch.cat([pages[2], pages[0]]).transpose(0, 1)[None]
    >>> torch.allclose(out, decode_attention(q, whole, whole, torch.tensor([6])))
    True
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _paged(query, key_pages, value_pages, page_table, lengths, starts, alibi_slopes, scale, window, softcap)
