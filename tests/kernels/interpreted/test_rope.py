"""The kernel of the rotary embedding against float64."""

import pytest
import torch

from fds.kernels.registry import INTERPRETED, operators
from fds.kernels.rope import rope, rope_angles

EPS = {torch.float32: 2e-6, torch.float16: 2e-3}


def arguments(dtype, batch=2, heads=3, kv=1, tokens=5, d=16, half=8, tables=1, token_first=True):
    g = torch.Generator().manual_seed(tokens + d)
    q, k = (
        torch.randn(*((batch, tokens, h, d) if token_first else (batch, h, tokens, d)), generator=g).to(dtype)
        for h in (heads, kv)
    )
    positions = torch.arange(tokens)[None] + 7 * torch.arange(tables)[:, None]
    return q, k, *rope_angles(positions, torch.logspace(0, -2, half)), token_first


def as_float64(args):
    return tuple(a.double() if isinstance(a, torch.Tensor) else a for a in args)


def test_kernels_run_here():
    assert INTERPRETED


CASES = [
    {},
    {"batch": 1, "heads": 1, "tokens": 1, "d": 2, "half": 1},
    {"tables": 2, "tokens": 7, "heads": 4, "kv": 2},
    {"d": 24, "half": 3, "tables": 2},  # 18 columns pass
    {"d": 130, "half": 64, "tokens": 3},
    {"d": 200, "half": 100, "batch": 1, "tokens": 2},
    {"tokens": 40, "heads": 2, "kv": 2, "d": 64, "half": 32},
    {"batch": 0},
    {"tokens": 0},
    {"kv": 0},
]


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("token_first", [True, False])
@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_rotation_and_its_gradient(sizes, token_first, dtype):
    op = operators()["rope"]
    args = arguments(dtype, token_first=token_first, **sizes)
    leaves = [a.requires_grad_() for a in args[:2]]
    wide = [a.detach().double().requires_grad_() for a in args[:2]]
    got, want = op(*leaves, *args[2:]), op.reference(*wide, *as_float64(args[2:]))
    weights = [torch.linspace(-1, 1, o.numel()).view(o.shape) for o in want]
    grads = (
        torch.autograd.grad([(o * w).sum() for o, w in zip(out, weights, strict=True)], x)
        for out, x in ((got, leaves), (want, wide))
    )
    for a, b in zip((*got, *next(grads)), (*want, *next(grads)), strict=True):
        assert a.dtype == dtype and a.is_contiguous() and a.shape == b.shape
        assert torch.allclose(a.double(), b, rtol=EPS[dtype], atol=2 * EPS[dtype])


def test_one_gradient_alone():
    op = operators()["rope"]
    q, k, *rest = arguments(torch.float32, tables=2)
    for place in (0, 1):
        leaf = (q, k)[place].clone().requires_grad_()
        args = (leaf, k) if place == 0 else (q, leaf)
        (g,) = torch.autograd.grad(op(*args, *rest)[place].square().sum(), leaf)
        assert torch.allclose(g, 2 * leaf.detach(), atol=1e-5)  # a rotation keeps lengths


def test_strides_and_the_same_bits():
    q, k, cos, sin, _ = arguments(torch.float32, token_first=False)
    want = rope(q, k, cos, sin)
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k)]
    assert all(torch.equal(a, b) for a, b in zip(rope(*turned, cos, sin), want, strict=True))
    one = q[:, :1].expand(2, 3, 5, 16)
    assert torch.equal(rope(one, k, cos, sin)[0], rope(one.contiguous(), k, cos, sin)[0])


def test_nan_and_infinity_stay_in_their_pair():
    op = operators()["rope"]
    args = arguments(torch.float32)
    args[0][0, 1, 0, 2], args[0][1, 3, 2, 9] = torch.nan, torch.inf
    out, want = op(*args)[0], op.reference(*args)[0]
    assert (
        torch.equal(out.isnan(), want.isnan())
        and torch.equal(out.isinf(), want.isinf())
        and out.isfinite().sum() == out.numel() - 4
    )
