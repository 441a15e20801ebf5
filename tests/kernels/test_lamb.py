"""LAMB on a flat buffer against a loop over its leaves in float64."""

import pytest
import torch
from torch.func import grad

from fds.kernels import operators
from fds.kernels.lamb import lamb_update

STARTS = [0, 40, 40, 41, 90]  # of 130 elements: one leaf without any, one of a single element


def tensors(dtype=torch.float32, n=130):
    g = torch.Generator().manual_seed(0)
    p, d, m, v = (torch.randn(n, generator=g) for _ in range(4))
    return p.to(dtype), d.to(dtype), m, v.abs()


def exact(p, g, m, v, starts, rate, b1, b2, eps, decay, t):
    """Algorithm 2 of the paper, leaf by leaf."""
    p, g, m, v = (x.double() for x in (p, g, m, v))
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    r = m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + eps) + decay * p
    new = p.clone()
    for a, b in zip(starts, [*starts[1:], len(p)], strict=True):
        own, change = p[a:b].norm(), r[a:b].norm()
        new[a:b] -= rate * (own / change if own > 0 and change > 0 else 1.0) * r[a:b]
    return new, m, v


HYPER = {"b1": 0.8, "b2": 0.99, "eps": 1e-6}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_against_a_loop(dtype):
    args = tensors(dtype)
    got = lamb_update(*args, torch.tensor(STARTS), rate=0.1, count=3, weight_decay=0.01, **HYPER)
    want = exact(*args, STARTS, 0.1, 0.8, 0.99, 1e-6, 0.01, 3)
    assert got[0].dtype == dtype
    for x, y in zip(got, want, strict=True):
        eps = torch.finfo(x.dtype).eps
        assert torch.allclose(x.double(), y, rtol=4 * eps, atol=4 * eps)


def test_leaves_without_a_norm():
    p, g, m, v = tensors()
    p[:40] = 0.0  # a leaf that begins at 0 moves as by Adam
    g[90:], m[90:] = 0.0, 0.0  # and one without a gradient stays
    got = lamb_update(p, g, m, v, torch.tensor(STARTS), rate=0.1, count=3, **HYPER)[0]
    assert torch.allclose(got.double(), exact(p, g, m, v, STARTS, 0.1, 0.8, 0.99, 1e-6, 0.0, 3)[0], atol=1e-6)
    assert torch.equal(got[90:], p[90:]) and (got[:40] != 0).all()


def test_shards_of_a_buffer():
    """Two ranks with half of the elements each; leaves cross the border, some have no element on one of them."""
    args, starts = tensors(), torch.tensor(STARTS)
    kw = {"rate": 0.1, "count": 3, "weight_decay": 0.01, **HYPER}
    want = lamb_update(*args, starts, **kw)
    halves = [([x[:64] for x in args], starts.clamp(max=64)), ([x[64:] for x in args], (starts - 64).clamp(min=0))]
    found = []
    for part, at in halves:
        lamb_update(*part, at, reduce=lambda s: found.append(s) or s, **kw)
    total = found[0] + found[1]
    parts = [lamb_update(*part, at, reduce=lambda s: total, **kw) for part, at in halves]
    for x, y in zip(zip(*parts, strict=True), want, strict=True):
        assert torch.allclose(torch.cat(x), y, rtol=1e-6)


def test_padding_is_no_part_of_a_norm():
    args, starts = tensors(), torch.tensor(STARTS)
    kw = {"rate": 0.1, "count": 3, "weight_decay": 0.01, **HYPER}
    padded = lamb_update(*(torch.cat([x, torch.zeros(6)]) for x in args), starts, **kw)
    for x, y in zip(padded, lamb_update(*args, starts, **kw), strict=True):
        assert torch.allclose(x[:130], y, rtol=1e-6) and (x[130:] == 0).all()


def test_the_copy_and_the_random_rounding():
    args, kw = tensors(), {"rate": 0.1, "count": 3}
    new, _, _, low = lamb_update(*args, torch.tensor(STARTS), copy=torch.float16, **kw)
    assert torch.equal(low, new.half())
    _, _, _, other = lamb_update(*args, torch.tensor(STARTS), copy=torch.bfloat16, seed=1, **kw)
    assert not torch.equal(other, new.bfloat16()) and (other.float() - new).abs().max() < 2**-7 * new.abs().max()


@pytest.mark.parametrize("starts", [[0], [0, 0], [5, 3, 200, -1]])
@pytest.mark.parametrize("n", [0, 1, 6])
def test_every_element_is_in_one_leaf(starts, n):
    out = lamb_update(*tensors(n=n), torch.tensor(starts), rate=0.1, count=1)
    assert all(o.shape == (n,) and o.isfinite().all() for o in out)


def test_a_leaf_with_nan_is_nan():
    p, g, m, v = tensors()
    g[50] = torch.nan
    new = lamb_update(p, g, m, v, torch.tensor(STARTS), rate=0.1, count=1)[0]
    assert new.isnan().nonzero().flatten().tolist() == list(range(41, 90))


def test_gradients_of_both_halves():
    args = [x.double() for x in tensors()]
    starts, rate = torch.tensor(STARTS), torch.tensor(0.1, dtype=torch.float64)
    apply, parts = operators()["lamb_apply"], operators()["lamb_moments"]

    def f(kind, rate, *args):
        moments, final = (parts.reference, apply.reference) if kind else (parts, apply)
        hyper = [torch.tensor(x, dtype=torch.float64) for x in (0.8, 0.99, 1e-6, 0.01)]
        m, v, squares = moments(*args, starts, *hyper, torch.tensor(2))
        return final(args[0], m, v, squares, starts, rate, *hyper, torch.tensor(2), "", None, 0)[0].sin().sum()

    places = (1, 2, 3, 4, 5)
    for a, b in zip(*(grad(f, argnums=places)(kind, rate, *args) for kind in (False, True)), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_bad_arguments():
    args = tensors()
    with pytest.raises(
        ValueError, match=r"lamb_moments: starts \(2,\) torch.int32 on cpu, required \[leaves\] torch.int64"
    ):
        lamb_update(*args, torch.tensor([0, 2], dtype=torch.int32), rate=0.1, count=1)
    with pytest.raises(ValueError, match=r"no leaf in starts, and 130 parameters; use starts=torch.zeros\(1\)"):
        lamb_update(*args, torch.tensor([], dtype=torch.int64), rate=0.1, count=1)
    with pytest.raises(ValueError, match=r"lamb_apply: squares \(2, 4\) torch.float32 on cpu, required \(2, 5\)"):
        lamb_update(*args, torch.tensor(STARTS), rate=0.1, count=1, reduce=lambda s: s[:, 1:])
    with pytest.raises(ValueError, match=r"lamb_moments: nu \(129,\) on cpu, required \(130,\)"):
        lamb_update(*args[:3], args[3][1:], torch.tensor(STARTS), rate=0.1, count=1)
