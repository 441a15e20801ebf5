"""Decode attention on the CPU: against torch's own attention under equal masks, and what it promises about caches, pages and bad input."""

import math
import re

import pytest
import torch
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from fds.kernels import attention_kernels, operators
from fds.kernels.aot import compiled
from fds.kernels.attention import decode_attention, paged_decode_attention

LENGTHS = torch.tensor([29, 17, 3, 0])
STARTS = torch.tensor([0, 5, 2, 0])


def inputs(heads=4, groups=2, tokens=1, d=16, dv=16, keys=31, dtype=torch.float32, rows=4):
    g = torch.Generator().manual_seed(heads + tokens + d)
    shapes = (rows, heads, tokens, d), (rows, groups, keys, d), (rows, groups, keys, dv)
    return tuple(torch.randn(s, generator=g).to(dtype) for s in shapes)


def masks(tokens, keys, lengths, starts=None, window=0):
    last = lengths[:, None, None] - tokens + torch.arange(tokens)[:, None]
    slot = torch.arange(keys)
    seen = slot <= last
    if starts is not None:
        seen = seen & (slot >= starts[:, None, None])
    return (seen & (slot > last - window) if window else seen), last - slot


def by_torch(query, key, value, lengths, *, starts=None, scale=None, window=0, alibi_slopes=None, softcap=0.0):
    """The same by torch's attention in float64, of which rows that see nothing are zeros; and by hand where there is a softcap."""
    q, k, v = (t.double() for t in (query, key, value))
    seen, back = masks(q.shape[2], k.shape[2], lengths, starts, window)
    bias = torch.zeros(()).double() if alibi_slopes is None else -alibi_slopes.double()[:, None, None] * back[:, None]
    bias = bias.where(seen[:, None], -torch.inf)
    if softcap:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        x = softcap * torch.tanh(q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale) / softcap) + bias
        return x.softmax(-1).nan_to_num(0.0) @ v
    with sdpa_kernel(SDPBackend.MATH):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, bias, scale=scale, enable_gqa=True).nan_to_num(
            0.0
        )


def paged(key, value, page, order):
    """A contiguous cache cut into pages that lie in `order` among pages of NaN, and its table."""
    b, groups, keys, _ = key.shape
    columns = -(-keys // page)
    table = order[: b * columns].view(b, columns).to(torch.int32)

    def cut(t):
        t = torch.nn.functional.pad(t, (0, 0, 0, columns * page - keys)).unflatten(2, (columns, page))
        pages = torch.full((len(order), page, groups, t.shape[-1]), torch.nan).to(t.dtype)
        pages[table.long()] = t.permute(0, 2, 3, 1, 4)
        return pages

    return cut(key), cut(value), table


OPTIONS = [
    {},
    {"starts": STARTS},
    {"window": 7},
    {"softcap": 2.0, "scale": 1.0},
    {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0])},
    {"starts": STARTS, "window": 4, "softcap": 2.0, "alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0])},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_against_torch(dtype, tokens, options):
    tensors = inputs(tokens=tokens, dtype=dtype)
    got = decode_attention(*tensors, LENGTHS, **options)
    want = by_torch(*tensors, LENGTHS, **options)
    assert got.dtype == dtype and got.is_contiguous()
    eps = torch.finfo(dtype).eps
    assert torch.allclose(got.double(), want, rtol=eps, atol=16 * max(eps if dtype == torch.float64 else 2**-24, 0))
    assert (got[3] == 0).all()


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (8, 1), (14, 2), (6, 6)])
@pytest.mark.parametrize(("d", "dv"), [(64, 64), (80, 80), (96, 32), (1, 3)])
def test_heads(heads, groups, d, dv):
    tensors = inputs(heads, groups, 2, d, dv)
    assert torch.allclose(decode_attention(*tensors, LENGTHS.int()).double(), by_torch(*tensors, LENGTHS), atol=2e-6)


def test_gradients_equal_those_of_torch():
    tensors = [t.double().requires_grad_() for t in inputs(tokens=2)]
    options = OPTIONS[-1]
    got = torch.autograd.grad(decode_attention(*tensors, LENGTHS, **options).square().sum(), tensors)
    want = torch.autograd.grad(by_torch(*tensors, LENGTHS, **options).square()[:3].sum(), tensors)
    # by hand, rows that see nothing divide zero by zero: the reference has gradients there, zeros
    for g, w in zip(got, want, strict=True):
        assert torch.isfinite(g).all() and torch.allclose(g[:2], w[:2], atol=1e-12) and (g[3] == 0).all()


@pytest.mark.parametrize("stale", [torch.nan, torch.inf])
def test_free_slots_may_hold_anything(stale):
    query, key, value = inputs(tokens=2, dtype=torch.float64)
    seen = masks(2, 31, LENGTHS, STARTS, 5)[0].any(1)[:, None, :, None]
    dirty = [t.where(seen, stale).requires_grad_() for t in (key, value)]
    leaf = query.clone().requires_grad_()
    out = decode_attention(leaf, *dirty, LENGTHS, starts=STARTS, window=5)
    assert torch.equal(out, decode_attention(query, key, value, LENGTHS, starts=STARTS, window=5))
    for g, x in zip(torch.autograd.grad(out.square().sum(), [leaf, *dirty]), (query, key, value), strict=True):
        assert g.shape == x.shape and torch.isfinite(g).all()


def test_nan_and_infinite_keys_are_kept():
    query, key, value = inputs()
    key[0, 0, 4] = torch.nan
    value[1, 1, 6, 2] = torch.inf
    out = decode_attention(query, key, value, LENGTHS)
    assert torch.isnan(out[0, :2]).all() and torch.isfinite(out[0, 2:]).all()
    assert torch.isinf(out[1, 2:, 0, 2]).all() and torch.isfinite(out[2:]).all()


@pytest.mark.parametrize(("lengths", "starts"), [(32, 0), (-1, 0), (5, -1)])
def test_impossible_lengths_give_nan(lengths, starts):
    tensors = inputs(rows=2)
    out = decode_attention(*tensors, torch.tensor([lengths, 4]), starts=torch.tensor([starts, 0]))
    assert torch.isnan(out[0]).all() and torch.isfinite(out[1]).all()


def test_tokens_before_the_first_key_are_zeros():
    out = decode_attention(*inputs(tokens=5), LENGTHS)
    assert (out[2, :, :2] == 0).all() and (out[2, :, 2:] != 0).all()


@pytest.mark.parametrize("page", [1, 4, 16])
@pytest.mark.parametrize("options", OPTIONS)
def test_pages(page, options):
    query, key, value = inputs(tokens=2)
    want = decode_attention(query, key, value, LENGTHS, **options)
    count = 4 * -(-31 // page) + 3
    first = paged_decode_attention(query, *paged(key, value, page, torch.arange(count)), LENGTHS, **options)
    assert torch.allclose(first, want, atol=1e-6)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(page))
    pages = paged(key, value, page, order)
    assert torch.equal(paged_decode_attention(query, *pages, LENGTHS, **options), first)


def test_page_numbers():
    query, key, value = inputs()
    keys, values, table = paged(key, value, 4, torch.arange(32))
    want = paged_decode_attention(query, keys, values, table, LENGTHS)
    free = table.clone()
    free[2, 1:], free[3] = -1, 99  # behind the third row's three keys, and the fourth row has none
    assert torch.equal(paged_decode_attention(query, keys, values, free, LENGTHS), want)
    for wrong in (-1, 32):
        free[0, 2] = wrong
        out = paged_decode_attention(query, keys, values, free, LENGTHS)
        assert torch.isnan(out[0]).all() and torch.equal(out[1:], want[1:])


def test_gradients_of_shared_pages_add_up():
    query, keys, values = (
        inputs(rows=2)[0].double(),
        torch.randn(1, 4, 2, 16).double(),
        torch.randn(1, 4, 2, 16).double(),
    )
    table, lengths = torch.zeros(2, 1, dtype=torch.int32), torch.tensor([4, 3])
    both = grad(lambda v: paged_decode_attention(query, keys, v, table, lengths).sum())(values)
    each = [
        grad(lambda v, i=i: paged_decode_attention(query[i : i + 1], keys, v, table[:1], lengths[i : i + 1]).sum())(
            values
        )
        for i in (0, 1)
    ]
    assert torch.allclose(both, each[0] + each[1], atol=1e-12)


@pytest.mark.parametrize(
    "shape", [{"rows": 0}, {"tokens": 0}, {"keys": 0}, {"rows": 1, "heads": 1, "groups": 1, "d": 1, "dv": 1, "keys": 1}]
)
def test_small_sizes(shape):
    tensors = inputs(**shape)
    lengths = LENGTHS[: shape.get("rows", 4)].clamp(max=shape.get("keys", 31))
    out = decode_attention(*tensors, lengths)
    assert out.shape == (*tensors[0].shape[:3], tensors[2].shape[3])
    assert torch.allclose(
        out.double(), by_torch(*tensors, lengths) if shape.get("keys", 1) else torch.zeros(()).double(), atol=1e-6
    )
    if "keys" in shape and not shape["keys"]:
        assert (
            paged_decode_attention(
                tensors[0], torch.ones(1, 4, 2, 16), torch.ones(1, 4, 2, 16), torch.zeros(4, 0).int(), lengths
            )
            == 0
        ).all()


def test_vmap_over_rows_pages_and_slopes():
    query, key, value = inputs(rows=4)
    stacked = [t.unflatten(0, (2, 2)) for t in (query, key, value, LENGTHS)]
    want = decode_attention(query, key, value, LENGTHS)
    assert torch.allclose(vmap(decode_attention)(*stacked).flatten(0, 1), want, atol=1e-6)
    queries = torch.stack([query, -query], 1)
    each = torch.stack([want, decode_attention(-query, key, value, LENGTHS)])
    assert torch.allclose(vmap(decode_attention, (1, None, None, None))(queries, key, value, LENGTHS), each, atol=1e-6)
    keys, values, table = paged(key, value, 4, torch.arange(32))
    got = vmap(paged_decode_attention, (0, None, None, 0, 0))(
        stacked[0], keys, values, table.unflatten(0, (2, 2)), stacked[3]
    )
    assert torch.allclose(got.flatten(0, 1), want, atol=1e-6)
    slopes = torch.rand(3, 4)
    got = vmap(lambda s: decode_attention(query, key, value, LENGTHS, alibi_slopes=s))(slopes)
    assert torch.allclose(got[2], decode_attention(query, key, value, LENGTHS, alibi_slopes=slopes[2]), atol=1e-6)


def test_bad_input():
    query, key, value = inputs()
    table = torch.zeros(4, 2, dtype=torch.int32)
    for arguments, options, text in [
        ((query[0], key, value, LENGTHS), {}, r"query \[4, 1, 16\] .* required \[B, Hq, Q, D\]"),
        ((query, key[:, :, :5], value, LENGTHS), {}, r"value \[4, 2, 31, 16\] .* required \[B=4, Hkv=2, L=5, Dv"),
        ((query[:, :3], key, value, LENGTHS), {}, "3 query heads, 2 key heads"),
        ((query.half(), key, value, LENGTHS), {}, r"key .* torch.float32 on cpu; required .* torch.float16 on cpu"),
        ((query.int(), key.int(), value.int(), LENGTHS), {}, "query .* torch.int32"),
        (
            (query, key, value, LENGTHS.float()),
            {},
            r"lengths \[4\] torch.float32 .* \[B=4\] torch.int32 or torch.int64",
        ),
        ((query, key, value, LENGTHS[:2]), {}, r"lengths \[2\]"),
        ((query, key, value, LENGTHS), {"starts": STARTS[:1]}, r"starts \[1\]"),
        ((query, key, value, LENGTHS), {"alibi_slopes": torch.ones(2)}, r"alibi_slopes \[2\] .* \[Hq=4\]"),
        ((query, key[:, :0], value[:, :0], LENGTHS), {}, "'Hkv': 0.*required at least 1"),
        ((query, key.to("meta"), value, LENGTHS), {}, "key .* on meta; required .* on cpu"),
        ((query, key, value, LENGTHS), {"window": -1}, "window=-1"),
        ((query, key, value, LENGTHS), {"softcap": -1.0}, "softcap=-1.0"),
    ]:
        with pytest.raises(ValueError, match=f"^decode_attention: .*{text}"):
            decode_attention(*arguments, **options)
    pages = torch.zeros(3, 4, 2, 16)
    for arguments, text in [
        ((query, pages[..., :8], pages, table, LENGTHS), r"key_pages .* \[P=3, page=4, Hkv=2, D=16\]"),
        ((query, pages[:0], pages[:0], table, LENGTHS), "'P': 0.*required at least 1"),
        ((query, pages[:, :0], pages[:, :0], table, LENGTHS), "'page': 0.*required at least 1"),
        ((query, pages, pages, table.long(), LENGTHS), "page_table .*int64"),
        ((query, pages, pages, table[:2], LENGTHS), r"page_table \[2, 2\] .* \[B=4, pages\]"),
    ]:
        with pytest.raises(ValueError, match=f"^paged_decode_attention: .*{text}"):
            paged_decode_attention(*arguments)
    with pytest.raises(ValueError, match="takes no gradient"):
        decode_attention(query, key, value, LENGTHS, alibi_slopes=torch.ones(4, requires_grad=True)).sum().backward()


def test_the_gate_has_what_is_launched():
    """The tiles that the launcher takes for the usual heads are among the configurations that are compiled ahead of time."""
    listed = [c for n in ("decode_attention", "paged_decode_attention") for c in operators()[n].kernels]
    for d in (128, 256):
        for rows in (1, 4, 7, 16, 28, 64):
            for dtype in (torch.bfloat16, torch.float32):
                blocks, warps, _ = attention_kernels._choice(dtype, rows, d, d, False)
                assert any(blocks.items() <= c.constants.items() and c.warps == warps for c in listed)


def test_every_form_of_the_kernel_has_the_same_arithmetic():
    """Rows keep their bits in pages, and in caches of one piece: their forms are compiled to as many instructions of each kind."""

    def arithmetic(configured):
        found = re.findall(r"\b(?:fma|mul|add|sub|max|ex2|mma)\.[\w.]*f32[\w.]*", compiled(configured, 90).ptx)
        return {k: found.count(k) for k in set(found)}

    forms = [{}, {"page": 16}, {"whole": True}]
    first, *rest = (arithmetic(attention_kernels._configured(torch.bfloat16, 16, 64, **form)) for form in forms)
    assert first and all(r == first for r in rest)


def test_scale_is_by_default_that_of_the_width():
    tensors = inputs(d=64)
    a, b = decode_attention(*tensors, LENGTHS), decode_attention(*tensors, LENGTHS, scale=1 / math.sqrt(64))
    assert torch.equal(a, b)
