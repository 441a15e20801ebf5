"""Normalisations on the CPU path: against torch, transformers and float64; what is refused."""

import pytest
import torch
import torch.nn.functional as F

from fds.kernels.norms import layer_norm, rms_norm

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def inputs(dtype, shape=(2, 3, 16), seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g).to(dtype) for s in (shape, shape, shape[-1:], shape[-1:])]


def ulp(dtype, count=1.0):
    return {"rtol": count * torch.finfo(dtype).eps, "atol": count * torch.finfo(dtype).eps}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(16,), (5, 1), (0, 16), (2, 3, 16)])
def test_values(dtype, shape):
    x, r, w, b = inputs(dtype, shape)
    wide = x.double()
    rms = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.allclose(rms_norm(x, w).double(), rms * w.double(), **ulp(dtype, 4))
    assert torch.allclose(rms_norm(x, w, offset=1.0).double(), rms * (1 + w.double()), **ulp(dtype, 4))
    assert torch.allclose(
        layer_norm(x, w, b).double(), F.layer_norm(wide, shape[-1:], w.double(), b.double()), **ulp(dtype, 4)
    )
    assert torch.equal(layer_norm(x, w), layer_norm(x, w, torch.zeros_like(b)))
    for f in (rms_norm, layer_norm):
        y, s = f(x, w, residual=r)
        assert torch.equal(s, x + r) and torch.equal(y, f(x + r, w)) and y.dtype == s.dtype == dtype


def test_it_is_what_transformers_computes():
    """In float32; in bfloat16 Llama's rounds twice, and Gemma's once like this one."""
    gemma = pytest.importorskip("transformers.models.gemma2.modeling_gemma2").Gemma2RMSNorm(16)
    llama = pytest.importorskip("transformers.models.llama.modeling_llama").LlamaRMSNorm(16)
    for module, offset in ((gemma, 1.0), (llama, 0.0)):
        eps = 1e-6
        x, _, w, _ = inputs(torch.float32)
        with torch.no_grad():
            module.weight.copy_(w)
            assert torch.allclose(rms_norm(x, w, eps=eps, offset=offset), module(x), **ulp(torch.float32, 4))
    with torch.no_grad():
        gemma.weight.copy_(w.bfloat16())
        assert torch.equal(rms_norm(x.bfloat16(), w.bfloat16(), eps=1e-6, offset=1.0), gemma(x.bfloat16()))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("layer", [False, True])
def test_gradients(layer, residual):
    """The closed form, which the table of operators does not take as it asks for the statistics' gradients too."""
    x, r, w, b = (t.requires_grad_() for t in inputs(torch.float64))
    weights = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view(x.shape)

    def by_torch():
        s = x + r if residual else x
        y = F.layer_norm(s, (16,), w, b, 1e-5) if layer else F.rms_norm(s, (16,), w + 1.0, 1e-5)
        return y, s

    def by_us():
        out = (
            layer_norm(x, w, b, residual=r if residual else None)
            if layer
            else rms_norm(x, w, eps=1e-5, residual=r if residual else None, offset=1.0)
        )
        return out if residual else (out, x)

    leaves = [x, w, *([r] if residual else []), *([b] if layer else [])]
    for part in ((1, 0), (0, 1), (1, 2))[: 3 if residual else 1]:

        def scalar(f, part=part):
            return sum(c * (o * weights).sum() for c, o in zip(part, f(), strict=True) if c)

        got, want = (
            torch.autograd.grad(scalar(f), leaves, allow_unused=True, materialize_grads=True) for f in (by_us, by_torch)
        )
        for a, e in zip(got, want, strict=True):
            assert torch.allclose(a, e, rtol=1e-10, atol=1e-12)


def test_second_derivatives_by_the_saved_statistics():
    x, r, w, b = (t.requires_grad_() for t in inputs(torch.float64, (3, 5)))
    assert torch.autograd.gradgradcheck(lambda x, r, w, b: layer_norm(x, w, b, residual=r), (x, r, w, b))
    assert torch.autograd.gradgradcheck(lambda x, w: rms_norm(x, w, offset=1.0), (x, w))


def test_outputs_share_nothing():
    x, r, w, _ = (t.requires_grad_() for t in inputs(torch.float32))
    y, s = rms_norm(x, w, residual=r)
    gx, gr = torch.autograd.grad(y.sum() + s.sum(), (x, r))
    assert torch.equal(gx, gr)
    assert len({t.untyped_storage().data_ptr() for t in (x, r, w, y, s, gx, gr)}) == 7


def test_weights_of_another_dtype():
    x, _, w, _ = inputs(torch.bfloat16)
    w = w.float().requires_grad_()
    y = rms_norm(x, w)
    assert y.dtype == torch.bfloat16 and torch.autograd.grad(y.float().sum(), w)[0].dtype == torch.float32


def f(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: rms_norm(f(5, 16), f(15)), r"rms_norm: weight \(15,\), required \(16,\) for x \(5, 16\)"),
        (lambda: rms_norm(f(), f(1)), r"rms_norm: x \(\), required \[..., H\]"),
        (lambda: rms_norm(f(5, 0), f(0)), r"rms_norm: x \(5, 0\), required \[..., H\]"),
        (lambda: rms_norm(f(5, 16), f(16), residual=f(16)), r"residual \(16,\), required \(5, 16\)"),
        (lambda: rms_norm(f(5, 16), f(16), residual=f(5, 16).half()), "residual is torch.float16, x is torch.float32"),
        (lambda: rms_norm(f(5, 16).int(), f(16)), "rms_norm: x is torch.int32.*nearest is float32"),
        (lambda: layer_norm(f(5, 16), f(16), f(15)), r"layer_norm: bias \(15,\), required \(16,\)"),
        (lambda: layer_norm(f(5, 16), f(16).to("meta")), "layer_norm: weight is on meta, required cpu"),
    ],
)
def test_what_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()
