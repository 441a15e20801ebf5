"""Bugs that were, each with an input that showed it."""

import gc

import pytest
import ranks
import torch
import torch.nn.functional as F
import zoo
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import fds


def axis():
    return fds.sharding.mesh(dp=-1)["dp"]


def square(program, stored, batch):
    return program(stored, batch["x"]).square().mean()


def stack(*layers):
    torch.manual_seed(0)
    return nn.Sequential(*layers)


# --- wrong gradients ---


@pytest.mark.parametrize(("family", "pattern"), [("t5", "encoder"), ("llama", "*"), ("llama", "model")])
def test_recompute_of_a_module_that_holds_sites(family, pattern):
    """Its blocks' leaves do not pass through its call: they had zero gradients."""
    program, params = fds.functionalize(zoo.build(family))
    train, rows = fds.at(pattern, fds.checkpoint())(program), zoo.batch(family)
    _, grads = fds.value_and_grad(lambda s, b: zoo.loss(train, s, b))(train.place(params), rows)
    _, want = zoo.reference(family, rows)
    got = train.restore(grads)
    assert all(torch.allclose(got[k], w, atol=1e-6) for k, w in want.items())


class Writes(nn.Linear):
    """Writes into the result of a product, before something whose gradient needs it."""

    def forward(self, x):
        scores = x @ self.weight
        scores += torch.arange(4.0)
        return scores.softmax(-1)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_a_policy_and_a_product_that_is_written_into(backend):
    module, x = stack(Writes(4, 4), Writes(4, 4)), torch.randn(3, 4)
    want = torch.autograd.grad(module(x).square().mean(), list(module.parameters()), allow_unused=True)
    program, params = fds.functionalize(module, sites="*")
    train = fds.checkpoint("matmul")(program)
    run = fds.value_and_grad(lambda s: train(s, x).square().mean())
    run = torch.compile(run, fullgraph=True, backend=backend) if backend else run
    got = train.restore(run(train.place(params))[1])
    for g, w in zip(got.values(), want, strict=True):
        assert torch.allclose(g, torch.zeros_like(g) if w is None else w, atol=1e-6)


def test_leaves_go_by_their_names_not_their_order():
    program, params = fds.functionalize(zoo.build("llama"))
    train = fds.lora(program, rank=2, targets="*.q_proj")
    stored, rows = train.place(params), zoo.batch("llama")
    shuffled = {s: dict(sorted(part.items(), reverse=True)) for s, part in reversed(stored.items())}
    f = fds.value_and_grad(lambda s, b: zoo.loss(train, s, b), wrt=train)
    (_, want), (_, got) = f(stored, rows), f(shuffled, rows)
    assert all(torch.equal(got[s][k], g) for s, part in want.items() for k, g in part.items())
    step = fds.train_step(train, fds.optim.adamw(1e-2), loss=zoo.loss)
    state = step.init(params)
    again = state._replace(params={s: dict(sorted(p.items(), reverse=True)) for s, p in state.params.items()})
    (a, _), (b, _) = step(state, rows), step(again, rows)
    assert all(torch.equal(b.params[s][k], v) for s, part in a.params.items() for k, v in part.items())
    with pytest.raises(ValueError, match="another program or optimizer"):
        step(state._replace(optimizer=fds.optim.sgd(0.1).init(params)), rows)


def test_a_second_derivative_through_recompute_is_refused_not_lost():
    module = stack(nn.Sequential(nn.Linear(3, 3), nn.Tanh()), nn.Sequential(nn.Linear(3, 3), nn.Tanh()))
    program, params = fds.functionalize(module, sites="*")
    train = fds.checkpoint(program)
    stored = fds.tree.map(lambda t: t.requires_grad_(), train.place(params))
    with pytest.raises(ValueError, match="second derivative"):
        torch.autograd.grad(train(stored, torch.ones(2, 3)).sum(), fds.tree.leaves(stored), create_graph=True)


# --- reductions over ranks ---


def test_an_optimizer_is_not_sharded_over_a_sharded_program():
    program, _ = fds.functionalize(zoo.build("llama"))
    for transform in (fds.shard(axis()), fds.replicate(axis())):
        with pytest.raises(ValueError, match="without sharded"):
            fds.train_step(transform(program), fds.optim.sharded(fds.optim.sgd(0.1), axis()))


@pytest.mark.parametrize("name", ["shard", "replicate"])
def test_no_leaf_is_left_without_its_reduction(name):
    program, _ = fds.functionalize(zoo.build("llama"))
    with pytest.raises(ValueError, match="this rank's rows alone"):
        fds.at("*.mlp", getattr(fds, name)(axis()))(program)
    with pytest.raises(ValueError, match="reduced twice"):
        fds.chain(fds.shard(axis()), fds.replicate(axis()))(program)


# --- the step ---


def test_a_skipped_step_leaves_the_buffers():
    program, params = fds.functionalize(stack(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    step = fds.train_step(program, fds.optim.sgd(0.1), loss=square)
    state = step.init(params)
    after, metrics = step(state, {"x": torch.full((4, 3), float("nan"))})
    assert bool(metrics["was_skipped"])
    assert all(torch.equal(a, b) for a, b in zip(fds.tree.flat(after.params), fds.tree.flat(state.params), strict=True))


def test_a_step_that_raises_keeps_the_donated_state():
    program, params = fds.functionalize(stack(nn.Linear(3, 1)))
    step = fds.train_step(program, fds.optim.sgd(0.1), loss=square, on_nonfinite="raise")
    run, state = fds.compile(step, backend="aot_eager"), step.init(params)
    with pytest.raises(fds.NonFiniteError):
        run(state, {"x": torch.full((4, 3), float("nan"))})
    state, metrics = run(state, {"x": torch.ones(4, 3)})
    assert torch.isfinite(metrics["loss"])


def test_a_norm_is_that_of_what_it_is_given():
    program, params = fds.functionalize(stack(nn.Linear(3, 1, bias=False)))
    tx = fds.optim.chain(fds.optim.scale(10.0), fds.optim.clip_by_global_norm(1.0), fds.optim.sgd(1.0))
    step = fds.train_step(program, tx, loss=lambda p, s, b: 5 * p(s, b["x"]).sum())
    state = step.init(params)
    after, _ = step(state, {"x": torch.eye(3)[:1]})
    moved = after.params[""]["0.weight"] - state.params[""]["0.weight"]
    assert float(moved.norm()) == pytest.approx(1.0, rel=1e-4)


def test_a_metric_does_not_hide_the_steps_own():
    program, params = fds.functionalize(stack(nn.Linear(3, 1)))
    step = fds.train_step(program, fds.optim.sgd(0.1), loss=lambda p, s, b: (square(p, s, b), {"loss": torch.ones(())}))
    with pytest.raises(ValueError, match="'loss'"):
        step(step.init(params), {"x": torch.ones(4, 3)})


def nonfinite_names():
    """Rank 1 alone has a gradient that is not finite, of one leaf."""
    program, params = fds.functionalize(stack(nn.Linear(3, 2), nn.Linear(2, 1)))
    bad = float("nan") if axis().rank else 1.0

    def loss(p, stored, batch):
        return p(stored, batch["x"]).mean() + bad * stored[""]["1.bias"].sum()

    step = fds.train_step(program, fds.optim.sharded(fds.optim.sgd(0.1), axis()), loss=loss)
    _, metrics = step(step.init(params), {"x": torch.ones(2, 3)})
    return {k: bool(v) for k, v in metrics["nonfinite"].items()}


def test_a_sharded_optimizer_names_the_leaves_that_are_not_finite():
    want = {"0.weight": False, "0.bias": False, "1.weight": False, "1.bias": True}
    assert ranks.run(2, nonfinite_names) == [want, want]


def test_metrics_weigh_as_the_loss_does():
    program, params = fds.functionalize(zoo.build("llama"))
    mask = (torch.arange(12) < torch.tensor([[12], [3], [7], [2]])).long()
    rows = {"input_ids": zoo.batch("llama")["input_ids"], "attention_mask": mask}

    def loss(p, stored, batch):
        value = fds.losses.causal_lm(p, stored, batch)
        return value, {"nats": value.detach()}

    loss.weight = fds.losses.causal_lm.weight
    step = fds.train_step(program, fds.optim.sgd(0.1), loss=loss, microbatches=4)
    _, metrics = step(step.init(params), rows)
    assert float(metrics["nats"]) == pytest.approx(float(metrics["loss"]), rel=1e-6)


def test_hyperparameters_meet_parameters_on_every_device():
    params = {"away": torch.zeros(2, device="meta"), "here": torch.zeros(2)}
    for tx in (fds.optim.adamw(0.1), fds.optim.sgd(0.1, momentum=0.9), fds.optim.clip_by_global_norm(1.0)):
        updates, _ = tx.update(
            {k: torch.ones_like(v) for k, v in params.items()}, tx.init(params), params, norm=lambda g: torch.ones(())
        )
        assert not updates["here"].is_meta and updates["away"].is_meta


# --- randomness ---


def test_attention_dropout_of_a_row_that_sees_nothing():
    """Left padding under a boolean mask: NaN, and then every step was skipped."""
    seeded = fds.with_seed(lambda q, m: _attend(q, m))
    q = torch.randn(1, 2, 4, 8)
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    mask[0] = False
    out = seeded(torch.tensor(1), q, mask)
    assert torch.isfinite(out).all() and torch.equal(out[..., 0, :], torch.zeros(1, 2, 8))


class Attend(nn.Module):
    def forward(self, q, mask):
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask, dropout_p=0.1)


def _attend(q, mask):
    program, _ = fds.functionalize(Attend())
    return program({"": {}}, q, mask)


def test_dropout_that_nobody_can_seed_is_refused():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    program, params = fds.functionalize(nn.Sequential(layer), sites="*")
    train, x = fds.checkpoint(program), torch.randn(2, 3, 8, requires_grad=True)
    with pytest.raises(ValueError, match="multi_head_attention_forward"):
        fds.value_and_grad(lambda s: train(s, x).sum())(train.place(params))
    with pytest.raises(ValueError, match="multi_head_attention_forward"):
        fds.with_seed(program)(torch.tensor(1), program.place(params), x)
    lstm, params = fds.functionalize(nn.LSTM(4, 4, num_layers=2, dropout=0.5))
    with pytest.raises(ValueError, match="lstm"):
        fds.with_seed(lstm)(torch.tensor(1), lstm.place(params), torch.randn(3, 2, 4))


class DropPath(nn.Module):
    def forward(self, x):
        return x * (torch.rand(size=(x.shape[0], 1)) > 0.5)


def test_rows_are_dropped_by_their_place_in_the_global_batch():
    program, _ = fds.functionalize(DropPath())
    from fds.frame import scoped

    whole = fds.with_seed(program)(torch.tensor(3), {"": {}}, torch.ones(32, 1))
    halves = []
    for block in (0, 1):
        with scoped(block=block):
            halves.append(fds.with_seed(program)(torch.tensor(3), {"": {}}, torch.ones(16, 1)))
    assert torch.equal(torch.cat(halves), whole) and not torch.equal(*halves)


class Block(nn.Module):
    """Draws before, in and after a part that it calls twice."""

    def __init__(self):
        super().__init__()
        self.ff = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))

    def forward(self, x):
        return F.dropout(self.ff(self.ff(F.dropout(x, 0.5))), 0.5)


def seeded_gradient(program, params, x):
    run = fds.value_and_grad(lambda s: fds.with_seed(program)(torch.tensor(3), s, x).square().sum())
    value, grads = run(program.place(params))
    return value, program.restore(grads)


@pytest.mark.parametrize("pattern", ["*.ff", "*.ff.1", "*.ff.*", "?"])
def test_a_wrapped_module_draws_what_it_drew_before(pattern):
    """Its masks were others than without the wrapper, and the same in every call."""
    program, params = fds.functionalize(stack(Block(), Block()), sites="?")
    x = torch.randn(4, 8)
    value, grads = seeded_gradient(program, params, x)
    for wrapped in (fds.at(pattern, fds.checkpoint()), fds.at(pattern, fds.around(lambda apply: apply, name="same"))):
        got, got_grads = seeded_gradient(wrapped(program), params, x)
        assert torch.equal(got, value) and all(torch.equal(got_grads[k], g) for k, g in grads.items())


def test_calls_of_a_wrapped_module_have_masks_of_their_own():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            return torch.stack([self.drop(x), self.drop(x)])

    program, _ = fds.functionalize(stack(Twice()), sites="0")
    wrapped = fds.at("0.drop", fds.checkpoint())(program)
    first, second = fds.with_seed(wrapped)(torch.tensor(3), wrapped.place({}), torch.ones(64))
    assert not torch.equal(first, second)


def test_recompute_of_an_adapted_layer_sees_the_adapters_mask():
    """In backward it drew from torch's generator."""
    program, params = fds.functionalize(stack(Block(), Block()), sites="?")
    plain = fds.lora(program, rank=2, targets="*.ff.0", dropout=0.5)
    stored = fds.tree.map(lambda t: torch.full_like(t, 0.1) if t.shape[-1] == 2 else t, plain.place(params))
    wrapped, x = fds.at("*.ff.0", fds.checkpoint())(plain), torch.randn(4, 8)

    def gradient(p):
        return fds.value_and_grad(lambda s: fds.with_seed(p)(torch.tensor(3), s, x).square().sum(), wrt=p)(stored)

    (value, grads), (want, want_grads) = gradient(wrapped), gradient(plain)
    assert torch.equal(value, want)
    assert all(torch.equal(a, b) for a, b in zip(fds.tree.leaves(grads), fds.tree.leaves(want_grads), strict=True))


# --- transformations that said yes and did nothing ---


def test_at_checks_what_it_restricts():
    program, _ = fds.functionalize(zoo.build("llama"))
    for transform, words in [
        (lambda: fds.at("*.layers.0", fds.lora(rank=2, targets="*.q_proj")), "targets"),
        (lambda: fds.at("*.layers.0", fds.cast("bfloat16", keep="*.nrm")), "matches no leaf"),
        (lambda: fds.at("*.weight", fds.checkpoint()), "matches no"),
    ]:
        with pytest.raises(ValueError, match=words):
            transform()(program)


def test_every_target_of_lora_has_to_be_a_linear_layer():
    program, _ = fds.functionalize(zoo.build("mixtral"))
    with pytest.raises(ValueError, match=r"'\*\.experts' matches no weight of a linear layer"):
        fds.lora(program, rank=2, targets=("*.q_proj", "*.experts"))
    with pytest.raises(ValueError, match="an embedding"):
        fds.lora(program, rank=2, targets="*.embed_tokens")


# --- memory, files ---


def test_a_program_does_not_keep_the_model_alive():
    module = zoo.build("llama")
    storage = StorageWeakRef(module.model.layers[0].mlp.up_proj.weight.untyped_storage())
    program, params = fds.functionalize(module)
    train = fds.shard(program, axis())
    assert not storage.expired()
    del module, params
    gc.collect()
    assert storage.expired() and train.sites


def fails_on_rank_1(directory):
    """A state file that one rank cannot read: both raise, none waits."""
    from test_checkpoint import stepper

    from fds import state_files

    step, params = stepper()
    fds.save_state(directory, step, step.init(params))
    opened = state_files.Reader._open
    if axis().rank == 1:
        state_files.Reader._open = lambda reader, path: opened(reader, path / "not a folder")
    try:
        fds.load_state(directory, step)
    except (OSError, ValueError) as error:
        return str(error)
    finally:
        state_files.Reader._open = opened
    return "loaded"


def test_one_ranks_failure_is_everybodys(tmp_path):
    first, second = ranks.run(2, fails_on_rank_1, str(tmp_path), timeout=60)
    assert "rank 1 failed" in first and "not a folder" in second


def cannot_publish(directory):
    """Something on rank 0 is in the way of the manifest."""
    from pathlib import Path

    from test_checkpoint import stepper

    step, params = stepper()
    if axis().rank == 0:
        (Path(directory) / "state.json" / "in the way").mkdir(parents=True)
    try:
        fds.save_state(directory, step, step.init(params))
    except (OSError, ValueError) as error:
        return type(error).__name__
    return "saved"


def test_a_manifest_that_cannot_be_written_is_everybodys_failure(tmp_path):
    assert ranks.run(2, cannot_publish, str(tmp_path), timeout=60) == ["IsADirectoryError", "ValueError"]


def test_a_state_of_another_chain_is_refused(tmp_path):
    from test_checkpoint import stepper

    step, params = stepper()
    fds.save_state(tmp_path, step, step.init(params))
    program = step.program.origin
    other = fds.chain(fds.lora(rank=2, alpha=99, targets="*.q_proj"), fds.shard(axis()))(program)
    with pytest.raises(ValueError, match="saved under"):
        fds.load_state(tmp_path, fds.train_step(other, step.tx))


# --- speed ---


def test_a_step_takes_all_squared_norms_at_once():
    """A stack of one scalar for each leaf made Inductor compile, and then run, a slow loop for every one of them."""
    from torch.fx.experimental.proxy_tensor import make_fx

    program, params = fds.functionalize(stack(nn.Linear(3, 2), nn.Linear(2, 1)))
    step = fds.train_step(program, fds.optim.sgd(0.1), loss=square)
    graph = make_fx(step.region)(fds.tree.flat(step.init(params)), {"x": torch.ones(2, 3)}).graph
    calls = [n.target for n in graph.nodes if n.op == "call_function"]
    assert calls.count(torch.ops.fds.square_sums.default) == 1 and torch.ops.aten.stack.default not in calls
