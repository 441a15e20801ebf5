"""Programs with a quantised wire: laws, bytes, compositions, states, and what training makes of the error."""

import functools
import math

import laws
import pytest
import ranks
import torch
import torch.distributed as dist
import zoo
from torch import nn

import fds
from fds import optim, sharding
from fds.sharding import ErrorFeedback


@functools.cache  # every mesh starts process groups
def axis():
    return sharding.mesh(dp=-1)["dp"]


# --- programs ---


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))


def error_of(program, stored, batch):
    return (program(stored, batch["x"]) - batch["y"]).square().mean()


def rows(i, a):
    generator = torch.Generator().manual_seed(i)
    x = torch.randn(16, 8, generator=generator)
    y = torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin(), x[:, 3:5].sum(1), x[:, 5].abs()], 1)
    return {k: v.chunk(a.size)[a.rank] for k, v in {"x": x, "y": y}.items()}


FEEDBACK = ErrorFeedback()
WIRES = {
    "exact": [],
    "int8": [fds.quantized(weights="int8", gradients="int8")],
    "int4": [fds.quantized(gradients="int4", block=1024)],
    "int4 fed back": [fds.quantized(gradients="int4", block=1024, feedback=FEEDBACK)],
}


def made(wire, **options):
    program, params = fds.functionalize(net(), sites=["0", "2", "4"])
    program = fds.chain(fds.shard(axis()), *WIRES[wire], fds.checkpoint())(program)
    return fds.train_step(program, optim.sgd(0.1), loss=error_of, **options), params


def run(step, state, which):
    losses = []
    for i in which:
        state, metrics = step(state, rows(i, axis()))
        losses.append(float(metrics["loss"]))
    return state, losses


def trained(wire, steps):
    step, params = made(wire)
    return torch.tensor(run(step, step.init(params), range(steps))[1])


def test_training_with_error_feedback_follows_the_exact_run_closer():
    exact, plain, fed, int8 = (ranks.run(2, trained, w, 40)[0] for w in ("exact", "int4", "int4 fed back", "int8"))
    assert float(exact[-10:].mean()) < 0.8 * float(exact[:10].mean())
    away = [float((x - exact).abs().mean()) for x in (plain, fed, int8)]
    assert away[1] < 0.5 * away[0] and away[2] < 0.5 * away[0], away


def compiled_steps():
    step, params = made("int4 fed back")
    eager, compiled = (run(s, s.init(params), range(3)) for s in (step, fds.compile(step)))
    assert compiled[1] == pytest.approx(eager[1], rel=1e-3)
    return [float(x["shard.float32.error"].abs().sum()) for x in compiled[0].params.values() if x]


def test_compiled_steps_carry_the_error():
    assert all(total > 0 for total in ranks.run(2, compiled_steps)[0])


def microbatches_and_skipped_steps():
    step, params = made("int4 fed back", microbatches=2)
    state, _ = run(step, step.init(params), range(1))
    assert all(float(x["shard.float32.passes"]) == 2.0 for x in state.params.values() if x)
    bad = {k: v.clone() for k, v in rows(1, axis()).items()}
    bad["x"][:1] = math.inf if axis().rank == 0 else 0.0
    after, metrics = step(state, bad)
    assert bool(metrics["was_skipped"])
    assert all(torch.equal(a, b) for a, b in zip(fds.tree.flat(after.params), fds.tree.flat(state.params), strict=True))


def test_the_error_goes_from_microbatch_to_microbatch_and_stays_when_a_step_is_skipped():
    ranks.run(2, microbatches_and_skipped_steps)


@pytest.mark.parametrize("family", ["llama-tied", "bert"])
def test_laws(family):
    name = "shard, quantized, checkpoint"
    for law in (laws.round_trip, laws.meaning, laws.gradient):
        ranks.run(2, law, family, name)
    ranks.run(2, laws.gradient, family, name, "func")


def test_laws_traced_and_on_four_ranks():
    name = "shard, quantized, checkpoint"
    ranks.run(2, laws.gradient, "llama", name, "traced")
    for law in (laws.round_trip, laws.gradient):
        ranks.run(4, law, "llama", name)


def traffic(how):
    """Bytes of one gradient of a Llama: weights in int8 (twice, but for the root), gradients in int4."""
    a = axis()
    program, params = fds.functionalize(zoo.build("llama"))
    wire = fds.quantized(weights="int8", gradients="int4", block=64, feedback=FEEDBACK)
    program = fds.chain(fds.shard(a), wire, fds.checkpoint())(program)
    mine = {k: v.chunk(a.size)[a.rank] for k, v in zoo.batch("llama").items()}
    run = laws.differentiate(program, how)
    with sharding.record() as counted:
        run(program.place(params), mine)
    m = {s: part["shard.float32"].numel() for s, part in program.spec.items()}
    blocks = {s: math.ceil(k / 64) for s, k in m.items()}
    assert counted.bytes == {
        "gather": sum((2 if s else 1) * a.size * (m[s] + 2 * blocks[s]) for s in m),
        "all_to_all": sum(a.size * (math.ceil(m[s] / 2) + 2 * blocks[s]) for s in m),
    }
    return counted.calls


def test_traffic():
    assert ranks.run(2, traffic, "eager")[0] == {"gather": 5, "all_to_all": 3}
    assert ranks.run(4, traffic, "eager")[0] == {"gather": 5, "all_to_all": 3}
    assert ranks.run(2, traffic, "traced")[0] == {"gather": 5, "all_to_all": 3}


def compositions():
    """Loss and gradients of chains around the quantised wire, against the plain module on all rows."""
    a = axis()
    wire = fds.quantized(weights="int8", gradients="int8", block=32, feedback=FEEDBACK)
    chains = {
        "cast": [fds.shard(a), wire, fds.cast("bfloat16"), fds.checkpoint()],
        "kept": [fds.checkpoint(), fds.shard(a), wire],
        "threshold": [fds.shard(a, threshold=100), wire],
        "offload": [fds.shard(a), wire, fds.offload("cpu"), fds.checkpoint()],
        "store": [fds.shard(a), wire, fds.offload(laws.HOST), fds.checkpoint()],
        "one dtype": [fds.shard(a), fds.at("shard.float32", wire)],
    }
    program, params = fds.functionalize(zoo.build("llama"))
    batch = zoo.batch("llama")
    mine = {k: v.chunk(a.size)[a.rank] for k, v in batch.items()}
    want_value, want = zoo.reference("llama", batch)
    total = math.sqrt(sum(float(g.square().sum()) for g in want.values()))
    for name, transforms in chains.items():
        result = fds.chain(*transforms)(program)
        stored = result.place(params)
        value, grads = fds.value_and_grad(lambda s, b, p=result: zoo.loss(p, s, b), wrt=result)(stored, mine)
        got = result.restore(grads)
        away = math.sqrt(sum(float((got[k].float() - g).square().sum()) for k, g in want.items()))
        off = abs(float(laws.mean(value, a) - want_value))
        assert off < 0.05 and away < 0.1 * total, (name, off, away / total)
        assert all(torch.equal(v, params[k]) for k, v in result.restore(stored).items()), name


def test_compositions():
    ranks.run(2, compositions)


def beside_tensor_parallelism():
    """Two by two ranks: a quantised wire for the parts of leaves that are split already, and one for the whole ones."""
    mesh, (program, params), batch = (
        sharding.mesh(dp=2, tp=2),
        fds.functionalize(zoo.build("llama")),
        zoo.batch("llama"),
    )
    wire = fds.quantized(weights="int8", gradients="int4", block=32, feedback=FEEDBACK)
    program = fds.chain(fds.tensor_parallel(mesh["tp"]), fds.shard(mesh["dp"]), wire, fds.checkpoint())(program)
    step = fds.train_step(program, optim.sgd(0.1), loss=zoo.loss)
    state, mine = step.init(params), {k: v.chunk(2)[mesh["dp"].rank] for k, v in batch.items()}
    state, metrics = step(state, mine)
    want, grads = zoo.reference("llama", batch)
    total = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
    errors = {k for part in state.params.values() for k in part if k.endswith(".error")}
    assert errors == {"shard.float32.error", "shard.float32.tp.error"}
    return float(metrics["loss"] - want), float(metrics["grad_norm"]) / total


def test_beside_tensor_parallelism():
    for off, norm in ranks.run(4, beside_tensor_parallelism):
        assert abs(off) < 0.05 and norm == pytest.approx(1.0, abs=0.1)


# --- states ---


def begun(directory):
    step, params = made("int4 fed back")
    state, _ = run(step, step.init(params), range(3))
    fds.save_state(directory, step, state)
    return run(step, state, range(3, 6))[1]


def gone_on(directory, wire):
    step, _ = made(wire)
    state = fds.load_state(directory, step)
    errors = [float(x["shard.float32.error"].abs().max()) for x in state.params.values() if "shard.float32.error" in x]
    return run(step, state, range(3, 6))[1], errors


def test_the_error_is_saved_for_the_same_ranks_and_begins_anew_on_others(tmp_path):
    where = str(tmp_path)
    want = ranks.run(2, begun, where)[0]
    losses, errors = ranks.run(2, gone_on, where, "int4 fed back")[0]
    assert losses == want and all(errors)
    losses, errors = ranks.run(4, gone_on, where, "int4 fed back")[0]
    assert losses == pytest.approx(want, rel=0.05) and errors == [0.0] * 3
    assert gone_on(where, "int4 fed back")[0] == pytest.approx(want, rel=0.05)
    assert ranks.run(2, gone_on, where, "int8")[0][0] == pytest.approx(want, rel=0.05)
    ranks.run(2, saved_without, str(tmp_path / "plain"))
    assert ranks.run(2, gone_on, str(tmp_path / "plain"), "int4 fed back")[0][1] == [0.0] * 3


def saved_without(directory):
    step, params = made("int8")
    fds.save_state(directory, step, step.init(params))


# --- what is refused ---


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "nothing to quantise"),
        ({"weights": "int9"}, "weights='int9'.*int8"),
        ({"gradients": "fp8"}, "gradients='fp8'.*e4m3"),
        ({"weights": "int8", "block": 0}, "block=0, required one of 32, 64"),
        ({"weights": "int8", "feedback": FEEDBACK}, "feedback is of quantised gradients"),
    ],
)
def test_options_are_checked(options, said):
    with pytest.raises(ValueError, match=said):
        fds.quantized(**options)
    for beta, reset in ((1.0, 8), (-0.1, 8), (0.5, 1), (0.5, 2.5)):
        with pytest.raises(ValueError, match="required"):
            ErrorFeedback(beta, reset)


def test_the_order_is_checked():
    program, _ = fds.functionalize(net(), sites=["0", "2", "4"])
    wire, shard = fds.quantized(weights="int8"), fds.shard(axis())
    for chain in ([wire], [wire, shard], [shard, fds.checkpoint(), wire], [fds.replicate(axis()), wire]):
        with pytest.raises(ValueError, match=r"directly after a shard.*chain\(\.\.\., shard\(axis\), quantized"):
            fds.chain(*chain)(program)
    with pytest.raises(ValueError, match="takes one quantized"):
        fds.chain(shard, wire, wire)(program)


def doubles():
    program, _ = fds.functionalize(net().double(), sites=["0", "2", "4"])
    with pytest.raises(ValueError, match=r"shard.float64 is torch.float64, required float32"):
        fds.chain(fds.shard(axis()), fds.quantized(weights="int8"))(program)
    return dist.get_rank()


def test_doubles_are_refused():
    assert ranks.run(2, doubles) == [0, 1]


def test_on_one_rank_nothing_changes():
    program, params = fds.functionalize(net(), sites=["0", "2", "4"])
    one = fds.chain(fds.shard(axis()), *WIRES["int4 fed back"])(program)
    assert one.tol == 0.0 and set(one.spec["0"]) == {"shard.float32"}
    stored, x = one.place(params), torch.randn(2, 8)
    assert torch.equal(one(stored, x), program(program.place(params), x))
