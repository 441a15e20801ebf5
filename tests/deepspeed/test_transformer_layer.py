"""The BERT layer against Hugging Face's; what its memory options keep, in bytes; programs, compilers and `torch.func` over it."""

import itertools
import json

import attrs
import pytest
import torch
import transformers as tf
from torch import nn
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.roberta_prelayernorm.modeling_roberta_prelayernorm import RobertaPreLayerNormLayer

import fds
from fds.deepspeed.transformer import DeepSpeedTransformerConfig, DeepSpeedTransformerLayer

B, S, H, WIDE, HEADS = 3, 10, 32, 64, 4
OPTIONS = ("normalize_invertible", "gelu_checkpoint", "attn_dropout_checkpoint", "stochastic_mode")


def hugging_face(pre, *, dropout=0.0, implementation="eager", act="gelu"):
    torch.manual_seed(0)
    sizes = dict(hidden_size=H, num_attention_heads=HEADS, intermediate_size=WIDE, hidden_act=act, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
                 attn_implementation=implementation)  # fmt: skip
    layer = (
        RobertaPreLayerNormLayer(tf.RobertaPreLayerNormConfig(**sizes)) if pre else BertLayer(tf.BertConfig(**sizes))
    )
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return layer.train(dropout > 0)


def rows():
    torch.manual_seed(1)
    mask = torch.zeros(B, 1, 1, S)
    mask[1, ..., 7:] = torch.finfo(torch.float32).min
    return torch.randn(B, S, H), mask


def gradients(layer, hidden, mask):
    """Value, gradient by the input, and by the parameters, under DeepSpeed's names."""
    hidden = hidden.detach().requires_grad_()
    out = layer(hidden, mask)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
    named = dict(layer.named_parameters())
    gx, *grads = torch.autograd.grad((out * weights).sum(), [hidden, *named.values()])
    grads = dict(zip(named, grads, strict=True))
    if not isinstance(layer, DeepSpeedTransformerLayer):
        grads = fds.deepspeed.transformer.from_hugging_face(grads, isinstance(layer, RobertaPreLayerNormLayer))
    return out.detach(), gx, grads


def assert_same(got, want, tol=1e-5):
    for a, b in zip(fds.tree.leaves(got), fds.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and float((a - b).abs().max()) <= tol * max(1.0, float(b.abs().max()))


ALL = [dict(zip(OPTIONS, on, strict=True)) for on in itertools.product([False, True], repeat=4)]


@pytest.mark.parametrize("pre", [False, True])
@pytest.mark.parametrize("act", ["gelu", "gelu_new"])
def test_equal_to_the_hugging_face_layer(pre, act):
    theirs = hugging_face(pre, act=act)
    hidden, mask = rows()
    want = gradients(theirs, hidden, mask)
    for options in ALL:
        ours = DeepSpeedTransformerLayer.from_hugging_face(theirs, **options)
        assert_same(gradients(ours, hidden, mask), want)
        assert_same(ours(hidden, mask == 0), want[0])


class Stack(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, hidden, mask):
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return hidden


@pytest.mark.parametrize("pre", [False, True])
def test_in_a_program_the_masks_are_the_hugging_face_layers_and_recompute_draws_them_again(pre):
    theirs = hugging_face(pre, dropout=0.3)
    hidden, mask = rows()

    def value_and_grad(layer, *transforms):
        program, params = fds.functionalize(Stack(layer))
        program = fds.chain(*transforms)(program)
        f = fds.with_seed(fds.value_and_grad(lambda p, x: program(p, x, mask).square().mean(), wrt=program))
        value, grads = f(torch.tensor(5), program.place(params), hidden)
        grads = program.restore(grads)
        names = {k.removeprefix("layers.0."): v for k, v in grads.items()}
        return value, names if isinstance(layer, DeepSpeedTransformerLayer) else fds.deepspeed.transformer.from_hugging_face(names, pre)  # fmt: skip

    want = value_and_grad(theirs)
    assert_same(value_and_grad(DeepSpeedTransformerLayer.from_hugging_face(theirs)), want)
    plain = value_and_grad(DeepSpeedTransformerLayer.from_hugging_face(theirs))
    for options in ALL:
        ours = DeepSpeedTransformerLayer.from_hugging_face(theirs, **options)
        assert_same(value_and_grad(ours), want)
        got = value_and_grad(ours, fds.checkpoint())
        assert_same(got, want)
        if not options["normalize_invertible"]:
            assert_same(got, plain, 1e-6)
    other = value_and_grad(DeepSpeedTransformerLayer.from_hugging_face(theirs, seed=3))
    assert not torch.allclose(other[0], want[0])


def kept(layer, hidden, mask):
    """Bytes of what autograd saves in a call, each storage once, parameters and the mask aside; and the backward's gradients."""
    aside = {t.untyped_storage().data_ptr() for t in [*layer.parameters(), mask]}
    found = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in aside:
            found[storage.data_ptr()] = (storage.nbytes(), t)  # held, so that no address is used twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(hidden.detach().requires_grad_(), mask)
    return sum(n for n, _ in found.values())


@pytest.mark.parametrize("pre", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_what_is_kept_is_what_is_claimed(pre, dropout):
    theirs = hugging_face(pre, dropout=dropout)
    hidden, mask = rows()
    size, scores = B * S * H, B * HEADS * S * S
    for options in ALL:
        ours = DeepSpeedTransformerLayer.from_hugging_face(theirs, **options)
        claimed = ours.config.kept_bytes(B, S, training=ours.training)
        assert kept(ours, hidden, mask) == sum(claimed.values()), (options, claimed)
    base = sum(DeepSpeedTransformerLayer.from_hugging_face(theirs).config.kept_bytes(B, S).values())
    saved = {}
    for name in OPTIONS:
        config = DeepSpeedTransformerLayer.from_hugging_face(theirs, **{name: True}).config
        saved[name] = base - sum(config.kept_bytes(B, S).values())
    norms = 2 if pre else 1
    assert saved == {
        "normalize_invertible": norms * 4 * (size + B * S),
        "gelu_checkpoint": 4 * B * S * WIDE,
        "attn_dropout_checkpoint": 4 * scores * (dropout > 0),
        "stochastic_mode": (scores + 2 * size - 4 * 8) * (dropout > 0),
    }


@pytest.mark.parametrize("pre", [False, True])
def test_options_change_no_value_of_a_plain_module(pre):
    """Outside of a program the masks come from torch's generator, the same with every option."""
    theirs = hugging_face(pre, dropout=0.3)
    hidden, mask = rows()
    results = []
    for options in ALL:
        ours = DeepSpeedTransformerLayer.from_hugging_face(theirs, **options)
        torch.manual_seed(3)
        results.append((options, gradients(ours, hidden, mask)))
    for options, got in results:
        assert_same(got, results[0][1], 1e-5 if options["normalize_invertible"] else 0.0)
    torch.manual_seed(4)
    assert not torch.equal(gradients(ours, hidden, mask)[0], results[0][1][0])
    assert torch.equal(ours.eval()(hidden, mask), ours(hidden, mask))


def test_under_torch_func():
    """grad, vmap(grad), jvp and grad of grad with everything recomputed, against the same with nothing."""
    theirs = hugging_face(False)
    hidden, _ = rows()
    results = []
    for options in ({}, dict.fromkeys(OPTIONS, True)):
        layer = DeepSpeedTransformerLayer.from_hugging_face(theirs, attn_dropout_ratio=0.2, hidden_dropout_ratio=0.2, training=True, **options)  # fmt: skip
        program, params = fds.functionalize(layer)
        stored = program.place(params)

        def f(p, x, program=program):
            return fds.with_seed(program)(torch.tensor(2), p, x[None]).square().mean()

        def norm(p, x, f=f):
            return sum(g.square().sum() for g in fds.tree.leaves(torch.func.grad(f)(p, x)))

        tangent = fds.tree.map(torch.ones_like, stored)
        results.append(
            (
                torch.func.grad(f)(stored, hidden[0]),
                torch.func.vmap(torch.func.grad(f), (None, 0))(stored, hidden),
                torch.func.jvp(lambda p, f=f: f(p, hidden[0]), (stored,), (tangent,)),
                torch.func.grad(norm)(stored, hidden[0]),
            )
        )
    assert_same(results[1], results[0], 2e-5)


@pytest.mark.parametrize("pre", [False, True])
def test_compiled_step(pre):
    """One graph of forward, backward and update follows the eager step, dropout and all options on."""
    theirs = hugging_face(pre, dropout=0.1)
    layers = [DeepSpeedTransformerLayer.from_hugging_face(theirs, **dict.fromkeys(OPTIONS, True)) for _ in range(2)]
    program, params = fds.functionalize(Stack(*layers))
    hidden, _ = rows()

    def loss(program, stored, batch):
        return program(stored, batch["x"], None).square().mean()

    step = fds.train_step(fds.checkpoint(program) if pre else program, fds.optim.sgd(0.1), loss=loss)
    eager, compiled = step.init(params), step.init(params)
    fast = fds.compile(step, backend="aot_eager")
    for _ in range(2):
        eager, a = step(eager, {"x": hidden})
        compiled, b = fast(compiled, {"x": hidden})
        assert float(b["loss"]) == pytest.approx(float(a["loss"]), rel=1e-5)
        assert float(b["grad_norm"]) == pytest.approx(float(a["grad_norm"]), rel=1e-4)


def test_in_the_place_of_the_layers_of_a_model():
    torch.manual_seed(0)
    config = tf.BertConfig(vocab_size=50, hidden_size=H, num_hidden_layers=2, num_attention_heads=HEADS, intermediate_size=WIDE, max_position_embeddings=16)  # fmt: skip
    model = tf.BertModel(config).eval()
    batch = {"input_ids": torch.arange(12).view(2, 6), "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])}
    want = model(**batch).last_hidden_state
    for i, layer in enumerate(model.encoder.layer):
        model.encoder.layer[i] = DeepSpeedTransformerLayer.from_hugging_face(layer, gelu_checkpoint=True)
    got = model(**batch).last_hidden_state
    assert_same(got[0], want[0])
    assert_same(got[1, :4], want[1, :4])


def base(**changes):
    return DeepSpeedTransformerConfig(**{"hidden_size": H, "heads": HEADS, "attn_dropout_ratio": 0.0, "hidden_dropout_ratio": 0.0, "num_hidden_layers": 8, "initializer_range": 0.02, **changes})  # fmt: skip


def test_configuration(tmp_path):
    fields = {f.name: f.default for f in attrs.fields(DeepSpeedTransformerConfig)}
    assert list(fields)[:8] == ["batch_size", "hidden_size", "intermediate_size", "heads", "attn_dropout_ratio", "hidden_dropout_ratio", "num_hidden_layers", "initializer_range"]  # fmt: skip
    assert (
        fields["pre_layer_norm"] is True and fields["adjust_init_range"] is True and fields["layer_norm_eps"] == 1e-12
    )
    path = tmp_path / "layer.json"
    for encoding in ("utf-8", "utf-16"):
        path.write_text(json.dumps({"hidden_size": H, "heads": 4}), encoding=encoding)
        assert DeepSpeedTransformerConfig.from_json_file(path) == DeepSpeedTransformerConfig(hidden_size=H, heads=4)
    layer = DeepSpeedTransformerLayer(base(intermediate_size=256, training=False))
    assert not layer.training and layer.inter_w.shape == (256, H)
    deviations = {k: float(p.std()) for k, p in layer.named_parameters() if p.dim() > 1}
    for name, want in {"attn_qkvw": 0.02, "inter_w": 0.02, "attn_ow": 0.005, "output_w": 0.005}.items():
        assert deviations[name] == pytest.approx(want, rel=0.1)
    x = torch.randn(1, 4, H)
    assert DeepSpeedTransformerLayer(base(return_tuple=True))(x)[0].shape == x.shape
    half = DeepSpeedTransformerLayer(base(fp16=True))
    assert half(x).dtype == torch.float32 and torch.equal(half(x), half(x).half().float())
    weights, biases = [torch.randn(H, H) for _ in range(4)], [torch.randn(H) for _ in range(4)]
    weights += [torch.ones(H), torch.randn(4 * H, H), torch.randn(H, 4 * H), torch.ones(H)]
    biases += [torch.zeros(H), None, torch.zeros(H), torch.zeros(H)]
    given = DeepSpeedTransformerLayer(base(), weights, biases)
    assert torch.equal(given.attn_qkvw, torch.cat(weights[:3])) and torch.equal(given.attn_qkvb, torch.cat(biases[:3]))
    assert torch.equal(given.output_w, weights[6]) and not given.inter_b.any()


def test_built_on_meta():
    with torch.device("meta"):
        layer = DeepSpeedTransformerLayer(base())
    program, _ = fds.functionalize(layer)
    stored = program.place(fds.init_params(program))
    assert float(stored[""]["attn_ow"].std()) == pytest.approx(0.005, rel=0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DeepSpeedTransformerLayer(base(heads=5)), "heads=5, required a number that divides hidden_size=32"),
        (lambda: DeepSpeedTransformerLayer(base(attn_dropout_ratio=-1)), "attn_dropout_ratio=-1, required"),
        (lambda: DeepSpeedTransformerLayer(base(hidden_size=-1)), "hidden_size=-1, required"),
        (lambda: DeepSpeedTransformerLayer(base(gelu_approximate="erf")), "gelu_approximate='erf', required"),
        (lambda: DeepSpeedTransformerLayer(base(initializer_range=-1)), "initializer_range=-1, required to draw"),
        (lambda: DeepSpeedTransformerLayer(base(num_hidden_layers=-1)), "num_hidden_layers=-1, .*adjust_init_range"),
        (lambda: DeepSpeedTransformerLayer(base(), [torch.ones(1)] * 8), "initial .*'biases': None.*required 8 of each"),
        (lambda: DeepSpeedTransformerLayer(base(), [torch.ones(1)] * 8, [None] * 8), "attn_qkvw: initial_weights gives"),
        (lambda: DeepSpeedTransformerLayer(base())(torch.ones(1, 2, H), head_mask=torch.ones(1)), "head_mask is not there"),
        (lambda: DeepSpeedTransformerLayer(base())(torch.ones(1, 2, H), past_key_values=()), "past_key_values is not there"),
        (lambda: DeepSpeedTransformerConfig.from_dict({"hiden_size": 2}), "'hiden_size' is no field; did you mean 'hidden_size'"),
        (lambda: DeepSpeedTransformerLayer.from_hugging_face(nn.Linear(2, 2)), "Linear is no BertLayer"),
        (lambda: DeepSpeedTransformerLayer.from_hugging_face(hugging_face(False, act="relu")), "activation ReLU.*required GELU"),
        (lambda: DeepSpeedTransformerLayer(base()).load_hugging_face(hugging_face(False)), "no 'intermediate.LayerNorm.weight'.*pre_layer_norm=True"),
        (lambda: DeepSpeedTransformerLayer(base(pre_layer_norm=False)).load_hugging_face(hugging_face(False)), "inter_w: the Hugging Face layer gives"),
    ],
)  # fmt: skip
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_dropout_under_checkpoint_needs_a_seed():
    layer = DeepSpeedTransformerLayer(base(attn_dropout_ratio=0.1))
    program, params = fds.functionalize(Stack(layer))
    program = fds.checkpoint(program)
    with pytest.raises(ValueError, match="needs an explicit seed"):
        fds.value_and_grad(lambda p: program(p, torch.ones(1, 2, H), None).sum(), wrt=program)(program.place(params))
