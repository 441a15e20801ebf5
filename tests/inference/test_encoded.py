"""Models with an encoder: prompts are encoded once, and their decoders write in every way that others do."""

import pytest
import torch
import zoo

import fds
from fds.inference import Decoding, Draft

NEW = 12


def prompts():
    """Three rows, the last two padded on the left."""
    ids = torch.randint(3, zoo.VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, :3] = mask[2, :6] = 0
    return ids.masked_fill(mask == 0, 0), mask


def set_up(family="t5"):
    program, params = fds.functionalize(zoo.lively(zoo.build(family)))
    return program, program.place(params)


def text(program, stored, *rows, **options):
    return fds.generate(program, stored, *(rows or prompts()), **{"max_new_tokens": NEW, "compile": False, **options})


def theirs(model, **options):
    model.generation_config.eos_token_id = None
    ids, mask = prompts()
    return model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW, pad_token_id=0, **options)  # fmt: skip


def test_prompts_are_encoded_once_and_their_keys_computed_once(monkeypatch):
    (program, stored), calls = set_up(), []
    site = next(s for s in program.sites if s.startswith("encoder."))
    counted = fds.at(site, fds.around(lambda apply: lambda *a, **k: (calls.append(1), apply(*a, **k))[1], name="counted"))(program)  # fmt: skip
    assert torch.equal(text(counted, stored), text(program, stored)) and len(calls) == 1
    decoding = Decoding.of(program)
    ids, mask = prompts()
    _, cache = decoding.prefill(stored, ids, mask.sum(1), 64, begin=torch.zeros(3, 1, dtype=torch.int64))
    _, after = decoding.step(stored, cache, torch.ones(3, 1, dtype=torch.int64))
    assert after["across"] is cache["across"] and after["lengths"].tolist() == [2, 2, 2]


def test_compiled():
    program, stored = set_up()
    for rows in (prompts(), [x[:, :7] for x in prompts()]):  # the same graphs
        assert torch.equal(text(program, stored, *rows, compile=True), text(program, stored, *rows))


def test_the_decoder_begins_with_what_it_is_given():
    """And says so in what comes out; so do the configuration's token and transformers."""
    model = zoo.lively(zoo.build("t5"))
    program, params = fds.functionalize(model)
    stored, begin = program.place(params), torch.tensor([[0, 7], [0, 9], [0, 7]])
    got = text(program, stored, decoder_input_ids=begin, details=True)
    assert torch.equal(got.tokens, theirs(model, decoder_input_ids=begin)) and got.logprobs.shape == (3, NEW)
    assert torch.equal(text(program, stored), theirs(model))
    module = program.origin.core.module
    module.config.decoder_start_token_id = module.generation_config.decoder_start_token_id = None
    with pytest.raises(ValueError, match="give decoder_input_ids"):
        text(program, stored)


def test_penalties_and_ends_are_those_of_the_decoders_text():
    model = zoo.lively(zoo.build("t5"))
    program, params = fds.functionalize(model)
    stored = program.place(params)
    assert torch.equal(text(program, stored, repetition_penalty=1.7), theirs(model, repetition_penalty=1.7))
    assert not torch.equal(text(program, stored), theirs(model, repetition_penalty=1.7))
    free = text(program, stored)[:, 1:]
    got = text(program, stored, eos_token_id=int(free[0, 3]), pad_token_id=0, details=True)
    assert got.lengths[0] == free[0].tolist().index(int(free[0, 3])) + 1


def test_logprobs_are_the_programs():
    program, stored = set_up("bart")
    ids, mask = (x.flip(1) for x in prompts())
    got = text(program, stored, ids, mask, temperature=1.3, details=True)
    logits = program(stored, input_ids=ids, attention_mask=mask, decoder_input_ids=got.tokens[:, :-1]).logits
    want = logits.log_softmax(-1).gather(2, got.tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(got.logprobs, want, rtol=0, atol=1e-5)


def test_samples_of_a_prompt_depend_on_nothing_else_and_come_as_they_are_drawn():
    (program, stored), (ids, mask), seen = set_up(), prompts(), []
    options = dict(temperature=1.0, seed=5)
    whole = text(program, stored, n=3, on_token=seen.append, **options)
    assert torch.equal(torch.stack(seen, 1), whole[:, 1:]) and len(whole.unique(dim=0)) == 9
    for i in range(3):
        assert torch.equal(text(program, stored, ids[i : i + 1, mask[i].bool()], n=3, **options), whole[3 * i : 3 * i + 3])  # fmt: skip


def test_engines():
    model = zoo.lively(zoo.build("t5"))
    program, params = fds.functionalize(model)
    engine = fds.init_inference(model, dtype="fp32", kernel_inject=True, max_out_tokens=30)
    assert torch.equal(engine.generate(*prompts(), max_new_tokens=NEW, compile=False), theirs(model))
    both = fds.inference.hybrid(fds.checkpoint()(program))
    assert torch.equal(both.generate(program.place(params), *prompts(), max_new_tokens=NEW, compile=False), theirs(model))  # fmt: skip


def test_what_cannot_be_is_refused():
    (program, stored), (ids, _) = set_up(), prompts()
    for options, words in (
        ({"draft": Draft()}, "behind an encoder"),
        ({"decoder_input_ids": torch.zeros(2, 1, dtype=torch.int64)}, "2 rows, required 3"),
        ({"decoder_input_ids": torch.full((3, 1), 97)}, "decoder_input_ids reach from 97"),
    ):
        with pytest.raises(ValueError, match=words):
            text(program, stored, **options)
    with pytest.raises(ValueError, match="begin="):
        Decoding.of(program).prefill(stored, ids, torch.tensor([9, 9, 9]), 64)
    llama, weights = fds.functionalize(zoo.build("llama"))
    with pytest.raises(ValueError, match="write them into input_ids"):
        text(llama, llama.place(weights), decoder_input_ids=ids)
    bart, weights = set_up("bart")
    with pytest.raises(ValueError, match="97 of 96 positions that the encoder has"):
        text(bart, weights, ids[:1, :1].expand(1, 97))
    import transformers as tf

    other, weights = fds.functionalize(tf.LEDForConditionalGeneration(tf.LEDConfig(vocab_size=97, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2, attention_window=4)))  # fmt: skip
    with pytest.raises(ValueError, match="'led' were not tried, known are t5"):
        text(other, other.place(weights))
