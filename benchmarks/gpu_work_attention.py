"""What `gpu.py` times of decode attention: the heads of Llama-3-8B, one new token for each row, full caches.

Torch's attention gets what suits it best: no mask, rows of one length, and under a window only the keys in it.
Caches below some 40 MB (one row, up to 8192 keys) stay in the L2 cache between replays: there all may be faster than the floor.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from gpu_work import Floor, Work, randn
from torch import Tensor

import fds.kernels

HEADS, GROUPS, WIDTH, PAGE = 32, 8, 128, 16


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)


def attend_pages(query: Tensor, keys: Tensor, values: Tensor, table: Tensor) -> Tensor:
    key, value = (t[table].flatten(1, 2).transpose(1, 2) for t in (keys, values))
    return attend(query, key, value)


def rivals(f: Callable[[], Tensor], g: Callable[..., Tensor], args: tuple[Tensor, ...]) -> dict[str, Callable[[], Any]]:
    """The operator, and torch's attention, eager and compiled. An error if they are apart: small examples do not show it."""
    got, want = f().float(), g(*args).float()
    apart = float((got - want).norm() / want.norm())
    if not apart < 2e-2:
        raise ValueError(f"decode attention: {apart:.1e} away from torch's")
    torch.compiler.reset()  # every size anew, and none of them dynamic
    compiled = torch.compile(g, dynamic=False)
    return {"fds": f, "eager": lambda: g(*args), "compiled": lambda: compiled(*args)}


def floor(batch: int, keys: int) -> Floor:
    """Keys and values that are seen, the query and the result; two products."""
    tokens = batch * HEADS * WIDTH
    return Floor(2 * (2 * batch * GROUPS * keys * WIDTH + 2 * tokens), 4 * tokens * keys)


def decode(batch: int, context: int, window: int = 0) -> tuple[dict[str, Callable[[], Any]], Floor]:
    query, key, value = randn(batch, HEADS, 1, WIDTH), *(randn(batch, GROUPS, context, WIDTH) for _ in range(2))
    lengths = torch.full((batch,), context, device=query.device)

    def fused() -> Tensor:
        return fds.kernels.decode_attention(query, key, value, lengths, window=window)

    seen = window or context
    return rivals(fused, attend, (query, *(t[:, :, -seen:] for t in (key, value)))), floor(batch, seen)


def decode_pages(batch: int, context: int) -> tuple[dict[str, Callable[[], Any]], Floor]:
    """Pages in any order. An error if a single bit differs from the same keys in one piece, or if a row alone has other bits."""
    columns = context // PAGE
    query, keys, values = (
        randn(batch, HEADS, 1, WIDTH),
        *(randn(batch * columns, PAGE, GROUPS, WIDTH) for _ in range(2)),
    )
    table = torch.randperm(batch * columns, device=query.device).view(batch, columns).to(torch.int32)
    lengths = torch.full((batch,), context, device=query.device)

    def fused() -> Tensor:
        return fds.kernels.paged_decode_attention(query, keys, values, table, lengths)

    last = slice(batch - 1, batch)
    key, value = (t[table[last]].flatten(1, 2).transpose(1, 2) for t in (keys, values))
    alone = fds.kernels.decode_attention(query[last], key, value, lengths[last])
    if not torch.equal(fused()[last], alone):
        raise ValueError("decode attention: other bits from pages, or in a batch")
    return rivals(fused, attend_pages, (query, keys, values, table)), floor(batch, context)


def works() -> list[Work]:
    heads = f"{HEADS} heads on {GROUPS} of {WIDTH}, bf16"
    found: list[Work] = []
    for batch in (1, 8, 64):
        for context in (2048, 8192, 32768):
            label = f"decode, {batch} x {context} keys, {heads}"
            found.append(Work(label, "decode_attention", lambda b=batch, c=context: decode(b, c)))
    label = f"decode, 8 x 32768 keys, window of 4096, {heads}"
    found.append(Work(label, "decode_attention", lambda: decode(8, 32768, 4096)))
    for batch, context in ((1, 8192), (8, 8192), (64, 2048), (64, 8192)):
        label = f"decode, {batch} x {context} keys in pages of {PAGE}, {heads}"
        found.append(Work(label, "paged_decode_attention", lambda b=batch, c=context: decode_pages(b, c)))
    return found


WORK = works()
