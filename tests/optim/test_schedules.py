"""Schedules against their formulas."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fds import optim


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
