"""Generation equals transformers' greedy search, and samples from the distribution it should."""

import pytest
import torch
import zoo

import fds

CAUSAL = ["llama", "llama-tied", "qwen3", "mistral", "gemma3", "gpt2", "opt", "bloom", "falcon", "mixtral"]


def prompts():
    """Three rows, the last two padded on the left."""
    ids = torch.randint(3, zoo.VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, :3] = mask[2, :6] = 0
    return ids.masked_fill(mask == 0, 0), mask


@pytest.mark.parametrize("family", CAUSAL)
def test_greedy_equals_transformers(family):
    model = zoo.build(family)
    program, params = fds.functionalize(model)
    ids, mask = prompts()
    got = fds.generate(program, program.place(params), ids, mask, max_new_tokens=24, compile=False)
    model.generation_config.eos_token_id = None
    assert torch.equal(
        got, model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=24, pad_token_id=0)
    )


def test_compiled_and_transformed():
    model = zoo.build("llama")
    model.generation_config.eos_token_id = None
    program, params = fds.functionalize(model.train())
    train = fds.chain(
        fds.lora(rank=2, targets="*.q_proj"), fds.shard(fds.sharding.mesh(dp=-1)["dp"]), fds.checkpoint()
    )(program)
    ids, mask = prompts()
    got = fds.generate(train, train.place(params), ids, mask, max_new_tokens=24)
    assert torch.equal(
        got,
        model.eval().generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=24, pad_token_id=0),
    )
    again = fds.generate(train, train.place(params), ids[:, :7], max_new_tokens=5)  # the same graph, another length
    assert torch.equal(
        again,
        model.generate(
            input_ids=ids[:, :7],
            attention_mask=torch.ones_like(ids[:, :7]),
            do_sample=False,
            max_new_tokens=5,
            pad_token_id=0,
        ),
    )


def test_the_end_token_ends_a_row():
    program, params = fds.functionalize(zoo.build("llama"))
    stored, (ids, mask) = program.place(params), prompts()
    free = fds.generate(program, stored, ids, mask, max_new_tokens=12, compile=False)
    end = int(free[0, ids.shape[1] + 3])
    got = fds.generate(program, stored, ids, mask, max_new_tokens=12, eos_token_id=end, pad_token_id=0, compile=False)
    for row, whole in zip(got[:, ids.shape[1] :].tolist(), free[:, ids.shape[1] :].tolist(), strict=True):
        stop = whole.index(end) + 1 if end in whole else len(row)
        assert row[:stop] == whole[:stop][: len(row)] and not any(row[stop:])


def test_sampling():
    program, params = fds.functionalize(zoo.build("llama"))
    stored, (ids, _) = program.place(params), prompts()
    draw = lambda **kw: fds.generate(program, stored, ids, max_new_tokens=8, compile=False, **kw)  # noqa: E731
    assert torch.equal(draw(temperature=1.0, seed=1), draw(temperature=1.0, seed=1))
    assert not torch.equal(draw(temperature=1.0, seed=1), draw(temperature=1.0, seed=2))
    assert torch.equal(draw(temperature=1.0, top_k=1), draw())
    assert torch.equal(draw(temperature=1.0, top_p=1e-6), draw())


def test_draws_follow_the_distribution():
    from fds.generate import _pick

    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5]).repeat(20_000, 1)
    for options, allowed in (
        ((1.0, None, None), [0, 1, 2, 3, 4]),
        ((0.7, 3, None), [1, 2, 4]),
        ((1.0, None, 0.8), [1, 2]),
    ):
        drawn = _pick(logits, *options, torch.tensor(3), 0)
        want = torch.zeros(5)
        want[allowed] = (logits[0, allowed] / options[0]).softmax(0)
        counts = torch.bincount(drawn, minlength=5).float()
        if options[2]:
            allowed = [i for i in range(5) if counts[i] > 0]
            want = torch.zeros(5)
            want[allowed] = logits[0, allowed].softmax(0)
        chi = sum(float((counts[i] - 20_000 * want[i]) ** 2 / (20_000 * want[i])) for i in allowed)
        assert (
            counts.sum() == counts[allowed].sum() and chi < 25.0
        )  # far beyond the 99.99th percentile for 4 degrees of freedom


@pytest.mark.parametrize(("change", "words"), [
    ({"max_new_tokens": 0}, "max_new_tokens"), ({"temperature": -1.0}, "temperature"), ({"top_k": 0}, "top_k"), ({"top_p": 1.5}, "top_p"), ({"max_new_tokens": 60}, "positions"),
])  # fmt: skip
def test_bad_arguments(change, words):
    program, params = fds.functionalize(zoo.build("llama"))
    with pytest.raises(ValueError, match=words):
        fds.generate(program, program.place(params), prompts()[0], **{"max_new_tokens": 4, **change})


def test_bad_prompts_and_models():
    program, params = fds.functionalize(zoo.build("llama"))
    stored, (ids, mask) = program.place(params), prompts()
    with pytest.raises(ValueError, match="left"):
        fds.generate(program, stored, ids, mask.flip(1), max_new_tokens=4)
    with pytest.raises(ValueError, match="tokeniser"):
        fds.generate(program, stored, ids + zoo.VOCABULARY, max_new_tokens=4)
    with pytest.raises(ValueError, match="at least one token"):
        fds.generate(program, stored, ids[:, :0], max_new_tokens=4)
    for family in ("bert", "t5"):
        other, weights = fds.functionalize(zoo.build(family))
        with pytest.raises(ValueError, match="not a causal language model"):
            fds.generate(other, other.place(weights), ids, max_new_tokens=4)
