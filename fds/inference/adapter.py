"""Caches as the objects that models of transformers write to and read from. They hold new trees: what came in is not written."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache as Held
from transformers.cache_utils import CacheLayerMixin, EncoderDecoderCache

from fds.inference import cache as caches
from fds.inference.cache import CacheConfig, Layer

__all__ = ["AcrossLayer", "EncoderDecoderCache", "Held", "HeldLayer"]


class HeldLayer(CacheLayerMixin):
    """A layer of a cache for the time of a call. Without `layer` it is filled by prompts, which then attend to themselves alone.

    `together`: the model counts positions itself, one count for all rows, by the tokens before the new ones.
    """

    is_compileable = True
    is_sliding = False

    def __init__(self, config: CacheConfig, slots: int, lengths: Tensor, table: Tensor | None, pages: int, at: Tensor | None, layer: Layer | None, turned: bool, together: bool) -> None:  # fmt: skip
        super().__init__()
        self.config, self.lengths, self.table, self.pages, self.at, self.layer = (
            config,
            lengths,
            table,
            pages,
            at,
            layer,
        )
        self.slots, self.turn, self.together = slots, None, together
        self.tokens = 0  # of a prompt
        self.is_initialized = layer is not None
        if layer is not None and at is not None:
            size = layer["keys"].shape[2]
            self.slots = size if table is None else table.shape[1] * size
            if turned:
                slot = torch.arange(self.slots, device=at.device)
                self.turn = (at[:, -1:] + 1 + slot) % self.slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Made by the first update."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.at is None or self.layer is None:
            self.tokens = key_states.shape[2]
            self.layer = caches.filled(self.config, key_states, value_states, self.lengths, self.slots, self.table, self.pages)  # fmt: skip
            return key_states, value_states
        self.layer = caches.written(self.config, self.layer, key_states, value_states, self.at, self.table)
        keys, values = caches.opened(self.layer, self.table, key_states.dtype)
        if self.turn is None:
            return keys, values
        turn = self.turn[:, None, :, None]
        return tuple(x.gather(2, turn.expand(-1, x.shape[1], -1, x.shape[3])) for x in (keys, values))  # type: ignore[return-value]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (query_length if self.at is None else self.slots), 0

    def get_seq_length(self) -> Any:
        """Every slot is before the new tokens, as far as models ask; which ones they see, masks say. A number, or where models count by it a 0-D tensor."""
        if self.at is None:
            return 0
        return self.at[0, 0] if self.together else self.slots - 1

    def get_max_length(self) -> int:
        return self.slots


class AcrossLayer(CacheLayerMixin):
    """Keys and values of an encoder's states in a layer of the decoder: made by the first call, without `layer`, and read by all others."""

    is_compileable = True
    is_sliding = False

    def __init__(self, config: CacheConfig, layer: Layer | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.config, self.layer, self.is_initialized = config, layer, layer is not None
        if layer is not None and dtype is not None:
            self.keys, self.values = caches.opened(layer, None, dtype)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Made by the first update."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        # In the order of [rows, heads, tokens, width], as every later step reads them.
        self.layer, self.keys = (
            caches.coded(self.config, key_states.contiguous(), value_states.contiguous()),
            key_states,
        )
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length(), 0

    def get_seq_length(self) -> int:
        return 0 if self.layer is None else self.layer["keys"].shape[2]

    def get_max_length(self) -> int:
        return self.get_seq_length()
