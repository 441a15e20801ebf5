"""The pure steps of a causal language model of transformers: `prefill` for prompts, `step` for the tokens behind them.

Rows begin at position 0 and slot 0, whatever padding their prompts came with, and every mask is made here, from the positions. So the models'
own masks, which count slots of the batch, are not asked. Two kinds of models cannot be told by a mask alone: ALiBi is computed by the model from a mask
[rows, slots]; and GPT-Neo cuts the window of its local layers out of a triangle that ends at the last slot, so its slots are turned until
the newest token is there.
"""

import inspect
from typing import Any

import attrs
import torch
from torch import Tensor

from fds import losses
from fds.inference import cache as caches
from fds.inference.cache import Cache, CacheConfig
from fds.program import Program

_ADDITIVE = torch.finfo(torch.float32).min


@attrs.frozen
class Family:
    """What a model has to be told, and how."""

    windows: tuple[int, ...]  # of each layer; 0: none
    by_type: tuple[str, ...] | None  # names of the layers' masks, where the model takes several
    additive: bool  # masks are added to scores
    flat: bool  # ALiBi: masks are [rows, slots]
    turned: bool  # newest token in the last slot
    positions: bool  # the model takes position_ids

    @property
    def exact_for_many(self) -> bool:
        """Whether several new tokens at once are computed as one after the other: a mask [rows, slots] says nothing of their order."""
        return not self.flat


def family(module: Any) -> Family:
    """How to ask a model. `ValueError` for one that is no causal language model with a key-value cache, or whose layers keep something else."""
    config = getattr(module, "config", None)
    takes = inspect.signature(module.forward).parameters if config is not None else {}
    if config is None or "past_key_values" not in takes or getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"generate: {type(module).__name__} is not a causal language model of transformers with a key-value cache; use transformers' own generate on the exported model (fds.save)"
        )
    text = config.get_text_config()
    implementation = text._attn_implementation
    if implementation not in ("sdpa", "eager"):
        raise ValueError(
            f"generate: attention is {implementation!r}, required 'sdpa' or 'eager'; load the model with attn_implementation='sdpa'"
        )
    flat = text.model_type in ("bloom", "mpt") or bool(getattr(text, "alibi", False))
    windows, types = _windows(text)
    return Family(
        windows=windows,
        by_type=types if len(set(types)) > 1 else None,
        additive=implementation == "eager",
        flat=flat,
        turned=text.model_type == "gpt_neo",
        positions="position_ids" in takes,
    )


def _windows(config: Any) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The window of each layer, and the name of its mask."""
    window, layers = getattr(config, "sliding_window", None) or 0, config.num_hidden_layers
    types = getattr(config, "layer_types", None)
    if types is None:
        types = ["sliding_attention" if window else "full_attention"] * layers
    known = {"full_attention": 0, "sliding_attention": window}
    if other := set(types) - set(known):
        raise ValueError(
            f"generate: layers of {config.model_type} are {sorted(other)}, allowed {sorted(known)}; use transformers' own generate on the exported model (fds.save)"
        )
    return tuple(known[t] for t in types), tuple(types)


@attrs.frozen
class Decoding:
    """The steps of one program. `ahead`: tokens at the end of the cache that may be taken back and written again."""

    program: Program
    family: Family
    config: CacheConfig
    ahead: int = 1

    @classmethod
    def of(cls, program: Program, config: CacheConfig | str = "static", ahead: int = 1) -> "Decoding":
        """The steps of a program, in evaluation mode. `ValueError` for a model that `family` refuses."""
        found = family(getattr(program.origin.core, "module", None))
        config = CacheConfig.of(config)
        if config.kind == "sliding" and found.turned:
            raise ValueError(
                "cache: 'sliding' is not for GPT-Neo, which takes its windows from the order of slots; use 'static'"
            )
        return cls(program.eval(), found, config, ahead)

    def prefill(self, stored: Any, tokens: Tensor, lengths: Tensor, slots: int, paged: tuple[Any, ...] = ()) -> tuple[Tensor, Cache]:  # fmt: skip
        """Logits float32 [rows, vocabulary] behind prompts, and a cache of `slots` positions that has them.

        `tokens` int64 [rows, prompt], padded behind; `lengths` int64 [rows]. `paged`: table and number of pages of a paged cache (`cache.tables`).
        """
        (rows, count), (table, pages) = tokens.shape, paged or (None, 0)
        at = torch.arange(count, device=tokens.device).expand(rows, count)
        held = self._held(self.family.windows, slots, lengths, table, pages)
        out = self._call(stored, tokens, at, held, lambda window, layer: caches.mask(count, at, window))
        last = (lengths - 1)[:, None, None].expand(-1, 1, out.shape[-1])
        return out.gather(1, last)[:, 0].float(), _tree(held, lengths, table)

    def step(self, stored: Any, cache: Cache, tokens: Tensor) -> tuple[Tensor, Cache]:
        """Logits float32 [rows, new, vocabulary] behind each of the next tokens int64 [rows, new], and the cache with them."""
        lengths, table = cache["lengths"], cache.get("pages")
        at = lengths[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        if tokens.shape[1] > 1 and self.family.flat:
            raise ValueError("decode: a model with ALiBi takes one token at a time")
        held = self._held(self.family.windows, 0, lengths, table, 0, cache["layers"], at)
        out = self._call(stored, tokens, at, held, lambda window, layer: self._mask(layer, at, window))
        return out.float(), _tree(held, lengths + tokens.shape[1], table)

    def _mask(self, layer: Any, at: Tensor, window: int) -> Tensor:
        seen = caches.mask(layer.slots, at, window)
        return seen if layer.turn is None else seen.gather(3, layer.turn[:, None, None].expand_as(seen))

    def _call(self, stored: Any, tokens: Tensor, at: Tensor, held: Any, make: Any) -> Tensor:
        f = self.family
        masks = {w: make(w, next(x for x, v in zip(held.layers, f.windows, strict=True) if v == w)) for w in dict.fromkeys(f.windows)}  # fmt: skip
        if f.flat:
            # ALiBi of a token is the number of ones before it. Of several new tokens, of a prompt, order is the model's to see.
            masks = {w: m[:, 0, -1].long() for w, m in masks.items()}
        elif f.additive:
            masks = {w: torch.zeros_like(m, dtype=torch.float32).masked_fill(~m, _ADDITIVE) for w, m in masks.items()}
        names = dict(zip(f.by_type or (), f.windows, strict=False))
        given: Any = {name: masks[w] for name, w in names.items()} if names else masks[f.windows[0]]
        extra = {"position_ids": at} if f.positions else {}
        with torch.no_grad():
            out = self.program(stored, input_ids=tokens, attention_mask=given, past_key_values=held, use_cache=True, **extra)  # fmt: skip
        return losses.logits_of(out)

    def _held(self, windows: Any, slots: int, lengths: Tensor, table: Any, pages: int, layers: Any = None, at: Any = None) -> Any:  # fmt: skip
        from fds.inference.adapter import Held, HeldLayer

        made: list[Any] = [
            HeldLayer(self.config, caches.room(self.config, slots, w, self.ahead), lengths, table, pages, at, layers and layers[i], self.family.turned)
            for i, w in enumerate(windows)
        ]  # fmt: skip
        return Held(layers=made)


def _tree(held: Any, lengths: Tensor, table: Tensor | None) -> Cache:
    return {"lengths": lengths, "layers": [x.layer for x in held.layers], **({} if table is None else {"pages": table})}
