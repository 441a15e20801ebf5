"""`generate`: prompts in, tokens out. One pure step for prefill, one for a token, both compiled, and no waiting for the device in between."""

from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fds import tree
from fds.compiling import ByShape, Recorded, again, traced
from fds.inference import cache as caches
from fds.inference.cache import CacheConfig
from fds.inference.decoding import Decoding
from fds.inference.prompts import Prompts, checked, endings, refuse_unknown
from fds.inference.sampling import Sampling
from fds.inference.speculative import Draft, Speculation, prepared
from fds.inference.workspace import Workspace
from fds.lowering import few_rows
from fds.program import Program

_ROOM = 64  # caches and compiled prompts grow in steps of this many tokens, so that nearby lengths share graphs
_PAGES = 16  # and stores of pages in steps of as many pages
_EVERY = 16  # tokens from one look at what is still running to the next, where looking means waiting


Carry = dict[str, Any]


def _in_place(step: Callable[..., Carry]) -> ByShape:
    """``step(*weights, carry, numbers)`` compiled; the carry that goes in is written over. The new tokens come out."""
    region = traced(few_rows(step))

    def body(*args: Any) -> Tensor:
        new = region(*args)
        for old, value in zip(tree.flat(args[-2]), tree.flat(new), strict=True):
            old.copy_(value)  # donated: Inductor writes the one new row in place
        return new["token"]

    return ByShape(body)


class _Loop:
    """The steps of one program, for one kind of cache and one way of choosing."""

    def __init__(self, decoding: Decoding, greedy: bool, penalised: bool) -> None:
        self.decoding, self.greedy, self.penalised = decoding, greedy, penalised
        prompt = traced(decoding.prefill)

        def filled(stored: Any, *args: Any) -> tuple[Tensor, Any]:
            return prompt(stored, *args)

        self.compiled, self.prompt = _in_place(self.next), ByShape(filled)

    def next(self, stored: Any, carry: Carry, numbers: dict[str, Tensor]) -> Carry:
        """One token more of every row."""
        logits, cache = self.decoding.step(stored, carry["cache"], carry["token"][:, None])
        return self.chosen(logits[:, 0], {**carry, "cache": cache}, numbers)

    def chosen(self, logits: Tensor, carry: Carry, numbers: dict[str, Tensor]) -> Carry:
        """Choose, and write down what was chosen. A row that has ended gets padding."""
        x, seen, running, at = logits, carry.get("seen"), carry["running"], carry["count"]
        if seen is not None:
            penalty = numbers["repetition_penalty"]
            x = torch.where(seen, torch.where(x > 0, x / penalty, x * penalty), x)
        if self.greedy:
            token = x.argmax(-1)
        else:
            from fds.kernels import sample  # imports Triton, which takes a while

            options = {k: numbers[k] for k in ("temperature", "top_k", "top_p", "min_p", "seed")}
            token = sample(x, position=at, stream=carry["stream"], **options)
        logprob = logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
        token = torch.where(running, token, numbers["pad"])
        out = {
            **carry,
            "token": token,
            "tokens": carry["tokens"].index_copy(1, at[None], token[:, None]),
            "logprobs": carry["logprobs"].index_copy(1, at[None], torch.where(running, logprob, 0.0)[:, None]),
            "running": running & ~torch.isin(token, numbers["ends"]),
            "length": carry["length"] + running,
            "count": at + 1,
        }
        return out if seen is None else {**out, "seen": seen.scatter(1, token[:, None], True)}


class Generated(NamedTuple):
    """What `generate` gives with ``details=True``.

    * `tokens`: int64 [rows n, prompt + new], prompts as they were given, padding behind what ended; behind an encoder what the decoder began with and `new`
    * `logprobs`: float32 [rows n, new], of each new token under the model as it is: before penalties, temperature and limits
    * `lengths`: int64 [rows n], new tokens of each row, the one that ended it included
    """

    tokens: Tensor
    logprobs: Tensor
    lengths: Tensor


def generate(
    program: Program, stored: Any, input_ids: Tensor, attention_mask: Tensor | None = None, *, max_new_tokens: int, temperature: float = 0.0, top_k: int | None = None,
    top_p: float | None = None, min_p: float | None = None, repetition_penalty: float = 1.0, eos_token_id: int | Sequence[int] | None = None, pad_token_id: int | None = None,
    stop_strings: str | Sequence[str] | None = None, tokenizer: Any = None, n: int = 1, seed: int = 0, cache: CacheConfig | str = "static", compile: bool = True,
    on_token: Callable[[Tensor], Any] | None = None, details: bool = False, workspace: Workspace | None = None, draft: Draft | None = None,
    decoder_input_ids: Tensor | None = None, cuda_graph: bool = False, **unknown: Any,
) -> Any:  # fmt: skip
    """Continue prompts: int64 [rows, prompt] -> [rows n, prompt + new], new <= `max_new_tokens`; or a `Generated`.

    Of a model with an encoder (T5, BART): encode prompts, and let the decoder write: [rows n, first + new].

    Greedy by default, and then equal to transformers' ``generate(do_sample=False)``. Dropout is off. Over several ranks every rank has to call
    it with as many rows and the same lengths; each may have its own prompts.

    Law: a row's tokens are a function of its prompt, the sampling, the seed and its number among the `n` of the prompt, whatever else is in the batch
    (to the rounding of batched products). Equal prompts in a batch get equal tokens: for several samples of one, use `n`.

    Args:
        attention_mask: [rows, prompt], 0 for padding, which may be on the left or on the right.
        temperature, top_k, top_p, min_p, repetition_penalty: see `Sampling`. Limits without a temperature are refused: nothing is drawn.
        eos_token_id: ends a row; one, or several. The rest of the row is `pad_token_id` (default: the first of them).
        stop_strings: end a row as well, as soon as its new text has one of them; needs the `tokenizer`. Looked for after every token, so the
            host waits for each.
        n: samples of each prompt, which is prefilled once; rows of one prompt are neighbours.
        cache: "static", "sliding", "paged", each also with "-int8"; or a `CacheConfig`.
        compile: compile the steps for prompts (their width rounded up to a multiple of 64, long ones of 256 or 1,024) and for single tokens. Graphs are
            kept with the program for later calls of nearby lengths.
        draft: speculative decoding (`Draft`): a smaller model, or the text itself, proposes tokens that are looked at together. The distribution is the
            same, greedy tokens are the same; with a seed, other draws. Not with `stop_strings`, `on_token` or a repetition penalty.
        decoder_input_ids: int64 [rows, first], what the decoder of a model with an encoder begins with. Default: the configuration's `decoder_start_token_id`.
        cuda_graph: record the compiled step once in a call, and play it for the tokens behind. Never run on a GPU so far.
        workspace: buffers that stay from call to call.
        on_token: called with the new tokens int64 [rows n] after each step; those of rows that have ended are padding.

    Raises:
        ValueError: a model without a cache, an empty prompt, tokens outside of the vocabulary, padding in the middle, a length beyond the
            model's positions, an argument out of its range, one that would do nothing beside the others, `cuda_graph` without CUDA or
            without `compile`, a draft of another vocabulary; and what transformers' ``generate`` takes and this one does not, with its name here.
    """
    refuse_unknown(unknown, _OPTIONS)
    sampling = Sampling(temperature, top_k or 0, 1.0 if top_p is None else top_p, min_p or 0.0, repetition_penalty, seed)  # fmt: skip
    for name, value in (("max_new_tokens", max_new_tokens), ("n", n)):
        tree.positive(f"generate: {name}", value)
    for name, value, fine, want in (
        ("draft", draft, isinstance(draft, Draft), "a Draft"), ("workspace", workspace, isinstance(workspace, Workspace), "a Workspace"), ("on_token", on_token, callable(on_token), "a function"),
    ):  # fmt: skip
        if value is not None and not fine:
            raise ValueError(f"generate: {name}={value!r}, required {want}, or None")
    ahead = 1 if draft is None else draft.tokens + 1
    decoding = _decoding(program, CacheConfig.of(cache), ahead)
    _check_samples(n, sampling, decoding, program)
    if cuda_graph:
        _check_recordable(program, input_ids, compile)
    prompts = checked(program.origin.core, decoding.family.encoder, input_ids, attention_mask, decoder_input_ids, max_new_tokens)  # fmt: skip
    if draft is not None:
        _check_draft(draft, decoding, sampling, stop_strings, on_token, int(prompts.lengths.max()) + max_new_tokens)
    ends, pad = endings(eos_token_id, pad_token_id, prompts.vocabulary)
    stops = _stops(stop_strings, tokenizer)
    lengths = prompts.text[1]
    slots = _rounded(int(lengths.max()) + max_new_tokens + ahead - 1)
    tokens = _cut(prompts, None if prompts.begin is not None else slots, compile)
    paged = caches.tables(decoding.config, (lengths + max_new_tokens + ahead - 1).tolist(), slots)
    paged = (paged[0].to(tokens.device), -(-paged[1] // _PAGES) * _PAGES) if paged else ()

    loop = _loop(program, decoding, sampling)
    begin = () if prompts.begin is None else (prompts.begin,)  # None is nothing that Dynamo would hand on
    logits, held = (loop.prompt if compile else decoding.prefill)(stored, tokens, prompts.lengths, slots, paged, *begin)
    carry = _carry(logits, held, prompts, max_new_tokens + ahead - 1, n, sampling)
    numbers = sampling.numbers(tokens.device) | {
        "pad": torch.tensor(pad, device=tokens.device),
        "ends": torch.tensor(ends, dtype=torch.int64, device=tokens.device),
        "most": torch.tensor(max_new_tokens, device=tokens.device),
    }
    every = 1 if stops or (tokens.device.type == "cpu" and not program.data_axes) else _EVERY
    carry = loop.chosen(logits.repeat_interleave(n, 0), carry, numbers)
    rounds = None if draft is None else _rounds(program, decoding, draft, sampling)
    theirs = {} if draft is None or draft.stored is None else draft.stored
    if rounds is not None:
        carry = prepared(rounds.speculation, theirs, carry, tokens, lengths, slots, n)
    carry = (workspace or Workspace()).take(carry)  # to be written over
    going = lambda c: _any_rank(c["running"] & (c["length"] < max_new_tokens), program)  # noqa: E731
    if rounds is not None:
        step = _stepped(rounds.compiled, rounds.speculation.round, (stored, theirs), numbers, compile, cuda_graph)
        while going(carry):
            carry = step(carry)
    else:
        step = _stepped(loop.compiled, loop.next, (stored,), numbers, compile, cuda_graph)
        for i in range(1, max_new_tokens + 1):
            if on_token is not None:
                on_token(carry["token"].clone())
            if stops is not None:
                carry["running"] &= ~stops(carry["tokens"][:, :i], None)
            if i == max_new_tokens or ((ends or stops) and i % every == 0 and not going(carry)):
                break
            carry = step(carry)
    return _result(input_ids if prompts.begin is None else prompts.begin, carry, max_new_tokens, n, numbers["pad"], details)  # fmt: skip


_OPTIONS = tuple(k for k, p in signature(generate).parameters.items() if p.kind is p.KEYWORD_ONLY)


def _cut(prompts: Prompts, slots: int | None, compile: bool) -> Tensor:
    """Prompts as wide as the longest; to be compiled as wide as many of about that length, if that fits `slots` and the model's positions."""
    tokens = prompts.tokens[:, : int(prompts.lengths.max())]
    if not compile:
        return tokens
    width = min(x for x in (_rounded(tokens.shape[1]), slots, prompts.limit) if x is not None)
    return torch.nn.functional.pad(tokens, (0, max(width - tokens.shape[1], 0)))


def _stepped(compiled: ByShape, pure: Callable[..., Carry], weights: tuple[Any, ...], numbers: dict[str, Tensor], compile: bool, record: bool) -> Callable[[Carry], Carry]:  # fmt: skip
    """From carry to carry: `pure`, or the compiled step, which writes over what it is given. All steps of a call have one graph, and the same tensors."""
    if not compile:
        return lambda carry: pure(*weights, carry, numbers)
    run: list[Callable[[], Any]] = []

    def step(carry: Carry) -> Carry:
        if run:
            run[0]()
        else:
            same = again(partial(compiled, *weights, carry, numbers))
            run.append(Recorded(same) if record else same)
        return carry

    return step


def _check_recordable(program: Program, ids: Tensor, compile: bool) -> None:
    if ids.device.type != "cuda":
        raise ValueError(
            f"generate: cuda_graph=True for input_ids on {ids.device}; leave it out, or move weights and prompts to CUDA"
        )
    if not compile:
        raise ValueError("generate: cuda_graph=True with compile=False, whose steps make new tensors; give one of them")
    axes = [*program.data_axes, *(a for t in program.history for a in t.shared)]
    if any(a.size > 1 for a in axes) or any(p.handles for p in program.sites.values()):
        raise ValueError(
            "generate: cuda_graph=True with weights that come from other ranks or a store, which a recorded step does not wait for; leave it out, or relayout into whole weights"
        )


def _result(prompts: Tensor, carry: Carry, most: int, n: int, pad: Tensor, details: bool) -> Any:
    lengths = carry["length"].clamp(max=most)
    new = int(lengths.max())
    over = torch.arange(new, device=lengths.device) >= lengths[:, None]
    out = torch.cat([prompts.repeat_interleave(n, 0), torch.where(over, pad, carry["tokens"][:, :new])], 1)
    return Generated(out, carry["logprobs"][:, :new].masked_fill(over, 0.0), lengths) if details else out


def _check_samples(n: int, sampling: Sampling, decoding: Decoding, program: Program) -> None:
    if n == 1:
        return
    for wrong, why in (
        (sampling.greedy, "temperature 0, where all of them would be the same; give temperature=1.0 to draw"),
        (decoding.config.kind == "paged", "cache='paged', whose pages belong to one row each; use 'static'"),
        (any(t.name == "adapters" for t in program.history), "adapters(...), which are chosen row by row; repeat the prompts, and choose for each"),
    ):  # fmt: skip
        if wrong:
            raise ValueError(f"generate: n={n} samples of a prompt with {why}, or leave n out")


def _check_draft(draft: Draft, decoding: Decoding, sampling: Sampling, stops: Any, on_token: Any, whole: int) -> None:
    """`whole`: tokens that the longest row may come to."""
    if stops is not None or on_token is not None or sampling.penalised:
        raise ValueError(
            "generate: draft= with stop_strings, on_token or repetition_penalty, which go token by token; leave out one or the other"
        )
    if decoding.family.together:
        raise ValueError(
            f"generate: draft= lets rows go on by several tokens, and {decoding.family.together}; leave it out"
        )
    if draft.program is None:
        return
    other, mine = Decoding.of(draft.program), decoding.family.vocabulary
    if other.family.encoder:
        raise ValueError(
            "generate: draft= is a model with an encoder, which does not go on with a text; give a decoder"
        )
    if other.family.vocabulary != mine:
        raise ValueError(f"generate: draft= knows {other.family.vocabulary} tokens, the model {mine}; required the same vocabulary")  # fmt: skip
    if other.family.limit is not None and whole > other.family.limit:
        raise ValueError(f"generate: draft= has {other.family.limit} positions, prompt and max_new_tokens come to {whole}; shorten either, or leave it out")  # fmt: skip


class _Rounds:
    """Rounds of speculative decoding, compiled."""

    def __init__(self, speculation: Speculation) -> None:
        self.speculation, self.compiled = speculation, _in_place(speculation.round)


def _rounds(program: Program, decoding: Decoding, draft: Draft, sampling: Sampling) -> _Rounds:
    key = "rounds", decoding.config, id(draft.program), draft.tokens, draft.ngram, sampling.greedy
    if key not in program.memo:
        drafter = None if draft.program is None else Decoding.of(draft.program, "static", draft.tokens + 1)
        program.memo[key] = _Rounds(Speculation(decoding, draft, drafter, sampling.greedy))
    return program.memo[key]


def _rounded(n: int) -> int:
    """Room for n tokens: the next multiple of 64, from 512 on of 256, from 4,096 on of 1,024."""
    step = _ROOM * (1 if n <= 8 * _ROOM else 4 if n <= 64 * _ROOM else 16)
    return -(-n // step) * step


def _decoding(program: Program, config: CacheConfig, ahead: int) -> Decoding:
    key = "decoding", config, ahead
    return program.memo.get(key) or program.memo.setdefault(key, Decoding.of(program, config, ahead))


def _loop(program: Program, decoding: Decoding, sampling: Sampling) -> _Loop:
    key = "loop", decoding.config, decoding.ahead, sampling.greedy, sampling.penalised
    return program.memo.get(key) or program.memo.setdefault(key, _Loop(decoding, sampling.greedy, sampling.penalised))


def _carry(logits: Tensor, cache: Any, prompts: Prompts, new: int, n: int, sampling: Sampling) -> Carry:
    """What goes from token to token."""
    text, lengths = prompts.text
    rows, device, room = len(lengths) * n, logits.device, _rounded(new)
    out: Carry = {
        "cache": caches.repeated(cache, n) if n > 1 else cache,
        "token": torch.zeros(rows, dtype=torch.int64, device=device),
        "tokens": torch.zeros(rows, room, dtype=torch.int64, device=device),
        "logprobs": torch.zeros(rows, room, device=device),
        "running": torch.ones(rows, dtype=torch.bool, device=device),
        "length": torch.zeros(rows, dtype=torch.int64, device=device),
        "count": torch.zeros((), dtype=torch.int64, device=device),
        "stream": prompts.streams(n),
    }
    if sampling.penalised:
        real = torch.arange(text.shape[1], device=device) < lengths[:, None]
        seen = torch.zeros(len(lengths), logits.shape[1], dtype=torch.int64, device=device)
        out["seen"] = seen.scatter_add(1, text, real.long()).bool().repeat_interleave(n, 0)
    return out


def _stops(strings: str | Sequence[str] | None, tokenizer: Any) -> Any:
    if strings is None:
        if tokenizer is not None:
            raise ValueError("generate: tokenizer= without stop_strings=, which is all it is for; leave it out")
        return None
    wanted = [strings] if isinstance(strings, str) else list(strings)
    if not wanted or not all(isinstance(x, str) and x for x in wanted):
        raise ValueError(f"generate: stop_strings={strings!r}, required a string that is not empty, or several")
    if tokenizer is None:
        raise ValueError("generate: stop_strings without a tokenizer to find them by; give tokenizer=")
    from transformers.generation.stopping_criteria import StopStringCriteria

    return StopStringCriteria(tokenizer, wanted)


def _any_rank(running: Tensor, program: Program) -> bool:
    """Whether a row runs on any rank: ranks that gather together have to stop together. The host waits for the device."""
    count = running.sum()
    for a in program.data_axes:
        count = a.sum(count)
    return bool(count > 0)
