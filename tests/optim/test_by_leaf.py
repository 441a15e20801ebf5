"""`sharded` of optimizers that look at whole leaves: two ranks follow one process, in the bytes and the memory that are promised."""

import by_ranks
import pytest
import ranks
import torch
from by_ranks import ONE, close, gradients, same, whole

import fds
from fds import optim, tree
from fds.optim.by_leaf import owners


def rule(name):
    rest = optim.chain(optim.clip_by_global_norm(0.3), optim.adamw(0.01, weight_decay=0.1))
    return {
        "lamb": optim.chain(optim.clip_by_global_norm(0.5), optim.lamb(0.05, weight_decay=0.1)),
        "muon": optim.partition(
            {"muon": optim.muon(0.02, dtype=torch.float32), "rest": rest},
            lambda name, leaf: "muon" if leaf.dim() == 2 else "rest",
        ),
        "master": optim.with_master(optim.lamb(0.05)),
    }[name]


def params():
    g = torch.Generator().manual_seed(1)
    sizes = {"a": (6, 3), "b": (5,), "c": (0, 2), "d": (1,)}
    out = {k: torch.randn(s, generator=g) for k, s in sizes.items()}
    return {"": out, "h.0": {"half": torch.randn(7, generator=g).bfloat16(), "w": torch.randn(2, 4, generator=g)}}


def split(name, n, bucket_bytes=2**25, compiled=False):
    axis = fds.sharding.mesh(dp=n)["dp"] if n > 1 else ONE
    tx = optim.sharded(rule(name), axis, bucket_bytes=bucket_bytes)
    p, leaves, traffic = by_ranks.split(tx, params(), axis, compiled=compiled)
    return p, [x.numel() for x in leaves if x.dim()], dict(traffic.calls), dict(traffic.bytes)


@pytest.mark.parametrize(("name", "compiled"), [("lamb", False), ("muon", False), ("master", False), ("muon", True)])
def test_two_ranks_equal_one_process(name, compiled):
    results = ranks.run(2, split, name, 2, 2**25, compiled)
    for got, *_ in results:
        close(got, whole(rule(name), params(), 2), 16)
    assert same(results[0][0], results[1][0])


def test_traffic_and_memory_are_the_closed_forms():
    (_, first, calls, moved), (_, second, *_) = ranks.run(2, split, "lamb", 2)
    # float32: 18 for one rank; 8, 5, 1 and nothing for the other. bfloat16: 7, for the first.
    assert {k: v for k, v in calls.items() if k in ("scatter", "gather")} == {"scatter": 2, "gather": 2}
    assert moved["scatter"] == moved["gather"] == 2 * (4 * 18 + 2 * 7)
    assert sorted(first) == sorted([18, 7] * 2) and sorted(second) == sorted([8, 5, 1, 0] * 2)


def test_buckets_change_no_bit():
    got, want = (ranks.run(2, split, "muon", 2, size)[0] for size in (24, 2**25))
    assert got[2]["scatter"] > want[2]["scatter"]
    assert same(got[0], want[0])


def in_place(bucket_bytes):
    axis = fds.sharding.mesh(dp=2)["dp"]
    tx, p = optim.sharded(rule("muon"), axis, bucket_bytes=bucket_bytes), params()
    state = tx.init(p)
    for i in range(4):
        homes = [x.data_ptr() for x in tree.leaves(p)]
        ok = torch.tensor(i != 2)
        p, state = tx.step(
            tx.reduce(gradients(params(), i, axis.rank)), state, p, norm=norm_of(axis), ok=ok, donated=True
        )
        assert [x.data_ptr() for x in tree.leaves(p)] == homes
    return p


def norm_of(axis):
    return lambda grads: axis.sum(tree.square_sum(tree.leaves(grads))).sqrt()


@pytest.mark.parametrize("bucket_bytes", [24, 2**25])
def test_a_donated_step_writes_over_the_parameters(bucket_bytes):
    want = whole(rule("muon"), params(), 2, (0, 1, 3))
    for got in ranks.run(2, in_place, bucket_bytes):
        close(got, want, 16)


@pytest.mark.parametrize("name", ["lamb", "muon"])
def test_one_rank_needs_no_group(name):
    close(split(name, 1)[0], whole(rule(name), params(), 1), 16)


def test_leaves_go_to_the_rank_that_has_least():
    assert owners([], 2) == [[], []] and owners([3, 3, 3, 2, 1], 2) == [[0, 2], [1, 3, 4]]
    with pytest.raises(ValueError, match=r"tx.reduce\(grads\)"):
        tx = optim.sharded(optim.lamb(0.1), ONE)
        tx.update(params(), tx.init(params()), params())


# --- a train step ---


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = torch.nn.Linear(4, 6), torch.nn.LayerNorm(6), torch.nn.Linear(6, 4)

    def forward(self, x):
        return self.down(self.norm(self.up(x)))


def rows(i):
    return torch.randn(4, 4, generator=torch.Generator().manual_seed(i)) * (float("nan") if i == 2 else 1.0)


def trained(wrap, compiled, steps, at=0, n=1, load=None):
    torch.manual_seed(0)
    program, p = fds.functionalize(Net())
    tx = wrap(rule("muon"))
    step = fds.train_step(program, tx, loss=lambda f, s, b: (f(s, b["x"]) - b["x"]).square().mean())
    state = step.init(p) if load is None else fds.load_state(load, step)
    run = fds.compile(step) if compiled else step
    for i in steps:
        state, metrics = run(state, {"x": rows(i).chunk(n)[at]})
    return step, state, float(metrics["grad_norm"])


def train_on_two(compiled, folder):
    axis = fds.sharding.mesh(dp=2)["dp"]
    step, state, norm = trained(lambda tx: optim.sharded(tx, axis), compiled, range(5), axis.rank, 2)
    fds.save_state(folder, step, state)
    return tree.named(state.params), norm, int(state.skipped)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_on_two_ranks_follows_one_and_its_files_go_on_there(compiled, tmp_path):
    (params, norm, skipped), (again, *_) = ranks.run(2, train_on_two, compiled, str(tmp_path))
    _, want, n = trained(lambda tx: tx, False, range(5))
    assert skipped == 1 and norm == pytest.approx(n, rel=1e-4)
    for k, w in tree.named(want.params).items():
        assert torch.equal(params[k], again[k])
        torch.testing.assert_close(params[k], w, rtol=1e-4, atol=1e-5)
    _, more, _ = trained(lambda tx: tx, False, range(5, 7), load=tmp_path)
    _, want, _ = trained(lambda tx: tx, False, range(7))
    for k, w in tree.named(want.params).items():
        torch.testing.assert_close(tree.named(more.params)[k], w, rtol=1e-4, atol=1e-5)


def without_leaves():
    """One leaf: the second rank has none, and no use of its own for the norm that the first one clips by."""
    axis = fds.sharding.mesh(dp=2)["dp"]
    tx = optim.sharded(optim.chain(optim.scale(2.0), optim.clip_by_global_norm(0.5), optim.lamb(0.1)), axis)
    p = {"w": torch.ones(4, 3)}
    state = tx.init(p)

    def step(p, leaves, g):
        updates, new = tx.update(tx.reduce(g), tree.rebuild(state, iter(leaves)), p)
        return optim.apply_updates(p, updates), tree.flat(new)

    compiled, leaves = torch.compile(step, fullgraph=True, backend="aot_eager"), tree.flat(state)
    for _ in range(2):
        p, leaves = compiled(p, leaves, {"w": torch.full((4, 3), 1.0 + axis.rank)})
    return p["w"]


def test_a_rank_without_leaves_takes_part_in_norms():
    a, b = ranks.run(2, without_leaves, timeout=120)
    assert torch.equal(a, b) and not torch.equal(a, torch.ones(4, 3))


def summed(dtype):
    axis = fds.sharding.mesh(dp=2)["dp"]
    tx = optim.sharded(optim.lamb(0.1), axis, sum_dtype=dtype)
    p = {"w": torch.zeros(4, dtype=torch.bfloat16), "v": torch.zeros(3, dtype=torch.bfloat16)}
    value = 1.0 if axis.rank else 2.0**-9  # of the sum bfloat16 keeps the larger one alone
    return tx.reduce(tree.map(lambda x: torch.full_like(x, value), p))["bfloat16"]


def test_sums_in_another_dtype():
    narrow, wide = (ranks.run(2, summed, d)[0] for d in (None, torch.float32))
    assert narrow.dtype == torch.bfloat16 and float(narrow[0]) == 0.5
    assert wide.dtype == torch.float32 and float(wide[0]) == 0.5 + 2.0**-10
