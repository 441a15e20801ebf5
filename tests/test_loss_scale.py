"""Loss scaling: sequences of scales as DeepSpeed's, and float16 that trains where it would underflow, wherever the step's parts are."""

import functools

import pytest
import ranks
import torch
import zoo
from torch import nn

import fds
from fds import optim, tree
from fds.loss_scale import LossScaleState
from fds.optim.base import Optimizer

# What DeepSpeed 0.19.8's DynamicLossScaler gives (raise_error_at_min_scale=False): a scale after each step, "!" for one that overflowed.
SEQUENCES = [
    (dict(initial_power=16), "..!!!.!", [65536, 65536, 65536, 32768, 16384, 16384, 8192]),
    (dict(initial_power=4, window=3), "......!!..!.......!!!!!!....", [16, 16, 16, 32, 32, 32, 32, 16, 16, 16, 8, 8, 8, 8, 16, 16, 16, 32, 32, 16, 8, 4, 2, 1, 1, 1, 1, 2]),
    (dict(initial_power=4, window=3, consecutive_hysteresis=True), "!.!.!!.....!!......", [16, 16, 16, 16, 16, 8, 8, 8, 8, 16, 16, 16, 8, 8, 8, 8, 16, 16, 16]),
    (dict(initial_power=3, window=2, hysteresis=1), "!!!!!!.....!......", [4, 2, 1, 1, 1, 1, 1, 1, 2, 2, 4, 2, 2, 2, 4, 4, 8, 8]),
    (dict(initial_power=5, window=1, hysteresis=3, minimum=4.0), "!!!!!!!!.....!!!", [32, 32, 16, 8, 4, 4, 4, 4, 4, 8, 16, 32, 64, 64, 64, 32]),
    (dict(initial_power=2, window=4, hysteresis=4, consecutive_hysteresis=True, minimum=0.5), "!!!.!!!!!.......!!!!!!......", [4, 4, 4, 4, 4, 4, 4, 2, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 1, 1]),
]  # fmt: skip


@pytest.mark.parametrize(("options", "steps", "want"), SEQUENCES)
def test_sequences_of_scales(options, steps, want):
    scaling = fds.DynamicLossScale(**options)
    state, got = scaling.init(), []
    for s in steps:
        lowest = bool(scaling.at_minimum(state)) and s == "!"
        new = scaling.update(state, torch.tensor(s == "!"))
        assert not lowest or float(new.scale) == float(state.scale) == scaling.minimum
        state = new
        got.append(float(state.scale))
    assert got == want and state.scale.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (dict(initial_power=1.5), "initial_power"),
        (dict(initial_power=500), "initial_power"),
        (dict(window=0), "window"),
        (dict(window=True), "window"),
        (dict(hysteresis=0), "hysteresis"),
        (dict(consecutive_hysteresis=1), "consecutive_hysteresis"),
        (dict(minimum=0.0), "minimum"),
        (dict(minimum=float("nan")), "minimum"),
        (dict(initial_power=2, minimum=8.0), "minimum"),
    ],
)
def test_what_a_scale_cannot_be(options, name):
    with pytest.raises(ValueError, match=name):
        fds.DynamicLossScale(**options)


# --- float16 that trains ---

TINY = 2.0**-22  # of a loss whose gradients float16 does not hold


def tiny_loss(program, stored, batch):
    return fds.losses.causal_lm(program, stored, batch) * TINY


tiny_loss.weight = fds.losses.causal_lm.weight


def trained(axis, transforms, tx, loss_scale, *, microbatches=1, how="eager", steps=8):
    """Losses, how many gradients of the last step were zero, and the last metrics, of a tiny Llama on two batches in turn."""
    program, params = fds.functionalize(zoo.build("llama"))
    step = fds.train_step(
        fds.chain(*transforms)(program), tx, loss=tiny_loss, microbatches=microbatches, loss_scale=loss_scale
    )
    run = fds.compile(step, backend="aot_eager") if how == "traced" else step
    state, losses, metrics = step.init(params), [], {}
    for i in range(steps):
        rows = zoo.batch("llama", seed=i % 2)
        mine = {k: v.chunk(axis.size)[axis.rank] for k, v in rows.items()}
        state, metrics = run(state, mine)
        losses.append(float(metrics["loss"]) / TINY)
    return losses, {k: float(v) for k, v in metrics.items() if k != "nonfinite"}


def axis():
    return fds.sharding.mesh(dp=-1)["dp"]


def descent():
    return optim.chain(optim.clip_by_global_norm(1e-5), optim.sgd(0.3 / TINY, momentum=0.5))


HOST = fds.HostStore()
PLACES = {  # where parameters, gradients and state are: transformations, optimizer
    "plain": lambda a: ([fds.cast("float16")], descent()),
    "checkpoint": lambda a: ([fds.cast("float16"), fds.checkpoint()], descent()),
    "autocast": lambda a: ([fds.checkpoint(), fds.autocast("float16")], descent()),
    "shard": lambda a: ([fds.shard(a), fds.cast("float16")], descent()),
    "sharded": lambda a: ([fds.cast("float16")], optim.sharded(descent(), a)),
    "master": lambda a: ([fds.cast("float16", stored=True)], optim.with_master(descent())),
    "sharded master": lambda a: ([fds.cast("float16", stored=True)], optim.sharded(optim.with_master(descent()), a)),
    "streamed": lambda a: ([fds.cast("float16")], optim.streamed(descent(), HOST)),
    "store": lambda a: ([fds.shard(a), fds.cast("float16"), fds.offload(HOST)], optim.streamed(descent(), HOST)),
    "stored low": lambda a: (
        [fds.cast("float16", stored=True), fds.offload(HOST)],
        optim.streamed(optim.with_master(descent()), HOST),
    ),
}
SCALE = fds.DynamicLossScale(initial_power=15, window=3, hysteresis=1)


@functools.cache
def in_float32():
    return trained(axis(), [], descent(), None)


def test_without_a_scale_float16_underflows():
    want, _ = in_float32()
    got, metrics = trained(axis(), [fds.cast("float16")], descent(), None)
    assert metrics["grad_norm"] < 0.5 * in_float32()[1]["grad_norm"]
    assert want[0] - want[-2] > 5 * abs(got[0] - got[-2])


@pytest.mark.parametrize("place", PLACES)
def test_with_a_scale_float16_follows_float32(place):
    want, last = in_float32()
    for microbatches in (1, 2):
        losses, metrics = trained(axis(), *PLACES[place](axis()), SCALE, microbatches=microbatches)
        assert losses == pytest.approx(want, abs=3e-2)
        assert metrics["grad_norm"] == pytest.approx(last["grad_norm"], rel=5e-2)
        assert metrics["skipped"] == 0 and metrics["loss_scale"] == 2.0**17  # doubled after 4 steps, and 3 more


def test_a_number_is_a_scale_that_stays():
    want, _ = in_float32()
    losses, metrics = trained(axis(), [fds.cast("float16")], descent(), 2.0**15)
    assert losses == pytest.approx(want, abs=3e-2)
    assert metrics["loss_scale"] == 2.0**15 and "scale_at_minimum" not in metrics


def on_this_rank(place, how="eager"):
    transforms, tx = PLACES[place](axis())
    return trained(axis(), transforms, tx, SCALE, how=how)


def test_two_ranks():
    want, _ = in_float32()
    for place in ("shard", "sharded", "sharded master", "store"):
        for losses, metrics in ranks.run(2, on_this_rank, place):
            assert losses == pytest.approx(want, abs=3e-2) and metrics["loss_scale"] == 2.0**17, place


@pytest.mark.parametrize("place", ["checkpoint", "store"])
def test_traced(place):
    want, _ = in_float32()
    losses, metrics = on_this_rank(place, "traced")
    assert losses == pytest.approx(want, abs=3e-2) and metrics["loss_scale"] == 2.0**17


# --- overflows ---


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.tensor([1.0, -2.0])), nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return (self.w * x).sum(-1) + self.b


def line_loss(program, stored, batch):
    return program(stored, batch["x"]).float().mean() * batch["factor"][0]


def line(scaling, tx=None, transforms=(), **options):
    program, params = fds.functionalize(Line())
    step = fds.train_step(fds.chain(*transforms)(program), tx or optim.sgd(0.1), loss=line_loss, loss_scale=scaling, **options)  # fmt: skip
    return step, step.init(params)


def rows(factor=1.0, x=1.0):
    return {"x": torch.full((2, 2), x), "factor": torch.full((2,), factor)}


@pytest.mark.parametrize("how", ["eager", "compiled", "not donated"])
def test_an_overflow_is_skipped_counted_and_named_and_lowers_the_scale(how):
    scaling = fds.DynamicLossScale(initial_power=14, window=2, hysteresis=2)
    step, state = line(scaling, transforms=[fds.cast("float16")])
    run = (
        step
        if how == "eager"
        else fds.compile(step, donate=how == "compiled", backend="inductor" if how == "compiled" else "aot_eager")
    )
    seen = []
    for factor in (1.0, 100.0, 100.0, 2.0, 1.0, 1.0, 1.0):
        before = tree.map(torch.clone, state)
        state, m = run(state, rows(factor))
        seen.append((float(m["loss_scale"]), int(m["skipped"]), bool(m["was_skipped"]), bool(m["scale_at_minimum"])))
        bad = {k for k, v in m["nonfinite"].items() if v}
        # 2**14 times 100, over two elements, is no float16. Inductor does not round w's to it between operators that it fuses.
        assert bad == (set() if factor != 100.0 else {"b"} if how == "compiled" else {"w", "b"})
        assert torch.equal(state.params[""]["w"], before.params[""]["w"]) == (factor == 100.0)
        if factor != 100.0:
            assert float(m["grad_norm"]) == pytest.approx(factor * 3**0.5)
            torch.testing.assert_close(state.params[""]["w"], before.params[""]["w"] - 0.1 * factor)
    assert seen == [
        (16384.0, 0, False, False),
        (16384.0, 1, True, False),
        (16384.0, 2, True, False),
        (8192.0, 2, False, False),
        (8192.0, 2, False, False),
        (8192.0, 2, False, False),
        (16384.0, 2, False, False),
    ]


def test_at_the_minimum_it_goes_on_and_says_so():
    step, state = line(fds.DynamicLossScale(initial_power=1, hysteresis=1))
    seen = []
    for _ in range(4):
        state, m = step(state, rows(float("inf")))
        seen.append((float(m["loss_scale"]), bool(m["scale_at_minimum"])))
    assert seen == [(2.0, False), (1.0, True), (1.0, True), (1.0, True)]
    state, m = step(state, rows())
    assert not m["was_skipped"] and not m["scale_at_minimum"] and int(m["skipped"]) == 4


def test_raise_raises_what_a_lower_scale_does_not_mend():
    step, state = line(fds.DynamicLossScale(initial_power=1, hysteresis=1), transforms=[fds.cast("float16")], on_nonfinite="raise")  # fmt: skip
    large = rows(1.5e5)  # more than float16 holds, with any scale
    state, m = step(state, large)
    assert m["was_skipped"]
    with pytest.raises(fds.NonFiniteError, match=r"loss scale of 1; not finite: w, b"):
        step(state, large)
    step, state = line(fds.DynamicLossScale(), on_nonfinite="raise")
    with pytest.raises(fds.NonFiniteError, match=r"loss -?inf"):
        step(state, rows(float("inf")))
    step, state = line(4.0, transforms=[fds.cast("float16")], on_nonfinite="raise")
    with pytest.raises(fds.NonFiniteError, match="loss scale of 4"):
        step(state, large)


def test_the_names_are_right_where_a_sharded_optimizer_sees_no_leaves():
    """The square of a scaled gradient may be more than float32 holds, and the gradient fine."""
    step, state = line(2.0**80, optim.sharded(optim.sgd(0.1), axis()))
    state, m = step(state, rows())
    assert not m["was_skipped"] and not any(m["nonfinite"].values())
    state, m = step(state, rows(1e30))
    assert m["was_skipped"] and all(m["nonfinite"].values())


def test_gradients_come_to_the_optimizer_in_float32():
    seen = []

    def update(grads, state, params, **_):
        seen.extend(tree.leaves(grads))
        return tree.map(torch.zeros_like, grads), state

    program, params = fds.functionalize(Line().half())
    step = fds.train_step(program, Optimizer(lambda p: (), update), loss=line_loss, loss_scale=2.0**10)
    step(step.init(params), rows(2.0**-24, x=1.0) | {"x": torch.ones(2, 2).half()})
    assert [g.dtype for g in seen] == [torch.float32] * 2
    assert all(torch.equal(g, torch.full_like(g, 2.0**-24)) for g in seen)  # as float16, that over two rows was 0


# --- as part of a state ---


def test_without_scaling_nothing_changes():
    step, state = line(None)
    assert state.loss_scale == () and len(tree.flat(state)) == len(tree.flat(state[:-1]))
    _, m = step(state, rows())
    assert "loss_scale" not in m and "scale_at_minimum" not in m
    assert line(8.0)[1].loss_scale == ()


def test_saved_and_gone_on(tmp_path):
    scaling = fds.DynamicLossScale(initial_power=4, window=3)
    step, state = line(scaling)
    for factor in (1.0, float("inf"), float("inf"), 1.0, 1.0):
        state, _ = step(state, rows(factor))
    fds.save_state(tmp_path / "a", step, state)
    back = fds.load_state(tmp_path / "a", line(scaling)[0])
    assert isinstance(back.loss_scale, LossScaleState)
    assert [float(x) for x in back.loss_scale] == [8.0, 1.0, 2.0]
    one, other = step(state, rows())[0], step(back, rows())[0]
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(one), tree.leaves(other), strict=True))
    with pytest.raises(ValueError, match="loss_scale"):
        fds.load_state(tmp_path / "a", line(None)[0])
    step, state = line(None)
    fds.save_state(tmp_path / "b", step, state)
    assert fds.load_state(tmp_path / "b", line(64.0)[0]).loss_scale == ()  # a number is no state
    with pytest.raises(ValueError, match="loss_scale"):
        fds.load_state(tmp_path / "b", line(scaling)[0])


@pytest.mark.parametrize("wrong", [0, -1.0, float("inf"), float("nan"), True, "dynamic", 2.0**200])
def test_what_is_no_scale(wrong):
    with pytest.raises(ValueError, match="loss_scale"):
        line(wrong)


def test_feedback_of_quantised_gradients_takes_a_scale_that_stays():
    program, _ = fds.functionalize(zoo.build("llama"))
    fed = fds.quantized(gradients="int8", block=32, feedback=fds.sharding.ErrorFeedback())
    program = fds.chain(fds.shard(fds.sharding.Axis("dp", 2, 0)), fed)(program)
    with pytest.raises(ValueError, match="feedback"):
        fds.train_step(program, optim.sgd(0.1), loss_scale=SCALE)
    fds.train_step(program, optim.sgd(0.1), loss_scale=2.0)
