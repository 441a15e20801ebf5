"""Schedules against their formulas."""

import inspect
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fds import optim
from fds.optim.torch_schedules import TORCH


def at(schedule, step):
    out = schedule(torch.tensor(step))
    assert out.shape == () and out.is_floating_point()
    return float(out)


def test_constant():
    assert [at(optim.constant(0.25), t) for t in (0, 1, 10**9)] == [0.25] * 3


@given(peak=st.floats(0, 10), warmup=st.integers(0, 50), step=st.integers(0, 200))
def test_linear_warmup(peak, warmup, step):
    want = peak * min(1.0, (step + 1) / max(warmup, 1))
    assert at(optim.linear_warmup(peak, warmup), step) == pytest.approx(want, rel=1e-6, abs=1e-12)


@given(
    peak=st.floats(1e-3, 10),
    end=st.floats(0, 1),
    warmup=st.integers(0, 20),
    decay=st.integers(1, 80),
    step=st.integers(0, 200),
)
def test_warmup_cosine(peak, end, warmup, decay, step):
    schedule = optim.warmup_cosine(peak, warmup_steps=warmup, total_steps=warmup + decay, end=end)
    if step < warmup:
        want = peak * (step + 1) / warmup
    else:
        want = end + (peak - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / decay)))
    assert at(schedule, step) == pytest.approx(want, rel=1e-6, abs=1e-9)


def test_edges_of_warmup_cosine():
    schedule = optim.warmup_cosine(1.0, warmup_steps=3, total_steps=7, end=0.25)
    assert at(schedule, 2) == at(schedule, 3) == 1.0
    assert at(schedule, 7) == at(schedule, 8) == at(schedule, 10**9) == 0.25
    assert at(optim.warmup_cosine(1.0, warmup_steps=0, total_steps=1), 0) == 1.0


def test_a_schedule_is_a_function_of_a_traced_step():
    schedule = optim.warmup_cosine(1.0, warmup_steps=3, total_steps=9)
    compiled = torch.compile(schedule, fullgraph=True, backend="aot_eager")
    for t in (0, 3, 5, 20):
        torch.testing.assert_close(compiled(torch.tensor(t)), schedule(torch.tensor(t)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: optim.linear_warmup(1.0, -1),
        lambda: optim.warmup_cosine(1.0, warmup_steps=5, total_steps=5),
        lambda: optim.warmup_cosine(1.0, warmup_steps=-1, total_steps=5),
    ],
)
def test_bad_steps(make):
    with pytest.raises(ValueError, match="warmup_steps"):
        make()


def test_schedule_as_learning_rate_equals_the_rates_by_hand():
    schedule = optim.linear_warmup(0.4, 4)
    p = {"w": torch.tensor([1.0, -2.0])}
    scheduled, by_hand = optim.sgd(schedule), optim.sgd(0.0)
    a, b = scheduled.init(p), by_hand.init(p)
    for t in range(6):
        ours, a = scheduled.update(p, a, p)
        theirs, b = by_hand.update(p, optim.set_hyperparams(b, learning_rate=at(schedule, t)), p)
        torch.testing.assert_close(ours, theirs)
    assert "learning_rate" not in optim.get_hyperparams(a)


# --- torch's by name ---

TORCHS = [
    ("StepLR", dict(step_size=7)),
    ("MultiStepLR", dict(milestones=[3, 3, 40], gamma=0.5)),
    ("MultiStepLR", dict(milestones=[])),
    ("ConstantLR", dict()),
    ("ConstantLR", dict(factor=0.5, total_iters=30)),
    ("LinearLR", dict()),
    ("LinearLR", dict(start_factor=1.0, end_factor=0.0, total_iters=50)),
    ("ExponentialLR", dict(gamma=0.97)),
    ("PolynomialLR", dict(total_iters=60, power=2.5)),
    ("CosineAnnealingLR", dict(T_max=30, eta_min=0.01)),
    ("CosineAnnealingWarmRestarts", dict(T_0=9)),
    ("CosineAnnealingWarmRestarts", dict(T_0=3, T_mult=2, eta_min=0.01)),
    ("CosineAnnealingWarmRestarts", dict(T_0=1, T_mult=3)),
    ("LambdaLR", dict(lr_lambda=lambda t: 0.9**t)),
    ("CyclicLR", dict(base_lr=0.01, max_lr=0.2, step_size_up=7, step_size_down=11)),
    ("CyclicLR", dict(base_lr=0.01, max_lr=0.2, step_size_up=8, mode="triangular2")),
    ("CyclicLR", dict(base_lr=0.01, max_lr=0.2, step_size_up=8, mode="exp_range", gamma=0.99, cycle_momentum=False)),
    ("OneCycleLR", dict(max_lr=0.5, total_steps=121)),
    ("OneCycleLR", dict(max_lr=0.5, epochs=11, steps_per_epoch=11, three_phase=True, anneal_strategy="linear")),
    ("OneCycleLR", dict(max_lr=0.5, total_steps=121, pct_start=0.0, cycle_momentum=False)),
]


@pytest.mark.parametrize(("name", "params"), TORCHS)
def test_torchs_schedules(name, params):
    real = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3, momentum=0.6)
    theirs = getattr(torch.optim.lr_scheduler, name)(real, **params)
    ours = optim.torch_schedule(name, 0.3, **params)
    group = real.param_groups[0]
    assert (ours.momentum is not None) == (name in ("CyclicLR", "OneCycleLR") and params.get("cycle_momentum", True))
    assert ours.b2 is None
    for t in range(121):
        assert at(ours.learning_rate, t) == pytest.approx(group["lr"], rel=1e-9, abs=1e-12), t
        if ours.momentum is not None:
            assert at(ours.momentum, t) == pytest.approx(group["momentum"], rel=1e-9), t
        if t < 120:
            real.step()
            theirs.step()


@pytest.mark.parametrize("name", TORCH)
def test_torchs_parameters_and_defaults(name):
    theirs = list(inspect.signature(getattr(torch.optim.lr_scheduler, name)).parameters.values())[1:-1]
    ours = list(inspect.signature(TORCH[name]).parameters.values())[1:]
    assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in theirs]


def test_every_schedule_of_torchs_has_an_answer():
    others = [n for n in torch.optim.lr_scheduler.__all__ if n not in (*TORCH, "LRScheduler")]
    assert others
    for name in others:
        with pytest.raises(ValueError, match=f"{name} (looks|is|takes)"):
            optim.torch_schedule(name, 0.1)


def _branching(t):
    return 1.0 if t < 3 else 0.5


@pytest.mark.parametrize(
    ("name", "params", "said"),
    [
        ("StepsLR", {}, "did you mean 'StepLR'"),
        ("StepLR", dict(size=3), "did you mean 'step_size'"),
        ("StepLR", {}, "step_size is not given"),
        ("StepLR", dict(step_size=0), "step_size=0"),
        ("MultiStepLR", dict(milestones=[1.5]), "milestones=1.5"),
        ("ConstantLR", dict(factor=1.5), "factor=1.5"),
        ("LinearLR", dict(start_factor=0), "start_factor=0"),
        ("CosineAnnealingWarmRestarts", dict(T_0=2, T_mult=0), "T_mult=0"),
        ("LambdaLR", dict(lr_lambda=3), "a function"),
        ("LambdaLR", dict(lr_lambda=_branching), "torch.where"),
        ("LambdaLR", dict(lr_lambda=lambda t: 0.5), "does not look"),
        ("LambdaLR", dict(lr_lambda=lambda t: t.expand(2)), "0-D"),
        ("CyclicLR", dict(base_lr=0.1, max_lr=0.2, mode="triangle"), "did you mean 'triangular'"),
        ("CyclicLR", dict(base_lr=0.1, max_lr=0.2, scale_fn=abs), "scale_fn"),
        ("OneCycleLR", dict(max_lr=0.1), "total_steps"),
        ("OneCycleLR", dict(max_lr=0.1, total_steps=10, pct_start=2.0), "pct_start=2.0"),
        ("OneCycleLR", dict(max_lr=0.1, total_steps=10, anneal_strategy="cosine"), "did you mean 'cos'"),
    ],
)
def test_what_torchs_schedules_refuse(name, params, said):
    with pytest.raises(ValueError, match=name) as error:
        optim.torch_schedule(name, 0.1, **params)
    assert said in str(error.value)


def test_one_cycle_of_torchs_stays_at_its_end():
    rate = optim.torch_schedule("OneCycleLR", 0.1, max_lr=0.5, total_steps=20).learning_rate
    assert at(rate, 19) == at(rate, 20) == at(rate, 10**6)


# --- policies from DeepSpeed: their values are in tests/deepspeed/test_schedules.py ---


@pytest.mark.parametrize(
    "schedule",
    [
        optim.lr_range_test(0.1, step_size=3, staircase=True),
        optim.one_cycle(0.1, 0.5, first_steps=3, first_stairs=2, decay_rate=0.5, decay_steps=1),
        optim.one_cycle_momentum(0.1, 0.5, first_steps=3),
        optim.warmup(0.5, steps=3),
        optim.warmup_decay(0.5, steps=3, total_steps=7),
        optim.warmup_cosine_floor(0.5, steps=3, total_steps=7),
        optim.torch_schedule("CosineAnnealingWarmRestarts", 0.5, T_0=2, T_mult=2).learning_rate,
        optim.torch_schedule("OneCycleLR", 0.5, max_lr=0.5, total_steps=8).learning_rate,
    ],
)
def test_all_are_functions_of_a_traced_step(schedule):
    compiled = torch.compile(schedule, fullgraph=True, backend="aot_eager")
    for t in (0, 2, 5, 9):
        torch.testing.assert_close(compiled(torch.tensor(t)), schedule(torch.tensor(t)))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: optim.lr_range_test(0.1, step_size=0), "step_size"),
        (lambda: optim.one_cycle(0.1, 0.5, first_steps=0), "first_steps"),
        (lambda: optim.one_cycle(0.1, 0.5, second_steps=-1), "second_steps"),
        (lambda: optim.one_cycle(0.1, float("nan")), "high"),
        (lambda: optim.one_cycle_momentum(0.1, 0.5, decay_rate=-1.0), "decay_rate"),
        (lambda: optim.warmup(0.5, steps=1.5), "steps"),
        (lambda: optim.warmup(0.5, steps=3, shape="lin"), "did you mean 'linear'"),
        (lambda: optim.warmup_decay(-0.5, steps=3, total_steps=7), "peak"),
        (lambda: optim.warmup_cosine_floor(0.5, steps=0, total_steps=7), "steps"),
    ],
)
def test_what_policies_refuse(make, said):
    with pytest.raises(ValueError, match=said):
        make()
