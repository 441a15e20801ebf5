"""LAMB against its paper's formula and DeepSpeed's in float64, and as a kernel."""

import pytest
import torch

import fds
from fds import kernels, optim, tree


def problem():
    g = torch.Generator().manual_seed(0)
    p = {
        "a": torch.randn(4, 3, generator=g).double(),
        "b": {"c": torch.zeros(5).double(), "d": torch.tensor(2.0).double()},
    }
    return p, [tree.map(lambda x: torch.randn(x.shape, generator=g).double(), p) for _ in range(6)]


def run(tx, p, grads):
    state = tx.init(p)
    for g in grads:
        updates, state = tx.update(g, state, p)
        p = optim.apply_updates(p, updates)
    return p


def formula(p, grads, lr, b1, b2, eps, decay, low, high, correction, inside):
    """One leaf, step by step, as the paper and DeepSpeed's kernel write it."""
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t, g in enumerate(grads, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        rate, mh, vh = lr, m, v
        if correction == "moments":
            mh, vh = m / (1 - b1**t), v / (1 - b2**t)
        elif correction == "rate":
            rate = lr * (1 - b2**t) ** 0.5 / (1 - b1**t)
        r = mh / ((vh + eps).sqrt() if inside else vh.sqrt() + eps) + decay * p
        ratio = 1.0
        if p.norm() > 0 and r.norm() > 0:
            ratio = min(max(float(p.norm() / r.norm()), low), high)
        p = p - rate * ratio * r
    return p


@pytest.mark.parametrize("bounds", [(None, None), (0.3, 0.9)])
@pytest.mark.parametrize(("correction", "inside"), [("moments", False), ("rate", False), ("none", True)])
def test_it_is_its_formula(correction, inside, bounds):
    p, grads = problem()
    low, high = bounds
    tx = optim.lamb(0.05, b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.1, min_ratio=low, max_ratio=high, correction=correction, eps_inside=inside)  # fmt: skip
    got = run(tx, p, grads)
    for i, leaf in enumerate(tree.leaves(p)):
        each = [tree.leaves(g)[i] for g in grads]
        want = formula(leaf, each, 0.05, 0.8, 0.9, 1e-3, 0.1, low or 0.0, high or 1e9, correction, inside)
        torch.testing.assert_close(tree.leaves(got)[i], want, rtol=1e-12, atol=1e-14)


def test_it_is_the_kernel():
    """`fds.kernels.lamb_update` is the same rule on a flat buffer."""
    p, grads = problem()
    p, grads = (tree.map(torch.Tensor.float, x) for x in (p, grads))
    leaves = tree.leaves(p)
    flat = torch.cat([x.reshape(-1) for x in leaves])
    mu, nu, starts = torch.zeros_like(flat), torch.zeros_like(flat), torch.tensor([0, 12, 17])
    for i, g in enumerate(grads, 1):
        g = torch.cat([x.reshape(-1) for x in tree.leaves(g)])
        flat, mu, nu = kernels.lamb_update(flat, g, mu, nu, starts, rate=0.05, count=i, weight_decay=0.1)
    got = torch.cat([x.reshape(-1) for x in tree.leaves(run(optim.lamb(0.05, weight_decay=0.1), p, grads))])
    torch.testing.assert_close(got, flat, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"correction": "moment"}, "did you mean 'moments'"),
        ({"min_ratio": 2.0, "max_ratio": 1.0}, "min_ratio <= max_ratio"),
        ({"max_ratio": -1.0}, "max_ratio=-1.0"),
        ({"b2": 1.0}, "b2=1.0"),
    ],
)
def test_what_cannot_be(options, words):
    with pytest.raises(ValueError, match=words):
        optim.lamb(0.1, **options)


@pytest.mark.parametrize("tx", [optim.lamb(0.1), optim.chain(optim.scale(1.0), optim.with_master(optim.lamb(0.1)))])
def test_cut_leaves_are_refused_by_the_step(tx):
    axis = fds.sharding.mesh(dp=1)["dp"]
    program, _ = fds.functionalize(torch.nn.Linear(3, 2))
    loss = lambda p, s, b: p(s, b["x"]).sum()  # noqa: E731
    fds.train_step(program, tx, loss=loss)
    with pytest.raises(ValueError, match=r"'shard.float32' are parts of leaves.*optim.sharded\(tx, axis\)"):
        fds.train_step(fds.shard(axis)(program), tx, loss=loss)
