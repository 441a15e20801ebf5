"""Key-value caches as trees of tensors: static, sliding, paged, in the model's dtype or in int8.

    {"lengths": int64 [rows], "layers": [{"keys": .., "values": .., ..}, ..], "pages": int64 [rows, pages of a row], "across": {..}}

A row's token at position p is in slot ``p % slots`` of its row, whatever the other rows have: rows of different lengths need no padding among
them, and tokens that are taken back (of a draft) are overwritten by the next ones. Which position a slot holds follows from the last position
that was written (`positions`), so that a mask is all that attention has to be told.

A layer of a sliding window keeps the window, not the context. Pages of a paged cache belong to rows by a table, so that a row has as many as it
needs; page 0 is nobody's: what a row writes beyond its pages goes there. int8 stores a scale for each token and head
(absmax / 127 over the width).

A decoder behind an encoder has a second part, ``"across"``: keys and values of the encoder's states ("layers", as wide as the prompts), their
"lengths", and "states", an empty tensor of their dtype. It is written by the prompts and never again.
"""

from collections.abc import Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from fds import tree

Layer = dict[str, Tensor]
Cache = dict[str, Any]
KINDS, DTYPES = ("static", "sliding", "paged"), (None, "int8")


@attrs.frozen
class CacheConfig:
    """What a cache is like.

    kind: "static": room for every position in every layer. "sliding": as far as a layer's window goes, where it has one. "paged": pages of `page`
    tokens, as many as each row needs.
    dtype: None, as the model computes; or "int8".
    page: tokens of a page; a multiple of 8.

    Raises `ValueError` for another kind or dtype, naming the nearest.
    """

    kind: str = "static"
    dtype: str | None = None
    page: int = 64

    def __attrs_post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"cache: kind {self.kind!r} is unknown; {tree.suggest(str(self.kind), KINDS)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"cache: dtype {self.dtype!r}, allowed None (the model's) or 'int8'")
        if type(self.page) is not int or self.page < 8 or self.page % 8:
            raise ValueError(f"cache: page={self.page!r}, required a multiple of 8")

    @classmethod
    def of(cls, given: "CacheConfig | str") -> "CacheConfig":
        """From a kind, with "-int8" behind it for that dtype.

        >>> CacheConfig.of("paged-int8")
        CacheConfig(kind='paged', dtype='int8', page=64)
        """
        if isinstance(given, CacheConfig):
            return given
        kind, _, dtype = str(given).partition("-")
        return cls(kind, dtype or None)


def positions(slots: int, last: Tensor) -> Tensor:
    """Which position each slot holds, by the last position written in each row [rows]; negative: none. [rows, slots]

    >>> positions(4, torch.tensor([1, 5])).tolist()
    [[0, 1, -2, -1], [4, 5, 2, 3]]
    """
    slot = torch.arange(slots, device=last.device)
    return last[:, None] - (last[:, None] - slot) % slots


def mask(slots: int, at: Tensor, window: int) -> Tensor:
    """Which slots the tokens at positions `at` [rows, new] see, after they were written: bool [rows, 1, new, slots]. `window` 0: all before."""
    held = positions(slots, at[:, -1])[:, None]
    seen = (held >= 0) & (held <= at[..., None])
    return (seen & (held > at[..., None] - window) if window else seen)[:, None]


def room(config: CacheConfig, slots: int, window: int, ahead: int) -> int:
    """Slots of a layer, in a cache of `slots` positions, whose last `ahead` tokens may be taken back."""
    return min(slots, window + 2 * ahead) if config.kind == "sliding" and window else slots


def tables(config: CacheConfig, lengths: Sequence[int], slots: int) -> tuple[()] | tuple[Tensor, int]:
    """A page table for rows that may come to these lengths: int64 [rows, pages], and the number of pages. Nothing for other kinds."""
    if config.kind != "paged":
        return ()
    table, free = torch.zeros(len(lengths), -(-slots // config.page), dtype=torch.int64), 1
    for row, length in enumerate(lengths):
        count = -(-length // config.page)
        table[row, :count] = torch.arange(free, free + count)
        free += count
    return table, free


def filled(config: CacheConfig, keys: Tensor, values: Tensor, lengths: Tensor, slots: int, table: Tensor | None, pages: int) -> Layer:  # fmt: skip
    """A layer that holds the first tokens [rows, heads, tokens, width] of rows, as many as `lengths` says."""
    parts = coded(config, keys, values)
    if table is None:
        return {k: _placed(x, lengths, slots) for k, x in parts.items()}
    out: Layer = {}
    tokens = keys.shape[2]
    count = -(-tokens // config.page)
    for k, x in parts.items():
        x = torch.nn.functional.pad(x, (0, 0, 0, count * config.page - tokens))
        rows, heads, _, width = x.shape
        x = x.view(rows, heads, count, config.page, width).transpose(1, 2)
        store = x.new_zeros(pages, heads, config.page, width)
        out[k] = store.index_put((table[:, :count],), x)
    return out


def _placed(x: Tensor, lengths: Tensor, slots: int) -> Tensor:
    tokens = x.shape[2]
    if tokens <= slots:
        return torch.nn.functional.pad(x, (0, 0, 0, slots - tokens))
    at = positions(slots, lengths - 1).clamp(min=0)
    return x.gather(2, at[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def written(config: CacheConfig, layer: Layer, keys: Tensor, values: Tensor, at: Tensor, table: Tensor | None) -> Layer:
    """A layer with new tokens [rows, heads, new, width] at positions `at` [rows, new]."""
    rows = torch.arange(at.shape[0], device=at.device)[:, None]
    out = dict(layer)
    for k, x in coded(config, keys, values).items():
        if table is None:
            place: list[Tensor | None] = [rows, None, at % layer[k].shape[2]]
        else:
            place = [table.gather(1, at // config.page), None, at % config.page]
        # Two indices with all heads between them: their dimensions come first, as [rows, new, heads, width].
        out[k] = torch.ops.aten.index_put(layer[k], place, x.transpose(1, 2))
    return out


def opened(layer: Layer, table: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values [rows, heads, slots, width] of a layer."""

    def whole(x: Tensor) -> Tensor:
        if table is None:
            return x
        pages = x[table]  # [rows, pages, heads, page, width]
        rows, count, heads, page, width = pages.shape
        return pages.transpose(1, 2).reshape(rows, heads, count * page, width)

    found = {k: whole(x) for k, x in layer.items()}
    for k in ("keys", "values"):
        if f"{k}_scales" in found:
            found[k] = (found[k].float() * found.pop(f"{k}_scales")).to(dtype)
    return found["keys"], found["values"]


def coded(config: CacheConfig, keys: Tensor, values: Tensor) -> Layer:
    """Keys and values as a layer of this dtype stores them."""
    if config.dtype is None:
        return {"keys": keys, "values": values}
    out: Layer = {}
    for k, x in (("keys", keys), ("values", values)):
        scale = x.float().abs().amax(-1, keepdim=True) / 127
        out[k] = (x.float() / scale.clamp(min=1e-30)).round().clamp(-127, 127).to(torch.int8)
        out[f"{k}_scales"] = scale
    return out


def repeated(cache: Cache, n: int) -> Cache:
    """Every row n times, one behind the other. `ValueError` for a paged cache: its pages belong to one row each."""
    if cache.get("pages") is not None:
        raise ValueError("cache: rows of a paged cache cannot be repeated; use kind='static' with n > 1")
    return tree.map(lambda x: x.repeat_interleave(n, 0), cache)


def grown(config: CacheConfig, cache: Cache, slots: int) -> Cache:
    """The same cache with room for more positions: a static one. `ValueError` for other kinds, and for fewer positions."""
    if config.kind != "static":
        why = {"sliding": "slots of a window are written in turn", "paged": "pages are dealt out for the lengths that rows may come to"}[config.kind]  # fmt: skip
        raise ValueError(f"cache: a {config.kind} cache does not grow: {why}; use kind='static', or make it for more")
    sizes = {x["keys"].shape[2] for x in cache["layers"]}
    if len(sizes) > 1 or slots < min(sizes):
        raise ValueError(f"cache: layers of {sorted(sizes)} slots to {slots}; required one size, and no smaller one")
    return {**cache, "layers": [{k: torch.nn.functional.pad(x, (0, 0, 0, slots - x.shape[2])) for k, x in layer.items()} for layer in cache["layers"]]}  # fmt: skip
