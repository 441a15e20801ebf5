"""Algebra, modules, the step, purity and errors."""

import subprocess
import sys

import laws
import pytest
import ranks
import torch
import zoo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import fds


def axis():
    return fds.sharding.mesh(dp=-1)["dp"]


@pytest.fixture
def llama():
    model = zoo.build("llama")
    return (model, *fds.functionalize(model))


# --- law 5: algebra ---


def test_chain_is_a_monoid():
    a, b, c = fds.cast("bfloat16"), fds.checkpoint(), fds.shard(axis())
    assert fds.chain(fds.chain(a, b), c) == fds.chain(a, fds.chain(b, c)) == fds.chain(a, b, c)
    assert fds.chain(fds.chain(), a) == fds.chain(a)
    assert fds.at("*.0", fds.chain(a, b)) == fds.chain(fds.at("*.0", a), fds.at("*.0", b))


def test_history_prints_and_goes_back(llama):
    _, program, params = llama
    train = fds.chain(fds.lora(rank=2, targets="*.q_proj"), fds.shard(axis()), fds.checkpoint())(program)
    assert [t.name for t in train.history] == ["lora", "shard", "checkpoint"]
    assert "lora(rank=2, targets='*.q_proj'" in repr(train) and "bytes stored" in repr(train)
    assert [t.name for t in train.without("lora").history] == ["shard", "checkpoint"]
    assert torch.equal(
        train.without("lora").restore(train.without("lora").place(params))["lm_head.weight"], params["lm_head.weight"]
    )
    with pytest.raises(ValueError, match="did you mean 'lora'"):
        train.without("lora_")


CHOICES = st.lists(st.sampled_from(laws.CHAINABLE), max_size=5)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(CHOICES)
def test_any_chain_keeps_the_laws_or_says_why_not(names):
    laws.any_chain(names)


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(CHOICES)
def test_any_chain_on_two_ranks(names):
    ranks.run(2, laws.any_chain, names)


def test_a_transformation_is_applied_directly_too(llama):
    program = llama[1]
    for name, options in [("cast", ("bfloat16",)), ("shard", (axis(),)), ("checkpoint", ()), ("offload", ("cpu",))]:
        transform = getattr(fds, name)
        now, later = transform(program, *options), transform(*options)(program)
        assert now.history == later.history == (transform(*options),)
    tuned = fds.lora(program, rank=2, targets="*.q_proj")
    assert (
        fds.fuse_lora(tuned).history
        == fds.chain(fds.lora(rank=2, targets="*.q_proj"), fds.fuse_lora())(program).history
    )


# --- lora, relayout ---


def test_fusing_is_another_program_over_the_same_tensors(llama):
    _, program, params = llama
    train = fds.chain(fds.lora(rank=2, targets="*.0.self_attn.q_proj"), fds.shard(axis()))(program)
    step = fds.train_step(train, fds.optim.adamw(1e-2), loss=zoo.loss)
    state, _ = step(step.init(params), zoo.batch("llama"))
    before = fds.tree.map(torch.clone, state.params)
    fused = fds.fuse_lora()(train)
    weights = fds.relayout(train, fused)(state.params)
    with torch.no_grad():
        assert torch.equal(
            train(state.params, **zoo.batch("llama")).logits, fused(weights, **zoo.batch("llama")).logits
        )
    assert all(torch.equal(a, b) for a, b in zip(fds.tree.leaves(before), fds.tree.leaves(state.params), strict=True))
    with pytest.raises(ValueError, match="requires 'lora'"):
        fds.fuse_lora()(program)
    with pytest.raises(ValueError, match="no trainable leaf"):
        fds.train_step(fused, fds.optim.sgd(0.1))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_fusing_into_low_precision_rounds_once(family):
    """W' as float32 makes it, rounded; while training and fused alike. Without training W comes back bit for bit, whatever its rows are."""
    base, name = zoo.build(family).bfloat16(), {"llama": "self_attn.q_proj", "gpt2": "attn.c_attn"}[family]
    weight = next(k for k in base.state_dict() if k.endswith(f"{name}.weight"))
    base.get_parameter(weight).data[3] = 0
    program, params = fds.functionalize(base)
    for dora in (False, True):
        train = fds.lora(rank=2, alpha=6, targets=f"*.{name}", dora=dora)(program)
        stored = train.place(params)
        assert all(torch.equal(v, params[k]) for k, v in train.restore(stored).items())
        stored = {s: {k: v.bfloat16() for k, v in part.items()} for s, part in laws.trained(stored).items()}
        part = next(part for part in stored.values() if weight in part)
        a, b, *m = (v.float() for k, v in part.items() if k.startswith(weight.removesuffix("weight") + "lora_"))
        delta = 3.0 * (b @ a)
        want, inputs = params[weight].float() + (delta.T if family == "gpt2" else delta), 0 if family == "gpt2" else 1
        if dora:
            want = want * (m[0] / torch.linalg.vector_norm(want, dim=inputs).bfloat16().float()).unsqueeze(inputs)
        fused = fds.relayout(train, fds.fuse_lora()(train))(stored)
        got = next(part[weight] for part in fused.values() if weight in part)
        assert got.dtype == torch.bfloat16 and torch.equal(got, want.bfloat16())
        rows = zoo.batch(family)
        assert torch.equal(train(stored, **rows).logits, fds.fuse_lora()(train)(fused, **rows).logits)
        _, grads = fds.value_and_grad(lambda s, b, p=train: zoo.loss(p, s, b), wrt=train)(stored, rows)
        assert all(bool(g.isfinite().all()) for g in fds.tree.leaves(grads))


def test_a_program_relayouts_without_copies_where_nothing_changes(llama):
    _, program, params = llama
    sharded = fds.shard(axis())(program)
    stored = sharded.place(params)
    again = fds.relayout(sharded, fds.checkpoint()(sharded))(stored)
    assert all(again[s] is stored[s] for s in stored)


@pytest.mark.parametrize("dora", [False, True])
def test_lora_dropout_runs_beside_the_layer(dora):
    model = zoo.build("llama", training=True)
    program, params = fds.functionalize(model)
    train = fds.chain(fds.lora(rank=2, targets="*.q_proj", dropout=0.5, dora=dora), fds.checkpoint())(program)
    stored = laws.trained(train.place(params))
    rows, seeded = zoo.batch("llama"), fds.with_seed(lambda s, b: zoo.loss(train, s, b))
    with torch.no_grad():
        one, same, other = (seeded(torch.tensor(i), stored, rows) for i in (1, 1, 2))
        assert torch.equal(one, same) and not torch.equal(one, other)
        plain = fds.fuse_lora()(train)
        weights = fds.relayout(train, plain)(stored)
        assert torch.allclose(train.eval()(stored, **rows).logits, plain.eval()(weights, **rows).logits, atol=1e-5)
    eager = fds.value_and_grad(lambda s, b: seeded(torch.tensor(1), s, b), wrt=train)(stored, rows)
    kept = fds.lora(rank=2, targets="*.q_proj", dropout=0.5, dora=dora)(program)
    want = fds.value_and_grad(
        lambda s, b: fds.with_seed(lambda s, b: zoo.loss(kept, s, b))(torch.tensor(1), s, b), wrt=kept
    )(stored, rows)
    assert torch.equal(eager[0], one) and torch.equal(eager[0], want[0])
    assert all(
        torch.allclose(a, b, atol=1e-7)
        for a, b in zip(fds.tree.leaves(eager[1]), fds.tree.leaves(want[1]), strict=True)
    )
    with pytest.raises(ValueError, match="explicit seed"):
        fds.value_and_grad(lambda s, b: zoo.loss(train, s, b), wrt=train)(stored, rows)


# --- modules ---


def test_batchnorm_returns_its_statistics_and_the_module_is_untouched():
    model = zoo.build("convnet", training=True)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    program, params = fds.functionalize(model)
    rows = zoo.batch("convnet")
    for transform in (fds.chain(), fds.chain(fds.shard(axis()), fds.checkpoint())):
        train = transform(program)
        stored = train.place(params)
        out, updates = fds.with_updates(train)(stored, **rows)
        (_, traced), _ = torch.compile(
            fds.value_and_grad(lambda s, b, t=train: _aux(t, s, b), has_aux=True, wrt=train),
            backend="aot_eager",
            fullgraph=True,
        )(stored, rows)
        plain = zoo.build("convnet", training=True)
        assert torch.allclose(out, plain(**rows))
        flat = {k: v for part in updates.values() for k, v in part.items()}
        for k, v in plain.named_buffers():
            assert torch.equal(flat[k], v), k
            assert torch.allclose(traced[k], v), k
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    step = fds.train_step(program, fds.optim.sgd(0.1), loss=zoo.loss)
    state, _ = step(step.init(params), rows)
    assert torch.equal(state.params["blocks.0"]["blocks.0.1.num_batches_tracked"], torch.tensor(1))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def _aux(program, stored, rows):
    out, updates = fds.with_updates(program)(stored, **rows)
    return zoo.loss_of(out), {k: v.clone() for part in updates.values() for k, v in part.items()}


class Shared(nn.Module):
    """Blocks that share a leaf, and a block that is called twice."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.layers[2].weight = self.layers[0].weight

    def forward(self, x):
        for layer in [*self.layers, self.layers[1]]:
            x = torch.tanh(layer(x))
        return x


@pytest.mark.parametrize("make", [Shared, lambda: nn.LSTM(4, 4, num_layers=2, batch_first=True)])
def test_shared_leaves_and_recurrent_layers(make):
    torch.manual_seed(0)
    model, x = make(), torch.randn(2, 3, 4)
    first = lambda out: (out[0] if isinstance(out, tuple) else out).square().mean()  # noqa: E731
    want = torch.autograd.grad(first(model(x)), list(model.parameters()))
    program, params = fds.functionalize(model)
    chains = [fds.chain(), fds.shard(axis())] + (
        [fds.chain(fds.shard(axis()), fds.checkpoint())] if len(program.sites) > 1 else []
    )
    for transform in chains:
        train = transform(program)
        _, grads = fds.value_and_grad(lambda s, x, t=train: first(t(s, x)))(train.place(params), x)
        got = train.restore(grads)
        assert all(
            torch.allclose(got[n], g, atol=1e-7) for (n, _), g in zip(model.named_parameters(), want, strict=True)
        )


def test_torch_func_of_a_program(llama):
    model, program, params = llama
    rows = zoo.batch("llama")
    for transform in (fds.chain(), fds.chain(fds.shard(axis()), fds.checkpoint())):
        train = transform(program)
        stored = train.place(params)
        floats = {
            s: {k: v for k, v in part.items() if "shard" in k or v.requires_grad or k in dict(model.named_parameters())}
            for s, part in stored.items()
        }
        f = lambda t, train=train, stored=stored: zoo.loss(train, {s: {**stored[s], **t[s]} for s in t}, rows)  # noqa: E731
        vector = fds.tree.map(lambda t: torch.ones_like(t) * 0.1, floats)
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            _, product = torch.func.jvp(torch.func.grad(f), (floats,), (vector,))
        got = torch.cat([t.flatten() for t in fds.tree.leaves(product)])
        up, down = (
            torch.func.grad(f)(fds.tree.map(lambda t, v, s=s: t + s * 0.01 * v, floats, vector)) for s in (1, -1)
        )
        want = torch.cat(
            [((a - b) / 0.02).flatten() for a, b in zip(fds.tree.leaves(up), fds.tree.leaves(down), strict=True)]
        )
        assert float((got - want).norm() / want.norm()) < 4e-2  # central differences in float32


# --- the step ---


def test_a_new_learning_rate_does_not_recompile():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.manual_seed(0)
    program, params = fds.functionalize(nn.Linear(3, 1))
    counter = CompileCounterWithBackend("aot_eager")
    step = fds.compile(
        fds.train_step(program, fds.optim.adamw(1e-2), loss=lambda p, s, b: p(s, b["x"]).square().mean()),
        backend=counter,
    )
    state = step.init(params)
    graphs = []
    for rate in (1e-2, 1e-3, 5e-4):
        state = state._replace(optimizer=fds.optim.set_hyperparams(state.optimizer, learning_rate=rate))
        state, _ = step(state, {"x": torch.ones(4, 3)})
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[1] == graphs[2] > 0


def test_steps_compile_inside_the_users_own_compile(llama):
    _, program, params = llama
    step = fds.train_step(fds.chain(fds.shard(axis()), fds.checkpoint())(program), fds.optim.adamw(1e-2), loss=zoo.loss)
    want, metrics = step(step.init(params), zoo.batch("llama"))
    for inner in (step, fds.compile(step)):
        torch._dynamo.reset()
        mine = torch.compile(lambda s, b, inner=inner: inner(s, b), fullgraph=True, backend="aot_eager")
        got, m = mine(step.init(params), zoo.batch("llama"))
        assert isinstance(got, fds.TrainState) and torch.allclose(m["loss"], metrics["loss"])
        assert all(
            torch.allclose(a, b, atol=1e-6) for a, b in zip(fds.tree.flat(got), fds.tree.flat(want), strict=True)
        )


def test_a_donated_state_raises_and_the_users_parameters_live():
    program, params = fds.functionalize(nn.Linear(3, 1))
    kept = {k: v.clone() for k, v in params.items()}
    step = fds.compile(
        fds.train_step(program, fds.optim.sgd(0.1), loss=lambda p, s, b: p(s, b["x"]).square().mean()),
        backend="aot_eager",
    )
    old = step.init(params)
    new, _ = step(old, {"x": torch.ones(4, 3)})
    assert all(torch.equal(params[k], kept[k]) for k in kept)
    with pytest.raises(ValueError, match="donated"):
        step(old, {"x": torch.ones(4, 3)})
    with pytest.raises(ValueError, match="donated"):
        program(old.params, torch.ones(4, 3))
    step(new, {"x": torch.ones(4, 3)})


def test_non_finite_steps_are_skipped_and_named():
    program, params = fds.functionalize(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)))
    loss = lambda p, s, b: p(s, b["x"]).square().mean()  # noqa: E731
    step = fds.train_step(program, fds.optim.adamw(0.1), loss=loss)
    state = step.init(params)
    after, metrics = step(state, {"x": torch.full((4, 3), float("nan"))})
    assert int(metrics["skipped"]) == 1 and bool(metrics["nonfinite"]["0.weight"])
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            fds.tree.flat([after.params, after.optimizer]), fds.tree.flat([state.params, state.optimizer]), strict=True
        )
    )
    after, metrics = step(after, {"x": torch.ones(4, 3)})
    assert int(metrics["skipped"]) == 1 and not bool(metrics["was_skipped"])
    strict = fds.train_step(program, fds.optim.adamw(0.1), loss=loss, on_nonfinite="raise")
    with pytest.raises(fds.NonFiniteError, match=r"0\.weight"):
        strict(strict.init(params), {"x": torch.full((4, 3), float("nan"))})


def test_the_memory_of_a_flat_shard_is_what_the_spec_says(llama):
    """Law 7, the stored part, in bytes: shards are 1/n of the parameters, padded; nothing else is kept."""
    _, program, params = llama
    pair = fds.sharding.Axis("dp", 2, 1, "")
    sharded = fds.shard(pair)(program)
    stored = sharded.place(params)
    assert fds.tree.nbytes(stored) == fds.tree.nbytes(sharded.spec)
    own = sum(
        t.untyped_storage().nbytes() for part in stored.values() for k, t in part.items() if k.startswith("shard")
    )
    total = sum(p.numel() * 4 for k, p in params.items() if k not in program.marks["buffer"])
    assert total / 2 <= own <= total / 2 + 4 * len(program.sites)


# --- bad input ---


@pytest.mark.parametrize(("action", "words"), [
    (lambda p, w: fds.lora(rank=2, targets="*.q_prj")(p), "did you mean '\\*.q_proj'"),
    (lambda p, w: fds.lora(rank=0, targets="*.q_proj"), "rank=0"),
    (lambda p, w: fds.at("*.mlpp", fds.checkpoint())(p), "matches no leaf"),
    (lambda p, w: fds.cast("bfloat17"), "did you mean 'bfloat16'"),
    (lambda p, w: fds.offload("disk"), "store 'disk'"),
    (lambda p, w: fds.checkpoint("matmull"), "did you mean 'matmul'"),
    (lambda p, w: fds.shard(axis(), reduce="avg"), "reduce"),
    (lambda p, w: fds.chain(fds.shard(axis()), fds.lora(rank=2, targets="*.q_proj"))(p), "the order that works: chain\\(lora"),
    (lambda p, w: fds.chain(fds.compile(), fds.shard(axis()))(p), "cannot follow compile"),
    (lambda p, w: fds.chain(fds.checkpoint(), fds.checkpoint())(p), "leave one of them out"),
    (lambda p, w: fds.chain(p), "not a transformation"),
    (lambda p, w: fds.sharding.mesh(dp=3), "multiply to 3, the job has 1 rank"),
    (lambda p, w: fds.sharding.mesh(dp=1)["pd"], "no axis 'pd'; allowed: dp"),
    (lambda p, w: p.place({**w, "model.norm.wait": w["model.norm.weight"]}), "model.norm.wait"),
    (lambda p, w: p(fds.shard(axis())(p).place(w), input_ids=torch.ones(1, 2)), "made for another program"),
    (lambda p, w: p(w), "not a stored tree"),
    (lambda p, w: fds.functionalize(3), "got int"),
    (lambda p, w: fds.functionalize(zoo.build("gpt2"), sites="*.hh"), "sites"),
    (lambda p, w: fds.train_step(p, fds.optim.sgd(0.1), microbatches=3)(fds.train_step(p, fds.optim.sgd(0.1)).init(w), zoo.batch("llama")), "4 rows do not divide into 3"),
    (lambda p, w: fds.value_and_grad(lambda s: s[""]["model.norm.weight"])(p.place(w)), "0-D"),
    (lambda p, w: fds.optim.adamw(-1.0), "learning_rate=-1.0"),
    (lambda p, w: fds.optim.set_hyperparams(fds.optim.sgd(0.1).init(w), learning_rte=1.0), "did you mean 'learning_rate'"),
    (lambda p, w: fds.compile(3), "got int"),
    (lambda p, w: fds.checkpoint()(fds.functionalize(nn.Linear(2, 2))[0]), "no sites"),
])  # fmt: skip
def test_bad_input_names_the_thing_and_the_fix(llama, action, words):
    _, program, params = llama
    with pytest.raises(ValueError, match=words):
        action(program, params)


def test_the_import_is_light():
    import subprocess
    import sys

    code = "import sys, fds; print([m for m in ('transformers', 'peft', 'matplotlib', 'rich', 'tokenizers', 'safetensors', 'triton', 'torch._inductor', 'torch._dynamo.convert_frame') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_compiled_step_keeps_its_memory_where_glibc_is():
    """A freed block of 24 MB is there again without a fault for each page, after `keep_freed`; in a process of its own, as it cannot be undone."""
    code = """
import platform, resource, sys
import torch
from fds.memory import keep_freed
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        x = torch.zeros(6_000_000)
        del x
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
kept = keep_freed()
assert kept == (platform.libc_ver()[0] == "glibc")
for _ in range(5):
    faults()  # until the heap is as large as it gets: where it lies differs from run to run
assert not kept or faults() < 100, "pages were given back"
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
