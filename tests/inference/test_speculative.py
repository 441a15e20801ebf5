"""Speculative decoding: greedy text is the same, draws have the same distribution, and rows that go on by different numbers of tokens stay apart."""

import pytest
import torch
import zoo

import fds
from fds.inference import CacheConfig, Draft
from fds.inference.speculative import Speculation, filtered


def prompts():
    """Three rows with a pattern in each, so that the text itself has something to propose; two padded on the left."""
    part = torch.randint(3, zoo.VOCABULARY, (3, 3), generator=torch.Generator().manual_seed(2))
    ids = part.repeat(1, 3)
    mask = torch.ones_like(ids)
    mask[1, :3] = mask[2, :6] = 0
    return ids.masked_fill(mask == 0, 0), mask


def set_up(family="llama", shift=0.0):
    model = zoo.build(family)
    if shift:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(shift * torch.randn(p.shape, generator=torch.Generator().manual_seed(7)))
    program, params = fds.functionalize(model)
    return program, program.place(params)


def drafts():
    return {
        "text": Draft(tokens=3),
        "itself": Draft(*set_up(), tokens=4),
        "another": Draft(*set_up(shift=0.01), tokens=2),
        "poor": Draft(*set_up(shift=1.0), tokens=3),
    }


@pytest.mark.parametrize("name", ["text", "itself", "another", "poor"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_greedy_text_is_the_same(family, name):
    (program, stored), (ids, mask) = set_up(family), prompts()
    want = fds.generate(program, stored, ids, mask, max_new_tokens=21, compile=False, details=True)
    for cache in ("static", "sliding", CacheConfig("paged", page=8)):
        got = fds.generate(program, stored, ids, mask, max_new_tokens=21, compile=False, details=True, draft=drafts()[name], cache=cache)  # fmt: skip
        assert torch.equal(got.tokens, want.tokens) and torch.equal(got.lengths, want.lengths)
        torch.testing.assert_close(got.logprobs, want.logprobs, rtol=1e-4, atol=1e-5)


def test_a_row_ends_at_its_end_token():
    (program, stored), (ids, mask) = set_up(), prompts()
    free = fds.generate(program, stored, ids, mask, max_new_tokens=12, compile=False)
    end = int(free[0, ids.shape[1] + 3])
    options = dict(max_new_tokens=12, compile=False, eos_token_id=end, pad_token_id=5, details=True)
    want = fds.generate(program, stored, ids, mask, **options)
    got = fds.generate(program, stored, ids, mask, draft=drafts()["itself"], **options)
    assert torch.equal(got.tokens, want.tokens) and torch.equal(got.lengths, want.lengths)


def test_compiled():
    (program, stored), (ids, mask) = set_up(), prompts()
    want = fds.generate(program, stored, ids, mask, max_new_tokens=15, compile=False)
    assert torch.equal(
        fds.generate(program, stored, ids, mask, max_new_tokens=15, draft=Draft(*set_up(shift=0.01), tokens=1)), want
    )


@pytest.mark.parametrize("name", ["text", "another", "poor"])
@pytest.mark.parametrize("options", [{}, {"top_k": 5, "temperature": 0.8}, {"top_p": 0.7}])
def test_draws_have_the_same_distribution(name, options):
    """Second and third tokens of 4,000 rows, which drafts propose, against the sum over all that may come before."""
    (program, stored), (ids, _) = set_up(), prompts()
    sampling = {"temperature": 1.0, **options}
    numbers = {k: torch.tensor(v) for k, v in ({"top_k": 0, "top_p": 1.0, "min_p": 0.0} | sampling).items()}
    got = fds.generate(program, stored, ids[:1], max_new_tokens=2, n=4000, compile=False, draft=drafts()[name], **sampling)  # fmt: skip
    first = filtered(program(stored, input_ids=ids[:1]).logits[0, -1], numbers).softmax(0)
    rows = torch.cat([ids[:1].expand(zoo.VOCABULARY, -1), torch.arange(zoo.VOCABULARY)[:, None]], 1)
    then = filtered(program(stored, input_ids=rows).logits[:, -1], numbers).softmax(1)
    for place, p in ((-2, first), (-1, first @ then)):
        counts, want = torch.bincount(got[:, place], minlength=zoo.VOCABULARY).float(), 4000 * p
        assert not counts[p == 0].any()
        common = want > 5
        chi = ((counts - want)[common].square() / want[common]).sum()
        assert chi < common.sum() + 6 * (2 * common.sum()).sqrt(), (place, chi)


def test_a_row_draws_the_same_in_every_batch():
    (program, stored), (ids, mask) = set_up(), prompts()
    options = dict(max_new_tokens=12, temperature=1.0, seed=5, compile=False, draft=drafts()["another"])
    whole = fds.generate(program, stored, ids, mask, **options)[:, ids.shape[1] :]
    for i in range(3):
        own = ids[i : i + 1, mask[i].bool()]
        assert torch.equal(fds.generate(program, stored, own, **options)[0, own.shape[1] :], whole[i]), i


def test_what_the_text_proposes():
    """What followed the last place with the same two tokens, other than the end itself; where there is none, the last token again."""
    look = Speculation(None, Draft(tokens=2), None, True)._looked_up
    text = torch.tensor([[7, 8, 1, 7, 8, 2, 7], [1, 2, 3, 4, 5, 0, 0]])
    tokens = torch.tensor([[8, 0, 0], [6, 0, 0]])  # the first row goes on with 8, the second, of five tokens, with 6
    carry = {"text": text, "size": torch.tensor([7, 5]), "tokens": tokens, "length": torch.tensor([1, 1]), "token": tokens[:, 0]}  # fmt: skip
    assert look({**carry, "text": torch.nn.functional.pad(text, (0, 3))}).tolist() == [[2, 7], [6, 6]]


def test_a_good_draft_saves_steps(monkeypatch):
    """The model itself as its draft: five tokens of every step of four proposals."""
    rounds, run = [], Speculation.round
    monkeypatch.setattr(Speculation, "round", lambda *a: (rounds.append(1), run(*a))[1])
    (program, stored), (ids, _) = set_up(), prompts()
    fds.generate(program, stored, ids, max_new_tokens=21, compile=False, draft=drafts()["itself"])
    assert len(rounds) == 4


def short(positions, vocabulary=zoo.VOCABULARY):
    """A GPT-2 of so many learned positions."""
    import transformers as tf

    torch.manual_seed(3)
    config = tf.GPT2Config(vocab_size=vocabulary, n_embd=16, n_layer=1, n_head=2, n_positions=positions, bos_token_id=None, eos_token_id=None)  # fmt: skip
    program, params = fds.functionalize(zoo.lively(tf.GPT2LMHeadModel(config).eval()))
    return program, program.place(params)


@pytest.mark.parametrize("draft", ["itself", "text"])
def test_proposals_behind_the_last_position(monkeypatch, draft):
    """Rows that fill all 32 positions: what is proposed behind them is looked at and not taken, and a row that is whole waits for the others."""
    (program, stored), (ids, mask) = short(32), prompts()
    options = dict(max_new_tokens=23, compile=False, details=True)
    want = fds.generate(program, stored, ids, mask, **options)
    lengths, run = [], Speculation.round
    monkeypatch.setattr(Speculation, "round", lambda *a: (c := run(*a), lengths.append(int(c["length"].max())))[0])
    drafted = Draft(program, stored, tokens=6) if draft == "itself" else Draft(tokens=6)
    got = fds.generate(program, stored, ids, mask, draft=drafted, **options)
    assert torch.equal(got.tokens, want.tokens) and torch.equal(got.lengths, want.lengths) and max(lengths) == 23


def test_what_cannot_be_is_refused():
    (program, stored), (ids, _) = set_up(), prompts()
    for draft, words in (
        (short(128, 50), "knows 50 tokens, the model 97"), (short(16), "16 positions, prompt and max_new_tokens come to 29"), (set_up("t5"), "a model with an encoder"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            fds.generate(program, stored, ids, max_new_tokens=20, draft=Draft(*draft))
    for options in ({"stop_strings": "x", "tokenizer": object()}, {"on_token": print}, {"repetition_penalty": 1.2}):
        with pytest.raises(ValueError, match="token by token"):
            fds.generate(program, stored, ids, max_new_tokens=4, draft=Draft(), **options)
    with pytest.raises(ValueError, match="ALiBi"):
        fds.generate(*set_up("bloom"), ids, max_new_tokens=4, draft=Draft())
    with pytest.raises(ValueError, match="tokens=0"):
        Draft(tokens=0)
    with pytest.raises(ValueError, match="needs its weights"):
        Draft(program)
