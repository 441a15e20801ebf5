"""The kernels of the gated linear units against float64."""

import pytest
import torch

from fds.kernels.glu import ACTIVATIONS
from fds.kernels.registry import INTERPRETED, operators

EPS = {torch.float32: 2e-6, torch.float16: 2e-3}


def test_kernels_run_here():
    assert INTERPRETED


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(0, 3), (), (1,), (5, 37), (3, 1025)])
def test_value_and_gradients(shape, activation, dtype):
    op = operators()["gated_linear_unit"]
    g = torch.Generator().manual_seed(0)
    leaves = [(2 * torch.randn(shape, generator=g)).to(dtype).requires_grad_() for _ in range(2)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    got, want = op(*leaves, activation), op.reference(*wide, activation)
    weights = torch.linspace(-1, 1, want.numel()).view(shape) if shape else torch.ones(())
    by_kernel, exact = (torch.autograd.grad((o * weights).sum(), x) for o, x in ((got, leaves), (want, wide)))
    for a, b in zip((got, *by_kernel), (want, *exact), strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        assert torch.allclose(a.double(), b, rtol=EPS[dtype], atol=4 * EPS[dtype])
    assert torch.equal(op(*leaves, activation), got)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_strides_and_what_is_not_finite(activation):
    op = operators()["gated_linear_unit"]
    gate, up = torch.linspace(-3, 3, 12).view(3, 4).T, torch.tensor([2.0]).expand(4, 3)
    out = op(gate, up, activation)
    assert out.is_contiguous() and torch.allclose(out, op.reference(gate, up, activation), atol=2e-6)
    x = torch.tensor([torch.nan, torch.inf, -100.0, 100.0, 1e4])
    out, want = op(x, torch.ones(5), activation), op.reference(x, torch.ones(5), activation)
    assert torch.allclose(out, want, equal_nan=True, atol=1e-10)
