"""Stochastic rounding: known answers of its generator, both neighbours in the right share, what it keeps."""

import math

import pytest
import torch

from fds.kernels import rounding
from fds.kernels.rounding import random_bits, stochastic_round


def key(*numbers):
    return [torch.tensor(n) for n in numbers]


@pytest.mark.parametrize(
    ("words", "want"),
    [  # of the authors of Philox: counter and key of zeros, of ones, of the digits of pi
        ((0,) * 6, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 6, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(words, want):
    *counter, k0, k1 = key(*words)
    assert tuple(int(w) for w in rounding.philox((k0, k1), tuple(counter))) == want


def test_every_number_of_bfloat16_is_kept():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    got, nan = stochastic_round(every.float(), 1), every.isnan()
    assert torch.equal(got[~nan].view(torch.int16), every[~nan].view(torch.int16)) and got[nan].isnan().all()


def test_what_is_not_a_number_and_what_is_large():
    low_bits = torch.tensor([0x7F800001, -0x7FFFFF], dtype=torch.int32).view(
        torch.float32
    )  # NaN by its last bits alone
    assert stochastic_round(low_bits.repeat(500), 0).isnan().all()
    largest = torch.full((1000,), torch.finfo(torch.float32).max)
    want = torch.finfo(torch.bfloat16).max
    assert (stochastic_round(largest, 0) == want).all() and (stochastic_round(-largest, 0) == -want).all()
    tiny = stochastic_round(torch.full((1000,), -1e-45), 0)
    assert torch.equal(tiny, torch.full_like(tiny, -0.0)) and tiny.signbit().all()


@pytest.mark.parametrize("x", [1.0 + 2**-9, -1.0 - 2**-8 - 2**-12, 1e-20, -3.14159, 2.0 - 2**-23, 1e-39, 6.5e4])
def test_the_mean_is_the_number(x):
    n = 200_000
    value = torch.full((n,), x)
    got = stochastic_round(value, 7, step=3, leaf=2).double()
    down = (value[:1].view(torch.int32) & -0x10000).view(torch.float32).double().item()
    up = (value[:1].view(torch.int32).bitwise_and(-0x10000) + 0x10000).view(torch.float32).double().item()
    assert set(got.unique().tolist()) <= {down, up}
    share = (value[0].double().item() - down) / (up - down)
    error = abs((got == up).double().mean().item() - share)
    assert error <= 4 * math.sqrt(share * (1 - share) / n) + 1e-12


def test_bits_are_uniform_and_independent():
    n = 2**18
    bits = random_bits(n, *key(11, 5), 3)
    for part in (bits & 0xFF, bits >> 8):
        counts = torch.bincount(part, minlength=256).double()
        chi = float(((counts - n / 256) ** 2 / (n / 256)).sum())
        assert abs(chi - 255) < 5 * math.sqrt(2 * 255)
    x = bits.double() - bits.double().mean()
    others = [
        random_bits(n, *key(11, 6), 3),
        random_bits(n, *key(12, 5), 3),
        random_bits(n, *key(11, 5), 4),
        random_bits(n, *key(11, 5), 3, 1),
    ]
    for y in [bits.roll(k) for k in (1, 2, 3, 4, 8, 16)] + others:
        y = y.double() - y.double().mean()
        assert abs(float((x * y).mean() / (x.std() * y.std()))) < 5 / math.sqrt(n)


def test_the_key():
    x = torch.randn(100)
    first = stochastic_round(x, 1, step=2, leaf=3)
    assert torch.equal(first, stochastic_round(x, torch.tensor(1), step=torch.tensor(2), leaf=3))
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (1 + 2**32, 2, 3), (-1, 2, 3)):
        assert not torch.equal(first, stochastic_round(x, other[0], step=other[1], leaf=other[2]))
    assert torch.equal(first[:37], stochastic_round(x[:37], 1, step=2, leaf=3))  # an element's bits are its own
    assert torch.equal(first, stochastic_round(x.view(20, 5).mT.contiguous().mT, 1, step=2, leaf=3).view(-1))


@pytest.mark.parametrize("shape", [(0,), (), (1,), (3, 0), (7, 9)])
def test_shapes(shape):
    y = stochastic_round(torch.ones(shape), 0)
    assert y.shape == shape and y.dtype == torch.bfloat16 and y.is_contiguous() and (y == 1).all()


def test_a_compiler_keeps_the_bits():
    x = torch.randn(1000)
    got = torch.compile(stochastic_round, fullgraph=True)(x, torch.tensor(5), step=torch.tensor(1))
    assert torch.equal(got, stochastic_round(x, 5, step=1))


def test_bad_arguments():
    x = torch.ones(3)
    with pytest.raises(ValueError, match=r"stochastic_round: x torch.float64, required torch.float32; use x.float\(\)"):
        stochastic_round(x.double(), 0)
    with pytest.raises(ValueError, match=r"leaf=-1, required 0 <= leaf < 2\^31"):
        stochastic_round(x, 0, leaf=-1)
    with pytest.raises(ValueError, match=r"seed \(1,\) torch.int64 on cpu, required a number, or a 0-D torch.int64"):
        stochastic_round(x, torch.ones(1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"step \(\) torch.float32"):
        stochastic_round(x, 0, step=torch.tensor(1.0))
