"""The kernels of the normalisations against float64."""

import pytest
import torch

import fds.kernels.norms as norms
from fds.kernels.registry import INTERPRETED, operators

EPS = {torch.float32: 4e-6, torch.float16: 2e-3}
SHAPES = [(0, 5), (1, 1), (5, 37), (2, 3, 128), (40, 129), (3, 1000), (2, 2049)]


def arguments(name, shape, dtype, residual, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, r, w, b = (torch.randn(s, generator=g).to(dtype) for s in (shape, shape, shape[-1:], shape[-1:]))
    rest = (1e-5, 1.0) if name == "rms_norm" else (b, 1e-5)
    return (x, r if residual else None, w, *rest)


def as_float64(args):
    return tuple(a.double() if isinstance(a, torch.Tensor) else a for a in args)


def near(got, want, dtype, factor=1.0):
    scale = factor * max(1.0, float(want.abs().max())) if want.numel() else 0.0
    assert got.shape == want.shape and got.is_contiguous()
    assert torch.allclose(got.double(), want, rtol=EPS[dtype], atol=EPS[dtype] * scale)


def test_kernels_run_here():
    assert INTERPRETED


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
def test_forward_and_backward(name, shape, dtype, monkeypatch):
    monkeypatch.setattr(norms, "PROGRAMS", 2)  # so that one program sums over several groups of rows
    op, residual = operators()[name], shape[0] % 2 == 0
    args = arguments(name, shape, dtype, residual)
    rounded = (
        args if not residual else ((args[0] + args[1]), None, *args[2:])
    )  # the statistics are those of the rounded sum
    y, s, *statistics = op(*args)
    want, _, *exact = op.reference(*as_float64(rounded))
    near(y, want, dtype)
    assert torch.equal(s, rounded[0]) if residual else s.numel() == 0
    for a, b in zip(statistics, exact, strict=True):
        assert a.dtype == torch.float32 and torch.allclose(a.double(), b, rtol=1e-5, atol=1e-6)

    places = [i for i in op.differentiable if args[i] is not None]
    leaves = [a.clone().requires_grad_() if i in places else a for i, a in enumerate(args)]
    wide = [a.double().requires_grad_() if i in places else a for i, a in enumerate(as_float64(args))]
    weights = torch.linspace(-1, 1, want.numel()).view(want.shape)

    def scalar(out):
        return (out[0] * weights).sum() + (2 * weights * out[1]).sum() if residual else (out[0] * weights).sum()

    got = torch.autograd.grad(scalar(op(*leaves)), [leaves[i] for i in places])
    known = torch.autograd.grad(scalar(op.reference(*wide)), [wide[i] for i in places])
    for a, b in zip(got, known, strict=True):
        near(a, b, dtype, 8.0)  # a row of one column has a gradient that is a difference of equal numbers
    again = torch.autograd.grad(scalar(op(*leaves)), [leaves[i] for i in places])
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
def test_stride_zero_and_one_argument_alone(name):
    op = operators()[name]
    args = list(arguments(name, (6, 20), torch.float32, True))
    args[0], args[2] = args[0][:1].expand(6, 20), args[2][:1].expand(20)
    want = op.reference(*as_float64(args))
    for a, b in zip(op(*args), want, strict=True):
        near(a, b, torch.float32)
    for i in op.differentiable:
        leaf, wide = args[i].clone().requires_grad_(), args[i].double().requires_grad_()
        (got,) = torch.autograd.grad(op(*args[:i], leaf, *args[i + 1 :])[0].square().sum(), leaf)
        exact = as_float64(args)
        (known,) = torch.autograd.grad(op.reference(*exact[:i], wide, *exact[i + 1 :])[0].square().sum(), wide)
        near(got, known, torch.float32, 20.0)


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
def test_nan_and_infinity_stay_in_their_row(name):
    op = operators()[name]
    args = arguments(name, (40, 20), torch.float32, False)
    args[0][1, 2], args[0][3, 4] = torch.nan, torch.inf
    y, want = op(*args)[0], op.reference(*args)[0]
    assert torch.equal(y.isnan(), want.isnan()) and torch.isfinite(y[[0, 2, *range(4, 40)]]).all()


def test_wide_rows_take_the_reference(monkeypatch):
    monkeypatch.setattr(norms, "WIDEST", 16)
    for name in ("rms_norm", "layer_norm"):
        op = operators()[name]
        args = arguments(name, (3, 20), torch.float32, True)
        leaf = args[0].clone().requires_grad_()
        y = op(leaf, *args[1:])[0]
        assert torch.equal(y, op.reference(*args)[0])
        assert torch.isfinite(torch.autograd.grad(y.square().sum(), leaf)[0]).all()
