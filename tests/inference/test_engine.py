"""`init_inference`: settings mean a chain, or are refused by name."""

import json

import pytest
import ranks
import torch
import zoo

import fds
from fds.inference import InferenceConfig


def ids():
    return zoo.batch("llama")["input_ids"]


def plain(**options):
    program, params = fds.functionalize(zoo.build("llama"))
    return fds.generate(program, program.place(params), ids(), max_new_tokens=12, compile=False, **options)


def test_a_model_in_text_out():
    model = zoo.build("llama", training=True)
    engine = fds.init_inference(model, dtype="fp32", max_out_tokens=40)
    assert torch.equal(engine.generate(ids(), max_new_tokens=12, compile=False), plain())
    assert engine.generate(ids(), compile=False).shape[1] == 40
    torch.testing.assert_close(engine(ids()).logits, model.eval()(ids()).logits)
    dropping = zoo.build("gpt2", training=True)
    torch.testing.assert_close(fds.init_inference(dropping, dtype="fp32")(ids()).logits, dropping.eval()(ids()).logits)
    assert not engine(ids()).logits.requires_grad and repr(engine).startswith("InferenceEngine(freeze()")


@pytest.mark.parametrize("options", [
    {"replace_with_kernel_inject": True}, {"zero": {"stage": 3, "offload_param": {"device": "cpu"}}}, {"kernel_inject": True, "max_tokens": 50},
])  # fmt: skip
def test_the_same_text_in_every_mode(options):
    engine = fds.init_inference(zoo.build("llama"), dtype="float32", **options)
    assert torch.equal(engine.generate(ids(), max_new_tokens=12, compile=False), plain())


@pytest.mark.parametrize(("options", "near"), [({"dtype": "bf16"}, 0.1), ({"dtype": "int8"}, 0.2), ({"dtype": "fp32", "quant": {"weight": {"num_bits": 4}}}, 1.0)])  # fmt: skip
def test_low_precision(options, near):
    model = zoo.build("llama")
    engine = fds.init_inference(model, **options)
    want = model(ids()).logits
    got = engine(ids()).logits.float()
    assert 0 < (got - want).abs().max() < near * want.abs().max()
    assert engine.generate(ids(), max_new_tokens=3, compile=False).shape == (4, 15)
    size = fds.tree.nbytes(engine.stored)
    assert size < 0.7 * sum(p.nbytes for p in model.parameters())


def test_weights_from_files(tmp_path):
    zoo.build("llama").save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = zoo.FAMILIES["llama"][0]()
    engine = fds.init_inference(empty, dtype="fp32", checkpoint=str(tmp_path))
    assert torch.equal(engine.generate(ids(), max_new_tokens=12, compile=False), plain())
    with pytest.raises(ValueError, match="checkpoint="):
        fds.init_inference(empty, dtype="fp32")


def split():
    engine = fds.init_inference(zoo.build("llama"), {"dtype": "fp32", "tensor_parallel": {"tp_size": 2}})
    return engine.generate(ids(), max_new_tokens=12, compile=False), fds.tree.nbytes(engine.stored)


def test_two_ranks_share_the_weights():
    whole = sum(p.nbytes for p in zoo.build("llama").parameters())
    for tokens, nbytes in ranks.run(2, split):
        assert torch.equal(tokens, plain()) and nbytes < 0.7 * whole


def test_times():
    engine = fds.init_inference(zoo.build("llama"), dtype="fp32")
    with pytest.raises(ValueError, match="profile_model_time"):
        engine.model_times()
    engine.profile_model_time()
    engine(ids())
    engine.generate(ids(), max_new_tokens=2, compile=False)
    assert len(times := engine.model_times()) == 2 and all(t > 0 for t in times) and engine.model_times() == []


def test_too_long_is_said_before_any_work():
    engine = fds.init_inference(zoo.build("llama"), dtype="fp32", max_out_tokens=14, min_out_tokens=3)
    with pytest.raises(ValueError, match="12 \\+ 8 new tokens = 20, max_out_tokens is 14"):
        engine.generate(ids(), max_new_tokens=8)
    with pytest.raises(ValueError, match="3 new tokens = 15"):
        engine.generate(ids())


@pytest.mark.parametrize(("options", "words"), [
    ({"dtpye": "fp32"}, "dtype"), ({"dtype": "fp8"}, "unknown"), ({"tensor_parallel": {"tp_siz": 2}}, "tp_size"), ({"use_triton": True}, "no effect here"), ({"max_out_tokens": 0}, ">= 1"),
    ({"max_tokens": 5, "max_out_tokens": 6}, "give it once"), ({"quant": {"weight": {"num_bits": 3}}}, "4 or 8"), ({"quant": {"weight": {"q_groups": 3}}}, "q_groups"), ({"zero": {"stage": 2}}, "stage 3"),
    ({"zero": {"stage": 3, "offload_param": {"device": "disk"}}}, "'nvme'"), ({"moe": {"ep_size": 2}}, "experts"), ({"injection_policy": {"a": "b"}}, "at\\("), ({"enable_cuda_graph": True}, "no CUDA"),
    ({"enable_cuda_graph": True, "tp": {"tp_size": 2}}, "with tensor_parallel"), ({"enable_cuda_graph": True, "zero": {"stage": 3, "offload_param": {"device": "cpu"}}}, "with zero"),
    ({"min_out_tokens": 9, "max_out_tokens": 8}, "at most max_out_tokens"), ({"tp": {"tp_size": 0}}, "tp_size=0"), ({"dtype": "int8", "quant": {"weight": {"num_bits": 4}}}, "with dtype int8"),
    ({"zero": {"stage": 3, "offload_param": {"device": "nvme"}}}, "nvme_path"), ({"zero": {"stage": 3, "offload_param": {"device": "cpu", "pin_memory": True}}}, "pin_memory"),
    ({"quant": {"enabled": "no"}}, "quant.enabled"), ({"tp": {"enabled": 1}}, "tensor_parallel.enabled"), ({"quant": {"weight": {"num_bits": 8.0}}}, "given 8.0"),
    ({"dtype": "int8", "quant": {"enabled": False}}, "with dtype int8"), ({"checkpoint": {"type": "ds_model"}}, "a directory of safetensors"), ({"moe_experts": [4]}, "experts"), ({"ep_group": 1}, "expert"),
    ({"args": {"dtype": "fp32"}}, "keys themselves"), ([1], "required a dictionary"), (5, "required a dictionary"), ("nowhere.json", "nowhere.json"),
    ({"replace_with_kernel_inject": "yes"}, "true or false"), ({"quant": {"weight": {"q_type": "asymmetric"}}}, "symmetric"),
])  # fmt: skip
def test_settings_that_cannot_be(options, words):
    if options == {"enable_cuda_graph": True} and torch.cuda.is_available():
        pytest.skip("there is CUDA here")
    with pytest.raises(ValueError, match=words):
        InferenceConfig.of(options)


def test_settings_from_a_file_and_by_default(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"dtype": "torch.half", "tp": {"tp_size": 1}}))
    assert InferenceConfig.of(str(tmp_path / "config.json"), max_tokens=9).max_out_tokens == 9
    assert InferenceConfig.of(fds.default_inference_config()) == InferenceConfig()
    assert InferenceConfig.of(tensor_parallel={"enabled": False, "tp_size": 2}).tp_size == 1
