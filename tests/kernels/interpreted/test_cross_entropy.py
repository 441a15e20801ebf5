"""The row kernel of the cross-entropy against float64."""

import pytest
import torch

import fds.kernels
from fds.kernels import cross_entropy, registry

OPTIONS = [(0.0, 0.0, 0.0), (3.0, 0.0, 0.0), (0.0, 0.2, 0.0), (3.0, 0.2, 0.05)]


def inputs(rows, vocabulary, dtype, width=8):
    g = torch.Generator().manual_seed(rows + vocabulary)
    hidden, weight, bias = (
        torch.randn(s, generator=g).to(dtype) for s in ((rows, width), (vocabulary, width), (vocabulary,))
    )
    target = torch.randint(vocabulary, (rows,), generator=g)
    target[::3] = -100
    return hidden, weight, bias, target


def test_kernels_run_here():
    assert registry.INTERPRETED and registry.on_device(torch.ones(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("rows", "vocabulary"), [(0, 5), (1, 1), (5, 37), (3, 4097)])
def test_against_float64(rows, vocabulary, options, dtype):
    op = fds.kernels.operators()["linear_cross_entropy"]
    tensors = inputs(rows, vocabulary, dtype)
    leaves = [t.requires_grad_() for t in tensors[:3]]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    rest = (tensors[3], -100, *options, True)
    got, want = op(*leaves, *rest), op.reference(*exact, *rest)
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a.double(), b, atol=2e-5, rtol=2e-5)

    def weighed(out):
        return sum((k + 1) * (o * torch.linspace(0.5, 1.0, rows)).sum() for k, o in enumerate(out))

    if not rows:
        assert not any(g.any() for g in torch.autograd.grad(weighed(got), leaves))
        return
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for a, b in zip(torch.autograd.grad(weighed(got), leaves), torch.autograd.grad(weighed(want), exact), strict=True):
        assert torch.allclose(a.double(), b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_sum_and_its_gradients(dtype):
    op = fds.kernels.operators()["linear_cross_entropy_sum"]
    tensors = inputs(7, 130, dtype)
    rest = (tensors[3], torch.linspace(0.1, 1.0, 7), -100, 3.0, 0.1, 0.01, [True, True, True])
    got, want = op(*tensors[:3], *rest), op.reference(*[t.double() for t in tensors[:3]], *rest)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a.double(), b, atol=tolerance, rtol=tolerance)


def test_stride_zero_and_infinite_logits():
    op = fds.kernels.operators()["linear_cross_entropy"]
    hidden, weight, bias, target = inputs(4, 40, torch.float32)
    bias[7] = -torch.inf
    target[:] = 3
    wide = hidden[:1].expand(4, 8)
    got, want = (
        op(wide, weight, bias, target, -100, 0.0, 0.0, 0.0, True),
        op.reference(wide, weight, bias, target, -100, 0.0, 0.0, 0.0, True),
    )
    assert all(torch.allclose(a, b, atol=1e-5) and torch.isfinite(a).all() for a, b in zip(got, want, strict=True))
    hidden[2] = torch.nan
    loss = op(hidden, weight, bias, target, -100, 0.0, 0.0, 0.0, False)[0]
    assert torch.isnan(loss).tolist() == [False, False, True, False]


def test_a_target_outside_of_the_vocabulary_is_seen():
    hidden, weight, _, _ = inputs(2, 40, torch.float32)
    assert torch.isnan(cross_entropy.linear_cross_entropy(hidden, weight, torch.tensor([40, 3]))).tolist() == [
        True,
        False,
    ]
