"""Kernels of the optimizer updates against their references: the same bits in float32, for the interpreter does not fuse either.

Rounding to the nearest bfloat16 is wrong in the interpreter, which cuts off: tested on the CPU path, and by the PTX.
"""

import numpy as np
import pytest
import torch

from fds.kernels import adamw8bit, lamb, optimizer, registry, rounding

OPERATORS = registry.operators()
SIZES = [0, 1, 5, 1024, 2047]


@pytest.fixture(autouse=True)
def _exact_square_roots(monkeypatch):
    """torch's on a CPU are those of a vector library, and off by an ulp for some numbers of a long tensor."""
    monkeypatch.setattr(torch.Tensor, "sqrt", lambda x: torch.from_numpy(np.asarray(np.sqrt(x.numpy()))))


def tensors(n, count, dtype=torch.float32):
    g = torch.Generator().manual_seed(n)
    return [torch.randn(n, generator=g).to(dtype) for _ in range(count)]


def scalars(*values):
    return [torch.tensor(v, dtype=torch.float64) for v in values]


def same(name, *args):
    """The operator by its kernel, and whether that is the reference to the bit."""
    op = OPERATORS[name]
    got, want = op(*args), op.reference(*args)
    for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (got, want)), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and a.is_contiguous()
        both = (a.isnan() & b.isnan()) | (a == b) if a.is_floating_point() else a == b
        assert both.all(), (name, (a.double() - b.double()).abs().max())
        assert not a.is_floating_point() or torch.equal(a.signbit()[~a.isnan()], b.signbit()[~b.isnan()])
    return got


def test_kernels_run_here():
    assert registry.INTERPRETED and registry.on_device(torch.ones(1))


@pytest.mark.parametrize("n", SIZES)
def test_stochastic_round(n):
    x = tensors(n, 1)[0]
    x[:5] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 3.4e38])[:n]
    x[5:7] = torch.tensor([-1e-45, 1.0])[: max(n - 5, 0)]
    for seed, step, leaf in ((0, 0, 0), (-(2**40) - 3, 2**31, 1), (2**62, 7, 2**31 - 1)):
        same("stochastic_round", x, torch.tensor(seed), torch.tensor(step), leaf)
    same("stochastic_round", x[:1].expand(n), torch.tensor(1), torch.tensor(2), 3)


def test_bits_of_high_places():
    """Beyond 2^35 elements the place has more than 32 bits; no buffer here is that long, so the generator is asked by itself."""
    from fds.kernels.triton_or_not import jit, tl

    @jit
    def draw_kernel(SEED, STEP, OUT, start, STREAM: tl.constexpr):
        tl.store(OUT + tl.arange(0, 16), rounding.draw(SEED, STEP, 3, start, STREAM, 16))

    out = torch.zeros(16, dtype=torch.int32)
    draw_kernel[(1,)](torch.tensor(5), torch.tensor(6), out, 2**40 + 32, STREAM=1)
    group = torch.tensor([2**37 + 4, 2**37 + 5])
    zero = torch.zeros_like(group)
    words = rounding.philox((zero + 5, zero), (group & 0xFFFFFFFF, (group >> 32) + 2**30, zero + 6, zero + 3))
    assert out.tolist() == [int(w[i] >> s & 0xFFFF) for i in (0, 1) for w in words for s in (0, 16)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("n", SIZES)
def test_updates(n, dtype):
    p, g = tensors(n, 2, dtype)
    m, v = tensors(n, 2, optimizer.wide(dtype))
    copy = "float16" if dtype == torch.float32 else ""
    for gradient in (g, g.half()):
        rest = (torch.tensor(3), copy, None, 0)
        same("adamw_update", p, gradient, m, v.abs(), *scalars(0.01, 0.9, 0.99, 1e-8, 0.1), *rest)
        same("lion_update", p, gradient, m, *scalars(0.01, 0.9, 0.99, 0.1), *rest)
        for buffer, nesterov in ((m, True), (m, False), (None, False)):
            same("sgd_update", p, gradient, buffer, *scalars(0.01, 0.9, 0.1), nesterov, *rest)


@pytest.mark.parametrize("n", [1, 1030])
def test_random_rounding(n):
    p, g, m, v = tensors(n, 4)
    seed, count, hyper = torch.tensor(11), torch.tensor(4), scalars(0.01, 0.9, 0.99, 1e-8, 0.1)
    for leaf in (0, 1, 9):
        same("adamw_update", p, g, m, v.abs(), *hyper, count, "bfloat16", seed, leaf)
        same("adamw_update", p.bfloat16(), g, m, v.abs(), *hyper, count, "", seed, leaf)
        same("lion_update", p.bfloat16(), g, m, *hyper[:3], hyper[4], count, "", seed, leaf)


def test_strides_zeros_and_what_is_not_finite():
    p, g, m, v = (t.view(40, 30).mT for t in tensors(1200, 4))
    m[0], g[0], v[0] = 0.0, 0.0, 0.0
    g, v = g[:, :1].expand(30, 40), v.abs()
    p[1, 0], m[2, 0], v[3, 0] = torch.nan, torch.inf, torch.inf
    m[4, 0], v[5, 0] = torch.nan, torch.nan
    rest = (torch.tensor(1), "", None, 0)
    same("adamw_update", p, g, m, v, *scalars(0.01, 0.9, 0.99, 1e-8, 0.1), *rest)
    same("lion_update", p, g, m, *scalars(0.01, 0.9, 0.99, 0.1), *rest)
    same("sgd_update", p, g, m, *scalars(0.01, 0.9, 0.1), True, *rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize(
    ("n", "starts"),
    [
        (0, [0, 0]), (1, [0]), (5, [0, 0, 3, 5]), (1024, [0]), (2500, [0, 1024, 1025, 1025, 2048]), (2500, [9, 2, 3000]),
        (9000, [0, 100, 8191, 8192]),
    ],
)  # fmt: skip
def test_lamb(n, starts, dtype):
    p, g = tensors(n, 2, dtype)
    m, v = tensors(n, 2, optimizer.wide(dtype))
    starts, hyper, count = torch.tensor(starts), scalars(0.9, 0.99, 1e-6, 0.1), torch.tensor(3)
    op, args = OPERATORS["lamb_moments"], (p, g, m, v.abs(), starts, *hyper, count)
    got, want = op(*args), op.reference(*args)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert torch.allclose(got[2], want[2], rtol=2e-6)
    copy = "float16" if dtype == torch.float32 else ""
    same("lamb_apply", p, *got, starts, *scalars(0.1), *hyper, count, copy, None, 0)
    if dtype == torch.float32:
        same("lamb_apply", p, *got, starts, *scalars(0.1), *hyper, count, "bfloat16", torch.tensor(1), 5)


def test_lamb_gives_the_same_bits_as_often_as_it_is_asked():
    p, g, m, v = tensors(3000, 4)
    f = lambda: lamb.lamb_update(p, g, m, v.abs(), torch.tensor([0, 7, 2000]), rate=0.1, count=2)  # noqa: E731
    assert all(torch.equal(a, b) for a, b in zip(f(), f(), strict=True))


@pytest.mark.parametrize("n", [0, 1, 255, 1024, 1500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_adamw8bit(n, dtype):
    g = torch.Generator().manual_seed(n)
    p, d = tensors(n, 2, dtype)
    mu = torch.randint(-127, 128, (n,), generator=g).to(torch.int8)
    nu = torch.randint(0, 256, (n,), generator=g).to(torch.uint8)
    scale = torch.rand(-(-n // adamw8bit.BLOCK), generator=g)
    if n > 600:
        d[600] = torch.nan
    op, hyper = OPERATORS["adamw8bit_update"], scalars(0.01, 0.9, 0.99, 1e-8, 0.1)
    copy, seed = ("bfloat16", torch.tensor(2)) if dtype == torch.float32 else ("", None)
    args = (p, d, mu, nu, scale, 2 * scale, *hyper, torch.tensor(3), copy, seed, 4, torch.tensor(7))
    got, want = op(*args), op.reference(*args)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        tolerance = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(a.dtype, 1e-6)
        assert torch.allclose(a.float(), b.float(), rtol=tolerance, atol=1e-8, equal_nan=True)
