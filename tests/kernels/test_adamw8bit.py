"""AdamW with moments of 8 bits: what the codes keep, and that it trains as AdamW does."""

import math

import pytest
import torch

from fds.kernels.adamw8bit import BLOCK, adamw8bit_update, decode_mu, decode_nu, encode_mu, encode_nu
from fds.kernels.optimizer import adamw_update
from fds.kernels.rounding import stochastic_round

NONE = torch.zeros(1, BLOCK, dtype=torch.int64)


def empty(p):
    scale = torch.zeros(-(-p.numel() // BLOCK))
    return torch.zeros_like(p, dtype=torch.int8), torch.zeros_like(p, dtype=torch.uint8), scale, scale


@pytest.mark.parametrize("scale", [1.0, 3.7e-5, 1e30, 1e-27])
def test_codes_stand_for_themselves(scale):
    top = torch.tensor([scale])
    q = torch.arange(-128, 128).clamp(min=-127)[None].to(torch.int8)
    got, s = encode_mu(decode_mu(q, top))
    assert torch.equal(got, q) and torch.allclose(s, top, rtol=1e-6)
    k = torch.arange(256)[None].to(torch.uint8)
    for bits in (NONE, NONE + 65535):
        got, s = encode_nu(decode_nu(k, top), bits)
        assert torch.equal(got, k) and torch.equal(s, top)


def test_steps_of_mu():
    x = torch.randn(50, BLOCK, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 0, BLOCK)
    q, top = encode_mu(x)
    y = decode_mu(q, top)
    half = 0.5 * ((q.abs() + 1.0) / 127) ** 4 - 0.5 * (q.abs() / 127.0) ** 4
    assert ((x - y).abs() <= 1.3 * half * top[:, None]).all() and (y * x >= 0).all()
    assert (((x - y).abs() / x.abs())[x.abs() > 0.5 * top[:, None]] < 0.02).all()


def test_the_mean_of_nu_is_nu():
    n, g = 4000, torch.Generator().manual_seed(1)
    x = (torch.randn(BLOCK, generator=g).square() * torch.logspace(-7, 0, BLOCK)).repeat(n, 1)
    y = decode_nu(*encode_nu(x, torch.randint(65536, x.shape, generator=g)))
    inside = x[0] > x[0].max() * 2.0**-31.5
    error = (y.double().mean(0) / x[0].double() - 1).abs()[inside]
    assert (
        error < 4.5 * 0.0453 / math.sqrt(n) + 1e-5
    ).all()  # half a step of 9 % is the most that its deviation can be
    assert (y / x - 1).abs()[:, inside].max() < 0.0906


def test_small_nu_does_not_become_0():
    x = torch.zeros(1, BLOCK)
    x[0, :4] = torch.tensor([1.0, 1e-5, 1e-9, 1e-30])
    k, top = encode_nu(x, NONE)
    y = decode_nu(k, top)
    assert (y[0, :4] > 0).all() and (y[0, 4:] == 0).all() and y[0, 3] == pytest.approx(2.0**-31.75)


def test_one_update_of_no_state_is_that_of_adamw():
    g = torch.Generator().manual_seed(2)
    p, d = torch.randn(700, generator=g), torch.randn(700, generator=g)
    kw = {"rate": 0.01, "weight_decay": 0.1, "count": 1}
    new, *state = adamw8bit_update(p, d, *empty(p), **kw)
    want, mu, nu = adamw_update(p, d, torch.zeros(700), torch.zeros(700), **kw)
    assert torch.equal(new, want)
    assert [s.dtype for s in state] == [torch.int8, torch.uint8, torch.float32, torch.float32]
    assert sum(s.numel() * s.element_size() for s in state) == 2 * 700 + 2 * 4 * 3
    pad = torch.nn.functional.pad
    assert torch.allclose(state[2], pad(mu, (0, 68)).view(3, -1).abs().amax(1)) and torch.allclose(
        state[3], pad(nu, (0, 68)).view(3, -1).amax(1)
    )


def train(update, state, steps=200):
    """Least squares with columns of very different size, gradients with noise; the mean loss of the last steps."""
    g = torch.Generator().manual_seed(3)
    width, rows = 512, 1024
    size = torch.logspace(-2, 0, width)
    a = torch.randn(rows, width, generator=g) * size
    b = a @ torch.randn(width, generator=g)
    p, losses = torch.zeros(width), []
    for t in range(1, steps + 1):
        pick = torch.randint(rows, (64,), generator=g)
        error = a[pick] @ p - b[pick]
        p, *state = update(p, a[pick].mT @ error / 64, *state, rate=0.02, count=t, b2=0.99)
        losses.append(float((a @ p - b).square().mean() / b.square().mean()))
    return sum(losses[-30:]) / 30


def test_it_trains_as_adamw_does():
    ours = train(adamw8bit_update, empty(torch.zeros(512)))
    theirs = train(adamw_update, [torch.zeros(512)] * 2)
    assert ours < 1.1 * theirs < 0.2


def test_nu_falls_when_gradients_do():
    """By 0.1 % in an update, which the nearest code would never follow."""
    n, t = 256 * 16, 300
    p = torch.zeros(n)
    keep = torch.zeros(n, dtype=torch.bool)
    keep[::BLOCK] = True  # the largest of each block, which holds the scale where it is
    state = adamw8bit_update(p, torch.where(keep, 10.0, 1.0), *empty(p), rate=0.0, count=1)[1:]
    first = decode_nu(state[1].view(-1, BLOCK), state[3])
    for i in range(2, t):
        state = adamw8bit_update(p, torch.where(keep, 0.3, 0.0), *state, rate=0.0, count=i)[1:]
    last = decode_nu(state[1].view(-1, BLOCK), state[3])
    ratio = (last / first)[:, 1:].mean().item()
    assert ratio == pytest.approx(0.999 ** (t - 2), rel=0.03)


def test_low_precision_parameters_and_copies():
    g = torch.Generator().manual_seed(4)
    p, d = torch.randn(300, generator=g), torch.randn(300, generator=g)
    kw = {"rate": 0.01, "count": 2}
    wide = adamw8bit_update(p, d, *empty(p), copy=torch.bfloat16, seed=5, **kw)
    assert torch.equal(wide[5], stochastic_round(wide[0], 5, step=2))
    low = adamw8bit_update(p.bfloat16(), d, *empty(p), seed=5, **kw)
    exact = adamw8bit_update(p.bfloat16().float(), d, *empty(p), **kw)
    assert torch.equal(low[0], stochastic_round(exact[0], 5, step=2)) and torch.equal(low[2], exact[2])


@pytest.mark.parametrize("shape", [(0,), (), (1,), (16, 16), (5, 60)])
def test_shapes(shape):
    p = torch.ones(shape)
    out = adamw8bit_update(p, p, *empty(p), rate=0.1, count=1)
    assert all(o.shape == shape and o.is_contiguous() for o in out[:3]) and torch.allclose(out[0], p - 0.1)


def test_nan_stays_in_its_block():
    p = torch.ones(3 * BLOCK)
    g = p.clone()
    g[BLOCK + 1], g[2 * BLOCK + 5] = torch.nan, torch.inf
    new, *state = adamw8bit_update(p, g, *empty(p), rate=0.1, count=1)
    assert new.isnan().nonzero().flatten().tolist() == [BLOCK + 1, 2 * BLOCK + 5]
    assert state[2].isnan().tolist() == state[3].isnan().tolist() == [False, True, True]
    assert adamw8bit_update(p, p, *state, rate=0.1, count=2)[0].isnan().view(3, -1).all(1).tolist() == [
        False,
        True,
        True,
    ]


def test_bad_arguments():
    p = torch.ones(300)
    with pytest.raises(
        ValueError, match=r"adamw8bit_update: mu_scale \(1,\) torch.float32 on cpu, required \(2,\) torch.float32"
    ):
        adamw8bit_update(p, p, *empty(p)[:2], torch.zeros(1), torch.zeros(2), rate=0.1, count=1)
    with pytest.raises(
        ValueError, match=r"adamw8bit_update: nu \(300,\) torch.int8 on cpu, required \(300,\) torch.uint8"
    ):
        adamw8bit_update(p, p, empty(p)[0], *empty(p)[::2][:1], *empty(p)[2:], rate=0.1, count=1)
    with pytest.raises(ValueError, match=r"param torch.float64; the nearest supported dtype is torch.float32"):
        adamw8bit_update(p.double(), p, *empty(p), rate=0.1, count=1)
