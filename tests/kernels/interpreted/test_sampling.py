"""The sampling kernel: the same tokens and the same kept sets as its reference, which other tests hold against float64."""

import pytest
import torch

from fds.kernels import operators, registry, sampling

# temperature, top_k, top_p, min_p of the rows
OPTIONS = [(0.0, 5, 0.9, 0.1), (1.0, 0, 1.0, 0.0), (0.7, 20, 1.0, 0.0), (1.5, 0, 0.9, 0.0), (1.0, 3, 0.8, 0.05), (9.0, 60, 0.97, 0.0), (1.0, 10**6, 0.999, 0.5)]  # fmt: skip


def arguments(logits, seed=0):
    rows = len(logits)
    picked = [OPTIONS[(i + seed) % len(OPTIONS)] for i in range(rows)]
    values = [torch.tensor([p[i] for p in picked], dtype=torch.int64 if i == 1 else torch.float32) for i in range(4)]
    return (
        logits,
        *values,
        torch.full((rows,), seed - 2),
        torch.arange(rows) * 2**33,
        torch.full((rows,), seed + 7),
        True,
    )


def check(*args):
    assert registry.INTERPRETED
    op = operators()["sample"]
    for got, want in zip(op(*args), op.reference(*args), strict=True):
        assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0)), (got, want)


def draw(rows, vocabulary, dtype, ties):
    x = 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    return ((2 * x).round() / 2 if ties else x).to(dtype)


@pytest.fixture
def narrow(monkeypatch):
    """16 lanes: lists of 64 tokens, so that rows are longer than the lists, and thresholds lie outside of them."""
    monkeypatch.setattr(sampling, "_TILE", 16)


@pytest.mark.parametrize(("dtype", "ties"), [(torch.float32, False), (torch.float16, True)])
@pytest.mark.parametrize("vocabulary", [1, 37])
def test_in_lists(vocabulary, dtype, ties, narrow):
    check(*arguments(draw(7, vocabulary, dtype, ties)))


@pytest.mark.parametrize(("dtype", "ties"), [(torch.float32, False), (torch.float16, True)])
def test_beyond_the_lists(dtype, ties, narrow, monkeypatch):
    passes, search = [], sampling.search_row

    def counted(*args):
        passes.append(args[-3])  # MASS
        return search(*args)

    monkeypatch.setattr(sampling, "search_row", counted)
    x = draw(3, 80, dtype, ties)
    x[1] = torch.linspace(0, 0.1, 80).to(dtype)  # flat: 0.9 of the mass is 70 tokens
    check(*arguments(x, seed=2))
    assert {bool(p) for p in passes} == {True, False}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_it_is_launched(dtype):
    check(*arguments(draw(3, 9001, dtype, False), seed=2))


def test_without_a_search(narrow):
    args = arguments(draw(7, 70, torch.float32, False))
    check(*args[:2], torch.zeros(7, dtype=torch.int64), torch.ones(7), *args[4:-1], False)


def test_not_finite(narrow):
    x = draw(9, 40, torch.float32, False)
    x[0, 3], x[1, 39], x[2] = torch.nan, -torch.nan, -torch.inf
    x[3, ::2], x[4, 7], x[4, 30], x[5, 1:] = -torch.inf, torch.inf, torch.inf, -torch.inf
    x[6], x[7] = -0.0, torch.finfo(torch.float32).min
    x[7, 20] = torch.finfo(torch.float32).max
    check(*arguments(x, seed=1))
    args = list(arguments(x[6:], seed=3))
    args[1], args[3] = torch.tensor([-1.0, 1.0, torch.nan]), torch.tensor([0.5, 1.5, 1.0])
    check(*args)


def test_views_and_no_rows(narrow):
    x = draw(2, 40, torch.float32, False)
    for view in (x.mT.contiguous().mT, x[:1].expand(2, 40), x[:, ::2], x[:0]):
        check(*arguments(view))


def test_a_row_by_itself(narrow):
    args = arguments(draw(3, 40, torch.float32, False), seed=2)
    together, alone = operators()["sample"](*args), operators()["sample"](*[a[2:] for a in args[:-1]], True)
    assert [int(t[2]) for t in together[:2]] == [int(t[0]) for t in alone[:2]]
