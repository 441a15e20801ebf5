"""Fused linear cross-entropy: numerics, its promise about memory, and its place in `losses.causal_lm`."""

import laws
import pytest
import ranks
import torch
import torch.nn.functional as F
import zoo

import fds
from fds.kernels import cross_entropy, linear_cross_entropy, linear_log_probabilities


def inputs(rows, width=24, vocabulary=50, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(s, generator=g).to(dtype) for s in ((rows, width), (vocabulary, width), (vocabulary,))
    )
    target = torch.randint(vocabulary, (rows,), generator=g)
    target[::4] = -100
    return hidden, weight, bias, target


def by_hand(hidden, weight, bias, target, softcap=0.0, label_smoothing=0.0, z_loss=0.0):
    x = hidden.double() @ weight.double().T + bias.double()
    x = softcap * torch.tanh(x / softcap) if softcap else x
    loss = F.cross_entropy(x, target, reduction="none", label_smoothing=label_smoothing)
    return loss + (z_loss * x.logsumexp(-1).square()).where(target != -100, 0)


OPTIONS = [
    {},
    {"softcap": 5.0},
    {"label_smoothing": 0.2},
    {"z_loss": 0.1},
    {"softcap": 5.0, "label_smoothing": 0.2, "z_loss": 0.1},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_every_option(rows, options, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK", 3 * 4 * 50)  # three rows at a time
    leaves = [t.requires_grad_() if t.is_floating_point() else t for t in inputs(rows, width=3)]
    hidden, weight, bias, target = leaves
    want = by_hand(*leaves, **options)
    got = linear_cross_entropy(hidden, weight, target, bias=bias, **options)
    assert got.dtype == torch.float32 and torch.allclose(got.double(), want, atol=2e-5)
    scale = torch.linspace(0.5, 1.0, rows)
    total = linear_cross_entropy(hidden, weight, target, bias=bias, scale=scale, **options)
    assert torch.allclose(total.double(), (want * scale).sum(), rtol=1e-5)
    wanted = torch.autograd.grad((want * scale).sum(), leaves[:3], allow_unused=True)
    for form in ((got * scale).sum(), total):
        for g, w in zip(torch.autograd.grad(form, leaves[:3]), wanted, strict=True):
            assert torch.allclose(g, torch.zeros_like(g) if w is None else w.float(), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    hidden, weight, bias, target = inputs(40, 64, 200, dtype)
    assert torch.allclose(
        linear_cross_entropy(hidden, weight, target, bias=bias).double(),
        by_hand(hidden, weight, bias, target),
        rtol=1e-5,
        atol=1e-5,
    )


def test_a_sum_by_low_products_is_that_of_a_model_that_returns_its_logits(monkeypatch):
    """On a processor with instructions for them. Gradients and loss are as far from float64 as those of the module are."""
    monkeypatch.setattr(cross_entropy, "CHUNK", 16 * 4 * 200)
    monkeypatch.setattr(cross_entropy, "native", lambda: {torch.bfloat16})
    leaves = [t.requires_grad_() if t.is_floating_point() else t for t in inputs(40, 64, 200, torch.bfloat16)]
    hidden, weight, bias, target = leaves
    scale = torch.full((40,), 1 / 40)

    def by_module():
        logits = hidden @ weight.T + bias
        return torch.nn.functional.cross_entropy(logits.float(), target)

    def gradients(loss):
        return [loss.detach().double(), *(g.double() for g in torch.autograd.grad(loss, leaves[:3]))]

    want = gradients((by_hand(*leaves) * scale).sum())
    got = gradients(linear_cross_entropy(hidden, weight, target, bias=bias, scale=scale))
    for g, m, w in zip(got, gradients(by_module()), want, strict=True):
        assert (g - w).abs().max() <= 1.5 * (m - w).abs().max() + 1e-6
    monkeypatch.setattr(cross_entropy, "native", frozenset)
    exact = gradients(linear_cross_entropy(hidden, weight, target, bias=bias, scale=scale))
    assert (exact[0] - want[0]).abs() < 1e-5 < (got[0] - want[0]).abs()


def test_log_probabilities_and_entropy():
    hidden, weight, bias, _ = inputs(9)
    target = torch.arange(9)
    weight[:, 0], hidden[:, 0] = 0.0, 1.0
    bias[4] = -torch.inf  # a word that cannot be
    log_p = ((hidden.double() @ weight.double().T + bias.double()) / 0.7).log_softmax(-1)
    got, entropy = linear_log_probabilities(hidden, weight, target, bias=bias, temperature=0.7)
    assert torch.allclose(got.double(), log_p.gather(1, target[:, None])[:, 0], atol=1e-5)
    assert torch.allclose(entropy.double(), -(log_p.exp() * log_p).nan_to_num(0.0).sum(-1), atol=1e-5)


def test_bad_input():
    hidden, weight, _, target = inputs(4)
    for arguments, words in [
        ((hidden, weight[:, :-1], target), "required \\[rows, width\\]"),
        ((hidden, weight, target[:-1]), "target"),
        ((hidden, weight.bfloat16(), target), "cast one of them"),
        ((hidden, weight, target.int()), "int64"),
    ]:
        with pytest.raises(ValueError, match=words):
            linear_cross_entropy(*arguments)
    with pytest.raises(ValueError, match="label_smoothing"):
        linear_cross_entropy(hidden, weight, target, label_smoothing=1.5)
    with pytest.raises(ValueError, match="takes no gradient"):
        scale = torch.ones(4, requires_grad=True)
        linear_cross_entropy(hidden.requires_grad_(), weight, target, scale=scale).backward()


def test_no_more_logits_than_promised():
    """1,500 rows of 8,000 words: 48 MB of logits. A chunk is 16 MB, and a few tensors of its size are alive at once, however many rows there are."""
    peaks = []
    for rows in (1500, 6000):
        hidden, weight, _, target = inputs(rows, 32, 8000)
        op = fds.kernels.operators()["linear_cross_entropy_sum"]
        with laws.Live((hidden, weight)) as live:  # sees what the reference does; from outside an operator is one call
            op.reference(hidden, weight, None, target, torch.ones(rows), -100, 0.0, 0.0, 0.0, [True, True, False])
        peaks.append(live.peak - 3 * (hidden.nbytes + weight.nbytes))
    assert cross_entropy.CHUNK < peaks[0] < 4 * cross_entropy.CHUNK
    assert peaks[1] < peaks[0] + 2**20


def plain_loss(program, stored, batch):
    """`causal_lm` as it is for a model that does more to its logits."""
    program.memo["ends with its output layer"] = False
    return fds.losses.causal_lm(program, stored, batch)


@pytest.mark.parametrize(
    ("family", "fused"), [("llama", True), ("llama-tied", True), ("gpt2", True), ("gemma2", False)]
)
def test_the_loss_of_a_language_model(family, fused):
    build = zoo.build if family in zoo.FAMILIES else capped
    batch = {"input_ids": torch.arange(24).view(2, 12) % 60}
    values = []
    for loss in (fds.losses.causal_lm, plain_loss):
        program, params = fds.functionalize(build(family))
        values.append(fds.value_and_grad(lambda s, b, p=program, f=loss: f(p, s, b))(program.place(params), batch))
        assert program.memo["ends with its output layer"] == (fused and loss is fds.losses.causal_lm)
    (a, grads), (b, want) = values
    assert torch.allclose(a, b, rtol=1e-6) and laws.distance(fds.tree.named(grads), fds.tree.named(want)) < 1e-5


def capped(_):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8, final_logit_softcapping=5.0)  # fmt: skip
    return Gemma2ForCausalLM(config).eval()


def test_an_adapted_output_layer_is_not_left_out():
    """A wrapper around the output layer has to be called: adapters with dropout live there."""
    program, params = fds.functionalize(zoo.build("llama"))
    adapted = fds.lora(program, rank=2, targets="lm_head", dropout=0.5)
    stored = fds.tree.map(lambda t: torch.full_like(t, 0.1) if 2 in t.shape else t, adapted.place(params))
    batch = {"input_ids": zoo.batch("llama")["input_ids"]}
    _, grads = fds.value_and_grad(lambda s, b: fds.losses.causal_lm(adapted, s, b), wrt=adapted)(stored, batch)
    assert all(bool(g.any()) for k, g in fds.tree.named(grads).items() if "lora" in k)


def test_a_compiled_program_keeps_its_logits():
    program, params = fds.functionalize(zoo.build("llama"))
    compiled, stored = fds.compile(program, backend="aot_eager"), program.place(params)
    batch = {"input_ids": zoo.batch("llama")["input_ids"]}
    for _ in range(2):
        assert torch.allclose(
            fds.losses.causal_lm(compiled, stored, batch), fds.losses.causal_lm(program, stored, batch)
        )
    assert bool(compiled(stored, **batch).logits.any())


def sharded_loss():
    """The gradient of the whole batch, by two ranks."""
    axis = fds.sharding.mesh(dp=-1)["dp"]
    program, params = fds.functionalize(zoo.build("llama-tied"))
    train = fds.chain(fds.shard(axis), fds.checkpoint())(program)
    batch = {"input_ids": zoo.batch("llama")["input_ids"].chunk(axis.size)[axis.rank]}
    _, grads = fds.value_and_grad(lambda s, b: fds.losses.causal_lm(train, s, b))(train.place(params), batch)
    return train.restore(grads)


def test_two_ranks():
    want = sharded_loss()
    for got in ranks.run(2, sharded_loss):
        assert laws.distance(got, want) < 1e-5
