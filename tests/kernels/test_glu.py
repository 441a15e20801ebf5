"""Gated linear units on the CPU path: against torch, gradients, what is refused."""

import pytest
import torch
import torch.nn.functional as F

from fds.kernels.glu import ACTIVATIONS, geglu, swiglu
from fds.kernels.registry import operators

BY_NAME = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
OURS = {"silu": swiglu, "gelu": geglu, "gelu_tanh": lambda g, u: geglu(g, u, approximate="tanh")}


def inputs(dtype, shape=(5, 17)):
    g = torch.Generator().manual_seed(0)
    return [3 * torch.randn(shape, generator=g).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(5, 17), (0, 4), ()])
def test_values_are_rounded_once(activation, dtype, shape):
    gate, up = inputs(dtype, shape)
    want = BY_NAME[activation](gate.double()) * up.double()
    got = OURS[activation](gate, up)
    eps, wide = torch.finfo(dtype).eps, torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    assert got.dtype == dtype and got.shape == shape
    allowed = (
        2 * eps * want.abs() + wide * (gate.double() * up.double()).abs()
    )  # the last is what 1 + erf leaves of a tail
    assert ((got.double() - want).abs() <= allowed).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients(activation):
    gate, up = (t.requires_grad_() for t in inputs(torch.float64))
    weights = torch.linspace(-1, 1, gate.numel(), dtype=torch.float64).view(gate.shape)
    got = torch.autograd.grad((OURS[activation](gate, up) * weights).sum(), (gate, up))
    want = torch.autograd.grad((BY_NAME[activation](gate) * up * weights).sum(), (gate, up))
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)
    (alone,) = torch.autograd.grad((OURS[activation](gate.detach(), up) * weights).sum(), up)
    assert torch.equal(alone, got[1])
    assert torch.autograd.gradgradcheck(
        OURS[activation], [t.detach()[:2, :3].clone().requires_grad_() for t in (gate, up)]
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_from_zero(activation):
    gate = torch.tensor([-1e4, -100.0, -30.0, 30.0, 100.0, 1e4]).requires_grad_()
    y = OURS[activation](gate, torch.ones(6))
    assert torch.allclose(y, gate.clamp(min=0), atol=1e-10)
    (g,) = torch.autograd.grad(y.sum(), gate)
    assert torch.allclose(g, (gate > 0).float(), atol=1e-10)
    nan = OURS[activation](torch.tensor([torch.nan, 1.0]), torch.ones(2))
    assert nan.isnan().tolist() == [True, False] and OURS[activation](torch.tensor([torch.inf]), torch.ones(1)).isinf()


def test_every_activation_under_the_table():
    """The table of operators has the first; `example` gives another one for another seed."""
    op = operators()["gated_linear_unit"]
    assert {op.example(seed, torch.float32)[2] for seed in range(3)} == set(ACTIVATIONS)


def f(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: swiglu(f(3), f(4)), r"gate \(3,\) torch.float32 on cpu, up \(4,\).*required two tensors alike"),
        (lambda: swiglu(f(3), f(3).half()), "required two tensors alike"),
        (lambda: swiglu(f(3).int(), f(3).int()), "gated_linear_unit: torch.int32.*nearest is float32"),
        (lambda: geglu(f(3), f(3), approximate="tan"), "did you mean 'tanh'"),
        (lambda: operators()["gated_linear_unit"](f(3), f(3), "gelu_tan"), "did you mean 'gelu_tanh'"),
    ],
)
def test_what_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()
