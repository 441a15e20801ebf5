"""`sharded` over ranks equals one process; `offloaded` changes no value."""

import by_ranks
import pytest
import ranks
import torch
from by_ranks import ONE, close, gradients, same, whole

import fds
from fds import optim, tree
from fds.sharding import mesh


def rule(name):
    tx = optim.chain(optim.clip_by_global_norm(0.5), optim.adamw(0.05, weight_decay=0.1))
    return {"adamw": tx, "sgd": optim.sgd(0.1, momentum=0.9), "offloaded": optim.offloaded(optim.adamw(0.05))}[name]


def params():
    g = torch.Generator().manual_seed(1)
    sizes = {"a": (3, 3), "b": (5,), "c": (0, 2), "d": (1,)}
    out = {k: torch.randn(s, generator=g) for k, s in sizes.items()}
    return {"": out, "h.0": {"half": torch.randn(7, generator=g).bfloat16()}}


def split(name, n, compiled=False):
    axis = mesh(dp=n)["dp"] if n > 1 else ONE
    p, leaves, traffic = by_ranks.split(optim.sharded(rule(name), axis), params(), axis, compiled=compiled)
    return p, tree.nbytes(leaves), dict(traffic.calls), dict(traffic.bytes)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["adamw", "sgd", "offloaded"])
def test_two_ranks_equal_one_process(name, compiled):
    results = ranks.run(2, split, name, 2, compiled)
    for got, *_ in results:
        close(got, whole(rule(name), params(), 2), 8)
    assert same(results[0][0], results[1][0])


def test_traffic_and_memory_are_the_closed_forms():
    (_, bytes_two, calls, moved), _ = ranks.run(2, split, "sgd", 2)
    padded = 4 * 16 + 2 * 8  # 15 float32 and 7 bfloat16 elements, each padded to a multiple of two
    assert {k: v for k, v in calls.items() if k in ("scatter", "gather")} == {"scatter": 2, "gather": 2}
    assert moved["scatter"] == moved["gather"] == padded
    _, bytes_one, *_ = split("sgd", 1)
    # Momentum is float32 for both dtypes; counts and hyperparameters are 0-D and the same everywhere.
    assert bytes_one - bytes_two == 4 * (15 - 8) + 4 * (7 - 4)


@pytest.mark.parametrize("name", ["adamw", "sgd", "offloaded"])
def test_one_rank_needs_no_group(name):
    close(split(name, 1)[0], whole(rule(name), params(), 1), 8)


def test_sharded_inside_of_others_is_refused():
    with pytest.raises(ValueError, match=r"sharded\("):
        optim.chain(optim.scale(1.0), optim.sharded(optim.sgd(0.1), ONE))
    with pytest.raises(ValueError, match=r"sharded\(offloaded\(tx\), axis\)"):
        optim.offloaded(optim.sharded(optim.sgd(0.1), ONE))


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_offloaded_changes_no_value(name):
    plain, moved = rule(name), optim.offloaded(rule(name))
    p, a, b = params(), plain.init(params()), moved.init(params())
    for i in range(4):
        g = gradients(p, i, 0)
        want, a = plain.update(g, a, p)
        got, b = moved.update(g, b, p)
        assert same(got, want)
        p = optim.apply_updates(p, want)
    assert {x.device.type for x in tree.leaves(b)} <= {"cpu"}


@pytest.mark.parametrize("wrap", [lambda tx: optim.sharded(tx, ONE), optim.offloaded], ids=["sharded", "offloaded"])
def test_hyperparameters_are_reached_through_wrappers(wrap):
    tx, p = wrap(optim.adamw(0.1)), params()
    state = optim.set_hyperparams(tx.init(p), learning_rate=0.0)
    assert optim.get_hyperparams(state)["learning_rate"] == 0.0
    updates, _ = tx.update(tx.reduce(p), state, p)
    assert all(not u.any() for u in tree.leaves(updates))


def summed(sum_dtype):
    """This rank's shard of the mean of gradients of bfloat16, and bytes on the wire."""
    axis = fds.sharding.mesh(dp=-1)["dp"]
    grads = {"w": torch.full((6,), 1.0 + 2.0**-7 * axis.rank).bfloat16(), "v": torch.full((2,), 1.0 + axis.rank)}
    tx = optim.sharded(optim.with_master(optim.sgd(1.0)), axis, sum_dtype=sum_dtype)
    with fds.sharding.record() as wire:
        shards = tx.reduce(grads)
    updates, _ = tx.update(shards, tx.init(grads), grads)
    return {k: (x.dtype, x.tolist()) for k, x in shards.items()}, updates["w"].float().tolist(), wire.bytes["scatter"]


def test_gradients_of_16_bits_are_summed_in_float32():
    for shards, _, sent in ranks.run(2, summed, None):
        assert (
            shards["bfloat16"] == (torch.bfloat16, [1.0] * 3) and sent == 6 * 2 + 2 * 4
        )  # half of the last bit is lost
    for shards, updates, sent in ranks.run(2, summed, torch.float32):
        assert shards["bfloat16"] == (torch.float32, [1.0 + 2.0**-8] * 3) and shards["float32"][1] == [1.5]
        assert sent == 6 * 4 + 2 * 4 and len(updates) == 6
    with pytest.raises(ValueError, match="sum_dtype"):
        optim.sharded(optim.sgd(1.0), fds.sharding.mesh(dp=1)["dp"], sum_dtype=torch.int8)
