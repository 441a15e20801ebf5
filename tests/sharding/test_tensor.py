"""Tensor parallelism by itself: uneven sizes, traffic, plans, what it composes with. Its laws over the families are in `test_laws.py`."""

import laws
import pytest
import ranks
import torch
import torch.distributed as dist
import transformers as tf
import zoo

import fds
from fds.sharding import collectives, plan_of
from fds.sharding.cuts import Heads

EPS = torch.finfo(torch.float32).eps


def axis():
    return fds.sharding.mesh(tp=-1)["tp"]


def llama(**changes):
    torch.manual_seed(0)
    base = {**zoo._BASE, **changes}
    return tf.LlamaForCausalLM(tf.LlamaConfig(**base))


def follows_one_process(model, transform, loss, rows, *, tolerance=64 * EPS):
    """Value and gradients of the transformed program against those of the same model on one process."""
    base, params = fds.functionalize(model)
    program = transform(base)
    stored = program.place(params)
    back = program.restore(stored)
    assert all(torch.equal(back[k], v) for k, v in params.items())
    run = fds.value_and_grad(lambda s, b: loss(program, s, b))
    value, grads = run(stored, rows)
    want, plain = fds.value_and_grad(lambda s, b: loss(base, s, b))(base.place(params), rows)
    assert abs(float(value - want)) < tolerance
    assert laws.distance(program.restore(grads), base.restore(plain)) < tolerance
    return program


# --- values and gradients ---


def causal(family, sequence):
    follows_one_process(zoo.build(family), fds.tensor_parallel(axis(), sequence=sequence), fds.losses.causal_lm, zoo.batch(family))  # fmt: skip


@pytest.mark.parametrize("family", ["llama-tied", "qwen3", "gemma3", "gpt2", "opt", "bloom", "falcon"])
def test_sequence_parallel(family):
    ranks.run(2, causal, family, True)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_loss_over_split_words(family):
    for n in (2, 4):
        ranks.run(n, causal, family, False)


def uneven(changes, sequence):
    rows = zoo.batch("llama", rows=2)
    program = follows_one_process(llama(**changes), fds.tensor_parallel(axis(), sequence=sequence), fds.losses.causal_lm, rows)  # fmt: skip
    return {k: tuple(v.shape) for k, v in program.sites["model.layers.0"].spec.items()}


def test_uneven_heads_and_features():
    six = dict(
        hidden_size=48, num_attention_heads=6, head_dim=8, intermediate_size=33, attention_bias=True, mlp_bias=True
    )
    shapes = ranks.run(2, uneven, {**six, "num_key_value_heads": 3}, True)
    assert [s["model.layers.0.self_attn.q_proj.weight"] for s in shapes] == [(32, 48), (16, 48)]
    assert [s["model.layers.0.self_attn.k_proj.weight"] for s in shapes] == [(16, 48), (8, 48)]
    assert [s["model.layers.0.mlp.down_proj.weight"] for s in shapes] == [(48, 17), (48, 16)]
    # Six heads over four ranks with two key-value heads: two query heads of the second rank look at one key-value head each.
    shapes = ranks.run(4, uneven, {**six, "num_key_value_heads": 2}, False)
    assert [s["model.layers.0.self_attn.q_proj.weight"][0] for s in shapes] == [16, 16, 8, 8]
    assert all(s["model.layers.0.self_attn.k_proj.weight"] == (16, 48) for s in shapes)


def test_heads_of_each_rank():
    def error(text):
        return ValueError(text)

    assert Heads.of(8, 4, 2, error).keys == ((0, 1), (2, 3))
    assert Heads.of(6, 2, 4, error).keys == ((0,), (0, 1), (1,), (1,))
    assert Heads.of(6, 2, 4, error).queries == ((0, 2), (2, 2), (4, 1), (5, 1))
    assert Heads.of(12, 4, 3, error).keys == ((0, 1), (2,), (3,))  # uneven, by whole groups
    assert Heads.of(9, 3, 2, error).queries == ((0, 6), (6, 3))
    assert Heads.of(10, 2, 3, error).keys == (
        (0,),
        (0, 1, 1),
        (1,),
    )  # 4 + 3 + 3 queries: the second has 1 of one, 2 of the other
    with pytest.raises(ValueError, match="4 attention heads over 8 ranks; sizes that work: 1 to 4"):
        Heads.of(4, 2, 8, error)


# --- training ---


def ten_steps(sequence, how):
    """With shards over two ranks where there are four, so that norms run over split and whole leaves in flat buffers."""
    mesh = fds.sharding.mesh(dp=-1, tp=2) if dist.is_initialized() else fds.sharding.mesh(dp=1, tp=1)
    program, params = fds.functionalize(zoo.build("qwen3"))
    program = fds.chain(fds.tensor_parallel(mesh["tp"], sequence=sequence), fds.shard(mesh["dp"]), fds.checkpoint())(
        program
    )
    rows = {k: v.chunk(mesh["dp"].size)[mesh["dp"].rank] for k, v in zoo.batch("qwen3").items()}
    tx = fds.optim.chain(fds.optim.clip_by_global_norm(0.5), fds.optim.adamw(1e-2, weight_decay=0.1))
    step = fds.train_step(program, tx)
    run, state, history = fds.compile(step) if how == "compiled" else step, step.init(params), []
    for _ in range(10):
        state, metrics = run(state, rows)
        history.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return history, {k: v.clone() for k, v in program.restore(state.params).items()}


def test_ten_steps_follow_one_process():
    losses, params = ten_steps(False, "eager")
    for n, sequence, how in ((4, False, "eager"), (4, True, "eager"), (2, True, "compiled")):
        for got in ranks.run(n, ten_steps, sequence, how):
            for (loss, norm), (want, want_norm) in zip(got[0], losses, strict=True):
                assert loss == pytest.approx(want, rel=1e-5) and norm == pytest.approx(want_norm, rel=1e-4)
            assert laws.distance(got[1], params) < 1e-2


def broken():
    """A weight that is not finite on one rank only has all ranks leave the step out."""
    program, params = fds.functionalize(zoo.build("llama"))
    step = fds.train_step(fds.tensor_parallel(axis())(program), fds.optim.sgd(0.1))
    state = step.init(params)
    with torch.no_grad():
        if axis().rank == 1:
            state.params["model.layers.0"]["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    new, metrics = step(state, zoo.batch("llama"))
    same = all(torch.equal(a, b, ) or a.isnan().any() for a, b in zip(fds.tree.leaves(new.params), fds.tree.leaves(state.params), strict=True))  # fmt: skip
    return bool(metrics["was_skipped"]), same


def test_nonfinite_on_one_rank_is_seen_by_all():
    assert ranks.run(2, broken) == [(True, True)] * 2


# --- traffic ---


def bytes_of_a_step(sequence):
    rows = zoo.batch("llama-tied")
    program, params = fds.functionalize(zoo.build("llama-tied"))
    program = fds.tensor_parallel(axis(), sequence=sequence)(program)
    stored = program.place(params)
    with fds.sharding.record() as wire:
        fds.value_and_grad(lambda s, b: fds.losses.causal_lm(program, s, b))(stored, rows)
    return wire.bytes


def test_traffic():
    """Per block two sums of activations forward and two backward; the embedding's, the output layer's; two numbers per token and rank."""
    n, blocks, activation = 2, 2, 4 * 12 * 32 * 4
    loss = n * 2 * (4 * 11) * 4
    assert ranks.run(n, bytes_of_a_step, False)[0] == {"total": (4 * blocks + 2) * activation, "gather": loss}
    # A sum becomes a reduce-scatter and an all-gather; the gradients of the norms are summed; the sequence is joined behind the last
    # block, and its gradient at the first.
    whole = {"total": 2 * activation + blocks * 2 * 32 * 4, "scatter": 4 * blocks * activation}
    whole["gather"] = (4 * blocks + 2) * activation + loss
    assert ranks.run(n, bytes_of_a_step, True)[0] == whole


def stored_bytes():
    program, params = fds.functionalize(zoo.build("llama-tied"))
    return fds.tree.nbytes(fds.tensor_parallel(axis())(program).place(params)), fds.tree.nbytes(params)


def test_every_rank_stores_its_part():
    norms = 4 * (
        5 * 32 + 4 + 97 * 32 % 64
    )  # whole on every rank: five norms, rotary frequencies; one word more on the first
    for mine, whole in ranks.run(2, stored_bytes):
        assert mine <= whole // 2 + norms


# --- with others ---


def composed(name):
    tp = axis()
    t = {
        "checkpoint inside": lambda: fds.chain(fds.checkpoint(), fds.tensor_parallel(tp)),
        "matmul": lambda: fds.chain(fds.tensor_parallel(tp), fds.checkpoint("matmul")),
        "store": lambda: fds.chain(fds.tensor_parallel(tp), fds.offload(fds.HostStore()), fds.checkpoint()),
        "by pattern": lambda: fds.tensor_parallel(tp, {"*.[qkv]_proj": "column", "*.o_proj": "row", "*.gate_proj": "column", "*.up_proj": "column", "*.down_proj": "row"}),
        "head by features": lambda: fds.tensor_parallel(tp, {"lm_head": "row_split", "*.embed_tokens": "embedding_column"}),
        "cast": lambda: fds.chain(fds.tensor_parallel(tp), fds.cast("bfloat16"), fds.checkpoint()),
        "Conv1D by itself": lambda: fds.tensor_parallel(tp, {"*.c_fc": "column_gather", "*.mlp.c_proj": "row_split"}),
    }[name]()  # fmt: skip
    tolerance = 8 * torch.finfo(torch.bfloat16).eps if name == "cast" else 64 * EPS
    family = "gpt2" if name.startswith("Conv1D") else "llama"
    follows_one_process(zoo.build(family), t, fds.losses.causal_lm, zoo.batch(family), tolerance=tolerance)


@pytest.mark.parametrize(
    "name", ["cast", "checkpoint inside", "matmul", "store", "by pattern", "head by features", "Conv1D by itself"]
)
def test_composed(name):
    ranks.run(2, composed, name)


def adapted(family, dropout):
    """Gradients of A and B against one process; B is not zero, which would hide A's."""
    base, params = fds.functionalize(zoo.build(family).train(dropout > 0))
    targets = {"llama": ["*.[qk]_proj", "*.o_proj"], "gpt2": ["*.c_attn", "*.c_proj"]}[family]
    adapters = fds.lora(rank=2, alpha=6, targets=targets, dropout=dropout)
    plain = adapters(base)
    inner = plain.place(params)
    for part in inner.values():
        for k in part:
            if "lora_B" in k:
                part[k] = torch.randn(part[k].shape, generator=torch.Generator().manual_seed(3)) * 0.1
    program = fds.tensor_parallel(axis())(plain)
    stored = {s: p.push(inner[s]) for s, p in program.sites.items()}
    seed = torch.tensor(3)

    def differentiate(program, stored):
        f = fds.with_seed(lambda s, b: fds.losses.causal_lm(program, s, b))
        return fds.value_and_grad(lambda s, b: f(seed, s, b), wrt=program)(stored, zoo.batch(family))

    value, grads = differentiate(program, stored)
    want_value, want = differentiate(plain, inner)
    _, back = program.before("lora", grads)
    pick = lambda t: {k: v for part in t.values() for k, v in part.items() if "lora_" in k}  # noqa: E731
    return (
        abs(float(value - want_value)),
        laws.distance(pick(back), pick(want)),
        float(min(v.norm() for v in pick(want).values())),
    )


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapters(family, n):
    for value, error, least in ranks.run(n, adapted, family, 0.0):
        assert value < 64 * EPS and error < 64 * EPS and least > 0


def dropped(training):
    """Dropout: whole activations are dropped alike on all ranks, split ones differently; recompute draws the same."""
    out = []
    for t in (
        fds.chain(fds.tensor_parallel(axis()), fds.checkpoint()),
        fds.chain(fds.checkpoint(), fds.tensor_parallel(axis())),
        fds.tensor_parallel(axis()),
    ):
        program, params = fds.functionalize(zoo.build("gpt2", training=training))
        program = t(program)
        f = fds.with_seed(lambda s, b, program=program: fds.losses.causal_lm(program, s, b))
        value, grads = fds.value_and_grad(lambda s, b, f=f: f(torch.tensor(3), s, b))(
            program.place(params), zoo.batch("gpt2")
        )
        out.append((float(value), program.restore(grads)))
    return out


def test_dropout():
    first, second = ranks.run(2, dropped, True)
    assert first[0][0] != ranks.run(2, dropped, False)[0][0][0]
    for mine, others in zip(first, second, strict=True):
        assert mine[0] == others[0] == first[0][0]
        assert all(torch.equal(mine[1][k], others[1][k]) for k in mine[1])
        assert laws.distance(mine[1], first[2][1]) < 64 * EPS


class Ones(torch.nn.Module):
    """One block, whose hidden units are 1 before a dropout; its outputs are the hidden units."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 8, bias=False))])  # fmt: skip
        for x, value in zip(self.parameters(), (torch.zeros(8, 3), torch.ones(8), torch.eye(8)), strict=True):
            x.data.copy_(value)

    def forward(self, x):
        return self.blocks[0](x)


def hidden_units():
    program, params = fds.functionalize(Ones().train(), sites="blocks.*")
    program = fds.tensor_parallel(axis(), {"blocks.*.0": "column", "blocks.*.2": "row"})(program)
    return fds.with_seed(program)(torch.tensor(3), program.place(params), torch.zeros(64, 3))


def test_ranks_drop_different_units():
    first, second = ranks.run(2, hidden_units)
    assert torch.equal(first, second) and set(first.unique().tolist()) == {0.0, 2.0}
    same = float((first[:, :4] == first[:, 4:]).float().mean())  # of the first rank's units and the second one's
    assert 0.3 < same < 0.7


# --- generation ---


def tokens(family):
    program, params = fds.functionalize(zoo.build(family))
    program = fds.tensor_parallel(axis())(program)
    return fds.generate(program, program.place(params), zoo.batch(family)["input_ids"][:, :5], max_new_tokens=6, compile=False)  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_generation_gives_the_tokens_of_one_process(family):
    want = tokens(family)
    for n in (2, 4):
        assert all(torch.equal(got, want) for got in ranks.run(n, tokens, family))


# --- plans ---


@pytest.mark.parametrize("family", ["gpt2", "opt", "bloom", "falcon", "bert", "t5"])
def test_rules_name_every_layer_of_a_block(family):
    model = zoo.build(family)
    plan = plan_of(model)
    blocks = fds.functionalize(model)[0].core.sites
    linear = {
        n
        for n, m in model.named_modules()
        if (isinstance(m, torch.nn.Linear) or type(m).__name__ == "Conv1D")
        and n.startswith(tuple(b + "." for b in blocks))
    }
    assert linear and linear <= plan.styles.keys()
    assert "by the names" in str(plan)


def test_the_models_own_plan_comes_first():
    plan = plan_of(zoo.build("mixtral"))
    assert (
        plan.source == "the model's own" and plan.styles["model.layers.1.mlp.experts.gate_up_proj"] == "packed_column"
    )
    assert plan.styles["model.embed_tokens"] == "embedding"


def refused(match, transform, model=None):
    with pytest.raises(ValueError, match=match):
        transform(fds.functionalize(model or zoo.build("llama"))[0])


def test_errors_name_the_fix():
    one = fds.sharding.Axis("tp", 1, 0)
    many = fds.sharding.Axis("tp", 64, 0)
    dp = fds.sharding.Axis("dp", 1, 0)
    refused(
        r"style 'colum' of '\*.q_proj' is unknown; did you mean 'column'",
        fds.tensor_parallel(one, {"*.q_proj": "colum"}),
    )
    refused(r"'\*.q_porj' matches no leaf; did you mean '\*.q_proj'", fds.tensor_parallel(one, {"*.q_porj": "column"}))
    refused(r"ConvNet has no plan of its own.*plan=\{'\*.up_proj'", fds.tensor_parallel(one), zoo.ConvNet())
    refused(
        r"layers.0.self_attn.q_proj: 4 attention heads over 64 ranks; sizes that work: 1 to 4",
        fds.tensor_parallel(many),
    )
    refused(
        r"mlp.up_proj: 64 features over 65 ranks",
        fds.tensor_parallel(fds.sharding.Axis("tp", 65, 0), {"*.up_proj": "column"}),
    )
    refused(r"q_norm: the plan splits.*this Qwen3RMSNorm; add 'model.layers.0.self_attn.q_norm': 'partial'",
            fds.tensor_parallel(one, {"*.[qkv]_proj": "column", "*.o_proj": "row"}), zoo.build("qwen3"))  # fmt: skip
    refused(
        r"the order that works: chain\(tensor_parallel.*, shard", fds.chain(fds.shard(dp), fds.tensor_parallel(one))
    )
    refused(r"order that works: chain\(lora.*tensor_parallel", fds.chain(fds.tensor_parallel(one), fds.lora(rank=1, targets="*.q_proj")))  # fmt: skip
    refused(r"use two axes of a mesh", fds.chain(fds.tensor_parallel(dp), fds.shard(dp)))
    refused(r"use two axes of a mesh", fds.chain(fds.replicate(dp), fds.tensor_parallel(dp)))
    refused(r"takes one tensor_parallel", fds.chain(fds.tensor_parallel(one), fds.tensor_parallel(dp)))
    refused(
        r"names its weights itself; write the pattern into its plan",
        lambda p: fds.at("*.q_proj", fds.tensor_parallel(one))(p),
    )
    refused(r"embed_tokens.weight: two layers share this weight", fds.tensor_parallel(many, {"lm_head": "row_split", "*.embed_tokens": "embedding"}), llama(tie_word_embeddings=True, hidden_size=128, vocab_size=128))  # fmt: skip
    refused(
        r"q_proj.weight: 'column' of a parameter by itself is for experts; name the layer, 'model.layers.0.self_attn.q_proj'",
        fds.tensor_parallel(one, {"*.q_proj.weight": "column"}),
    )
    refused(
        r"lm_head: 'embedding' is for an nn.Embedding, not a Linear", fds.tensor_parallel(one, {"lm_head": "embedding"})
    )
    refused(
        r"style 'experts' does not work on a part of the sequence",
        fds.tensor_parallel(one, sequence=True),
        zoo.build("mixtral"),
    )
    refused(r"not one stack", fds.tensor_parallel(one, sequence=True), zoo.build("bert"))
    model = zoo.build("llama")
    model._tp_plan = {"lm_head": "diagonal"}
    refused(r"style 'diagonal' of 'lm_head' in the plan of LlamaForCausalLM is not supported; supported: colwise", fds.tensor_parallel(one), model)  # fmt: skip


def test_plans_that_leave_something_split():
    one = fds.sharding.Axis("tp", 1, 0)

    def plan(**styles):
        return fds.tensor_parallel(one, {f"*.{k}": v for k, v in styles.items()})

    refused(r"lm_head: its output stays split.* 'row' layer outside of the model's blocks; .*'column_gather'", fds.tensor_parallel(one, {"lm_head": "column"}))  # fmt: skip
    refused(r"layers.0.fc1: its output stays split.* 'row' layer of model.decoder.layers.0", plan(fc1="column"), zoo.build("opt"))  # fmt: skip
    refused(r"self_attn.o_proj: its input is whole.* 'column' layer of model.layers.0; .*'row_split'", plan(o_proj="row"))  # fmt: skip
    refused(r"the plan names no layer", fds.tensor_parallel(one, {}))
    refused(r"plan=\['a'\], required styles by pattern", lambda p: fds.tensor_parallel(one, ["a"])(p))
    refused(r"sequence='yes', required True or False", lambda p: fds.tensor_parallel(one, sequence="yes")(p))


def split_input(styles):
    """A call by a plan that is whole for each block, but not for each layer."""
    program, params = fds.functionalize(zoo.build("llama"))
    program = fds.tensor_parallel(axis(), {f"*.{k}": v for k, v in styles.items()})(program)
    with pytest.raises(ValueError) as caught:
        program(program.place(params), zoo.batch("llama")["input_ids"])
    return str(caught.value)


@pytest.mark.parametrize(("styles", "words"), [
    ({"[qkv]_proj": "column", "o_proj": "replicate", "down_proj": "row_split"}, "self_attn.o_proj: its input has 16 features, required 32 (the plan over 2 ranks); what comes before is split"),
    ({"[qkv]_proj": "column", "o_proj": "row", "down_proj": "row"}, "mlp.down_proj: its input has 64 features, required 32 (the plan over 2 ranks); split what comes before by 'column'"),
    ({"[qkv]_proj": "column", "o_proj": "column", "down_proj": "row_split"}, "self_attn.o_proj: its input has 16 features, required 32 (the plan over 2 ranks); what comes before is split already"),
])  # fmt: skip
def test_a_layer_whose_input_does_not_fit_is_named(styles, words):
    for said in ranks.run(2, split_input, styles):
        assert f"tensor_parallel: model.layers.0.{words}" in said


def unknown_word():
    program, params = fds.functionalize(zoo.build("llama"))
    program = fds.tensor_parallel(axis())(program)
    for word in (-1, zoo.VOCABULARY):
        with pytest.raises(IndexError):
            program(program.place(params), torch.tensor([[5, word]]))


def test_a_word_of_no_rank_fails_on_all():
    ranks.run(2, unknown_word)


def odd_sequence():
    program, params = fds.functionalize(zoo.build("llama"))
    program = fds.tensor_parallel(axis(), sequence=True)(program)
    with pytest.raises(ValueError, match="a sequence of 11 does not divide by 2 ranks; pad it, or use sequence=False"):
        program(program.place(params), zoo.batch("llama")["input_ids"][:, :11])
    with pytest.raises(ValueError, match="output_hidden_states would give parts"):
        program(program.place(params), zoo.batch("llama")["input_ids"], output_hidden_states=True)


def test_a_sequence_that_does_not_divide():
    ranks.run(2, odd_sequence)


# --- the collectives of one loss ---

M = 3


def both():
    return torch.stack([torch.linspace(-1, 2, M), torch.linspace(3, -2, M)])


def one_loss():
    """What all ranks compute together against the same without ranks: values, gradients, tangents, second derivatives, batches."""
    a = axis()
    x, w = torch.linspace(1, 2, M), both()

    def together(x):
        return collectives.fan_in(w[a.rank] * collectives.fan_out(x, a).pow(2), a).pow(2).sum()

    def alone(x):
        return (w.sum(0) * x.pow(2)).pow(2).sum()

    def parts(x):  # split, work on a part, join
        y = collectives.split(torch.cat([x, 2 * x]), a, dim=0, sizes=[2, 2 * M - 2])
        y = collectives.join(y.pow(3), a, dim=0, sizes=[2, 2 * M - 2])
        return (torch.cat([w[0], w[1]]) * y.pow(2)).sum()

    def parts_alone(x):
        return (torch.cat([w[0], w[1]]) * torch.cat([x, 2 * x]).pow(6)).sum()

    def rows(x):  # gather before and scatter behind, along a dimension
        y = collectives.split(torch.stack([x, 2 * x])[None], a, dim=1)
        y = collectives.gather_along(y, a, 1).pow(2) * w[a.rank]
        return collectives.join(collectives.scatter_along(y, a, 1), a, dim=1).pow(2).sum()

    def rows_alone(x):
        return (torch.stack([x, 2 * x]).pow(2) * w.sum(0)).pow(2).sum()

    for f, g in ((together, alone), (parts, parts_alone), (rows, rows_alone)):
        close = torch.testing.assert_close
        leaf = x.clone().requires_grad_()
        close(torch.autograd.grad(f(leaf), leaf)[0], torch.func.grad(g)(x))
        close(torch.func.grad(f)(x), torch.func.grad(g)(x))
        close(torch.func.jvp(f, (x,), (w[0],)), torch.func.jvp(g, (x,), (w[0],)))
        close(
            torch.func.grad(lambda x, f=f: torch.func.grad(f)(x).sum())(x),
            torch.func.grad(lambda x, g=g: torch.func.grad(g)(x).sum())(x),
        )
        batch = torch.stack([x, -x, 2 * x])
        close(torch.func.vmap(torch.func.grad(f))(batch), torch.func.vmap(torch.func.grad(g))(batch))
        torch._dynamo.reset()
        close(torch.compile(torch.func.grad(f), fullgraph=True, backend="aot_eager")(x), torch.func.grad(g)(x))


def test_collectives_of_one_loss():
    ranks.run(2, one_loss)
