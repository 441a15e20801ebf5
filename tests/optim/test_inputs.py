"""What goes in wrong is refused with a name; scalars and settings that come later count."""

import re

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from fds import optim, tree
from fds.sharding.mesh import Axis

ONE = Axis("dp", 1, 0, "")
P = {"w": torch.ones(3)}
RULES = {
    "adamw": lambda: optim.adamw(0.1, weight_decay=0.1),
    "sgd": lambda: optim.sgd(0.1, weight_decay=0.1),
    "momentum": lambda: optim.sgd(0.1, momentum=0.9, nesterov=True),
    "chain": lambda: optim.chain(optim.clip_by_global_norm(0.1), optim.adamw(optim.linear_warmup(0.1, 3))),
    "schedule": lambda: optim.scale_by_schedule(optim.constant(0.1)),
    "offloaded": lambda: optim.offloaded(optim.adamw(0.1)),
}


@pytest.mark.parametrize("name", RULES)
def test_a_scalar_leaf_keeps_its_dtype(name):
    tx, p = RULES[name](), {"temperature": torch.tensor(2.0)}
    state = tx.init(p)
    updates, after = tx.update(p, state, p)
    assert updates["temperature"].dtype == torch.float32
    assert [x.dtype for x in tree.leaves(after)] == [x.dtype for x in tree.leaves(state)]


def test_weight_decay_can_be_switched_on_later():
    tx = optim.sgd(0.1)
    state = optim.set_hyperparams(tx.init(P), weight_decay=0.5)
    torch.testing.assert_close(tx.update(P, state, P)[0]["w"], torch.full((3,), -0.15))


def test_momentum_without_a_buffer_cannot_be_set():
    with pytest.raises(ValueError, match="momentum"):
        optim.set_hyperparams(optim.sgd(0.1).init(P), momentum=0.9)


@pytest.mark.parametrize(
    ("name", "value"), [("learning_rate", -1.0), ("learning_rate", torch.ones(2)), ("b1", 1.0), ("eps", float("nan"))]
)
def test_set_checks_the_value(name, value):
    with pytest.raises(ValueError, match=name):
        optim.set_hyperparams(optim.adamw(0.1).init(P), **{name: value})


@pytest.mark.parametrize(
    "make",
    [
        lambda: optim.adamw("fast"),
        lambda: optim.adamw(torch.ones(1)),
        lambda: optim.scale(float("nan")),
        lambda: optim.constant(-1.0),
        lambda: optim.linear_warmup(-1.0, 3),
        lambda: optim.warmup_cosine(1.0, warmup_steps=1, total_steps=2, end=-0.1),
    ],
)
def test_bad_values_are_refused_when_made(make):
    with pytest.raises(ValueError, match="required"):
        make()


@pytest.mark.parametrize("name", ["adamw", "sgd", "offloaded"])
@pytest.mark.parametrize(
    "grads", [{"w": torch.ones(1)}, {"v": torch.ones(2)}, {"w": torch.ones(3), "v": torch.ones(1)}]
)
def test_gradients_of_another_shape_are_named(name, grads):
    tx = RULES[name]()
    with pytest.raises(ValueError, match=r"^[vw]: gradient"):
        tx.update(grads, tx.init(P), P)


def test_sharded_takes_reduced_gradients_once():
    tx = optim.sharded(optim.adamw(0.1), ONE)
    with pytest.raises(ValueError, match=r"tx.reduce\(grads\)"):
        tx.update(P, tx.init(P), P)
    with pytest.raises(ValueError, match="dtypes"):
        tx.update(tx.reduce({"w": torch.ones(3).bfloat16()}), tx.init(P), P)
    with pytest.raises(ValueError, match="sharded already"):
        optim.sharded(tx, ONE)
    with pytest.raises(ValueError, match="required an axis of a mesh"):
        optim.sharded(optim.adamw(0.1), {"dp": ONE})


@pytest.mark.parametrize("leaves", [1, 6])
def test_a_compiled_adamw_leaf_is_one_loop_without_powers(leaves):
    tx = optim.adamw(1e-3, weight_decay=0.01)
    p = {f"w{i}": torch.randn(64, 100 + i) for i in range(leaves)}
    spec = tree.map(lambda x: x.to("meta"), tx.init(p))

    def step(p, flat, g):
        updates, state = tx.update(g, tree.rebuild(spec, iter(flat)), p)
        return optim.apply_updates(p, updates), tree.flat(state)

    _, (source, *_) = run_and_get_code(torch.compile(step, fullgraph=True), p, tree.flat(tx.init(p)), p)
    assert len(re.findall(r"for\(int64_t", source)) == leaves
    assert "pow(" not in source
    assert source.count("std::expm1") == 2  # both corrections, once for all leaves
