"""The kernels of block quantisation: the same bits as their reference, which other tests hold against float64 and torch's own 8-bit floats.

All arithmetic is exact or on integers, so that bfloat16 and 8-bit floats are right under the interpreter as well.
"""

import pytest
import torch

from fds.kernels import quantize as q
from fds.kernels import registry

FORMATS = list(q.FORMATS)


def equal(got, want):
    assert got.dtype == want.dtype and got.shape == want.shape and torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))


def inputs(rows, n, dtype, seed=0):
    g = torch.Generator().manual_seed(seed + n)
    return (torch.randn(rows, n, generator=g).clamp(-3, 3) * torch.tensor([1e-7, 1.0, 300.0])[:rows, None]).to(dtype)


def check(x, format, block):
    assert registry.INTERPRETED
    codes, scales = q.block_quantize(x, format=format, block=block)
    want = q._quantize(x, format, block)
    equal(codes, want[0])
    equal(scales, want[1])
    n = x.shape[-1]
    y = q.block_dequantize(codes, scales, format=format, block=block, length=n)
    equal(y, q._dequantize(codes, scales, n, format, block, torch.float32))
    return codes, scales, y


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("rows", "n", "block"), [(0, 40, 32), (3, 0, 32), (1, 1, 32), (3, 75, 32), (2, 2049, 1024), (3, 256, 128)]
)
def test_against_the_reference(rows, n, block, format, dtype):
    x = inputs(rows, n, dtype)
    _, scales, y = check(x, format, block)
    if q.FORMATS[format].limit:
        half = scales.double().repeat_interleave(block, -1)[..., :n] / 2
        assert bool(((x.double() - y.double()).abs() <= half).all())


@pytest.mark.parametrize("format", FORMATS)
def test_bfloat16_and_many_programs(format):
    check(inputs(3, 4100, torch.bfloat16), format, 32)
    x = inputs(1, 4101, torch.bfloat16)  # one row: whole blocks, then the short one, in two launches
    codes, scales, _ = check(x, format, 32)
    codes, scales = torch.stack([codes, codes.flip(0)]), torch.stack([scales, scales])
    got, want = q.block_quantized_sum(codes, scales, format=format, block=32), q._sum(codes, scales, format, 32)
    equal(got[0], want[0])
    equal(got[1], want[1])


@pytest.mark.parametrize("format", FORMATS)
def test_not_finite_and_extreme(format):
    x = inputs(3, 200, torch.float32)
    x[0, 3], x[1, 70], x[2, 199] = torch.nan, torch.inf, -torch.inf
    x[0, 64:96] = 0.0
    x[1, 100:132] *= 1e36
    x[1, 132:140] *= 1e-40
    x[2, 5], x[2, 6] = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny / 3
    check(x, format, 32)
    check(x, format, 128)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_next_to_a_tie(format):
    limit = q.FORMATS[format].limit
    ties = (torch.arange(-limit, limit, dtype=torch.float32)[:31] + 0.5) * 1.0078125
    for x in (ties, ties.nextafter(torch.tensor(9e9)), ties.nextafter(torch.tensor(-9e9))):
        check(torch.cat([x, torch.tensor([limit * 1.0078125])])[None], format, 32)


@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_every_8_bit_float(format):
    every, one = torch.arange(256, dtype=torch.uint8), torch.ones(8, dtype=torch.bfloat16)
    got = q.block_dequantize(every, one, format=format, block=32)
    equal(got, every.view(q.FORMATS[format].real).float())


@pytest.mark.parametrize("format", FORMATS)
def test_views(format):
    x = inputs(3, 75, torch.float32)
    for view in (x.mT.contiguous().mT, x[:, ::2], x[:1].expand(3, 75)):
        check(view, format, 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_results_are_rounded_once(dtype):
    codes, scales, y = check(inputs(3, 75, torch.float32)[:2], "int8", 32)
    equal(q.block_dequantize(codes, scales, block=32, dtype=dtype), y.to(dtype))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("shards", "n"), [(1, 75), (3, 75), (4, 160), (2, 0)])
def test_sum(shards, n, format):
    x = torch.stack([inputs(3, n, torch.float32, seed) for seed in range(shards)])
    if n > 75:
        x[1, 2, 9] = torch.nan
    codes, scales = q.block_quantize(x, format=format, block=32)
    got, want = q.block_quantized_sum(codes, scales, format=format, block=32), q._sum(codes, scales, format, 32)
    equal(got[0], want[0])
    equal(got[1], want[1])
