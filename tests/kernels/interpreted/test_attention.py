"""The kernels of decode attention: against the reference in float64, and the bits that they promise."""

import pytest
import torch
from torch.nn.functional import pad

from fds.kernels import attention_kernels, operators
from fds.kernels.attention import decode_attention, paged_decode_attention

SLOPES = torch.tensor([0.5, 0.125])


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    """Pieces of 32 keys, at most 4 for each row, so that short rows have many and long rows have longer ones."""
    monkeypatch.setattr(attention_kernels, "SPLIT", 32)
    monkeypatch.setattr(attention_kernels, "PIECES", 4)


def inputs(rows=3, heads=2, groups=1, tokens=1, d=16, dv=16, keys=150, dtype=torch.float32):
    g = torch.Generator().manual_seed(heads + tokens + d + keys)
    shapes = (rows, heads, tokens, d), (rows, groups, keys, d), (rows, groups, keys, dv)
    return tuple(torch.randn(s, generator=g).to(dtype) for s in shapes)


def exact(query, key, value, lengths, *, starts=None, scale=None, window=0, alibi_slopes=None, softcap=0.0):
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    tensors = [t.double() for t in (query, key, value)]
    return operators()["decode_attention"].reference(*tensors, lengths, starts, alibi_slopes, scale, window, softcap)


def near(got, want, dtype=torch.float32):
    """Low precision rounds a probability once, and the result once more."""
    eps = torch.finfo(dtype).eps
    limit = {"rtol": 1e-5, "atol": 4e-6} if dtype == torch.float32 else {"rtol": 4 * eps, "atol": 4 * eps}
    assert got.dtype == dtype and torch.allclose(got.double(), want, **limit), (got - want).abs().max()


def paged(key, value, page, order=None):
    """A contiguous cache cut into pages that lie in `order` among pages of NaN, and its table."""
    b, groups, keys, _ = key.shape
    columns = -(-keys // page)
    order = torch.arange(b * columns + 2) if order is None else order
    table = order[: b * columns].view(b, columns).to(torch.int32)

    def cut(t):
        pages = torch.full((len(order), page, groups, t.shape[-1]), torch.nan).to(t.dtype)
        t = pad(t, (0, 0, 0, columns * page - keys)).unflatten(2, (columns, page))
        pages[table.long()] = t.permute(0, 2, 3, 1, 4)
        return pages

    return cut(key), cut(value), table


OPTIONS = [
    {},
    {"window": 50},
    {"softcap": 2.0, "scale": 1.0},
    {"starts": torch.tensor([3, 40, 0]), "window": 100, "alibi_slopes": SLOPES, "softcap": 3.0},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("options", OPTIONS)
def test_against_float64(dtype, options):
    tensors, lengths = inputs(tokens=1 + len(options) % 2 * 2, dtype=dtype), torch.tensor([150, 71, 0])
    near(decode_attention(*tensors, lengths, **options), exact(*tensors, lengths, **options), dtype)


HEADS = [
    (1, 1, 1, 64, 64),
    (7, 1, 1, 80, 24),
    (8, 4, 3, 1, 3),
    (4, 1, 5, 96, 96),
    (1, 1, 2, 128, 128),
    (1, 1, 1, 256, 256),
]


@pytest.mark.parametrize(("heads", "groups", "tokens", "d", "dv"), HEADS)
def test_heads(heads, groups, tokens, d, dv):
    for dtype in (torch.float32, torch.float16):
        tensors, lengths = inputs(1, heads, groups, tokens, d, dv, 32, dtype), torch.tensor([29])
        near(decode_attention(*tensors, lengths), exact(*tensors, lengths), dtype)


def test_more_rows_than_a_tile_has(monkeypatch):
    monkeypatch.setattr(attention_kernels, "SPLIT", 64)
    for dtype in (torch.float32, torch.float16):
        tensors, lengths = inputs(1, 8, 1, 5, keys=64, dtype=dtype), torch.tensor([64])
        near(decode_attention(*tensors, lengths), exact(*tensors, lengths), dtype)


@pytest.mark.parametrize(
    "shape", [{"rows": 0}, {"tokens": 0}, {"keys": 0}, {"rows": 1, "heads": 1, "d": 1, "dv": 1, "keys": 1}]
)
def test_small_sizes(shape):
    tensors = inputs(**{"rows": 2, **shape})
    lengths = torch.tensor([1, 1])[: shape.get("rows", 2)].clamp(max=shape.get("keys", 9))
    near(decode_attention(*tensors, lengths), exact(*tensors, lengths))


def test_operands_that_are_not_contiguous():
    query, key, value = inputs(2, keys=40)
    lengths = torch.tensor([40, 33])
    want = decode_attention(query, key, value, lengths)
    crossed = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key, value)]
    assert torch.equal(decode_attention(*crossed, lengths), want)
    one = [t[:1].expand(2, *t.shape[1:]) for t in (query, key, value)]
    assert torch.equal(decode_attention(*one, lengths[:1].expand(2))[1], want[0])


def test_nan_and_infinite_keys_are_kept():
    query, key, value = inputs(groups=2, keys=80)
    lengths = torch.tensor([80, 71, 40])
    key[0, 0, 4], value[1, 1, 6, 2], key[2, 0, 40:], value[2, :, 41:] = torch.nan, torch.inf, torch.nan, torch.nan
    out = decode_attention(query, key, value, lengths)
    assert torch.isnan(out[0, 0]).all() and torch.isfinite(out[0, 1]).all() and torch.isfinite(out[2]).all()
    assert torch.isinf(out[1, 1, 0, 2]) and torch.isfinite(out[1, 0]).all()


@pytest.mark.parametrize("keys", [32, 40])  # one piece, and two
def test_impossible_lengths_and_pages_give_nan(keys):
    query, key, value = inputs(keys=keys)
    for length, start in [(keys + 1, 0), (-1, 0), (5, -1)]:
        out = decode_attention(query, key, value, torch.tensor([length, 4, 0]), starts=torch.tensor([start, 0, 0]))
        assert torch.isnan(out[0]).all() and torch.isfinite(out[1]).all() and (out[2] == 0).all()
    keys, values, table = paged(key, value, 16)
    lengths = torch.tensor([32, 10, 0])
    want = paged_decode_attention(query, keys, values, table, lengths)
    for wrong in (-1, len(keys)):
        table[0, 1], table[1, 1], table[2] = wrong, wrong, 10**9
        out = paged_decode_attention(query, keys, values, table, lengths)
        assert torch.isnan(out[0]).all() and torch.equal(out[1:], want[1:])


def test_sizes_that_kernels_do_not_take():
    query, key, value = inputs(1)
    lengths = torch.tensor([1])
    pages, table = torch.zeros(1, 16, 1, 16), torch.zeros(1, 1, dtype=torch.int32).expand(1, 2**26 + 1)
    with pytest.raises(ValueError, match=r"^paged_decode_attention: 1073741840 keys .* at most 2\^30"):
        paged_decode_attention(query, pages, pages, table, lengths)
    with pytest.raises(ValueError, match=r"^decode_attention: 2\^31 elements .* use pages"):
        decode_attention(query, *(t[:, :, :1].expand(1, 1, 2**27, 16) for t in (key, value)), lengths)
    with pytest.raises(ValueError, match=r"^decode_attention: heads of 257 columns .* at most 256"):
        decode_attention(*inputs(1, d=257, keys=3), lengths)


# --- bits ---


BITS = [(torch.float32, {}), (torch.float16, {"window": 100, "softcap": 3.0, "alibi_slopes": SLOPES})]


@pytest.mark.parametrize(("dtype", "options"), BITS)
def test_a_row_has_the_same_bits_in_every_batch(dtype, options, monkeypatch):
    query, key, value = inputs(2, tokens=2, dtype=dtype)
    lengths = torch.tensor([150, 40])
    want = decode_attention(query, key, value, lengths, **options)
    for i in range(2):  # alone, in a cache with no free slot
        n = int(lengths[i])
        alone = decode_attention(*(t[i : i + 1, :, :n] for t in (query, key, value)), lengths[i : i + 1], **options)
        assert torch.equal(alone[0], want[i])
    wide = (pad(t, (0, 0, 13, 90), value=torch.nan) for t in (key, value))  # padding, and free slots
    assert torch.equal(decode_attention(query, *wide, lengths + 13, starts=torch.full((2,), 13), **options), want)
    monkeypatch.setattr(attention_kernels, "_programs", lambda *_: 1)
    assert torch.equal(decode_attention(query, key, value, lengths, **options), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_pages_in_any_order_and_of_any_size_have_the_same_bits(dtype):
    query, key, value = inputs(1, keys=70, dtype=dtype)
    lengths = torch.tensor([70])
    want = decode_attention(query, key, value, lengths, softcap=5.0)
    for page in (1, 16, 48):
        order = torch.randperm(-(-70 // page) + 2, generator=torch.Generator().manual_seed(page))
        assert torch.equal(paged_decode_attention(query, *paged(key, value, page, order), lengths, softcap=5.0), want)
    assert torch.equal(paged_decode_attention(query, *paged(key, value, 48), lengths, softcap=5.0), want)


def test_one_piece_has_the_bits_of_the_second_pass(monkeypatch):
    """A cache of one piece gets its result from the first pass."""
    query, key, value = inputs(keys=30)
    lengths = torch.tensor([30, 11, 0])
    want = decode_attention(query, *(pad(t, (0, 0, 0, 9)) for t in (key, value)), lengths)
    launched = []
    run = attention_kernels.launch
    monkeypatch.setattr(attention_kernels, "launch", lambda f, *a, **k: (launched.append(f), run(f, *a, **k)))
    assert torch.equal(decode_attention(query, key, value, lengths), want)
    assert launched == [attention_kernels.pieces_kernel]


def test_lengths_of_pieces_agree(monkeypatch):
    tensors, lengths = inputs(2, 1), torch.tensor([150, 71])
    want = exact(*tensors, lengths)
    for split, pieces in ((32, 2), (16, 64), (256, 128)):
        monkeypatch.setattr(attention_kernels, "SPLIT", split)
        monkeypatch.setattr(attention_kernels, "PIECES", pieces)
        near(decode_attention(*tensors, lengths), want)
