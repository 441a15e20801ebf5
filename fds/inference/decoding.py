"""The pure steps of a language model of transformers: `prefill` for prompts, `step` for the tokens behind them.

Rows begin at position 0 and slot 0, whatever padding their prompts came with, and every mask is made here, from the positions. So the models'
own masks, which count slots of the batch, are not asked. Two kinds of models cannot be told by a mask alone: ALiBi is computed by the model from a mask
[rows, slots]; and GPT-Neo cuts the window of its local layers out of a triangle that ends at the last slot, so its slots are turned until
the newest token is there.

A model with an encoder encodes the prompts once; its decoder, which begins with a token of its own, attends to them across, and has a cache of its own
besides. Such decoders count positions themselves, for all rows alike; their rows do begin and go on together.
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
_ENCODED = (
    "t5",
    "mt5",
    "bart",
    "mbart",
    "pegasus",
    "marian",
)  # encoder-decoder models whose text was compared with transformers'


@attrs.frozen
class Family:
    """What a model has to be told, and how."""

    windows: tuple[int, ...]  # of each layer; 0: none
    by_type: tuple[str, ...] | None  # names of the layers' masks, where the model takes several
    additive: bool  # masks are added to scores
    flat: bool  # ALiBi: masks are [rows, slots]
    turned: bool  # newest token in the last slot
    positions: bool  # the model takes position_ids
    encoder: bool  # a decoder behind an encoder
    vocabulary: int
    limit: int | None  # positions

    @property
    def together(self) -> str:
        """Why all rows have to go on by one token at a time; "" if they need not."""
        if self.flat:
            return "ALiBi is computed from a mask [rows, slots], which says nothing of the order of several new tokens"
        return "a decoder behind an encoder counts positions for all rows alike" if self.encoder else ""


def family(module: Any) -> Family:
    """How to ask a model. `ValueError` for one that is no language model with a key-value cache, or whose layers keep something else."""
    config = getattr(module, "config", None)
    takes = inspect.signature(module.forward).parameters if config is not None else {}
    encoder = bool(getattr(config, "is_encoder_decoder", False))
    if (
        config is None
        or "past_key_values" not in takes
        or (getattr(module, "get_output_embeddings", lambda: None)() is None)
    ):
        raise ValueError(
            f"generate: {type(module).__name__} is not a language model of transformers with a key-value cache and an output layer; use transformers' own generate on the exported model (fds.save)"
        )
    if encoder and config.model_type not in _ENCODED:
        raise ValueError(
            f"generate: encoder-decoder models of family {config.model_type!r} were not tried, known are {', '.join(_ENCODED)}; use transformers' own generate on the exported model (fds.save)"
        )
    text = config.get_text_config(decoder=True) if encoder else config.get_text_config()
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
        encoder=encoder,
        vocabulary=text.vocab_size,
        limit=getattr(text, "max_position_embeddings", None),
    )


def _windows(config: Any) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The window of each layer, and the name of its mask."""
    window = getattr(config, "sliding_window", None) or 0
    layers = getattr(config, "num_decoder_layers", None) or config.num_hidden_layers
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

    def prefill(self, stored: Any, tokens: Tensor, lengths: Tensor, slots: int, paged: tuple[Any, ...] = (), begin: Tensor | None = None) -> tuple[Tensor, Cache]:  # fmt: skip
        """Logits float32 [rows, vocabulary] behind prompts, and a cache of `slots` positions that has them.

        `tokens` int64 [rows, prompt], padded behind; `lengths` int64 [rows]. `paged`: table and number of pages of a paged cache (`cache.tables`).
        `begin` int64 [rows, first]: for a model with an encoder, what its decoder begins with; the logits are behind that, and so are the slots.

        Raises `ValueError` for lengths of other rows, more tokens than slots, and a table that is missing or not asked for.
        """
        if (begin is not None) != self.family.encoder:
            raise ValueError(
                "prefill: begin= is what a decoder behind an encoder begins with, for such models and no others"
            )
        if lengths.shape != tokens.shape[:1]:
            raise ValueError(f"prefill: lengths {tuple(lengths.shape)}, required ({len(tokens)},) as tokens have rows")
        if bool(paged) != (self.config.kind == "paged"):
            raise ValueError(f"prefill: paged= {'is' if paged else 'is not'} given for a {self.config.kind} cache; it is what cache.tables(config, lengths, slots) gives for this kind")  # fmt: skip
        across, own = None, lengths
        if begin is not None:
            across, tokens = self._across(tokens, lengths, None), begin
            own = torch.full_like(lengths, begin.shape[1])
        (rows, count), (table, pages) = tokens.shape, paged or (None, 0)
        if count > slots:
            raise ValueError(f"prefill: {count} tokens, and slots for {slots}; give more slots, or fewer tokens")
        at = torch.arange(count, device=tokens.device).expand(rows, count)
        held = self._held(self.family.windows, slots, own, table, pages)
        out = self._call(stored, tokens, at, held, lambda window, layer: caches.mask(count, at, window), across)
        last = (own - 1)[:, None, None].expand(-1, 1, out.shape[-1])
        return out.gather(1, last)[:, 0].float(), _tree(held, own, table, across)

    def step(self, stored: Any, cache: Cache, tokens: Tensor) -> tuple[Tensor, Cache]:
        """Logits float32 [rows, new, vocabulary] behind each of the next tokens int64 [rows, new], and the cache with them.

        How long rows are is data, so it is the caller's to stop before slots are full: what comes then is written over the oldest.

        Raises `ValueError` for the cache of another batch, or of another model.
        """
        lengths, table = cache["lengths"], cache.get("pages")
        if len(tokens) != len(lengths) or len(cache["layers"]) != len(self.family.windows):
            raise ValueError(f"decode: a cache of {len(lengths)} rows and {len(cache['layers'])} layers, required {len(tokens)} rows as tokens have, {len(self.family.windows)} layers as the model has; use the cache that came out of this batch's prefill")  # fmt: skip
        at = lengths[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        if tokens.shape[1] > 1 and self.family.flat:
            raise ValueError("decode: a model with ALiBi takes one token at a time")
        held = self._held(self.family.windows, 0, lengths, table, 0, cache["layers"], at)
        kept = cache.get("across")
        across = None if kept is None else self._across(kept["states"], kept["lengths"], kept["layers"])
        out = self._call(stored, tokens, at, held, lambda window, layer: self._mask(layer, at, window), across)
        new = _tree(held, lengths + tokens.shape[1], table, None)
        return out.float(), new if kept is None else {**new, "across": kept}

    def _mask(self, layer: Any, at: Tensor, window: int) -> Tensor:
        seen = caches.mask(layer.slots, at, window)
        return seen if layer.turn is None else seen.gather(3, layer.turn[:, None, None].expand_as(seen))

    def _call(self, stored: Any, tokens: Tensor, at: Tensor, held: Any, make: Any, across: "_Across | None") -> Tensor:
        f = self.family
        masks = {w: make(w, next(x for x, v in zip(held.layers, f.windows, strict=True) if v == w)) for w in dict.fromkeys(f.windows)}  # fmt: skip
        if f.flat:
            # ALiBi of a token is the number of ones before it. Of several new tokens, of a prompt, order is the model's to see.
            masks = {w: m[:, 0, -1].long() for w, m in masks.items()}
        else:
            masks = {w: self._as_asked(m) for w, m in masks.items()}
        names = dict(zip(f.by_type or (), f.windows, strict=False))
        given: Any = {name: masks[w] for name, w in names.items()} if names else masks[f.windows[0]]
        if across is None:
            inputs: dict[str, Any] = {"input_ids": tokens, "attention_mask": given, "past_key_values": held}
        else:
            inputs = {"decoder_input_ids": tokens, "decoder_attention_mask": given, **across.inputs(held)}
        if f.limit is not None and self.ahead > 1:
            at = at.clamp(max=f.limit - 1)  # proposals behind the last token that there is room for, which nobody takes
        extra = {"position_ids": at} if f.positions else {}
        with torch.no_grad():
            out = self.program(stored, **inputs, use_cache=True, **extra)
        return losses.logits_of(out)

    def _as_asked(self, mask: Tensor) -> Tensor:
        return (
            torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, _ADDITIVE) if self.family.additive else mask
        )

    def _held(self, windows: Any, slots: int, lengths: Tensor, table: Any, pages: int, layers: Any = None, at: Any = None) -> Any:  # fmt: skip
        from fds.inference.adapter import Held, HeldLayer

        made: list[Any] = [
            HeldLayer(self.config, caches.room(self.config, slots, w, self.ahead), lengths, table, pages, at, layers and layers[i], self.family.turned, self.family.encoder)
            for i, w in enumerate(windows)
        ]  # fmt: skip
        return Held(layers=made)

    def _across(self, source: Tensor, lengths: Tensor, layers: Any) -> "_Across":
        """What a decoder attends to: prompts [rows, prompt] that are to be encoded, or without them the `layers` that were made of them."""
        from fds.inference.adapter import AcrossLayer, Held

        made: list[Any] = [AcrossLayer(self.config, layers and layers[i], layers and source.dtype) for i in range(len(self.family.windows))]  # fmt: skip
        seen = torch.arange(source.shape[1], device=source.device) < lengths[:, None]
        return _Across(source, lengths, self._as_asked(seen[:, None, None]), Held(layers=made), layers is None)


@attrs.frozen
class _Across:
    """The side of the encoder for the time of a call."""

    source: Tensor
    lengths: Tensor
    mask: Tensor
    held: Any
    fresh: bool

    def inputs(self, own: Any) -> dict[str, Any]:
        """Arguments of a model: prompts to encode, or the encoder's states, of which models ask no more than that they are there."""
        from fds.inference.adapter import EncoderDecoderCache

        source = {"input_ids": self.source} if self.fresh else {"encoder_outputs": (self.source,)}
        return {**source, "attention_mask": self.mask, "past_key_values": EncoderDecoderCache(own, self.held)}

    def tree(self) -> dict[str, Any]:
        keys = self.held.layers[0].keys
        empty = keys.new_zeros(keys.shape[0], keys.shape[2], 0)
        return {"lengths": self.lengths, "layers": [x.layer for x in self.held.layers], "states": empty}


def _tree(held: Any, lengths: Tensor, table: Tensor | None, across: _Across | None) -> Cache:
    return {
        "lengths": lengths, "layers": [x.layer for x in held.layers],
        **({} if table is None else {"pages": table}), **({} if across is None else {"across": across.tree()}),
    }  # fmt: skip
