"""DeepSpeed's schedules by name: values of the real ones, errors that name a key, arguments that come back as they were given."""

from argparse import ArgumentParser

import pytest
import torch

import fds
from fds import optim, tree
from fds.deepspeed.errors import DeepSpeedConfigError
from fds.deepspeed.schedules import POLICIES, add_tuning_arguments, build, scheduler_from_arguments

# What DeepSpeed 0.19.8 has in the optimizer's group when it applies update n: the rate, and with OneCycle's momentum Adam's first beta.
# The optimizer's own rate is the third.
TABLE = [
    ("LRRangeTest", {"lr_range_test_min_lr": 0.0001, "lr_range_test_step_size": 7, "lr_range_test_step_rate": 2.5}, 0.1, {0: 0.0001, 1: 0.000135714285714, 3: 0.000207142857143, 7: 0.00035, 100: 0.00367142857143, 5000: 0.178671428571}),
    ("LRRangeTest", {"lr_range_test_min_lr": 0.0001, "lr_range_test_step_size": 7, "lr_range_test_staircase": True}, 0.1, {0: 0.0001, 6: 0.0001, 7: 0.0002, 13: 0.0002, 14: 0.0003, 5000: 0.0715}),
    ("OneCycle", {"cycle_min_lr": 0.01, "cycle_max_lr": 0.1, "cycle_first_step_size": 4, "cycle_second_step_size": 6, "decay_lr_rate": 0.5, "decay_step_size": 2, "decay_mom_rate": 0.01}, 0.1, {0: (0.01, 0.8), 1: (0.0325, 0.875), 4: (0.1, 0.8), 5: (0.085, 0.816666666667), 9: (0.025, 0.883333333333), 10: (0.01, 0.9), 11: (0.008, 0.9045), 12: (0.00666666666667, 0.909), 3000: (1.33600534402e-05, 14.355)}),
    ("OneCycle", {"cycle_min_lr": 0.01, "cycle_max_lr": 0.1, "cycle_first_step_size": 6, "cycle_first_stair_count": 2, "cycle_second_stair_count": 3}, 0.1, {0: (0.01, 0.8), 2: (0.01, 0.9), 3: (0.055, 0.85), 5: (0.055, 0.85), 6: (0.1, 0.8), 7: (0.07, 0.833333333333), 8: (0.07, 0.833333333333), 10: (0.04, 0.866666666667), 12: (0.01, 0.9), 13: (0.01, 0.9)}),
    ("OneCycle", {"cycle_min_lr": 0.01, "cycle_max_lr": 0.1, "cycle_first_step_size": 3, "cycle_second_step_size": 0, "cycle_momentum": False}, 0.1, {0: 0.01, 2: 0.07, 3: 0.01, 4: 0.01}),
    ("WarmupLR", {"warmup_num_steps": 10, "warmup_min_lr": 0.001, "warmup_max_lr": 0.5}, 0.3, {0: 0.001, 1: 0.001, 2: 0.151213967836, 5: 0.349786032164, 10: 0.5, 11: 0.5, 2000: 0.5}),
    ("WarmupLR", {"warmup_num_steps": 10, "warmup_type": "linear"}, 0.3, {0: 0.0, 1: 0.0, 2: 0.03, 5: 0.12, 10: 0.27, 11: 0.3, 2000: 0.3}),
    ("WarmupLR", {"warmup_num_steps": 1}, 0.3, {0: 0.0, 1: 0.0, 2: 0.3, 3: 0.3}),
    ("WarmupDecayLR", {"total_num_steps": 30, "warmup_num_steps": 10, "warmup_min_lr": 0.0001}, 0.3, {0: 0.0001, 1: 0.0001, 5: 0.000729073003902, 10: 0.001, 11: 0.001, 20: 0.000595, 30: 0.000145, 31: 0.0001, 4000: 0.0001}),
    ("WarmupDecayLR", {"total_num_steps": 5, "warmup_num_steps": 10, "warmup_type": "linear"}, 0.3, {1: 0.0, 5: 0.0004, 10: 0.0009, 11: 0.0}),
    ("WarmupCosineLR", {"total_num_steps": 30, "warmup_num_steps": 10, "warmup_min_ratio": 0.2, "cos_min_ratio": 0.05}, 0.3, {0: 0.0, 1: 0.06, 5: 0.227752801041, 10: 0.3, 11: 0.298245588535, 20: 0.1575, 30: 0.015, 31: 0.015, 4000: 0.015}),
    ("WarmupCosineLR", {"total_num_steps": 30, "warmup_num_steps": 10, "warmup_type": "linear"}, 0.3, {0: 0.0, 1: 0.0, 5: 0.12, 10: 0.27, 11: 0.298153435764, 29: 0.00187656423584, 30: 3e-05}),
]  # fmt: skip


@pytest.mark.parametrize(("type", "params", "base_lr", "want"), TABLE)
def test_values_are_deepspeeds(type, params, base_lr, want):
    policy = build(type, params, base_lr)
    for n, value in want.items():
        rate, momentum = value if isinstance(value, tuple) else (value, None)
        got = policy.learning_rate(torch.tensor(n))
        assert got.shape == () and got.dtype == torch.float64
        assert float(got) == pytest.approx(rate, rel=1e-11), n
        assert (policy.momentum is None) == (momentum is None) == (policy.b2 is None)
        if policy.momentum is not None:
            assert float(policy.momentum(torch.tensor(n))) == pytest.approx(momentum, rel=1e-11), n
            assert policy.b2 == 0.99


def test_names_and_lists_as_people_write_them():
    one = build("warmupcosinelr", {"total_num_steps": 9, "warmup_num_steps": 2}, 0.5).learning_rate
    assert float(one(torch.tensor(2))) == 0.5
    two = build("OneCycle", {"cycle_min_lr": [0.25], "cycle_max_lr": (0.5,), "last_batch_iteration": -1}, 0.1)
    assert float(two.learning_rate(torch.tensor(0))) == 0.25
    torchs = build("StepLR", {"step_size": 2, "gamma": 0.5, "last_epoch": -1}, 0.8).learning_rate
    assert [float(torchs(torch.tensor(i))) for i in range(3)] == [0.8, 0.8, 0.4]
    assert build("OneCycleLR", {"max_lr": 0.5, "total_steps": 10}, 0.8).momentum is not None


CYCLE = {"cycle_min_lr": 0.1, "cycle_max_lr": 1}


@pytest.mark.parametrize(
    ("type", "params", "key", "said"),
    [
        ("WarmUpLRs", {}, "scheduler.type", "did you mean 'WarmupLR'"),
        ("ReduceLROnPlateau", {}, "scheduler.type", "looks at a metric"),
        ("StepLR", {"step_sise": 3}, "scheduler.type", "did you mean 'step_size'"),
        ("StepLR", {"step_size": 3, "last_epoch": 4}, "scheduler.params.last_epoch", "load_checkpoint"),
        ("WarmupLR", {"warmup_nums_steps": 3}, "scheduler.params.warmup_nums_steps", "did you mean 'warmup_num_steps'"),
        ("WarmupLR", {"base_lr": 3}, "scheduler.params.base_lr", "no such parameter"),
        ("WarmupLR", {"warmup_num_steps": 3.5}, "scheduler.params.warmup_num_steps", "whole number"),
        ("WarmupLR", {"warmup_num_steps": True}, "scheduler.params.warmup_num_steps", "whole number"),
        ("WarmupLR", {"warmup_num_steps": "auto"}, "scheduler.params.warmup_num_steps", "'auto'"),
        ("WarmupLR", {"warmup_type": "lin"}, "scheduler.params.warmup_type", "did you mean 'linear'"),
        ("WarmupLR", {"warmup_max_lr": [0.1, 0.2]}, "scheduler.params.warmup_max_lr", "2 values"),
        ("WarmupLR", {"warmup_max_lr": float("nan")}, "scheduler.params.warmup_max_lr", "number >= 0"),
        ("WarmupLR", {"last_batch_iteration": 7}, "scheduler.params.last_batch_iteration", "load_checkpoint"),
        ("WarmupDecayLR", {}, "scheduler.params.total_num_steps", "needs it"),
        ("WarmupCosineLR", {"total_num_steps": 0}, "scheduler.params.total_num_steps", ">= 1"),
        ("WarmupCosineLR", {"total_num_steps": 9, "warmup_min_lr": 0.1}, "scheduler.params.warmup_min_lr", "no such"),
        ("OneCycle", {"cycle_min_lr": 0.1}, "scheduler.params.cycle_max_lr", "needs it"),
        ("OneCycle", {**CYCLE, "cycle_first_step_size": 0}, "scheduler.params.cycle_first_step_size", "> 0"),
        ("OneCycle", {**CYCLE, "cycle_second_step_size": -1}, "scheduler.params.cycle_second_step_size", ">= 0"),
        ("OneCycle", {**CYCLE, "cycle_momentum": 1}, "scheduler.params.cycle_momentum", "true or false"),
        ("LRRangeTest", {"lr_range_test_step_size": 0}, "scheduler.params.lr_range_test_step_size", ">= 1"),
    ],
)
def test_errors_name_the_key(type, params, key, said):
    with pytest.raises(DeepSpeedConfigError, match=r"^scheduler") as error:
        build(type, params, 0.1)
    assert key in error.value.keys and said in str(error.value)


def test_a_schedule_that_ends_in_its_warm_up_warns():
    with pytest.warns(UserWarning, match=r"total_num_steps=5 is less than .*warmup_num_steps=10"):
        build("WarmupDecayLR", {"total_num_steps": 5, "warmup_num_steps": 10}, 0.1)


# --- arguments ---


def parsed(line):
    return add_tuning_arguments(ArgumentParser()).parse_args(line.split())


@pytest.mark.parametrize("name", POLICIES)
def test_the_defaults_of_the_arguments_build_every_policy(name):
    section = scheduler_from_arguments(parsed(f"--lr_schedule {name} --total_num_steps 2000"))
    assert section is not None and section["type"] == name
    build(section["type"], section["params"], 0.1)


def test_arguments_come_back_as_they_were_given():
    line = "--lr_schedule OneCycle --cycle_min_lr 0.5 --cycle_max_lr 2 --cycle_first_step_size 7 --cycle_second_step_size 9 --cycle_first_stair_count 2 --no-cycle_momentum --decay_lr_rate .25"
    params = scheduler_from_arguments(parsed(line))["params"]
    given = {"cycle_min_lr": 0.5, "cycle_max_lr": 2.0, "cycle_first_step_size": 7, "cycle_second_step_size": 9, "cycle_first_stair_count": 2, "cycle_momentum": False, "decay_lr_rate": 0.25}  # fmt: skip
    assert given.items() <= params.items() and "total_num_steps" not in params
    assert build("OneCycle", params, 0.1).momentum is None
    params = scheduler_from_arguments(parsed("--lr_schedule LRRangeTest --lr_range_test_staircase"))["params"]
    assert params["lr_range_test_staircase"] is True
    assert set(params) == {f"lr_range_test_{k}" for k in ("min_lr", "step_size", "step_rate", "staircase")}
    line = "--lr_schedule WarmupDecayLR --total_num_steps 90 --warmup_type linear"
    params = scheduler_from_arguments(parsed(line))["params"]
    assert params["total_num_steps"] == 90 and params["warmup_type"] == "linear"


def test_defaults_of_arguments():
    """DeepSpeed's, but for those that cannot work there."""
    want = {
        "lr_schedule": None, "lr_range_test_min_lr": 0.001, "lr_range_test_step_rate": 1.0, "lr_range_test_step_size": 1000, "lr_range_test_staircase": False, "cycle_first_step_size": 1000,
        "decay_step_size": 1000, "cycle_min_lr": 0.01, "cycle_max_lr": 0.1, "decay_lr_rate": 0.0, "cycle_min_mom": 0.8, "cycle_max_mom": 0.9, "decay_mom_rate": 0.0, "warmup_min_lr": 0,
        "warmup_max_lr": 0.001, "warmup_num_steps": 1000, "warmup_type": "log", "warmup_min_ratio": 0.01, "cos_min_ratio": 0.01,
    }  # fmt: skip
    ours = {"cycle_second_step_size": None, "cycle_first_stair_count": 0, "cycle_second_stair_count": None, "cycle_momentum": True, "total_num_steps": None}  # fmt: skip
    assert vars(parsed("")) == want | ours


def test_errors_of_arguments():
    assert scheduler_from_arguments(parsed("--warmup_num_steps 3")) is None
    with pytest.raises(DeepSpeedConfigError, match="did you mean 'WarmupLR'"):
        scheduler_from_arguments(parsed("--lr_schedule WarmupL"))
    with pytest.raises(DeepSpeedConfigError, match="--total_num_steps"):
        scheduler_from_arguments(parsed("--lr_schedule WarmupCosineLR"))


# --- in a step ---


def test_a_policy_drives_a_compiled_step():
    policy = build("OneCycle", {"cycle_min_lr": 0.1, "cycle_max_lr": 0.5, "cycle_first_step_size": 2}, 0.1)
    program, params = fds.functionalize(torch.nn.Linear(2, 1, bias=False))
    step = fds.train_step(program, optim.sgd(policy.learning_rate), loss=lambda p, s, b: p(s, b["x"]).sum())
    run, state = fds.compile(step, backend="aot_eager"), step.init(params)
    seen = []
    for _ in range(6):
        before = tree.map(torch.clone, state.params)
        state, _ = run(state, {"x": torch.ones(1, 2)})
        seen.append(float((before[""]["weight"] - state.params[""]["weight"]).mean()))
    assert seen == pytest.approx([0.1, 0.3, 0.5, 0.3, 0.1, 0.1], rel=1e-5)
