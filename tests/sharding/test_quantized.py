"""Quantised communication: values, every derivative, bytes on the wire, errors that are fed back, and what training makes of them."""

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
from fds.kernels import block_dequantize, block_quantize
from fds.sharding import ErrorFeedback, collectives
from fds.sharding.quantized import quantized_gather

M, BLOCK = 75, 32  # elements of a shard: two whole blocks and a short one, and an odd number for int4
FORMATS = ["int8", "int4", "e4m3", "e5m2"]


@functools.cache  # every mesh starts process groups
def axis():
    return sharding.mesh(dp=-1)["dp"]


def shards(n):
    """What the ranks hold, [rank, M]."""
    return torch.randn(n, M, generator=torch.Generator().manual_seed(0))


def cotangents(n):
    """Rank r's loss is sum(cotangents[r] * gathered): other on every rank, so that a missing reduction shows."""
    return torch.randn(n, n * M, generator=torch.Generator().manual_seed(1))


def rounded(x, format):
    return block_dequantize(*block_quantize(x, format=format, block=BLOCK), format=format, block=BLOCK, length=M)


def gatherer(weights="", gradients="", beta=0.0, mean=True):
    a = axis()

    def gather(x, error=None, passes=None):
        return quantized_gather(x, error, passes, a.size, a.group, mean, weights, gradients, BLOCK, beta)

    return gather


def wanted(gradients, mean=True):
    """The gradient of the reduced loss by this rank's shard, without a collective."""
    a = axis()
    parts = cotangents(a.size).view(a.size, a.size, M)[:, a.rank]
    total = (rounded(parts, gradients) if gradients else parts).sum(0)
    return total / a.size if mean else total


def loss(**formats):
    a, gather = axis(), gatherer(**formats)
    w = cotangents(a.size)[a.rank]
    return lambda x: (w * gather(x)).sum()


def near(got, want):
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


# --- the collective by itself ---


def values():
    a = axis()
    mine = shards(a.size)[a.rank]
    for format in FORMATS:
        for dtype in (torch.float32, torch.bfloat16):
            got = gatherer(weights=format)(mine.to(dtype))
            want = rounded(shards(a.size).to(dtype), format).flatten().to(dtype)
            assert torch.equal(got, want) and got.dtype == dtype
            error = float((got.float() - shards(a.size).to(dtype).flatten().float()).abs().max())
            assert 0 < error < fds.quantize.tolerance(format, dtype) * float(shards(a.size).abs().max())
    assert torch.equal(gatherer(gradients="int8")(mine), shards(a.size).flatten())


def gradients():
    a = axis()
    mine = shards(a.size)[a.rank]
    for format in [*FORMATS, ""]:
        for mean in (True, False):
            f = loss(weights="int8", gradients=format, mean=mean)
            x = mine.clone().requires_grad_()
            near(torch.autograd.grad(f(x), x)[0], wanted(format, mean))
            near(torch.func.grad(f)(mine), wanted(format, mean))


def batched():
    """One message for a batch; the same as one by one."""
    a = axis()
    mine = shards(a.size)[a.rank]
    rows, scale = torch.stack([mine, 10 * mine, -mine]), torch.tensor([1.0, 0.5, -3.0])
    for format in ("int8", "int4"):
        run = gatherer(weights=format)
        with sharding.record() as wire:
            got = torch.func.vmap(run)(rows)
        assert wire.calls == {"gather": 1}
        assert torch.equal(got, torch.stack([run(x) for x in rows]))
        near(torch.func.vmap(run, in_dims=1)(rows.T), got)
        one = loss(weights="int8", gradients=format)
        grad = torch.func.grad(lambda x, c, one=one: c * one(x))
        with sharding.record() as wire:
            got = torch.func.vmap(grad, in_dims=(None, 0))(mine, scale)
        assert wire.calls == {"gather": 1, "all_to_all": 1}
        near(got, torch.stack([grad(mine, c) for c in scale]))
        both = torch.func.grad(lambda x, one=one: torch.func.vmap(one)(x).sum())(rows)
        near(both, wanted(format).expand(3, M))


def forward_mode_and_second_derivatives():
    a = axis()
    mine, w = shards(a.size)[a.rank], cotangents(a.size)[a.rank]
    tangent = torch.full((M,), float(a.rank + 1))
    exact = torch.arange(1.0, a.size + 1).repeat_interleave(M)
    _, moved = torch.func.jvp(gatherer(weights="int4", gradients="int4"), (mine,), (tangent,))
    near(moved, exact)

    def squares(**formats):
        gather = gatherer(weights="int8", **formats)
        return lambda x: (w * gather(x).pow(2)).sum()

    _, product = torch.func.jvp(torch.func.grad(squares()), (mine,), (tangent,))
    near(product, 2 * cotangents(a.size).mean(0).view(a.size, M)[a.rank] * tangent)
    twice = torch.func.grad(lambda x: torch.func.grad(squares())(x).sum())(mine)
    near(twice, 2 * cotangents(a.size).mean(0).view(a.size, M)[a.rank] / a.size)
    for nested in (
        lambda f: torch.func.jvp(torch.func.grad(f), (mine,), (tangent,)),
        lambda f: torch.func.grad(lambda x: torch.func.grad(f)(x).sum())(mine),
    ):
        with pytest.raises(ValueError, match="no derivative"):
            nested(squares(gradients="int8"))


def compiled():
    a = axis()
    mine = shards(a.size)[a.rank]
    torch._dynamo.reset()
    f = torch.func.grad(loss(weights="int8", gradients="int4"))
    near(torch.compile(f, fullgraph=True)(mine), wanted("int4"))


def bytes_on_the_wire():
    a = axis()
    n, mine, blocks = a.size, shards(a.size)[a.rank], math.ceil(M / BLOCK)
    for weights, sent in (("int8", M + 2 * blocks), ("int4", math.ceil(M / 2) + 2 * blocks), ("", 4 * M)):
        for grads, back in (("e4m3", M + 2 * blocks), ("int4", math.ceil(M / 2) + 2 * blocks), ("", 4 * M)):
            with sharding.record() as wire:
                torch.func.grad(loss(weights=weights, gradients=grads))(mine)
            assert wire.bytes == {"gather": n * sent, "all_to_all" if grads else "scatter": n * back}


COLLECTIVE = [values, gradients, batched, forward_mode_and_second_derivatives, compiled, bytes_on_the_wire]


@pytest.mark.parametrize("law", COLLECTIVE)
def test_the_collective_on_two_ranks(law):
    ranks.run(2, law)


@pytest.mark.parametrize("law", [values, gradients])
def test_the_collective_on_four_ranks(law):
    ranks.run(4, law)


# --- the error of a gradient ---


def nothing_is_lost(beta):
    """The same gradient again and again, most of it too small for its block. What was sent, against what should have been."""
    a, steps = axis(), 40
    g = torch.full((a.size * M,), 0.03)
    g[::16] = 1.0 + a.rank
    error, passes, sent = torch.zeros(g.shape, dtype=torch.bfloat16), torch.zeros(()), torch.zeros(M)
    plain, x, gather = torch.zeros(M), torch.zeros(M), gatherer(gradients="int4", beta=beta)
    f = torch.func.grad(lambda *leaves: (g * gather(*leaves)).sum(), (0, 1, 2))
    for _ in range(steps):
        part, error, uses = f(x, error, passes)
        sent, plain = sent + part, plain + torch.func.grad(lambda x: (g * gather(x)).sum())(x)
        assert float(uses) == 1.0
    want = steps * collectives.scatter(g, a)
    late = collectives.scatter(error.float(), a) / (1 - beta)
    assert float((plain - want).abs().max()) > 0.9  # 40 times 0.03, never sent
    return float((sent + late - want).abs().max()), float((sent - want).abs().max())


def test_what_was_sent_and_what_is_late_add_up():
    for beta in (0.0, 0.8):
        for rest, gap in ranks.run(2, nothing_is_lost, beta):
            assert rest < 0.06 and gap < 0.5, (beta, rest, gap)  # the error is kept in bfloat16


class Calls(nn.Module):
    """A block that is called twice, and one that is not."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.twice, self.never = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x):
        return self.twice(self.twice(x).tanh())


def uses_of_a_site():
    program, params = fds.functionalize(Calls(), sites=["twice", "never"])
    program = fds.chain(fds.shard(axis()), fds.quantized(gradients="int4", feedback=ErrorFeedback(0.0, 3)))(program)
    stored, x = program.place(params), torch.randn(3, 12)
    error, passes = "shard.float32.error", "shard.float32.passes"
    for part in ("twice", "never"):
        stored[part][error], stored[part][passes] = torch.full_like(stored[part][error], 0.25), torch.ones(())
    _, grads = fds.value_and_grad(lambda s, x: program(s, x).square().mean(), wrt=program)(stored, x)
    assert float(grads["twice"][passes]) == 2.0 and float(grads["never"][passes]) == 0.0
    following = program.carry(stored, grads)
    assert torch.equal(following["twice"][error], grads["twice"][error] / 2)
    assert torch.equal(following["never"][error], stored["never"][error])
    assert set(program.trainable(stored)["twice"]) == {"shard.float32"}
    for want in (2.0, 0.0):
        stored = {s: {**stored[s], **program.carry(stored, grads).get(s, {})} for s in stored}
        assert float(stored["twice"][passes]) == want
    assert not stored["twice"][error].any() and stored["never"][error].all()  # after 3 passes, and after 1


def test_a_site_that_is_called_twice_or_not_at_all():
    ranks.run(2, uses_of_a_site)


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
