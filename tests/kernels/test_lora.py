"""Adapters on the CPU path: numerics against float64, gradients, what is refused."""

import pytest
import torch
from torch import Tensor

import fds.kernels.lora as lora
from fds.kernels.lora import lora_fuse, lora_linear
from fds.kernels.registry import operators


def randn(dtype, *shapes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g).to(dtype) for s in shapes]


def doubled(tensors):
    return [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in tensors]


def many(dtype=torch.float32, t=11, n=3, seed=0):
    """Arguments of the operator of many adapters, with a token of each kind."""
    tensors = randn(dtype, (t, 16), (7, 16), (7,), (n, 5, 16), (n, 7, 5), seed=seed)
    return *tensors, torch.linspace(-1.0, 2.0, n), torch.arange(t) % (n + 1) - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rank", [0, 1, 3, 16])
def test_fuse_is_rounded_once(dtype, rank):
    weight, a, b = randn(dtype, (7, 16), (rank, 16), (7, rank))
    want = weight.double() + 0.5 * (b.double() @ a.double())
    out = lora_fuse(weight, a, b, 0.5)
    assert out.dtype == dtype and out.data_ptr() != weight.data_ptr()
    if dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(out, want.to(dtype))  # no value of this seed lies within a float32 rounding of a tie
    else:
        assert torch.allclose(out.double(), want, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps * 16)


def test_fuse_is_what_peft_merges_in_float32():
    weight, a, b = randn(torch.float32, (7, 16), (3, 16), (7, 3))
    assert torch.allclose(lora_fuse(weight, a, b, 2.0), weight + (b @ a) * 2.0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (0,)])
def test_linear_of_any_leading_shape(lead, dtype):
    x, weight, bias, a, b = randn(dtype, (*lead, 16), (7, 16), (7,), (3, 16), (7, 3))
    y = lora_linear(x, weight, a, b, scale=0.5, bias=bias)
    want = x.double() @ (weight.double() + 0.5 * b.double() @ a.double()).T + bias.double()
    eps = torch.finfo(dtype).eps
    assert y.shape == (*lead, 7) and y.dtype == dtype
    assert torch.allclose(y.double(), want, rtol=eps, atol=32 * torch.finfo(torch.float32).eps * 4)


@pytest.mark.parametrize("adapters", [1, 3, 20])
def test_many_are_each_token_by_itself(adapters):
    """By adapter where there are fewer of them than tokens, by token else; both are one adapter at a time."""
    x, weight, bias, a, b, scale, index = args = many(n=adapters)
    index[0] = -1
    y = operators()["lora_linear_many"](*args)
    for t, i in enumerate(index.tolist()):
        base = torch.nn.functional.linear(x[t], weight, bias)
        want = base if i < 0 else lora_linear(x[t], weight, a[i], b[i], scale=float(scale[i]), bias=bias)
        assert torch.allclose(y[t], want, rtol=1e-5, atol=1e-5)


def test_both_ways_of_choosing_are_one():
    x, _, _, a, b, scale, index = doubled(many())
    by_adapter, by_token = (f(x, a, b, scale, index, lora._exact) for f in (lora._by_adapter, lora._by_token))
    assert torch.allclose(by_adapter, by_token, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("adapters", [1, 3, 20])
def test_gradients_of_many(adapters):
    """The closed form against one adapter at a time by autograd, in float64."""
    args = doubled(many(n=adapters))
    leaves = [t.clone().requires_grad_() for t in args[:5]]
    scale, index = args[5:]
    y = operators()["lora_linear_many"](*leaves, scale, index)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
    got = torch.autograd.grad((y * weights).sum(), leaves)
    x, weight, bias, a, b = leaves
    rows = [
        x[t] @ weight.T + bias + (0 if i < 0 else scale[i] * (x[t] @ a[i].T) @ b[i].T)
        for t, i in enumerate(index.tolist())
    ]
    want = torch.autograd.grad((torch.stack(rows) * weights).sum(), leaves)
    for g, w in zip(got, want, strict=True):
        assert torch.allclose(g, w, rtol=1e-11, atol=1e-11)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            got,
            torch.autograd.grad((operators()["lora_linear_many"](*leaves, scale, index) * weights).sum(), leaves),
            strict=True,
        )
    )


@pytest.mark.parametrize("adapters", [2, 20])
def test_a_broken_adapter_stays_with_its_tokens(adapters):
    x, weight, bias, a, b, scale, _ = many(t=5, n=adapters)
    index = torch.tensor([0, 1, -1, 0, 1])
    a[1, 0, 0], b[1, 2, 1] = torch.inf, torch.nan
    x[4, 3] = torch.nan
    a, b = a.requires_grad_(), b.requires_grad_()
    y = lora_linear(x, weight, a, b, scale=scale, bias=bias, index=index)
    assert torch.isfinite(y).all(1).tolist() == [True, False, True, True, False]
    ga, gb = torch.autograd.grad(y[[0, 2, 3]].sum(), (a, b))
    assert torch.isfinite(ga[0]).all() and torch.isfinite(gb[0]).all()


@pytest.mark.parametrize("adapters", [2, 20])
def test_an_index_of_no_adapter_is_seen(adapters):
    x, weight, _, a, b, scale, _ = many(t=5, n=adapters)
    leaf = x.clone().requires_grad_()
    y = lora_linear(leaf, weight, a, b, scale=scale, index=torch.tensor([0, adapters, -1, -2, 1], dtype=torch.int32))
    assert y.isnan().all(1).tolist() == [False, True, False, True, False] == y.isnan().any(1).tolist()
    (g,) = torch.autograd.grad(y.sum(), leaf)
    assert g.abs().sum(1).ne(0).tolist() == [True, False, True, False, True]


def test_partial_gradients_and_low_precision():
    """Only what is asked for; and close to float64 in bfloat16."""
    for name in ("lora_fuse", "lora_linear", "lora_linear_many"):
        op = operators()[name]
        args = op.example(0, torch.bfloat16)
        for i in op.differentiable:
            leaf, exact = args[i].clone().requires_grad_(), args[i].double().requires_grad_()
            (got,) = torch.autograd.grad(op(*args[:i], leaf, *args[i + 1 :]).float().sum(), leaf)
            wide = doubled(args)
            (want,) = torch.autograd.grad(op.reference(*wide[:i], exact, *wide[i + 1 :]).sum(), exact)
            assert got.dtype == torch.bfloat16 and torch.allclose(got.double(), want, rtol=1e-2, atol=1e-2)


def test_the_scale_takes_no_gradient():
    *rest, scale, index = many()
    with pytest.raises(ValueError, match=r"lora_linear_many: .*takes no gradient"):
        operators()["lora_linear_many"](*rest, scale.requires_grad_(), index).sum().backward()


def f(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


W, X = f(7, 16), f(5, 16)
A, B, AS, BS, INDEX = f(3, 16), f(7, 3), f(2, 3, 16), f(2, 7, 3), torch.zeros(5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: lora_fuse(W, f(3, 15), B), r"lora_fuse: a \(3, 15\), required \(3, 16\)"),
        (lambda: lora_fuse(W, A, f(7, 4)), r"lora_fuse: b \(7, 4\), required \(7, 3\)"),
        (lambda: lora_fuse(W[0], A, B), r"lora_fuse: weight \(16,\).*required \[N, K\]"),
        (lambda: lora_fuse(W.long(), A, B), "lora_fuse: weight is torch.int64.*nearest is float32"),
        (lambda: lora_fuse(W, A.to("meta"), B), "lora_fuse: a is on meta, required cpu"),
        (lambda: lora_linear(f(5, 15), W, A, B), r"lora_linear: x \(5, 15\), required \(5, 16\)"),
        (lambda: lora_linear(X.half(), W, A, B), "weight is torch.float32, x is torch.float16"),
        (lambda: lora_linear(X, W, A.half(), B), "b is torch.float32, a is torch.float16"),
        (lambda: lora_linear(X, W, A, B, bias=f(6)), r"bias \(6,\), required \(7,\)"),
        (lambda: lora_linear(X, W, A, B, scale=f(2)), r"use scale=float\(scale\)"),
        (lambda: lora_linear(X, W, AS, BS), r"a \(2, 3, 16\); required \[T, K\], \[N, K\], \[r, K\]"),
        (lambda: lora_linear(X, W, A, B, index=INDEX), r"required \[T, K\], \[N, K\], \[n, r, K\]"),
        (lambda: lora_linear(X, W, AS, f(3, 7, 3), index=INDEX), r"b \(3, 7, 3\), required \(2, 7, 3\)"),
        (lambda: lora_linear(X, W, AS, BS, index=INDEX.float()), "index .* torch.float32"),
        (lambda: lora_linear(X, W, AS, BS, index=INDEX[:3]), r"index \(3,\)"),
        (lambda: lora_linear(X, W, AS, BS, scale=f(3), index=INDEX), r"scale \(3,\), required \(2,\)"),
        (lambda: lora_linear(X, W, AS[:0], BS[:0], index=INDEX), "no adapter"),
    ],
)
def test_what_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()
