"""DeepSpeed's optimizers by name: the rule and the defaults of each, against torch where DeepSpeed takes torch's; what is refused."""

import re

import pytest
import torch

import fds
from fds import optim, tree
from fds.deepspeed import DeepSpeedConfigError
from fds.deepspeed.optimizers import NO_EFFECT, build, muon_label, rule, without_effect
from fds.deepspeed.schema.methods import OPTIMIZERS
from fds.sharding.mesh import Axis

ONE = Axis("dp", 1, 0, "")


def params():
    g = torch.Generator().manual_seed(0)
    return {
        "embed.weight": torch.randn(5, 3, generator=g),
        "h.up": torch.randn(3, 4, generator=g),
        "h.bias": torch.randn(4, generator=g),
    }


def gradients(step):
    g = torch.Generator().manual_seed(step + 1)
    return tree.map(lambda p: torch.randn(p.shape, generator=g), params())


def run(tx, steps=5):
    p = params()
    state = tx.init(p)
    for i in range(steps):
        updates, state = tx.update(tx.reduce(gradients(i)), state, p)
        p = optim.apply_updates(p, updates)
    return p


def run_torch(make, pick=lambda k: True):
    leaves = {k: x.clone().requires_grad_() for k, x in params().items() if pick(k)}
    tx = make(list(leaves.values()))
    for i in range(5):
        for k, x in leaves.items():
            x.grad = gradients(i)[k]
        tx.step()
    return leaves


T = torch.optim
BETAS = {"betas": [0.8, 0.95]}


@pytest.mark.parametrize(
    ("type", "given", "theirs"),
    [
        ("Adam", {}, lambda p: T.AdamW(p, weight_decay=0.0)),
        ("adam", {"lr": 1e-2, "weight_decay": 0.1, **BETAS}, lambda p: T.AdamW(p, 1e-2, betas=(0.8, 0.95), weight_decay=0.1)),
        ("Adam", {"weight_decay": 0.1, "adam_w_mode": False}, lambda p: T.Adam(p, weight_decay=0.1)),
        ("Adam", {"torch_adam": True}, lambda p: T.AdamW(p)),
        ("Adam", {"torch_adam": True, "adam_w_mode": False}, lambda p: T.Adam(p)),
        ("AdamW", {"eps": 1e-3}, lambda p: T.AdamW(p, eps=1e-3, weight_decay=0.0)),
        ("FusedAdam", {"weight_decay": 0.1}, lambda p: T.AdamW(p, weight_decay=0.1)),
        ("DeepSpeedCPUAdam", {"weight_decay": 0.1, "adamw_mode": False}, lambda p: T.Adam(p, weight_decay=0.1)),
        ("Adagrad", {"weight_decay": 0.1}, lambda p: T.Adagrad(p, weight_decay=0.1)),
        ("Adagrad", {"lr_decay": 0.1, "initial_accumulator_value": 0.5}, lambda p: T.Adagrad(p, lr_decay=0.1, initial_accumulator_value=0.5)),
        ("SGD", {}, lambda p: T.SGD(p)),
        ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, lambda p: T.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.1)),
        ("SGD", {"maximize": True, "weight_decay": 0.1}, lambda p: T.SGD(p, maximize=True, weight_decay=0.1)),
    ],
)  # fmt: skip
def test_where_deepspeed_takes_torchs(type, given, theirs):
    got, want = run(build(type, given)), run_torch(theirs)
    for k, w in want.items():
        torch.testing.assert_close(got[k], w.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("type", "given", "words"),
    [
        ("Adam", {"bias_correction": False}, "fds.optim.adamw(learning_rate=0.001, b1=0.9, b2=0.999, eps=1e-08, weight_decay=0.0, bias_correction=False)"),
        ("Lion", {}, "fds.optim.lion(learning_rate=0.001, b1=0.9, b2=0.999, weight_decay=0.0)"),
        ("Lamb", {}, "fds.optim.lamb(learning_rate=0.001, b1=0.9, b2=0.999, eps=1e-08, weight_decay=0.0, min_ratio=0.01, max_ratio=10.0, correction='rate')"),
        ("FusedLamb", {"bias_correction": False, "eps_inside_sqrt": True, "max_coeff": 2.0}, "fds.optim.lamb(learning_rate=0.001, b1=0.9, b2=0.999, eps=1e-08, weight_decay=0.0, min_ratio=0.01, max_ratio=2.0, correction='none', eps_inside=True)"),
        ("OneBitAdam", {"freeze_step": 7}, "fds.optim.onebit_adam(learning_rate=0.001, b1=0.9, b2=0.999, eps=1e-08, weight_decay=0.0, freeze_step=7)"),
        ("ZeroOneAdam", {}, "fds.optim.zero_one_adam(learning_rate=0.001, b1=0.9, b2=0.999, eps=1e-08, weight_decay=0.0, var_freeze_step=100000, var_update_scaler=16, local_step_scaler=32678, local_step_clipper=16)"),
        ("OneBitLamb", {}, "fds.optim.onebit_lamb(learning_rate=0.001, b1=0.9, b2=0.999, eps=1e-08, weight_decay=0.0, freeze_step=100000, max_ratio=10.0, min_ratio=0.01, coeff_beta=0.9, factor_max=4.0, factor_min=0.5, factor_threshold=0.1)"),
        ("Muon", {"lr": 0.01, "ns_method": "standard"}, "fds.optim.partition(optimizers={'muon': fds.optim.muon(learning_rate=0.01, momentum=0.95, weight_decay=0.0, method='standard', dtype=torch.bfloat16), 'rest': fds.optim.adamw(learning_rate=0.01, b1=0.9, b2=0.95, eps=1e-10, weight_decay=0.0)}, labels=fds.deepspeed.optimizers.muon_label)"),
    ],
)  # fmt: skip
def test_the_rule_prints_as_it_is_made(type, given, words):
    assert repr(rule(type, given)) == words
    own = words.replace("learning_rate", "axis=ONE, learning_rate") if "one" in words.split("(")[0] else words
    again = eval(own, {"fds": fds, "torch": torch, "ONE": ONE})
    for a, b in zip(tree.leaves(run(build(type, given, axis=ONE), 2)), tree.leaves(run(again, 2)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("type", OPTIMIZERS)
def test_every_name_builds_and_trains(type):
    tx = build(type.upper(), {}, axis=ONE)
    assert all(x.isfinite().all() and not torch.equal(x, params()[k]) for k, x in run(tx).items())


def test_muons_matrices_and_the_rest():
    given = {"muon_lr": 0.05, "adam_lr": 1e-3, "weight_decay": 0.1, "ns_method": "standard"}
    got = run(build("Muon", given))
    muon = run_torch(lambda p: T.Muon(p, lr=0.05, weight_decay=0.1), lambda k: k == "h.up")
    rest = run_torch(lambda p: T.AdamW(p, 1e-3, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.1), lambda k: k != "h.up")
    torch.testing.assert_close(got["h.up"], muon["h.up"].detach(), rtol=1e-4, atol=5e-4)
    for k, w in rest.items():
        torch.testing.assert_close(got[k], w.detach(), rtol=1e-5, atol=1e-6)
    assert repr(rule("Muon")).count("learning_rate=0.02") == repr(rule("Muon")).count("learning_rate=0.0003") == 1
    assert [muon_label(k, x) for k, x in params().items()] == ["rest", "muon", "rest"]


@pytest.mark.parametrize("type", ["AdamW", "Muon", "SGD"])
def test_a_schedule_is_the_rate_of_all(type):
    tx = build(type, {"lr": 0.5}, schedule=optim.constant(0.0))
    assert all(torch.equal(x, params()[k]) for k, x in run(tx, 2).items())
    assert "learning_rate" not in optim.get_hyperparams(tx.init(params()))


@pytest.mark.parametrize("type", OPTIMIZERS)
def test_a_default_that_is_written_down_changes_nothing(type):
    """What the table says is the default, is what is made without it."""
    plain = repr(rule(type))
    for k, (default, _) in OPTIMIZERS[type].items():
        if default is not None and (type, k) not in {("Muon", "lr"), ("Muon", "weight_decay")}:
            assert repr(rule(type, {k: default})) == plain, k


def test_what_changes_nothing_is_said():
    given = {"lr": 1e-3, "cuda_aware": False, "comm_backend_name": "nccl"}
    build("OneBitAdam", given, axis=ONE)
    assert without_effect(given).keys() == {"cuda_aware", "comm_backend_name"}
    assert all(any(k in table for table in OPTIMIZERS.values()) for k in NO_EFFECT)


@pytest.mark.parametrize(
    ("type", "given", "key", "words"),
    [
        ("AdmW", {}, "optimizer.type", "did you mean 'AdamW'"),
        ("RMSprop", {}, "optimizer.type", "is torch's, and no rule here"),
        ("MuAdam", {}, "optimizer.type", "optim.partition"),
        ("Adam", {"learning_rate": 1e-3}, "optimizer.params.learning_rate", "Adam has no such parameter"),
        ("Adam", {"max_grad_norm": 1.0}, "optimizer.params.max_grad_norm", "gradient_clipping"),
        ("Adam", {"lr": -1.0}, "optimizer.params.lr", "given -1.0"),
        ("Adam", {"betas": [0.9]}, "optimizer.params.betas", "given [0.9]"),
        ("Adam", {"amsgrad": True}, "optimizer.params.amsgrad", "given True"),
        ("AdamW", {"adam_w_mode": False}, "optimizer.params.adam_w_mode", "use type Adam"),
        ("CPUAdam", {"adam_w_mode": False, "adamw_mode": True}, "optimizer.params.adamw_mode", "mean the same"),
        ("CPUAdam", {"fp32_optimizer_states": False}, "optimizer.params.fp32_optimizer_states", "given False"),
        ("Adam", {"torch_adam": True, "bias_correction": False}, "optimizer.params.bias_correction", "torch_adam"),
        ("SGD", {"momentum": 0.9, "dampening": 0.1}, "optimizer.params.dampening", "given 0.1"),
        ("SGD", {"nesterov": True}, "optimizer.params", "momentum > 0"),
        ("Lamb", {"min_coeff": 2.0, "max_coeff": 1.0}, "optimizer.params", "min_ratio <= max_ratio"),
        ("Muon", {"ns_method": "grams"}, "optimizer.params.ns_method", "gram"),
        ("OneBitAdam", {"eps_inside_sqrt": True}, "optimizer.params.eps_inside_sqrt", "leave it out"),
        ("OneBitLamb", {"bias_correction": True}, "optimizer.params.bias_correction", "leave it out"),
    ],
)  # fmt: skip
def test_what_cannot_be(type, given, key, words):
    with pytest.raises(DeepSpeedConfigError, match=re.escape(words)) as caught:
        build(type, given, axis=ONE)
    assert caught.value.keys == (key,) and key in str(caught.value)


def test_one_bit_needs_its_axis_and_all_problems_are_told():
    with pytest.raises(DeepSpeedConfigError, match=r"axis=mesh\['dp'\]"):
        build("OneBitAdam", {})
    with pytest.raises(DeepSpeedConfigError) as caught:
        build("Adam", {"lrr": 1, "eps": -1})
    assert caught.value.keys == ("optimizer.params.lrr", "optimizer.params.eps")
