"""Counts of work against counts by hand: forward and backward, by module."""

import pytest
import ranks
import torch
import torch.nn.functional as F
import transformers
import zoo
from torch import nn

import fds
from fds.deepspeed.flops import Cost
from fds.deepspeed.profiler import get_model_profile, profile, timed
from fds.deepspeed.profiles import lines, number


def gradients(program, loss=None):
    loss = loss or (lambda p, *args, **kwargs: zoo.loss_of(program(p, *args, **kwargs)))
    return fds.value_and_grad(loss, wrt=program)


def costs(found, path=""):
    return found.modules[path].costs


def test_a_linear_stack_operation_by_operation():
    program, params = fds.functionalize(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)))
    found = profile(
        gradients(program, lambda p, x: program(p, x).sum()), program.place(params), torch.ones(3, 8), of=program
    )
    # Forward: two products, one comparison for each hidden unit, a sum over 3 x 4 outputs.
    assert costs(found)["forward"] == Cost(3 * (128 + 64), 2 * 3 * (128 + 64) + 3 * 16 + 3 * 4)
    # Backward: both weights; the second layer's input, but not the data; both biases; the ReLU.
    assert costs(found)["backward"] == Cost(3 * (128 + 64 + 64), 2 * 3 * (128 + 64 + 64) + 3 * 16 + 3 * 4 + 3 * 16)
    assert costs(found, "0")["backward"] == Cost(3 * 128, 2 * 3 * 128 + 3 * 16)
    assert costs(found, "2")["backward"] == Cost(2 * 3 * 64, 2 * 2 * 3 * 64 + 3 * 4)
    assert [m.parameters for m in found.modules.values()] == [144 + 68, 144, 0, 68]
    assert not found.uncounted and costs(found)["recompute"] == Cost()


class Attention(nn.Module):
    """Two heads of queries for one of keys and values."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.o = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x):
        b, s, _ = x.shape
        q, kv = self.q(x).view(b, s, 2, 4).transpose(1, 2), self.k(x).view(b, s, 2, 4).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, kv[:, :1].expand(b, 2, s, 4), kv[:, 1:].expand(b, 2, s, 4))
        return self.o(out.transpose(1, 2).reshape(b, s, 8))


def test_attention():
    program, params = fds.functionalize(Attention())
    x = torch.ones(3, 5, 8)
    found = profile(gradients(program, lambda p: program(p, x).sum()), program.place(params), of=program)
    products, scores = 3 * 5 * 64, 3 * 2 * 5 * 5 * 4
    assert costs(found)["forward"].macs == 3 * products + 2 * scores
    # Of three weights, and of the output's input; the data takes none. Attention computes its scores again.
    assert costs(found)["backward"].macs == 4 * products + 5 * scores
    assert costs(found, "q")["backward"].macs == products


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions(groups):
    program, params = fds.functionalize(nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, groups=groups), nn.BatchNorm2d(8)))
    found = profile(
        gradients(program, lambda p, x: program(p, x).square().sum()),
        program.place(params),
        torch.ones(2, 4, 10, 6),
        of=program,
    )
    assert costs(found, "0")["forward"].macs == 2 * 8 * 60 * 9 * 4 // groups == costs(found, "0")["backward"].macs
    assert costs(found, "1")["forward"].flops > 2 * 8 * 60 and not found.uncounted


def llama(**changes):
    return transformers.LlamaConfig(**{**zoo._BASE, **changes})


def by_hand(config, rows, length):
    """MACs of a Llama's forward: of its linear layers, and of attention."""
    h, d = config.hidden_size, config.hidden_size // config.num_attention_heads
    q, kv = config.num_attention_heads * d, config.num_key_value_heads * d
    layer = 2 * h * q + 2 * h * kv + 3 * h * config.intermediate_size
    linear = rows * length * (config.num_hidden_layers * layer + h * config.vocab_size)
    return linear, config.num_hidden_layers * 2 * rows * config.num_attention_heads * length**2 * d


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4, "num_hidden_layers": 3, "intermediate_size": 40}])
def test_a_llama_in_closed_form(changes):
    config = llama(**changes)
    program, params = fds.functionalize(transformers.LlamaForCausalLM(config))
    batch = zoo.batch("llama", rows=2)
    found = profile(gradients(program), program.place(params), of=program, **batch)
    linear, attention = by_hand(config, *batch["input_ids"].shape)
    assert costs(found)["forward"].macs == linear + attention
    assert costs(found)["backward"].macs == 2 * linear + attention * 5 // 2
    assert found.total.parameters == sum(p.numel() for p in params.values() if p.is_floating_point()) - _buffers(params)
    assert not found.uncounted


def _buffers(params):
    return sum(p.numel() for k, p in params.items() if k.endswith("inv_freq"))


@pytest.mark.parametrize("family", ["llama", "opt", "bert", "t5"])
def test_every_linear_layer_has_its_own_work_in_both_passes(family):
    """What torch's FlopCounterMode gets wrong: it gives one projection's backward to another."""
    model, seen = zoo.build(family), {}
    for path, m in model.named_modules():
        if isinstance(m, nn.Linear):
            m.register_forward_hook(lambda m, x, y, path=path: seen.__setitem__(path, x[0].numel() // m.in_features))
    batch = zoo.batch(family)
    model(**batch)
    program, params = fds.functionalize(zoo.build(family))
    found = profile(gradients(program), program.place(params), of=program, **batch)
    assert seen
    for path, rows in seen.items():
        m = model.get_submodule(path)
        macs = rows * m.in_features * m.out_features
        assert costs(found, path)["forward"].macs == macs, path
        assert costs(found, path)["backward"].macs == 2 * macs, path


def test_nothing_is_computed_and_the_same_is_counted_as_if_it_were():
    program, params = fds.functionalize(zoo.build("gpt2"))
    step, batch = gradients(program), zoo.batch("gpt2")
    stored = program.place(params)
    real = profile(step, stored, of=program, abstract=False, **batch)
    meta = fds.tree.map(lambda x: torch.empty_like(x, device="meta").requires_grad_(x.requires_grad), stored)
    found = profile(step, stored, of=program, **batch)
    assert {p: m.costs["forward"] for p, m in found.modules.items()} == {
        p: m.costs["forward"] for p, m in real.modules.items()
    }
    assert found.total.macs == real.total.macs
    abstract = profile(step, meta, of=program, **{k: x.to("meta") for k, x in batch.items()})
    assert abstract.total.costs["forward"].macs == real.total.costs["forward"].macs


def test_recompute_is_forward_again_for_every_module_of_a_block():
    program, params = fds.functionalize(zoo.build("llama"))
    again = fds.checkpoint(program)
    batch = zoo.batch("llama")
    plain = profile(gradients(program), program.place(params), of=program, **batch)
    found = profile(gradients(again), again.place(params), of=again, **batch)
    blocks = [p for p in found.modules if p.startswith("model.layers.")]
    assert len(blocks) > 20
    for path in blocks:
        assert costs(found, path)["recompute"] == costs(plain, path)["forward"] == costs(found, path)["forward"], path
        assert costs(found, path)["backward"] == costs(plain, path)["backward"], path
    assert costs(found, "lm_head")["recompute"] == Cost()


def test_a_fused_loss_counts_what_its_formula_computes():
    program, params = fds.functionalize(zoo.build("llama"))
    ids = zoo.batch("llama")["input_ids"]
    found = profile(
        gradients(program, lambda p, b: fds.losses.causal_lm(program, p, b)), program.place(params), {"input_ids": ids, "labels": ids}, of=program
    )  # fmt: skip
    linear, attention = by_hand(llama(), *ids.shape)
    # Its operator computes the gradients of the output layer along with the loss; the last position of each row predicts nothing.
    head = 32 * zoo.VOCABULARY
    rows = found.operators["fds.linear_cross_entropy_sum"].macs // (3 * head)
    assert rows in (ids.numel(), ids.numel() - len(ids)) and not found.uncounted
    inside = linear - ids.numel() * head
    assert found.total.macs == 3 * inside + attention * 7 // 2 + 3 * rows * head


def _sharded(only):
    axis = fds.sharding.mesh(dp=2)["dp"]
    program, params = fds.functionalize(zoo.build("llama"))
    program = fds.shard(program, axis)
    stored = program.place(params)
    if axis.rank not in only:
        return None
    found = profile(gradients(program), stored, of=program, **zoo.batch("llama"))
    return found.total.macs


def test_a_rank_counts_a_sharded_program_by_itself():
    program, params = fds.functionalize(zoo.build("llama"))
    plain = profile(gradients(program), program.place(params), of=program, **zoo.batch("llama"))
    assert ranks.run(2, _sharded, [0]) == [plain.total.macs, None]


class Reader(nn.Module):
    """Asks a tensor for its value, as experts do."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return self.up(x[: int((x > 0).sum())]) if bool(x.sum() > 0) else x


def test_a_model_that_reads_values_is_counted_by_computing():
    model, x = Reader(), torch.eye(4)
    with pytest.raises(ValueError, match=r"reads a tensor's value.*abstract=False"):
        profile(model, x)
    assert profile(model, x, abstract=False).total.macs == 4 * 16
    assert get_model_profile(model, args=[x], print_profile=False, as_string=False) == (2 * 64 + 16, 64, 16)


def test_inference_mode_counts_the_same():
    model, x = Attention(), torch.ones(3, 5, 8)
    with torch.inference_mode():
        found = profile(model, x, abstract=False)
    assert costs(found) == costs(profile(model, x)) and not found.uncounted


def test_an_operator_without_a_rule_is_reported():
    found = profile(lambda x: torch.linalg.svdvals(x), torch.ones(3, 3), of=nn.Linear(1, 1))
    assert set(found.uncounted) == {"aten._linalg_svd"}
    assert "not counted: aten._linalg_svd x 1" in repr(found)


# --- get_model_profile ---


def test_deepspeeds_function(capsys, tmp_path):
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).train()
    assert get_model_profile(model, (3, 8), as_string=False) == (2 * 576 + 48, 576, 212)
    out = capsys.readouterr().out
    assert "forward latency" in out and "0 Linear: 144, 384 MACs, 66.7%" in out
    assert model.training and not model[0]._forward_hooks  # as it was
    got = get_model_profile(
        model, args=[torch.ones(3, 8)], detailed=False, output_file=tmp_path / "new" / "profile.txt"
    )
    assert got == ("1.2 K", "576 MACs", "212 ")
    assert capsys.readouterr().out == ""
    text = (tmp_path / "new" / "profile.txt").read_text()
    assert "depth 1, MACs: Linear 576 MACs" in text and "0 Linear" not in text


def test_latency_of_every_module_that_ran():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    found = timed(profile(model, torch.ones(2, 8)), model, torch.ones(2, 8))
    inner, whole = [found.modules[p].seconds for p in ("0", "1")], found.total.seconds
    assert all(x > 0 for x in inner) and sum(inner) <= whole and found.modules["0"].calls == 1


def test_a_model_without_memory_is_counted():
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(llama(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_key_value_heads=32, vocab_size=32000, num_hidden_layers=32))  # fmt: skip
    ids = torch.zeros(1, 128, dtype=torch.long, device="meta")
    _, macs, parameters = get_model_profile(model, kwargs={"input_ids": ids}, print_profile=False, as_string=False)
    assert parameters == 6_738_415_616  # Llama 2, 7B
    assert macs == sum(by_hand(model.config, 1, 128))


def test_generation():
    model = zoo.build("llama").eval()
    ids = zoo.batch("llama", rows=1)["input_ids"]
    kwargs = {"input_ids": ids, "max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    options = dict(print_profile=False, as_string=False, warm_up=0)
    _, macs, _ = get_model_profile(model, kwargs=kwargs, mode="generate", **options)
    assert macs > get_model_profile(model, kwargs={"input_ids": ids}, **options)[1]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"model": 3}, "model is int"),
        ({}, "no inputs"),
        ({"input_shape": (2, 4), "args": [1]}, "were given"),
        ({"input_shape": [2, 4]}, "required a tuple"),
        ({"input_shape": (2, 4), "mode": "foward"}, "forward"),
    ],
)
def test_wrong_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        get_model_profile(**{"model": nn.Linear(4, 4), **kwargs})


def test_profile_wants_modules():
    with pytest.raises(ValueError, match="of="):
        profile(lambda x: x, torch.ones(1))


def test_what_is_shown():
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 2))
    found = profile(model, torch.ones(4, 8))
    text = "\n".join(lines(found, module_depth=1, top_modules=2, ignore=[nn.ReLU]))
    assert "depth 1, MACs: Sequential 256 MACs, Linear 64 MACs" in text
    assert "depth 2" not in text
    assert "ReLU" in "\n".join(lines(found)) and "ReLU" not in "\n".join(lines(found, ignore=["ReLU"]))
    assert [number(x) for x in (0, 999, 1e15)] == ["0 ", "999 ", "1 P"]
