"""Reading, replacing and checking hyperparameters."""

import pytest
import torch

from fds import optim, tree

P = {"w": torch.ones(3)}


def test_names_and_values():
    state = optim.chain(optim.clip_by_global_norm(2.0), optim.adamw(0.1, weight_decay=0.5)).init(P)
    got = optim.get_hyperparams(state)
    want = {"max_norm": 2.0, "learning_rate": 0.1, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.5}
    assert {k: float(v) for k, v in got.items()} == pytest.approx(want)


@pytest.mark.parametrize("value", [0.25, torch.tensor(0.25), torch.tensor(0.25, dtype=torch.float64)])
def test_set_returns_a_new_state(value):
    tx = optim.sgd(0.5)
    state = tx.init(P)
    changed = optim.set_hyperparams(state, learning_rate=value)
    assert torch.equal(tx.update(P, changed, P)[0]["w"], torch.full((3,), -0.25))
    assert torch.equal(tx.update(P, state, P)[0]["w"], torch.full((3,), -0.5))
    assert [x.dtype for x in tree.leaves(changed)] == [x.dtype for x in tree.leaves(state)]


def test_a_given_tensor_is_copied():
    rate = torch.tensor(0.5)
    made, changed = optim.sgd(rate).init(P), optim.set_hyperparams(optim.sgd(0.1).init(P), learning_rate=rate)
    rate.fill_(7.0)
    assert [float(optim.get_hyperparams(s)["learning_rate"]) for s in (made, changed)] == [0.5, 0.5]


def test_unknown_name_gets_a_near_match():
    with pytest.raises(ValueError, match=r"learning_rat.*did you mean 'learning_rate'"):
        optim.set_hyperparams(optim.sgd(0.1).init(P), learning_rat=1.0)


def test_a_schedule_is_no_hyperparameter():
    state = optim.adamw(optim.constant(0.1)).init(P)
    with pytest.raises(ValueError, match="learning_rate"):
        optim.set_hyperparams(state, learning_rate=1.0)


NAN = float("nan")


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("learning_rate", lambda: optim.sgd(-0.1)),
        ("learning_rate", lambda: optim.adamw(NAN)),
        ("learning_rate", lambda: optim.adamw(float("inf"))),
        ("momentum", lambda: optim.sgd(0.1, momentum=-0.5)),
        ("weight_decay", lambda: optim.sgd(0.1, weight_decay=-1.0)),
        ("nesterov", lambda: optim.sgd(0.1, nesterov=True)),
        ("b1", lambda: optim.adamw(0.1, b1=1.0)),
        ("b2", lambda: optim.adamw(0.1, b2=-0.1)),
        ("eps", lambda: optim.adamw(0.1, eps=-1e-8)),
        ("weight_decay", lambda: optim.adamw(0.1, weight_decay=-1.0)),
        ("max_norm", lambda: optim.clip_by_global_norm(-1.0)),
    ],
)
def test_numbers_out_of_range(name, make):
    with pytest.raises(ValueError, match=name):
        make()
