"""Optimizers against torch's own."""

import pytest
import torch

import fds
from fds import optim


def problem():
    generator = torch.Generator().manual_seed(0)
    params = {"a": torch.randn(5, 3, generator=generator), "b": {"c": torch.randn(7, generator=generator)}}
    grads = [fds.tree.map(lambda p: torch.randn(p.shape, generator=generator), params) for _ in range(20)]
    return params, grads


def run(tx, params, grads):
    state = tx.init(params)
    for g in grads:
        before = fds.tree.map(torch.clone, params)
        updates, state = tx.update(g, state, params)
        assert all(torch.equal(a, b) for a, b in zip(fds.tree.leaves(before), fds.tree.leaves(params), strict=True))
        params = optim.apply_updates(params, updates)
    return params


def run_torch(make, params, grads, clip=None):
    leaves = [t.clone().requires_grad_() for t in fds.tree.leaves(params)]
    opt = make(leaves)
    for g in grads:
        for p, x in zip(leaves, fds.tree.leaves(g), strict=True):
            p.grad = x.clone()
        if clip:
            torch.nn.utils.clip_grad_norm_(leaves, clip)
        opt.step()
    return leaves


@pytest.mark.parametrize(("mine", "theirs", "clip"), [
    (optim.adamw(1e-2, weight_decay=0.1), lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1), None),
    (optim.adamw(3e-3, b1=0.8, b2=0.95, eps=1e-6), lambda p: torch.optim.AdamW(p, 3e-3, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.0), None),
    (optim.sgd(0.1), lambda p: torch.optim.SGD(p, 0.1), None),
    (optim.sgd(0.1, momentum=0.9, weight_decay=0.01), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01), None),
    (optim.sgd(0.1, momentum=0.9, nesterov=True), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True), None),
    (optim.chain(optim.clip_by_global_norm(0.7), optim.adamw(1e-2)), lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.0), 0.7),
    (optim.offloaded(optim.chain(optim.clip_by_global_norm(0.7), optim.adamw(1e-2))), lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.0), 0.7),
])  # fmt: skip
def test_numerics_are_torchs(mine, theirs, clip):
    params, grads = problem()
    for got, want in zip(
        fds.tree.leaves(run(mine, params, grads)), run_torch(theirs, params, grads, clip), strict=True
    ):
        assert torch.allclose(got, want.detach(), rtol=1e-5, atol=1e-7)


def test_chain_laws_and_schedules():
    params, grads = problem()
    a, b = optim.clip_by_global_norm(0.5), optim.scale(2.0)
    same = lambda x, y: all(torch.equal(p, q) for p, q in zip(fds.tree.leaves(x), fds.tree.leaves(y), strict=True))  # noqa: E731
    assert same(optim.chain().update(grads[0], (), params)[0], grads[0])
    left, right = optim.chain(optim.chain(a, b), optim.sgd(0.1)), optim.chain(a, optim.chain(b, optim.sgd(0.1)))
    assert same(run(left, params, grads), run(right, params, grads))
    rate = optim.warmup_cosine(0.1, warmup_steps=3, total_steps=10)
    pairs = zip(
        fds.tree.leaves(run(optim.sgd(rate), params, grads)),
        fds.tree.leaves(run(optim.chain(optim.sgd(1.0), optim.scale_by_schedule(rate)), params, grads)),
        strict=True,
    )
    assert all(torch.allclose(p, q, rtol=1e-6) for p, q in pairs)


def test_low_precision_parameters_keep_moments_in_float32():
    state = optim.adamw(1e-3).init({"w": torch.zeros(3, dtype=torch.bfloat16)})
    assert state.moments["nu"]["w"].dtype == torch.float32


def test_bad_input():
    for action, words in (
        (lambda: optim.adamw(1e-3, b1=1.0), "b1"), (lambda: optim.sgd(0.1, nesterov=True), "nesterov"), (lambda: optim.clip_by_global_norm(0.0), "max_norm"),
        (lambda: optim.warmup_cosine(0.1, warmup_steps=5, total_steps=5), "warmup_steps"), (lambda: optim.offloaded(optim.sgd(0.1), "nvme"), "nvme"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            action()
