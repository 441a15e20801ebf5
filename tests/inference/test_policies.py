"""Rules: what they match in every family, what they change in no value, and what is refused."""

from pathlib import Path

import pytest
import torch
import transformers as tf
import zoo

import fds
from fds.inference import policies, replace_transformer_layer, report, revert_transformer_layer
from fds.inference.policies import family_of

_SMALL = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, max_position_embeddings=64)  # fmt: skip


def clip():
    part = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, projection_dim=16)
    config = tf.CLIPConfig(text_config={**part, "vocab_size": 97, "max_position_embeddings": 32, "eos_token_id": 2}, vision_config={**part, "image_size": 16, "patch_size": 8}, projection_dim=16)  # fmt: skip
    return tf.CLIPModel(config), {"pixel_values": torch.randn(4, 3, 16, 16)}


ENCODERS = {
    "roberta": lambda: (tf.RobertaModel(tf.RobertaConfig(**_SMALL)), {}),
    "distilbert": lambda: (tf.DistilBertModel(tf.DistilBertConfig(vocab_size=97, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=64)), {}),
    "clip": clip,
}  # fmt: skip
SEQ2SEQ = ["t5", "mt5", "bart", "mbart", "pegasus", "marian"]
DECODERS = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "gpt2", "gptj", "gpt-neo", "gpt-neox", "opt", "bloom", "falcon", "mixtral", "qwen3-moe"]  # fmt: skip


def model(family):
    """A model whose norms' weights are not all one, and what it is called with."""
    torch.manual_seed(0)
    if family not in ENCODERS:
        return zoo.build(family), zoo.batch(family)
    built, more = ENCODERS[family]()
    with torch.no_grad():
        for p in built.parameters():
            p.add_(0.02 * torch.randn(p.shape))
    return built.eval(), {"input_ids": zoo.batch("bert")["input_ids"], **more}


def first(out):
    return next(x for x in out.values() if isinstance(x, torch.Tensor))


@pytest.mark.parametrize("family", [*DECODERS, *SEQ2SEQ, "bert", *ENCODERS])
def test_rules_of_a_family(family):
    built, rows = model(family)
    program, params = fds.functionalize(built)
    assert family_of(program) in policies()
    found = report(program)
    assert found.found and all(f.replaced for f in found.found), str(found)
    fast = replace_transformer_layer(program)
    want, got = first(program(program.place(params), **rows)), first(fast(fast.place(params), **rows))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert revert_transformer_layer(fast).history == ()


def test_a_model_without_rules():
    program, _ = fds.functionalize(zoo.build("convnet"))
    assert replace_transformer_layer(program, "generic") is program
    assert "no rules" in str(report(program))
    with pytest.raises(ValueError, match="no rules for 'ConvNet'"):
        replace_transformer_layer(program)
    with pytest.raises(ValueError, match="specialized"):
        replace_transformer_layer(program, "special")


def test_what_is_left_is_said():
    """A feed-forward layer of another activation is not swiglu."""
    config = tf.LlamaConfig(**_SMALL, hidden_act="relu")
    program, _ = fds.functionalize(tf.LlamaForCausalLM(config))
    found = {f.rule.operator: f for f in report(program).found}
    assert not found["swiglu"].replaced and "other values than swiglu" in str(report(program))
    assert len(found["rms_norm"].replaced) == 5


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_text_is_the_same(family):
    program, params = fds.functionalize(zoo.build(family))
    fast = replace_transformer_layer(program)
    ids = zoo.batch(family)["input_ids"]
    options = dict(max_new_tokens=16, compile=False)
    assert torch.equal(fds.generate(fast, fast.place(params), ids, **options), fds.generate(program, program.place(params), ids, **options))  # fmt: skip


def families():
    """The table of docs/inference.md: what is matched in a tiny model of two layers of each family."""
    lines = ["| family | generic | specialized: modules of two layers | not matched |", "|---|---|---|---|"]
    for family in [*DECODERS, *SEQ2SEQ, "bert", *ENCODERS]:
        program, _ = fds.functionalize(model(family)[0])
        found = report(program)
        matched = ", ".join(f"{len(f.replaced)} `{f.rule.pattern}` by {f.rule.operator}" for f in found.found)
        left = ", ".join(f"{k}: {v}" for f in found.found for k, v in f.left.items()) or "none"
        text = "text, in every cache" if family in [*DECODERS, *SEQ2SEQ] else "forward"
        text = {"gpt-neo": "text; no sliding cache"}.get(family, f"{text}; no drafts" if family in ["bloom", *SEQ2SEQ] else text)  # fmt: skip
        lines.append(f"| {found.family} | {text} | {matched} | {left} |")
    return "\n".join(lines)


def test_the_table_in_the_docs():
    page = (Path(__file__).parents[2] / "docs" / "inference.md").read_text()
    written = page.partition("<!-- families:begin -->")[2].partition("<!-- families:end -->")[0].strip()
    assert written == families(), "write it anew: PYTHONPATH=.:tests python tests/inference/test_policies.py"


if __name__ == "__main__":
    path = Path(__file__).parents[2] / "docs" / "inference.md"
    head, _, rest = path.read_text().partition("<!-- families:begin -->")
    path.write_text(
        f"{head}<!-- families:begin -->\n{families()}\n<!-- families:end -->{rest.partition('<!-- families:end -->')[2]}"
    )
