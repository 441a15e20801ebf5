"""`with_master`: bfloat16 parameters that follow torch's recipe of a float32 copy, whole and split, compiled, skipped, saved."""

from pathlib import Path

import pytest
import ranks
import torch
from torch import nn

import fds
from fds import optim, tree
from fds.sharding.mesh import Axis

ONE = Axis("dp", 1, 0, "")


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).bfloat16()


def rows(i):
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(i)).bfloat16()


def loss(program, stored, batch):
    return program(stored, batch["x"]).float().square().mean()


def reference(steps):
    """Parameters after steps of torch's AdamW over a float32 copy."""
    m = model()
    master = [p.detach().float().requires_grad_() for p in m.parameters()]
    tx = torch.optim.AdamW(master, lr=1e-3, weight_decay=0.1)
    for i in range(steps):
        m.zero_grad()
        m(rows(i)).float().square().mean().backward()
        for w, p in zip(master, m.parameters(), strict=True):
            w.grad = p.grad.float()
        tx.step()
        with torch.no_grad():
            for w, p in zip(master, m.parameters(), strict=True):
                p.copy_(w)
    return {k: p.detach() for k, p in m.named_parameters()}, master


def make(wrap=lambda tx: tx):
    program, params = fds.functionalize(model())
    tx = wrap(optim.with_master(optim.adamw(1e-3, weight_decay=0.1)))
    return fds.train_step(program, tx, loss=loss), params


def trained(step, params, steps, at=0, n=1):
    state = step.init(params)
    for i in range(steps):
        state, metrics = step(state, {"x": rows(i).chunk(n)[at]})
    assert not metrics["skipped"]
    return state


@pytest.mark.parametrize("compiled", [False, True])
def test_it_is_torchs_recipe(compiled):
    step, params = make()
    state = trained(fds.compile(step) if compiled else step, params, 6)
    want, master = reference(6)
    for k, p in tree.named(state.params).items():
        torch.testing.assert_close(p, want[k], rtol=2**-7, atol=0)
    for got, m in zip(tree.leaves(state.optimizer[0]), [master[i] for i in (1, 0, 3, 2)], strict=True):  # bias, weight
        torch.testing.assert_close(got, m, rtol=1e-4, atol=1e-6)
    for p, m in zip(tree.leaves(state.params), tree.leaves(state.optimizer[0]), strict=True):
        assert p.dtype == torch.bfloat16 and torch.equal(p, m.bfloat16())


def test_small_updates_add_up():
    """Without a copy they are lost."""
    w, g = {"w": torch.ones(1, dtype=torch.bfloat16)}, {"w": torch.full((1,), 1.0, dtype=torch.bfloat16)}
    ends = []
    for tx in (optim.sgd(1e-3), optim.with_master(optim.sgd(1e-3))):
        state, p = tx.init(w), w
        for _ in range(20):
            updates, state = tx.update(g, state, p)
            p = optim.apply_updates(p, updates)
        ends.append(float(p["w"]))
    assert ends[0] == 1.0 and ends[1] == pytest.approx(0.98, abs=2**-9)


def test_a_skipped_step_changes_nothing():
    step, params = make()
    state = trained(step, params, 2)
    before = [x.clone() for x in tree.leaves((state.params, state.optimizer))]
    state, metrics = step(state, {"x": rows(0) * float("nan")})
    assert metrics["was_skipped"]
    assert all(torch.equal(a, b) for a, b in zip(before, tree.leaves((state.params, state.optimizer)), strict=True))


def split(compiled, folder):
    axis = fds.sharding.mesh(dp=2)["dp"]
    step, params = make(lambda tx: optim.sharded(tx, axis))
    state = trained(fds.compile(step) if compiled else step, params, 4, axis.rank, 2)
    with fds.sharding.collectives.record() as traffic:
        new, _ = step(state, {"x": rows(4).chunk(2)[axis.rank]})
    fds.save_state(folder, step, new)
    return tree.leaves(new.params), tree.leaves(new.optimizer[0]), dict(traffic.bytes), tree.nbytes(new.optimizer)


@pytest.mark.parametrize("compiled", [False, True])
def test_two_ranks_follow_one_and_its_files_go_on_there(tmp_path, compiled):
    (params, master, moved, nbytes), (again, *_) = ranks.run(2, split, compiled, str(tmp_path / "two"))
    step, start = make()
    want = trained(step, start, 5)
    copies = tree.leaves(want.optimizer[0])
    for p, q, w in zip(params, again, tree.leaves(want.params), strict=True):
        assert torch.equal(p, q)
        torch.testing.assert_close(p, w, rtol=2**-6, atol=1e-4)
    n = sum(p.numel() for p in params)
    assert moved["scatter"] == moved["gather"] == 2 * n, "bfloat16 on the wire"
    assert [m.numel() for m in master] == [n // 2] and nbytes < 12 * n // 2 + 200
    for other, name in ((step, "one"), (make(optim.offloaded)[0], "offloaded")):
        got = fds.load_state(tmp_path / "two", other)
        for p, q in zip(tree.leaves(got.params), params, strict=True):
            assert torch.equal(p, q), name
        if name == "one":
            for m, c in zip(tree.leaves(got.optimizer[0]), copies, strict=True):
                torch.testing.assert_close(m, c, rtol=1e-2, atol=1e-4)
            for m, p in zip(tree.leaves(got.optimizer[0]), params, strict=True):
                assert torch.equal(m.bfloat16(), p)
    assert Path(tmp_path / "two" / "state.json").is_file()


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"sharded\(with_master\(tx\), axis\)"):
        optim.with_master(optim.sharded(optim.sgd(0.1), ONE))
    with pytest.raises(ValueError, match=r"float16, required torch.float32"):
        optim.with_master(optim.sgd(0.1), torch.float16)
