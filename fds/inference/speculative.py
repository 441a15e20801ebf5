"""Speculative decoding: a draft proposes some tokens, one step of the model looks at all of them, and what comes out is distributed as without.

Of proposals d_1, d_2, ... drawn from q_1, q_2, ... the first is taken with probability min(1, p_1(d_1) / q_1(d_1)), then the next; in place of the
first that is not taken a token is drawn from max(0, p - q), normalised; behind all of them one more from p. Leviathan et al. 2023,
arXiv:2211.17192, section 2.3; Chen et al. 2023, arXiv:2302.01318. Drafts from the text itself: Saxena 2023, prompt lookup decoding: what followed the
last time that these tokens were there; such a proposal is certain of itself, q(d) = 1.

Rows go on by different numbers of tokens. A cache's slots are positions, so what was not taken is written over by what comes next.
"""

from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from fds import tree
from fds.inference import cache as caches
from fds.inference.decoding import Decoding
from fds.program import Program
from fds.randomness import mix


@attrs.frozen
class Draft:
    """Who proposes: a smaller model of the same vocabulary, or the text itself (`program` None).

    tokens: proposals in a step of the model. ngram: tokens at the end of the text that are looked for in it.
    """

    program: Program | None = None
    stored: Any = None
    tokens: int = 4
    ngram: int = 2

    def __attrs_post_init__(self) -> None:
        for name in ("tokens", "ngram"):
            tree.positive(f"draft: {name}", getattr(self, name))
        if (self.program is None) != (self.stored is None):
            raise ValueError(
                "draft: a program needs its weights, and the other way round; give both, or none for drafts from the text"
            )


Carry = dict[str, Any]


@attrs.frozen
class Speculation:
    """Rounds of one model with one draft."""

    model: Decoding
    draft: Draft
    drafter: Decoding | None
    greedy: bool

    def round(self, stored: Any, theirs: Any, carry: Carry, numbers: dict[str, Tensor]) -> Carry:
        """Some tokens more of every row: between one and one more than the draft proposes. `theirs`: the draft's weights."""
        count = self.draft.tokens
        proposed, q, other = self._proposals(theirs, carry, numbers)
        tokens = torch.cat([carry["token"][:, None], proposed], 1)
        logits, cache = self.model.step(stored, carry["cache"], tokens)
        choose = self._likeliest if self.greedy else self._drawn
        n, fresh = choose(logits, proposed, q, carry, numbers)
        new = torch.where(torch.arange(count, device=logits.device) < n[:, None], proposed, 0)
        new = F.pad(new, (0, 1)).scatter(1, n[:, None], fresh[:, None])
        return self._written(carry, new, n + 1, logits, cache, other, numbers)

    def _likeliest(self, logits: Tensor, proposed: Tensor, q: Any, carry: Carry, numbers: dict[str, Tensor]) -> tuple[Tensor, Tensor]:  # fmt: skip
        """How many proposals are what the model would have chosen, and what it chooses behind them."""
        best = logits.argmax(-1)
        n = (proposed == best[:, :-1]).long().cumprod(1).sum(1)
        return n, best.gather(1, n[:, None])[:, 0]

    def _drawn(self, logits: Tensor, proposed: Tensor, q: Tensor, carry: Carry, numbers: dict[str, Tensor]) -> tuple[Tensor, Tensor]:  # fmt: skip
        """How many proposals are taken, and what is drawn behind them."""
        count = proposed.shape[1]
        p = filtered(logits, numbers).softmax(-1)
        chance, of_q = (x[:, :count].gather(2, proposed[..., None])[..., 0] for x in (p, q))
        places = carry["length"][:, None] + torch.arange(count + 1, device=p.device)
        taken = self._random(carry, numbers, places[:, :count], 1) < chance / of_q.clamp(min=1e-30)
        n = taken.long().cumprod(1).sum(1)
        at = n[:, None, None].expand(-1, 1, p.shape[2])
        rest, last = ((p - F.pad(q, (0, 0, 0, 1))).clamp(min=0).gather(1, at)[:, 0], p.gather(1, at)[:, 0])
        # Nothing is left where p and q agree to rounding; then a rejection was one too.
        weights = torch.where(rest.sum(1, keepdim=True) > 0, rest, last)
        return n, _first(weights, self._random(carry, numbers, places.gather(1, n[:, None]), 2)[:, 0])

    def _written(self, carry: Carry, new: Tensor, n: Tensor, logits: Tensor, cache: Any, other: Any, numbers: dict[str, Tensor]) -> Carry:  # fmt: skip
        """Take tokens up to the first that ends the row; a row that has ended stays where it is."""
        place = torch.arange(new.shape[1], device=new.device)
        end = torch.isin(new, numbers["ends"]) & (place < n[:, None])
        n = torch.where(end.any(1), end.long().argmax(1) + 1, n) * carry["running"]
        n = n.clamp(max=(numbers["most"] - carry["length"]).clamp(min=0))  # a row that is whole waits for the others
        real = place < n[:, None]
        at = (carry["length"][:, None] + place).clamp(max=carry["tokens"].shape[1] - 1)
        found = logits.log_softmax(-1).gather(2, new[..., None])[..., 0]
        tokens = carry["tokens"].scatter(1, at, torch.where(real, new, carry["tokens"].gather(1, at)))
        logprobs = carry["logprobs"].scatter(1, at, torch.where(real, found, carry["logprobs"].gather(1, at)))
        last = torch.where(n > 0, new.gather(1, (n - 1).clamp(min=0)[:, None])[:, 0], carry["token"])
        lengths = carry["cache"]["lengths"] + n
        return {
            **carry,
            "cache": {**cache, "lengths": lengths},
            **({} if other is None else {"draft": {**other, "lengths": lengths}}),
            "token": last,
            "tokens": tokens,
            "logprobs": logprobs,
            "running": carry["running"] & ~end.any(1),
            "length": carry["length"] + n,
            "count": carry["count"] + 1,
        }

    def _proposals(self, theirs: Any, carry: Carry, numbers: dict[str, Tensor]) -> tuple[Tensor, Any, Any]:
        """Tokens [rows, count], what each was drawn from [rows, count, vocabulary], and the draft's cache with them."""
        if self.drafter is None:
            proposed = self._looked_up(carry)
            return proposed, None if self.greedy else F.one_hot(proposed, self.model.family.vocabulary).float(), None
        cache, token = carry["draft"], carry["token"]
        found: list[Tensor] = []  # not list[Tensor](): Dynamo cannot call that
        qs: list[Tensor] = []
        for i in range(self.draft.tokens + 1):  # the last one only goes into the cache
            logits, cache = self.drafter.step(theirs, cache, token[:, None])
            if i == self.draft.tokens:
                break
            if self.greedy:
                token = logits[:, 0].argmax(-1)
            else:
                q = filtered(logits[:, 0], numbers).softmax(-1)
                token = _first(q, self._random(carry, numbers, (carry["length"] + i)[:, None], 3)[:, 0])
                qs.append(q)
            found.append(token)
        return torch.stack(found, 1), torch.stack(qs, 1) if qs else None, cache

    def _looked_up(self, carry: Carry) -> Tensor:
        """What followed the last place where the text had its last `ngram` tokens; its last token again where there is none."""
        text, size, k, n = carry["text"], carry["size"], self.draft.tokens, self.draft.ngram
        place = torch.arange(text.shape[1], device=text.device)
        written = carry["tokens"].gather(1, (place - size[:, None]).clamp(0, carry["tokens"].shape[1] - 1))
        whole = torch.where(place < size[:, None], text, written)
        end = size + carry["length"]
        same = torch.ones_like(whole, dtype=torch.bool)
        for back in range(n):
            mine = whole.gather(1, (end - 1 - back).clamp(min=0)[:, None])
            same &= F.pad(whole, (back, 0), value=-1)[:, : whole.shape[1]] == mine
        same &= place < end[:, None] - 1  # not the end itself
        found = torch.where(same, place, -1).amax(1)
        after = (found[:, None] + 1 + torch.arange(k, device=text.device)).clamp(max=whole.shape[1] - 1)
        after = torch.minimum(after, end[:, None] - 1)
        return torch.where(found[:, None] >= 0, whole.gather(1, after), carry["token"][:, None])

    def _random(self, carry: Carry, numbers: dict[str, Tensor], place: Tensor, purpose: int) -> Tensor:
        """Numbers in [0, 1) for places [rows, n] of rows: the same in every batch."""
        key = mix(mix(carry["stream"], numbers["seed"]), 0x3C6EF372 + purpose)
        return (mix(mix(place, key[:, None]), 0x51ED27) >> 8).float() * 2.0**-24


def _first(weights: Tensor, u: Tensor) -> Tensor:
    """The first index where the sum of weights [rows, n] exceeds u of their total."""
    sums = weights.double().cumsum(-1)
    return (sums <= (u.double() * sums[:, -1])[:, None]).sum(-1).clamp(max=weights.shape[-1] - 1)


def filtered(logits: Tensor, numbers: dict[str, Tensor]) -> Tensor:
    """Logits [..., vocabulary] after temperature, top-k, top-p and min-p, -inf for what is left out: what `fds.kernels.sample` draws from."""
    x = logits.float() / numbers["temperature"]
    ordered = x.sort(-1, descending=True).values
    k = torch.where(numbers["top_k"] > 0, numbers["top_k"], x.shape[-1]).clamp(max=x.shape[-1])
    least = ordered.gather(-1, (k - 1).expand(*x.shape[:-1], 1))
    p = ordered.masked_fill(ordered < least, -torch.inf).softmax(-1)
    before = p.cumsum(-1) - p
    kept = (before < numbers["top_p"]) & (p > 0)
    least = torch.maximum(least, ordered.masked_fill(~kept, torch.inf).amin(-1, keepdim=True))
    least = torch.maximum(least, ordered[..., :1] + numbers["min_p"].log())
    return x.masked_fill(x < least, -torch.inf)


def prepared(speculation: Speculation, theirs: Any, carry: Carry, prompts: Tensor, lengths: Tensor, slots: int, n: int) -> Carry:  # fmt: skip
    """What rounds need besides: the prompts to look things up in, or the draft's cache of them."""
    if speculation.drafter is None:
        room = slots - prompts.shape[1]
        more = {"text": F.pad(prompts, (0, max(room, 0))).repeat_interleave(n, 0), "size": lengths.repeat_interleave(n)}
        return {**carry, **more}
    _, cache = speculation.drafter.prefill(theirs, prompts, lengths, slots)
    return {**carry, "draft": caches.repeated(cache, n)}
