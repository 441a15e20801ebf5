"""Block quantisation: its bound, its round trip, the 8-bit floats against torch's, and what is not finite."""

import pytest
import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch.func import vmap

from fds.kernels import quantize
from fds.kernels.quantize import FORMATS, block_dequantize, block_quantize, block_quantized_sum

INTEGERS, REALS = ["int8", "int4"], {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
SHAPES = [(0,), (1,), (3, 0), (0, 40), (31,), (2, 3, 75), (5, 256), (2, 129)]


def draw(shape, dtype=torch.float32, amplitude=1.0, seed=0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)).clamp(-3, 3) * amplitude).to(dtype)


def round_trip(x, format, block=32):
    codes, scales = block_quantize(x, format=format, block=block)
    return codes, scales, block_dequantize(codes, scales, format=format, block=block, length=x.shape[-1])


def spread(scales: Tensor, length, block=32):
    """The scale of every element."""
    return scales.repeat_interleave(block, -1)[..., :length]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_round_trip(shape, format, dtype):
    x = draw(shape, dtype)
    codes, scales, y = round_trip(x, format)
    n = shape[-1]
    assert codes.dtype == FORMATS[format].dtype and codes.shape == (
        *shape[:-1],
        (n + 1) // 2 if format == "int4" else n,
    )
    assert scales.dtype == torch.bfloat16 and scales.shape == (*shape[:-1], -(-n // 32))
    assert y.shape == x.shape and y.dtype == torch.float32
    again = round_trip(y, format)
    assert torch.equal(again[0], codes) and torch.equal(again[1], scales) and torch.equal(again[2], y)


@pytest.mark.parametrize("format", INTEGERS)
@pytest.mark.parametrize("amplitude", [1e-42, 1e-38, 1e-9, 1.0, 6e4, 1e30, 1.13e38])
def test_integers_are_nearest(format, amplitude):
    """|x - q s| <= s / 2 without any slack, and the largest code is reached."""
    x = draw((40, 75), amplitude=amplitude)
    codes, scales, y = round_trip(x, format)
    s = spread(scales, 75).double()
    assert bool(((x.double() - y.double()).abs() <= s / 2).all())
    if amplitude > 1e-30:
        most = (y.double() / s).abs()[:, :32].amax(-1)
        assert bool((most == FORMATS[format].limit).all())
        near = x.abs()[:, :32].amax(-1).double() / FORMATS[format].limit
        assert torch.allclose(scales[:, 0].double(), near, rtol=2.0**-8)
    again = round_trip(y, format)
    assert torch.equal(again[0], codes) and torch.equal(again[1], scales)


@pytest.mark.parametrize("format", INTEGERS)
def test_next_to_a_tie(format):
    """Half steps, and their neighbours among floats, of scales that are no powers of two."""
    limit = FORMATS[format].limit
    for scale in (1.0, 1.0078125, 1.9921875, 3 * 2.0**-40):
        ties = (torch.arange(-limit, limit, dtype=torch.float32)[:31] + 0.5) * scale
        for x in (ties, ties.nextafter(torch.tensor(9e9)), ties.nextafter(torch.tensor(-9e9))):
            x = torch.cat([x, torch.full((-len(x) % 32,), limit * scale)])
            _, scales, y = round_trip(x, format)
            assert float(scales) == scale
            quotient = x.double() / scale  # exact enough: 24 bits by 8
            assert torch.equal(y.double() / scale, quotient.round())


@pytest.mark.parametrize("format", REALS)
@pytest.mark.parametrize("amplitude", [1e-38, 1e-9, 1.0, 1e30, 1e38])
def test_8_bit_floats(format, amplitude):
    x = draw((40, 75), amplitude=amplitude) * torch.logspace(-6, 0, 75)
    codes, scales, y = round_trip(x, format)
    s = spread(scales, 75).float()
    assert torch.equal(codes.view(REALS[format]).float(), (x / s).to(REALS[format]).float())
    assert torch.equal(y, codes.view(REALS[format]).float() * s)
    step = 2.0 ** -(FORMATS[format].mantissa + 1)
    least = torch.finfo(REALS[format]).smallest_normal
    assert bool(((x - y).abs() <= step * torch.maximum(x.abs(), least * s)).all())
    assert bool((scales.float().log2() % 1 == 0).all())


@pytest.mark.parametrize("format", FORMATS)
def test_zeros_are_exact(format):
    x = draw((2, 64))
    x[0, :32], x[1, 5] = 0.0, 0.0
    y = round_trip(x, format)[2]
    assert bool((y[0, :32] == 0).all()) and y[1, 5] == 0 and bool((y[1, :5] != 0).any())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_visible(format, bad):
    x = draw((2, 75))
    x[1, 40] = bad
    codes, scales, y = round_trip(x, format)
    assert y.isnan().nonzero().tolist() == [[1, i] for i in range(32, 64)]
    assert scales.isnan().nonzero().tolist() == [[1, 1]]
    again = round_trip(y, format)
    assert torch.equal(again[0], codes) and torch.equal(again[1].isnan(), scales.isnan())
    total = block_quantized_sum(torch.stack([codes, codes]), torch.stack([scales, scales]), format=format, block=32)
    assert torch.equal(total[1].isnan(), scales.isnan())


def test_codes_of_others():
    """NaN and infinity of 8-bit floats, which `block_quantize` never writes."""
    every, one = torch.arange(256, dtype=torch.uint8), torch.ones(2, dtype=torch.bfloat16)
    for format, dtype in REALS.items():
        got = block_dequantize(every, one, format=format)
        assert torch.equal(got.nan_to_num(7.0), every.view(dtype).float().nan_to_num(7.0))


def test_two_codes_to_a_byte():
    codes, scales = block_quantize(torch.tensor([1.0, -7.0, 7.0, 0.0, -1.0]), format="int4", block=32)
    assert codes.tolist() == [0x91, 0x07, 0x0F] and scales.tolist() == [1.0]
    assert block_dequantize(codes, scales, format="int4", block=32, length=5).tolist() == [1.0, -7.0, 7.0, 0.0, -1.0]
    assert block_dequantize(codes, scales, format="int4", block=32).tolist()[5:] == [0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_are_rounded_once(dtype):
    codes, scales, y = round_trip(draw((4, 75)), "int8")
    assert torch.equal(block_dequantize(codes, scales, block=32, dtype=dtype), y.to(dtype))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shards", [1, 2, 5])
def test_sum(format, shards):
    x = draw((shards, 3, 75))
    codes, scales = block_quantize(x, format=format, block=32)
    parts = block_dequantize(codes, scales, format=format, block=32, length=75)
    want = parts[0]
    for p in parts[1:]:
        want = want + p
    got = block_quantized_sum(codes, scales, format=format, block=32)
    wanted = block_quantize(want, format=format, block=32)
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


def test_the_size_on_the_wire():
    x = draw((4096,), torch.bfloat16)
    for format, bytes_each in (("int8", 1.015625), ("e4m3", 1.015625), ("e5m2", 1.015625), ("int4", 0.515625)):
        assert sum(t.nbytes for t in block_quantize(x, format=format)) == bytes_each * x.numel()


def test_views_and_vmap():
    x = draw((6, 75))
    for view in (x.mT.contiguous().mT, x[::2], x[:1].expand(6, 75)):
        got, want = block_quantize(view, block=32), block_quantize(view.clone(), block=32)
        assert all(torch.equal(g, w) and g.is_contiguous() for g, w in zip(got, want, strict=True))
    codes, scales = vmap(lambda r: block_quantize(r, format="int4", block=32), in_dims=1)(x.mT)
    want = block_quantize(x, format="int4", block=32)
    assert torch.equal(codes, want[0]) and torch.equal(scales, want[1])

    def back(c, s):
        return block_dequantize(c, s, format="int4", block=32, length=75)

    assert torch.equal(vmap(back)(codes, scales), back(codes, scales))
    assert torch.equal(vmap(back, in_dims=(0, None))(codes, scales[0]), back(codes, scales[:1].expand(6, 3)))
    both = vmap(lambda c, s: block_quantized_sum(c, s, format="int4", block=32))(
        codes.view(3, 2, 38), scales.view(3, 2, 3)
    )
    assert torch.equal(both[0][1], block_quantized_sum(codes[2:4], scales[2:4], format="int4", block=32)[0])


def test_inductor():
    """It leaves out the short last block where a padded view is flattened and cut (torch 2.13, CPU)."""
    x = draw((3, 75))

    def f(x):
        codes, scales, y = round_trip(2 * x, "int8")
        return codes, scales, y

    # The caches of graphs know an operator by its name: they would give the code of an older reference.
    with functorch_config.patch(enable_autograd_cache=False), inductor_config.patch(fx_graph_cache=False):
        got = torch.compile(f, fullgraph=True)(x)
    assert all(torch.equal(g, w) for g, w in zip(got, f(x), strict=True))


def test_no_gradient():
    x = draw((64,)).requires_grad_()
    codes, scales = block_quantize(x)
    assert not codes.requires_grad and not scales.requires_grad
    assert bool((torch.func.grad(lambda x: (x * block_quantize(x)[1].sum().float()).sum())(x.detach()) != 0).all())


BYTES, SCALES = torch.zeros(2, 64, dtype=torch.int8), torch.ones(2, 1, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: block_quantize(torch.ones(4, dtype=torch.float64)), "block_quantize: torch.float64.*float32"),
        (lambda: block_quantize(torch.ones(4, dtype=torch.int32)), "block_quantize: torch.int32"),
        (lambda: block_quantize(torch.tensor(1.0)), "0-D"),
        (lambda: block_quantize(torch.ones(4), format="int9"), "block_quantize: format='int9'.*int8|int4"),
        (lambda: block_quantize(torch.ones(4), block=100), "block=100.*use 128"),
        (lambda: block_dequantize(BYTES.view(torch.uint8), SCALES), "codes torch.uint8"),
        (lambda: block_dequantize(BYTES, SCALES.float()), "scales torch.float32"),
        (lambda: block_dequantize(BYTES, SCALES, block=32), r"required scales \(2, 2\)"),
        (lambda: block_dequantize(BYTES, SCALES, length=63), "length=63"),
        (lambda: block_dequantize(BYTES, SCALES, dtype=torch.float64), "dtype=torch.float64"),
        (lambda: block_dequantize(BYTES[0, 0], SCALES), r"codes \(\)"),
        (lambda: block_quantized_sum(BYTES[0], SCALES[0]), "shards >= 1"),
        (lambda: block_quantized_sum(BYTES[:0], SCALES[:0]), "shards >= 1"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_every_format_has_a_kernel():
    listed = {
        (c.kernel, c.constants["LIMIT"], c.constants["MANTISSA"])
        for op in (quantize._quantize_op, quantize._dequantize_op, quantize._sum_op)
        for c in op.kernels
    }
    assert len(listed) == 3 * len(FORMATS)
