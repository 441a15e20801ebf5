"""Caches: what a slot holds, masks, memory, int8."""

import pytest
import torch
import zoo

import fds
from fds import tree
from fds.inference import Decoding
from fds.inference import cache as caches
from fds.inference.cache import CacheConfig


@pytest.mark.parametrize("slots", [4, 7, 16])
@pytest.mark.parametrize("window", [0, 3])
def test_masks_say_what_slots_hold(slots, window):
    """Against writing positions down one by one."""
    held = [-1] * slots
    for p in range(3 * slots):
        held[p % slots] = p
        seen = caches.mask(slots, torch.tensor([[p]]), window)[0, 0, 0].tolist()
        assert seen == [h >= 0 and h <= p and (not window or h > p - window) for h in held]
        assert [h if h >= 0 else None for h in caches.positions(slots, torch.tensor([p]))[0].tolist()] == [
            h if h >= 0 else None for h in held
        ]


def decoding(config, family="llama", ahead=1):
    program, params = fds.functionalize(zoo.build(family))
    return Decoding.of(program, config, ahead), program.place(params), program


def rows():
    ids = torch.randint(3, zoo.VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(1))
    return ids, torch.tensor([12, 5, 9])


def run(config, family="llama", several=1, ahead=1):
    """Logits behind prompts of 12, 5 and 9 tokens and behind each of eight more, one by one or several at once; and the cache."""
    d, stored, program = decoding(config, family, ahead)
    ids, lengths = rows()
    table = caches.tables(d.config, (lengths + 8).tolist(), 64)
    logits, cache = d.prefill(stored, ids[:, :12], lengths, 64, table)
    out = [logits]
    more = torch.stack([ids[i, n : n + 8] for i, n in enumerate(lengths)])
    for new in more.split(several, 1):
        got, cache = d.step(stored, cache, new)
        out += list(got.unbind(1))
    return torch.stack(out, 1), cache, stored, program


@pytest.mark.parametrize("several", [1, 4])
@pytest.mark.parametrize("kind", ["static", "sliding", "paged"])
def test_logits_are_those_of_whole_rows(kind, several):
    got, cache, stored, program = run(CacheConfig(kind, page=8), "mistral", several, several)
    ids, lengths = rows()
    for i, n in enumerate(lengths.tolist()):
        want = program(stored, input_ids=ids[i : i + 1, : n + 8]).logits[0, n - 1 :]
        torch.testing.assert_close(got[i], want, rtol=1e-4, atol=1e-5)
    assert cache["lengths"].tolist() == [20, 13, 17]


def test_tokens_can_be_taken_back():
    """Of four drafted tokens two stay; the next ones are written over the rest, in a window's slots too."""
    for kind in ("static", "sliding", "paged"):
        d, stored, program = decoding(CacheConfig(kind, page=8), "mistral", ahead=4)
        ids, lengths = rows()
        table = caches.tables(d.config, (lengths + 12).tolist(), 64)
        _, cache = d.prefill(stored, ids[:, :12], lengths, 64, table)
        for at in range(0, 6, 2):
            new = torch.stack([ids[i, n + at : n + at + 2] for i, n in enumerate(lengths)])
            got, cache = d.step(stored, cache, torch.cat([new, new.flip(1) + 1], 1).clamp(max=96))
            cache = {**cache, "lengths": cache["lengths"] - 2}
        for i, n in enumerate(lengths.tolist()):
            want = program(stored, input_ids=ids[i : i + 1, : n + 6]).logits[0, n + 5]
            torch.testing.assert_close(got[i, 1], want, rtol=1e-4, atol=1e-5)


def test_memory():
    """Of 64 slots in two layers of two heads of eight numbers: all, a window, pages for what rows may come to, a quarter and scales."""
    one = 2 * 2 * 2 * 8 * 4  # bytes of a token
    sizes = {}
    for kind in ("static", "sliding", "paged", "static-int8"):
        config = CacheConfig.of(kind) if kind != "paged" else CacheConfig("paged", page=8)
        _, cache, *_ = run(config, "mistral")
        sizes[kind] = tree.nbytes(cache["layers"])
    assert sizes["static"] == 3 * 64 * one
    assert sizes["sliding"] == 3 * (8 + 2) * one
    assert sizes["paged"] == (1 + 3 + 2 + 3) * 8 * one
    assert sizes["static-int8"] == 3 * 64 * (one // 4 + 2 * 2 * 2 * 4)


def test_int8_is_near():
    exact, *_ = run(CacheConfig())
    near, *_ = run(CacheConfig.of("static-int8"))
    assert 0 < (near - exact).abs().max() < 0.02 * exact.abs().max()


def test_growing_changes_no_value():
    d, stored, _ = decoding(CacheConfig())
    ids, lengths = rows()
    _, cache = d.prefill(stored, ids[:, :12], lengths, 16)
    new = torch.stack([ids[i, n : n + 2] for i, n in enumerate(lengths)])
    want, _ = d.step(stored, cache, new)
    got, bigger = d.step(stored, caches.grown(d.config, cache, 32), new)
    torch.testing.assert_close(got, want)
    assert bigger["layers"][0]["keys"].shape[2] == 32
    with pytest.raises(ValueError, match="required one size"):
        caches.grown(d.config, bigger, 16)
    for kind in ("sliding", "paged"):
        with pytest.raises(ValueError, match=f"a {kind} cache does not grow"):
            caches.grown(CacheConfig(kind), cache, 32)


def test_what_cannot_be_is_refused():
    for config, words in (
        (dict(kind="pages"), "paged"),
        (dict(dtype="int4"), "int8"),
        (dict(page=12), "multiple of 8"),
        (dict(page=64.0), "multiple of 8"),
    ):
        with pytest.raises(ValueError, match=words):
            CacheConfig(**config)
    with pytest.raises(ValueError, match="GPT-Neo"):
        decoding("sliding", "gpt-neo")
    d, stored, _ = decoding(CacheConfig(), "bloom")
    ids, lengths = rows()
    _, cache = d.prefill(stored, ids[:, :12], lengths, 64)
    with pytest.raises(ValueError, match="one token at a time"):
        d.step(stored, cache, ids[:, :2])


def test_a_cache_of_something_else_is_refused():
    d, stored, _ = decoding(CacheConfig())
    ids, lengths = rows()
    _, cache = d.prefill(stored, ids[:, :12], lengths, 64)
    with pytest.raises(ValueError, match="a cache of 3 rows and 2 layers, required 1 rows"):
        d.step(stored, cache, ids[:1, :1])
    with pytest.raises(ValueError, match=r"3 rows and 1 layers, required .* 2 layers"):
        d.step(stored, {**cache, "layers": cache["layers"][:1]}, ids[:, :1])
    with pytest.raises(ValueError, match=r"lengths \(2,\), required \(3,\)"):
        d.prefill(stored, ids[:, :12], lengths[:2], 64)
    with pytest.raises(ValueError, match="12 tokens, and slots for 8"):
        d.prefill(stored, ids[:, :12], lengths, 8)
    with pytest.raises(ValueError, match="is not given for a paged cache"):
        Decoding.of(d.program, "paged").prefill(stored, ids[:, :12], lengths, 64)
    table = caches.tables(CacheConfig("paged"), [20] * 3, 64)
    with pytest.raises(ValueError, match="is given for a static cache"):
        d.prefill(stored, ids[:, :12], lengths, 64, table)
