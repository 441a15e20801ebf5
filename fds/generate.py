"""Text generation: a pure decode step over a static key-value cache, and the loop around it."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fds import losses, tree
from fds.compiling import traced
from fds.program import Program
from fds.randomness import fold, uniform

Cache = dict[
    str, Any
]  # {"length": int64 [1], "keys": [per layer], "values": [per layer]}, each [rows, heads, slots, width]
_SLOTS = 64  # caches grow in steps of this many tokens, so that nearby lengths share one compiled step


def decode(program: Program) -> Callable[..., tuple[Tensor, Cache]]:
    """The pure step ``(stored, cache, tokens, mask, positions) -> (logits, cache)`` of a causal language model of transformers.

    `tokens` [rows, n] int64 go in behind what the cache holds; `mask` [rows, slots] is 1 for every slot that may ever be looked at;
    `positions` [rows, n]. `logits` [rows, vocabulary] are those of the last token. The cache that goes in is not written.

    Raises:
        ValueError: the model keeps no key-value cache, or is an encoder-decoder.
    """
    module: Any = getattr(program.origin.core, "module", None)
    _check_model(module)
    takes = inspect.signature(module.forward).parameters

    def step(stored: Any, cache: Cache, tokens: Tensor, mask: Tensor, positions: Tensor) -> tuple[Tensor, Cache]:
        held = _as_transformers(cache, mask.shape[1], len(cache["keys"]))
        extra = {"position_ids": positions} if "position_ids" in takes else {}
        with torch.no_grad():
            out = program(stored, input_ids=tokens, attention_mask=mask, past_key_values=held, use_cache=True, **extra)
        return losses.logits_of(out)[:, -1].float(), _as_tree(held)

    return step


def _check_model(module: Any) -> None:
    config = getattr(module, "config", None)
    if (
        config is None
        or getattr(config, "is_encoder_decoder", False)
        or "past_key_values" not in inspect.signature(module.forward).parameters
    ):
        raise ValueError(
            f"generate: {type(module).__name__} is not a causal language model of transformers with a key-value cache; use transformers' own generate on the exported model (fds.save)"
        )


def _as_transformers(cache: Cache, slots: int, layers: int) -> Any:
    """The cache as the object that transformers' models write to; over copies, so that the step stays pure."""
    from transformers.cache_utils import Cache as Held
    from transformers.cache_utils import StaticLayer

    held = Held(layers=[StaticLayer(max_cache_len=slots) for _ in range(layers)])
    filled: list[Any] = held.layers
    for layer, keys, values in zip(filled, cache["keys"], cache["values"], strict=True):
        layer.cumulative_length = cache["length"].clone()
        if keys is not None:
            layer.keys, layer.values = keys.clone(), values.clone()
            layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
    return held


def _as_tree(held: Any) -> Cache:
    return {
        "length": held.layers[0].cumulative_length,
        "keys": [x.keys for x in held.layers],
        "values": [x.values for x in held.layers],
    }


class _Decoder:
    """The decode step of one program, eager for prompts and compiled for single tokens."""

    def __init__(self, program: Program) -> None:
        self.step = decode(program)
        region = traced(self.step)

        def body(stored: Any, cache: Cache, tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
            logits, new = region(stored, cache, tokens, mask, positions)
            for old, value in zip(tree.flat(cache), tree.flat(new), strict=True):
                old.copy_(value)  # donated: Inductor writes the one new row in place
            return logits

        self.compiled = torch.compile(body, fullgraph=True, dynamic=False)


def generate(
    program: Program, stored: Any, input_ids: Tensor, attention_mask: Tensor | None = None, *, max_new_tokens: int, temperature: float = 0.0, top_k: int | None = None,
    top_p: float | None = None, eos_token_id: int | None = None, pad_token_id: int | None = None, seed: int = 0, compile: bool = True,
) -> Tensor:  # fmt: skip
    """Continue prompts: int64 [rows, prompt] -> [rows, prompt + new], new <= `max_new_tokens`.

    Greedy by default, and then equal to transformers' ``generate(do_sample=False)``. Dropout is off. Over several ranks every rank has to call
    it with as many rows and the same lengths; each may have its own prompts.

    Args:
        attention_mask: [rows, prompt], 0 for padding, which has to be on the left.
        temperature: 0 is greedy; else tokens are drawn, after `top_k` and `top_p` (in this order).
        eos_token_id: ends a row; the rest of it is `pad_token_id` (default: the same token).
        seed: with the row's number and the position it decides a row's draws.
        compile: compile the step for single tokens; it is kept with the program for later calls of nearby lengths.

    Raises:
        ValueError: a model without a cache, an empty prompt, tokens outside of the vocabulary, padding on the right, a length beyond the
            model's positions, or an argument out of its range.
    """
    config = getattr(program.origin.core, "config", None)
    decoder = program.memo.get("decoder") or program.memo.setdefault("decoder", _Decoder(program.eval()))
    mask = _checked(input_ids, attention_mask, config, max_new_tokens, temperature, top_k, top_p)
    slots = -(-(input_ids.shape[1] + max_new_tokens) // _SLOTS) * _SLOTS
    full = torch.cat([mask, mask.new_ones(mask.shape[0], slots - mask.shape[1])], 1)
    positions = (full.cumsum(1) - 1).clamp(min=0)
    layers = config.get_text_config().num_hidden_layers  # type: ignore[union-attr]
    cache: Cache = {
        "length": torch.zeros(1, dtype=torch.int64, device=input_ids.device),
        "keys": [None] * layers,
        "values": [None] * layers,
    }
    logits, cache = decoder.step(stored, cache, input_ids, full, positions[:, : input_ids.shape[1]])
    cache = {
        "length": cache["length"].clone(),
        "keys": [k.clone() for k in cache["keys"]],
        "values": [v.clone() for v in cache["values"]],
    }

    tokens, running = input_ids, torch.ones(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    pad = eos_token_id if pad_token_id is None else pad_token_id
    for i in range(max_new_tokens):
        new = _pick(logits, temperature, top_k, top_p, torch.tensor(seed), i)
        if eos_token_id is not None:
            new = torch.where(running, new, torch.full_like(new, pad if pad is not None else 0))
            running = running & (new != eos_token_id)
        tokens = torch.cat([tokens, new[:, None]], 1)
        if i + 1 == max_new_tokens or (eos_token_id is not None and not _any_rank(running, program)):
            break
        place = positions[:, tokens.shape[1] - 1 : tokens.shape[1]].contiguous()
        if compile:
            logits = decoder.compiled(stored, cache, new[:, None], full, place)
        else:
            logits, cache = decoder.step(stored, cache, new[:, None], full, place)
    return tokens


def _any_rank(running: Tensor, program: Program) -> bool:
    """Whether a row runs on any rank: ranks that gather together have to stop together. One host synchronisation per token."""
    count = running.sum()
    for a in program.data_axes:
        count = a.sum(count)
    return bool(count > 0)


def _pick(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, seed: Tensor, i: int) -> Tensor:
    """The next token of every row: the largest logit, or a draw by the Gumbel trick."""
    if temperature == 0.0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p is not None:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        logits = logits.masked_fill((before >= top_p).gather(1, order.argsort(1)), -torch.inf)
    u = uniform(fold(seed, i), logits.shape, device=logits.device).clamp(min=2.0**-25)
    return (logits - (-u.log()).log()).argmax(-1)


def _checked(
    ids: Tensor, mask: Tensor | None, config: Any, new: int, temperature: float, top_k: int | None, top_p: float | None
) -> Tensor:
    """The attention mask, after all arguments were found to be in range."""
    if ids.dim() != 2 or ids.dtype != torch.int64 or not ids.numel():
        raise ValueError(
            f"generate: input_ids {tuple(ids.shape)} {ids.dtype}, required int64 [rows, prompt] with at least one token"
        )
    for name, value, fine, want in (
        ("max_new_tokens", new, new >= 1, ">= 1"), ("temperature", temperature, temperature >= 0.0, ">= 0 (0 is greedy)"),
        ("top_k", top_k, top_k is None or top_k >= 1, ">= 1"), ("top_p", top_p, top_p is None or 0.0 < top_p <= 1.0, "0 < top_p <= 1"),
    ):  # fmt: skip
        if not fine:
            raise ValueError(f"generate: {name}={value!r}, required {want}")
    text = config.get_text_config()
    low, high, limit = int(ids.min()), int(ids.max()), getattr(text, "max_position_embeddings", None)
    if low < 0 or high >= text.vocab_size:
        raise ValueError(
            f"generate: input_ids reach from {low} to {high}, required tokens in [0, {text.vocab_size}); is it this model's tokeniser?"
        )
    if limit is not None and ids.shape[1] + new > limit:
        raise ValueError(
            f"generate: prompt {ids.shape[1]} + max_new_tokens {new} = {ids.shape[1] + new} positions, the model has {limit}; shorten either"
        )
    if mask is None:
        return torch.ones_like(ids)
    if mask.shape != ids.shape:
        raise ValueError(f"generate: attention_mask {tuple(mask.shape)}, required {tuple(ids.shape)} like input_ids")
    mask = mask.to(ids.dtype)
    if bool((mask.diff(dim=1) < 0).any()) or not bool(mask[:, -1].all()):
        raise ValueError(
            "generate: attention_mask has padding on the right (or an empty row); pad on the left: tokenizer.padding_side = 'left'"
        )
    return mask
