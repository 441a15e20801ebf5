"""Generation equals transformers' greedy search under every kind of cache, and samples from the distribution it should."""

import pytest
import torch
import zoo

import fds
from fds.inference import Sampling


def prompts():
    """Three rows, the last two padded on the left."""
    ids = torch.randint(3, zoo.VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, :3] = mask[2, :6] = 0
    return ids.masked_fill(mask == 0, 0), mask


def theirs(model, ids, mask, new, **options):
    model.generation_config.eos_token_id = None
    return model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=new, pad_token_id=0, **options
    )


def set_up(family="llama", **options):
    program, params = fds.functionalize(zoo.build(family, **options))
    return program, program.place(params)


@pytest.mark.parametrize("kind", ["static", "sliding-int8", "paged"])
def test_compiled_and_transformed(kind):
    model = zoo.build("gemma3" if kind.startswith("sliding") else "llama")
    program, params = fds.functionalize(model.train())
    train = fds.chain(
        fds.lora(rank=2, targets="*.q_proj"), fds.shard(fds.sharding.mesh(dp=-1)["dp"]), fds.checkpoint()
    )(program)
    model.eval()
    ids, mask = prompts()
    got = fds.generate(train, train.place(params), ids, mask, max_new_tokens=24, cache=kind)
    if "int8" in kind:
        want = fds.generate(train, train.place(params), ids, mask, max_new_tokens=24, cache=kind, compile=False)
    else:
        want = theirs(model, ids, mask, 24)
    assert torch.equal(got, want)
    again = fds.generate(train, train.place(params), ids[:, :7], max_new_tokens=5, cache=kind)  # the same graphs
    if "int8" not in kind:
        assert torch.equal(again, theirs(model, ids[:, :7], torch.ones_like(ids[:, :7]), 5))


def test_the_end_token_ends_a_row():
    (program, stored), (ids, mask) = set_up(), prompts()
    free = fds.generate(program, stored, ids, mask, max_new_tokens=12, compile=False)
    end = int(free[0, ids.shape[1] + 3])
    got = fds.generate(program, stored, ids, mask, max_new_tokens=12, eos_token_id=[end, 96], pad_token_id=0, compile=False, details=True)  # fmt: skip
    for row, whole, length in zip(got.tokens[:, ids.shape[1] :].tolist(), free[:, ids.shape[1] :].tolist(), got.lengths.tolist(), strict=True):  # fmt: skip
        stop = whole.index(end) + 1 if end in whole else len(row)
        assert row[:stop] == whole[:stop][: len(row)] and not any(row[stop:]) and length == stop


def words():
    """A tokenizer of 97 words: abcdef (which transformers asks for), w1, w2, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    table = Tokenizer(models.WordLevel({f"w{i}" if i else "abcdef": i for i in range(zoo.VOCABULARY)}, unk_token="w1"))
    table.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=table, unk_token="w1")


def test_stop_strings_end_a_row():
    (program, stored), (ids, mask) = set_up(), prompts()
    free = fds.generate(program, stored, ids, mask, max_new_tokens=12, compile=False)[:, ids.shape[1] :]
    stop = f"w{int(free[0, 4])}"
    got = fds.generate(program, stored, ids, mask, max_new_tokens=12, stop_strings=stop, tokenizer=words(), compile=False, details=True)  # fmt: skip
    assert int(got.lengths[0]) == free[0].tolist().index(int(free[0, 4])) + 1
    with pytest.raises(ValueError, match="tokenizer="):
        fds.generate(program, stored, ids, mask, max_new_tokens=4, stop_strings=stop)


def test_tokens_as_they_come():
    (program, stored), (ids, mask) = set_up(), prompts()
    seen = []
    got = fds.generate(program, stored, ids, mask, max_new_tokens=6, compile=False, on_token=seen.append)
    assert torch.equal(torch.stack(seen, 1), got[:, ids.shape[1] :])
    seen.clear()
    got = fds.generate(program, stored, ids, mask, max_new_tokens=6, compile=False, on_token=seen.append, eos_token_id=got[:, -5].tolist())  # fmt: skip
    assert torch.equal(torch.stack(seen, 1), got[:, ids.shape[1] :]) and len(seen) < 6, "no step behind the last end"


def test_repetition_penalty_is_that_of_transformers():
    model, (program, stored), (ids, _) = zoo.build("llama"), set_up(), prompts()
    want = theirs(model, ids[:1], torch.ones_like(ids[:1]), 20, repetition_penalty=1.7)
    assert torch.equal(fds.generate(program, stored, ids[:1], max_new_tokens=20, repetition_penalty=1.7, compile=False), want)  # fmt: skip
    assert not torch.equal(want, theirs(model, ids[:1], torch.ones_like(ids[:1]), 20))


def test_a_penalty_knows_nothing_of_padding():
    """Rows of a batch draw what they draw alone: the token that pads is not one that they have had."""
    program, params = fds.functionalize(zoo.lively(zoo.build("llama")))
    stored, (ids, mask) = program.place(params), prompts()
    options = dict(max_new_tokens=16, temperature=1.0, repetition_penalty=4.0, n=8, compile=False)
    whole = fds.generate(program, stored, ids, mask, **options)[:, ids.shape[1] :]
    assert (whole == 0).any(), "else it would tell nothing"
    for i in range(3):
        own = ids[i : i + 1, mask[i].bool()]
        assert torch.equal(fds.generate(program, stored, own, **options)[:, own.shape[1] :], whole[8 * i : 8 * i + 8])


def test_logprobs_are_the_programs():
    """Of rollouts, to 1e-5: what a policy gradient needs."""
    (program, stored), (ids, mask) = set_up(), prompts()
    got = fds.generate(program, stored, ids, mask, max_new_tokens=10, temperature=1.3, top_k=20, compile=False, details=True)  # fmt: skip
    whole = torch.cat([mask, torch.ones(3, 10, dtype=mask.dtype)], 1)
    places = (whole.cumsum(1) - 1).clamp(min=0)
    logits = program(stored, input_ids=got.tokens, attention_mask=whole, position_ids=places).logits
    want = logits[:, ids.shape[1] - 1 : -1].log_softmax(-1).gather(2, got.tokens[:, ids.shape[1] :, None])[..., 0]
    torch.testing.assert_close(got.logprobs, want, rtol=0, atol=1e-5)


def test_sampling():
    (program, stored), (ids, _) = set_up(), prompts()
    draw = lambda **kw: fds.generate(program, stored, ids, max_new_tokens=8, compile=False, **kw)  # noqa: E731
    assert torch.equal(draw(temperature=1.0, seed=1), draw(temperature=1.0, seed=1))
    assert not torch.equal(draw(temperature=1.0, seed=1), draw(temperature=1.0, seed=2))
    for one in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert torch.equal(draw(temperature=1.0, **one), draw())


def test_a_row_draws_the_same_in_every_batch():
    (program, stored), (ids, mask) = set_up(), prompts()
    options = dict(max_new_tokens=12, temperature=1.0, seed=5, compile=False)
    whole = fds.generate(program, stored, ids, mask, **options)[:, ids.shape[1] :]
    turned = fds.generate(program, stored, ids.flip(0), mask.flip(0), **options)[:, ids.shape[1] :]
    assert torch.equal(turned.flip(0), whole)
    for i in range(3):
        own = ids[i : i + 1, mask[i].bool()]
        assert torch.equal(fds.generate(program, stored, own, **options)[0, own.shape[1] :], whole[i]), i
    many = fds.generate(program, stored, ids, mask, n=3, **options).view(3, 3, -1)[:, :, ids.shape[1] :]
    assert len({tuple(r.tolist()) for r in many[0]}) == 3, "samples of one prompt differ"
    again = fds.generate(program, stored, ids[:1], n=5, **options)[:3, ids.shape[1] :]
    assert torch.equal(again, many[0]), "by their number, not by how many there are"


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.8, "temperature": 0.7}, {"min_p": 0.2}])
def test_draws_follow_the_distribution(options):
    """4,000 first tokens of one prompt; chi-squared far beyond the 99.99th percentile."""
    (program, stored), (ids, _) = set_up(), prompts()
    sampling = {"temperature": 1.0, **options}
    got = fds.generate(program, stored, ids[:1], max_new_tokens=1, n=4000, compile=False, **sampling)[:, -1]
    logits = program(stored, input_ids=ids[:1]).logits[0, -1] / sampling["temperature"]
    p = logits.softmax(0)
    order = p.argsort(descending=True)
    before = p[order].cumsum(0) - p[order]
    keep = torch.ones_like(p, dtype=torch.bool)
    if "top_k" in options:
        keep = p >= p.topk(options["top_k"]).values[-1]
    elif "top_p" in options:
        keep[order] = before < options["top_p"]
    elif "min_p" in options:
        keep = p >= options["min_p"] * p.max()
    want = torch.where(keep, p, 0.0) / p[keep].sum() * 4000
    counts = torch.bincount(got, minlength=zoo.VOCABULARY).float()
    assert not counts[~keep].any()
    common = want > 5
    chi = ((counts - want)[common].square() / want[common]).sum()
    assert chi < common.sum() + 6 * (2 * common.sum()).sqrt()


@pytest.mark.parametrize(("change", "words"), [
    ({"max_new_tokens": 0}, "max_new_tokens"), ({"temperature": -1.0}, "temperature"), ({"top_k": -1}, "top_k"), ({"top_p": 1.5}, "top_p"), ({"max_new_tokens": 120}, "positions"),
    ({"min_p": 2.0}, "min_p"), ({"repetition_penalty": 0.0}, "repetition_penalty"), ({"n": 0}, "n=0"), ({"cache": "statik"}, "static"), ({"cache": "static-int4"}, "int8"),
    ({"cache": "paged", "n": 2, "temperature": 1.0}, "paged"), ({"cuda_graph": True, "compile": True}, "cuda_graph=True for input_ids on cpu"), ({"n": 1.5}, "n=1.5"),
    ({"top_p": 0.9}, "top_p=0.9 with temperature 0"), ({"top_k": 5}, "top_k=5 with temperature 0"), ({"min_p": 0.1}, "min_p=0.1 with temperature 0"), ({"n": 3}, "n=3 .*temperature 0"),
    ({"temperature": 1.0, "top_k": 2.5}, "top_k=2.5"), ({"temperature": "1"}, "temperature='1'"), ({"temperature": True}, "temperature=True"), ({"temperature": float("nan")}, "temperature=nan"),
    ({"repetition_penalty": float("inf")}, "finite"), ({"seed": 1.5}, "seed=1.5"), ({"seed": 2**63}, "64 bits"), ({"eos_token_id": -1}, r"eos_token_id=-1, required a token in \[0, 97\)"),
    ({"eos_token_id": [3, 97]}, "eos_token_id=97"), ({"eos_token_id": "w3"}, "eos_token_id='w3'"), ({"pad_token_id": 97}, "pad_token_id=97"), ({"tokenizer": object()}, "without stop_strings"),
    ({"stop_strings": "", "tokenizer": object()}, "not empty"), ({"stop_strings": [], "tokenizer": object()}, "not empty"), ({"num_beams": 4}, "num_beams=4 .*beam search.*transformers"),
    ({"do_sample": True}, "temperature="), ({"max_length": 9}, "max_new_tokens="), ({"num_return_sequences": 2}, "give n="), ({"temprature": 1.0}, "did you mean 'temperature'"),
    ({"workspace": 3}, "a Workspace"), ({"draft": "small"}, "a Draft"), ({"on_token": 3}, "on_token=3"),
])  # fmt: skip
def test_bad_arguments(change, words):
    program, stored = set_up()
    with pytest.raises(ValueError, match=words):
        fds.generate(program, stored, prompts()[0], **{"max_new_tokens": 4, "compile": False, **change})


def test_whole_numbers_are_numbers_too():
    (program, stored), (ids, _) = set_up(), prompts()
    draw = lambda **kw: fds.generate(program, stored, ids, max_new_tokens=4, compile=False, **kw)  # noqa: E731
    assert torch.equal(draw(temperature=1, top_p=1, min_p=0, repetition_penalty=1), draw(temperature=1.0))
    assert torch.equal(draw(eos_token_id=torch.tensor([5, 7])), draw(eos_token_id=[5, 7]))


def test_bad_prompts_and_models():
    (program, stored), (ids, mask) = set_up(), prompts()
    with pytest.raises(ValueError, match="input_ids is a list"):
        fds.generate(program, stored, ids.tolist(), max_new_tokens=4)
    with pytest.raises(ValueError, match=r"attention_mask \(3, 2\), required \(3, 9\)"):
        fds.generate(program, stored, ids, mask[:, :2], max_new_tokens=4)
    holes = mask.clone()
    holes[0, 4] = 0
    for bad in (holes, mask * 0):
        with pytest.raises(ValueError, match="in the middle"):
            fds.generate(program, stored, ids, bad, max_new_tokens=4)
    with pytest.raises(ValueError, match="tokeniser"):
        fds.generate(program, stored, ids + zoo.VOCABULARY, max_new_tokens=4)
    with pytest.raises(ValueError, match="at least one token"):
        fds.generate(program, stored, ids[:, :0], max_new_tokens=4)
    with pytest.raises(ValueError, match="BertForMaskedLM is not a language model"):
        fds.generate(*set_up("bert"), ids, max_new_tokens=4)
    body, params = fds.functionalize(zoo.build("llama").model)
    with pytest.raises(ValueError, match="output layer"):
        fds.generate(body, body.place(params), ids, max_new_tokens=4)
    with pytest.raises(ValueError, match="top_k"):
        Sampling(top_k=-2)


def test_a_prompt_near_the_end_of_the_positions(monkeypatch):
    """Prompts are compiled wider than they are, but no wider than a model with 70 trained positions has."""
    import transformers as tf

    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    torch.manual_seed(0)
    model = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=4, n_positions=70)).eval()
    program, params = fds.functionalize(model)
    ids = torch.randint(3, 97, (1, 66), generator=torch.Generator().manual_seed(1))
    got = fds.generate(program, program.place(params), ids, max_new_tokens=4)
    assert torch.equal(got, theirs(model, ids, torch.ones_like(ids), 4))
