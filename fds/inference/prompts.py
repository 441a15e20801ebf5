"""What `generate` is given: prompts and end tokens in range, each row moved to the front, and the numbers that rows draw by."""

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from fds import tree
from fds.randomness import mix

# What transformers' generate takes and this one does not, and what says the same here.
_THEIRS = {
    "num_beams": "beam search is not here: fds.save, and transformers' generate on the exported model",
    "do_sample": "temperature= above 0 draws, without it text is greedy",
    "max_length": "give max_new_tokens=, new ones alone",
    "num_return_sequences": "give n=",
    "generation_config": "it is not read; give its settings one by one",
    "streamer": "give on_token=",
    "stopping_criteria": "give eos_token_id= or stop_strings=",
    "logits_processor": "give temperature=, top_k=, top_p=, min_p= or repetition_penalty=",
    "assistant_model": "give draft=Draft(program, stored)",
    "prompt_lookup_num_tokens": "give draft=Draft(tokens=...)",
    "output_scores": "give details=True, which has logprobs",
    "return_dict_in_generate": "give details=True",
    "cache_implementation": "give cache='static', 'sliding' or 'paged'",
}


@attrs.frozen
class Prompts:
    """Checked prompts.

    tokens: int64 [rows, prompt], padded behind with zeros; lengths: int64 [rows].
    begin: int64 [rows, first], what a decoder behind an encoder begins with; None where there is no encoder.
    limit: positions that the model has, or None. vocabulary: tokens that it knows.
    """

    tokens: Tensor
    lengths: Tensor
    begin: Tensor | None
    limit: int | None
    vocabulary: int

    @property
    def text(self) -> tuple[Tensor, Tensor]:
        """The text that goes on, int64 [rows, tokens], and its lengths: the prompt, or what the decoder begins with."""
        if self.begin is None:
            return self.tokens, self.lengths
        return self.begin, torch.full_like(self.lengths, self.begin.shape[1])

    def streams(self, n: int) -> Tensor:
        """A number for each row to draw by: of its prompt, and of its place among the `n` samples of that. int64 [rows n]"""
        place = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        hashed = mix(self.tokens, mix(place, 0x51ED27)).masked_fill(place >= self.lengths[:, None], 0).sum(1)
        sample = torch.arange(n, device=self.tokens.device)
        return mix(hashed[:, None], mix(sample, 0x2545F491)).reshape(-1)


def longest(ids: Tensor, mask: Tensor | None) -> int:
    """Tokens of the longest prompt.

    >>> longest(torch.zeros(2, 5), torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 1]]))
    3
    """
    _tensor("input_ids", ids)
    return ids.shape[-1] if mask is None or not mask.numel() else int((mask != 0).sum(-1).max())


def room(ids: Tensor, mask: Tensor | None, new: int, most: int, where: str) -> int:
    """Tokens that an engine's `max_out_tokens` leaves behind the longest prompt. `ValueError` where that is less than `new`."""
    tree.positive("generate: max_new_tokens", new)
    prompt = longest(ids, mask)
    if prompt + new > most:
        raise ValueError(
            f"generate: prompt {prompt} + {new} new tokens = {prompt + new}, max_out_tokens is {most}; shorten either, or raise it in {where}"
        )
    return most - prompt


def checked(core: Any, encoder: bool, ids: Tensor, mask: Tensor | None, begin: Tensor | None, new: int) -> Prompts:
    """Prompts of a model, after all of them were found to be in range. `ValueError` names what is not, and what is."""
    text = core.config.get_text_config(decoder=True) if encoder else core.config.get_text_config()
    _tokens("input_ids", ids, text.vocab_size)
    if mask is None:
        mask = torch.ones_like(ids)
    if mask.shape != ids.shape:
        raise ValueError(f"generate: attention_mask {tuple(mask.shape)}, required {tuple(ids.shape)} like input_ids")
    real = mask != 0
    lengths, start = real.sum(1), real.long().argmax(1)
    place = torch.arange(ids.shape[1], device=ids.device)
    turn = (start[:, None] + place) % ids.shape[1]
    if not bool(lengths.all()) or bool((real.gather(1, turn) != (place < lengths[:, None])).any()):
        raise ValueError(
            "generate: attention_mask has an empty row, or padding in the middle of one; pad on the left or on the right"
        )
    limit = getattr(text, "max_position_embeddings", None)
    begin = _begun(core, encoder, ids, begin, text.vocab_size)
    long = int(lengths.max())
    first = long if begin is None else begin.shape[1]
    if limit is not None and first + new > limit:
        raise ValueError(
            f"generate: prompt {first} + max_new_tokens {new} = {first + new} positions, the model has {limit}; shorten either"
        )
    if limit is not None and long > limit:
        raise ValueError(f"generate: prompt {long} of {limit} positions that the encoder has; shorten it")
    return Prompts(
        ids.gather(1, turn).masked_fill(place >= lengths[:, None], 0), lengths, begin, limit, text.vocab_size
    )


def endings(ends: Any, pad: int | None, vocabulary: int) -> tuple[list[int], int]:
    """The tokens that end a row, and the one behind them: by default the first of these, or 0. `ValueError` for what is no token of the model."""
    several = (
        []
        if ends is None
        else list(ends)
        if isinstance(ends, Sequence | Tensor) and not isinstance(ends, str)
        else [ends]
    )
    found = [_token("eos_token_id", x, vocabulary) for x in several]
    return found, (found or [0])[0] if pad is None else _token("pad_token_id", pad, vocabulary)


def _token(name: str, given: Any, vocabulary: int) -> int:
    number: Any = given.item() if isinstance(given, Tensor) and given.numel() == 1 else given
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < vocabulary:
        raise ValueError(f"generate: {name}={number!r}, required a token in [0, {vocabulary})")
    return number


def refuse_unknown(given: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raise `ValueError` for options that `generate` does not have; for those of transformers it says what has their place here."""
    for name, value in given.items():
        raise ValueError(f"generate: {name}={value!r} is unknown; {_THEIRS.get(name) or tree.suggest(name, known)}")


def _tensor(name: str, ids: Any) -> None:
    if not isinstance(ids, Tensor):
        raise ValueError(
            f"generate: {name} is a {type(ids).__name__}, required a tensor, int64 [rows, tokens]; torch.tensor(...) makes one of lists"
        )


def _tokens(name: str, ids: Tensor, vocabulary: int) -> None:
    _tensor(name, ids)
    if ids.dim() != 2 or ids.dtype != torch.int64 or not ids.numel():
        raise ValueError(
            f"generate: {name} {tuple(ids.shape)} {ids.dtype}, required int64 [rows, prompt] with at least one token"
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"generate: {name} reach from {low} to {high}, required tokens in [0, {vocabulary}); is it this model's tokeniser?"
        )


def _begun(core: Any, encoder: bool, ids: Tensor, begin: Tensor | None, vocabulary: int) -> Tensor | None:
    if not encoder:
        if begin is not None:
            raise ValueError("generate: decoder_input_ids for a model without an encoder; write them into input_ids")
        return None
    if begin is None:
        settings = (core.config, getattr(core.module, "generation_config", None))
        found = [x for c in settings if (x := getattr(c, "decoder_start_token_id", None)) is not None]
        if not found:
            raise ValueError(
                "generate: the model's configuration has no decoder_start_token_id; give decoder_input_ids, int64 [rows, 1] or more"
            )
        return torch.full((len(ids), 1), found[0], dtype=torch.int64, device=ids.device)
    _tokens("decoder_input_ids", begin, vocabulary)
    if len(begin) != len(ids):
        raise ValueError(f"generate: decoder_input_ids of {len(begin)} rows, required {len(ids)} as input_ids have")
    return begin
