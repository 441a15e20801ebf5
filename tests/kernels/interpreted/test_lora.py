"""The kernels of the adapters against float64."""

import pytest
import torch

import fds.kernels.lora as lora
from fds.kernels.registry import INTERPRETED, operators

EPS = {torch.float32: 2e-6, torch.float16: 2e-3}  # a few units in the last place of sums of this size


def randn(dtype, *shapes):
    g = torch.Generator().manual_seed(sum(map(sum, shapes)))
    return [torch.randn(s, generator=g).to(dtype) for s in shapes]


def near(got, want, dtype):
    assert got.dtype == dtype and got.is_contiguous() and got.shape == want.shape
    scale = float(want.abs().max()) if want.numel() else 1.0
    assert torch.allclose(got.double(), want, rtol=EPS[dtype], atol=EPS[dtype] * scale)


def doubled(tensors):
    return [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in tensors]


def test_kernels_run_here():
    assert INTERPRETED


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize(
    ("n", "k", "r"), [(0, 5, 2), (1, 1, 1), (7, 16, 0), (70, 130, 3), (33, 129, 16), (5, 40, 128), (65, 20, 37)]
)
def test_fuse(n, k, r, dtype):
    op = operators()["lora_fuse"]
    weight, a, b = randn(dtype, (n, k), (r, k), (n, r))
    near(op(weight, a, b, 0.5), op.reference(*doubled((weight, a, b)), 0.5), dtype)


def test_fuse_takes_adapters_of_another_dtype_and_odd_strides():
    op = operators()["lora_fuse"]
    (weight,), (a, b) = randn(torch.float16, (9, 40)), randn(torch.float32, (3, 1), (9, 3))
    wide = a.expand(3, 40)
    near(op(weight, wide, b, 2.0), op.reference(*doubled((weight, wide, b)), 2.0), torch.float16)
    turned = weight.T.contiguous().T
    assert torch.equal(op(turned, wide, b, 2.0), op(weight, wide, b, 2.0))


def test_fuse_keeps_nan_and_infinity_and_the_weight():
    op = operators()["lora_fuse"]
    weight, a, b = randn(torch.float32, (6, 20), (2, 20), (6, 2))
    weight[1, 2], weight[3, 4] = torch.nan, torch.inf
    before = weight.clone()
    out = op(weight, a, b, 1.0)
    assert torch.equal(out.isnan(), weight.isnan()) and torch.equal(out.isinf(), weight.isinf())
    assert torch.equal(weight.nan_to_num(7.0), before.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize(
    ("t", "k", "n", "r"),
    [
        (0, 5, 3, 2),
        (1, 1, 1, 1),
        (3, 20, 0, 2),
        (2, 300, 18, 3),
        (17, 40, 33, 5),
        (2, 33, 5, 128),
        (33, 20, 8, 3),
        (70, 20, 9, 4),
    ],
)
def test_linear(t, k, n, r, dtype):
    op = operators()["lora_linear"]
    x, weight, shift, a, b = randn(dtype, (t, k), (n, k), (n,), (r, k), (n, r))
    args = (x, weight, shift if n % 2 else None, a, b)
    near(op(*args, 0.5), op.reference(*doubled(args), 0.5), dtype)


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize(("t", "adapters", "r"), [(0, 2, 3), (1, 1, 1), (5, 3, 6), (17, 2, 3), (4, 9, 5), (70, 2, 3)])
def test_linear_of_many(t, adapters, r, dtype):
    op = operators()["lora_linear_many"]
    n = 19 if t < 17 else 5
    x, weight, bias, a, b = randn(dtype, (t, 40), (n, 40), (n,), (adapters, r, 40), (adapters, n, r))
    index = torch.arange(t) % (adapters + 1) - 1
    args = (x, weight, bias, a, b, torch.linspace(0.5, 2.0, adapters), index)
    near(op(*args), op.reference(*doubled(args)), dtype)


def test_a_broken_adapter_stays_with_its_tokens():
    op = operators()["lora_linear_many"]
    x, weight, a, b = randn(torch.float32, (5, 20), (7, 20), (2, 3, 20), (2, 7, 3))
    a[1, 0, 0], b[1, 2, 1], x[4, 3] = torch.inf, torch.nan, torch.nan
    index = torch.tensor([0, 1, -1, 0, 0])
    out = op(x, weight, None, a, b, torch.ones(2), index.int())
    assert torch.isfinite(out).all(1).tolist() == [True, False, True, True, False]
    for wrong in (2, -2):
        index[2] = wrong
        out = op(x, weight, None, a, b, torch.ones(2), index)
        assert out[2].isnan().all() and torch.isfinite(out[[0, 3]]).all()


def test_stride_zero_and_adapters_of_another_dtype():
    (x,), (weight,) = randn(torch.float16, (1, 40)), randn(torch.float16, (19, 40))
    a, b = randn(torch.float32, (3, 40), (19, 3))
    x = x.expand(6, 40)
    want = lora._beside(*doubled((x, weight, None, a, b)), 2.0)
    near(lora.lora_linear(x, weight, a, b, scale=2.0), want, torch.float16)
    stacked = (a.expand(2, 3, 40), b.expand(2, 19, 3))
    near(lora.lora_linear(x, weight, *stacked, scale=2.0, index=torch.tensor([0, 1] * 3)), want, torch.float16)


@pytest.mark.parametrize("name", ["lora_fuse", "lora_linear", "lora_linear_many"])
def test_gradients_and_the_same_bits(name):
    op = operators()[name]
    args = op.example(1, torch.float32)
    leaves = [a.clone().requires_grad_() if i in op.differentiable else a for i, a in enumerate(args)]
    exact = [a.double().requires_grad_() if i in op.differentiable else a for i, a in enumerate(args)]
    places = [i for i in op.differentiable if args[i] is not None]
    out = op(*leaves)
    weights = torch.linspace(0.5, 1.5, out.numel()).view(out.shape)
    got = torch.autograd.grad((out * weights).sum(), [leaves[i] for i in places])
    want = torch.autograd.grad((op.reference(*exact) * weights).sum(), [exact[i] for i in places])
    for g, w in zip(got, want, strict=True):
        assert torch.allclose(g.double(), w, rtol=1e-5, atol=1e-5)
    assert torch.equal(op(*args), out)
