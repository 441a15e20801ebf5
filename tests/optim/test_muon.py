"""Muon against torch's, and against singular value decompositions."""

import pytest
import torch

from fds import optim, tree
from fds.optim.muon import COEFFICIENTS, orthogonal


def problem(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    p = {
        "square": torch.randn(6, 6, generator=g),
        "tall": torch.randn(9, 4, generator=g),
        "wide": torch.randn(3, 8, generator=g),
    }
    return tree.map(lambda x: x.to(dtype), p), [
        tree.map(lambda x: torch.randn(x.shape, generator=g).to(dtype), p) for _ in range(5)
    ]


def run(tx, p, grads):
    state = tx.init(p)
    for g in grads:
        updates, state = tx.update(g, state, p)
        p = optim.apply_updates(p, updates)
    return p


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {"weight_decay": 0.0}),
        ({"momentum": 0.8, "nesterov": False, "weight_decay": 0.1, "steps": 3}, {"momentum": 0.8, "nesterov": False, "weight_decay": 0.1, "ns_steps": 3}),
        ({"adjust": "rms"}, {"adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.0}),
    ],
)  # fmt: skip
def test_five_steps_are_torchs(ours, theirs):
    p, grads = problem()
    leaves = [x.clone().requires_grad_() for x in tree.leaves(p)]
    tx = torch.optim.Muon(leaves, lr=0.02, **theirs)
    for g in grads:
        for x, y in zip(leaves, tree.leaves(g), strict=True):
            x.grad = y.clone()
        tx.step()
    for got, want in zip(tree.leaves(run(optim.muon(0.02, **ours), p, grads)), leaves, strict=True):
        torch.testing.assert_close(
            got, want.detach(), rtol=1e-5, atol=2e-4
        )  # both in bfloat16, whose last bit is 2^-8 of a step


@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize("shape", [(5, 5), (8, 3), (2, 3, 7), (2, 7, 3)])
def test_singular_values_come_near_one_and_vectors_stay(method, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True)
    a, b, c = COEFFICIENTS
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(orthogonal(x, method=method), u @ torch.diag_embed(s) @ v, rtol=1e-9, atol=1e-9)
    assert ((s > 0.6) & (s < 1.25)).all()


def test_gram_is_the_same_but_for_rounding():
    p, grads = problem(torch.float64)
    a, b = (run(optim.muon(0.02, method=m, dtype=torch.float64), p, grads) for m in ("standard", "gram"))
    for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


def test_more_dimensions_are_batches_or_rows():
    g = torch.Generator().manual_seed(2)
    experts, kernel = torch.randn(2, 4, 6, generator=g), torch.randn(4, 3, 2, 2, generator=g)
    tx = optim.muon(1.0, dtype=torch.float32, adjust="none")
    zero = {"e": torch.zeros(2, 4, 6), "k": torch.zeros(4, 3, 2, 2)}
    got, _ = tx.update({"e": experts, "k": kernel}, tx.init(zero), zero)
    torch.testing.assert_close(got["e"], -torch.stack([orthogonal(x) for x in experts]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got["k"], -orthogonal(kernel.view(4, 12)).view(4, 3, 2, 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"adjust": "row"}, "did you mean 'rows'"),
        ({"method": "grams"}, "did you mean 'gram'"),
        ({"steps": 0}, "steps=0"),
        ({"coefficients": (1.0, 2.0)}, "three numbers"),
        ({"momentum": 1.0}, "momentum=1.0"),
    ],
)
def test_what_cannot_be(options, words):
    with pytest.raises(ValueError, match=words):
        optim.muon(0.1, **options)


def test_a_vector_is_named():
    with pytest.raises(ValueError, match=r"h.0.norm has shape \(3,\).*partition"):
        optim.muon(0.1).init({"h.0": {"h.0.w": torch.zeros(2, 2), "h.0.norm": torch.zeros(3)}})
