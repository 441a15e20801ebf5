"""Sampling: what is kept against plain float64, what is drawn against the probabilities, and what a draw depends on."""

import pytest
import torch

from fds.kernels import sampling
from fds.kernels.sampling import sample

OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def draw(rows, vocabulary, dtype=torch.float32, seed=0, ties=False):
    x = 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))
    return ((2 * x).round() / 2 if ties else x).to(dtype)


def kept(logits, **options):
    """Which tokens the operator keeps [B, V]: what it says of their number and of the least of them, which have to agree."""
    rows = len(logits)
    values = [
        torch.full((rows,), v, dtype=torch.int64 if n == "top_k" else torch.float32) for n, v in (OFF | options).items()
    ]
    token, number, least = sampling._draw(logits, *values, *(torch.arange(rows) for _ in range(3)), True)
    keep = logits.float() >= least[:, None]
    assert torch.equal(keep.sum(-1), number) and bool(keep.gather(1, token[:, None]).all())
    return keep


def by_sorting(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """As Hugging Face's four warpers, in float64; ties are kept together."""
    x = logits.double() / temperature
    if 0 < top_k < x.shape[-1]:
        x = x.masked_fill(x < x.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        p = x.softmax(-1)
        likelier = torch.stack([(p * (x > x[:, i : i + 1])).sum(-1) for i in range(x.shape[1])], 1)
        x = x.masked_fill(likelier >= top_p, -torch.inf)
    p = x.softmax(-1)
    return (p >= min_p * p.amax(-1, keepdim=True)) & (p > 0)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"top_k": 1}, {"top_k": 7}, {"top_k": 10**9}, {"top_p": 0.9}, {"top_p": 0.3, "temperature": 2.0}, {"top_p": 1e-6}, {"min_p": 0.05},
        {"min_p": 1.0}, {"top_k": 12, "top_p": 0.77}, {"top_k": 30, "top_p": 0.95, "min_p": 0.03, "temperature": 0.6},
    ],
)  # fmt: skip
def test_what_is_kept(options, dtype, ties):
    x = draw(24, 151, dtype, ties=ties)
    assert torch.equal(kept(x, **options), by_sorting(x, **options))


def by_warpers(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """What Hugging Face's own warpers keep, in float64 and in their order."""
    hf = pytest.importorskip("transformers.generation.logits_process")
    x = hf.TemperatureLogitsWarper(temperature)(None, logits.double())
    x = hf.TopKLogitsWarper(top_k)(None, x) if top_k else x
    x = hf.TopPLogitsWarper(top_p)(None, x) if top_p < 1 else x
    return (hf.MinPLogitsWarper(min_p)(None, x) if min_p else x) > -torch.inf


WARPED = [
    {"top_k": 1}, {"top_k": 7}, {"top_k": 500}, {"top_p": 0.9}, {"top_p": 0.2, "temperature": 3.0}, {"min_p": 0.1},
    {"top_k": 12, "top_p": 0.77}, {"top_k": 30, "top_p": 0.95, "min_p": 0.03, "temperature": 0.6},
]  # fmt: skip


@pytest.mark.parametrize("options", WARPED)
def test_as_transformers(options):
    x = draw(24, 151)
    assert torch.equal(kept(x, **options), by_warpers(x, **options))


@pytest.mark.parametrize("options", WARPED)
def test_as_transformers_but_for_ties(options):
    """Of a tie at top-p's boundary, a sort keeps some: here all are kept, and nothing else besides."""
    x = draw(24, 151, ties=True)
    ours, theirs = kept(x, **options), by_warpers(x, **options)
    least = x.masked_fill(~theirs, torch.inf).amin(-1, keepdim=True)
    assert torch.equal(ours, x >= least)
    assert "top_p" in options or torch.equal(ours, theirs)


def test_ties_at_the_boundary():
    x = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]])
    assert kept(x, top_k=2).tolist() == [[False, True, True, True, True, False]]
    assert kept(x, top_p=0.6).tolist() == [[False, True, True, True, True, False]]
    assert kept(torch.tensor([[0.0, -0.0, 0.0, -1.0]]), top_k=1).tolist() == [[True, True, True, False]]
    half = torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf]])
    assert kept(half, top_p=0.5).tolist() == [[True, True, False, False]]  # nothing is likelier than either


def test_weights_are_exponentials():
    x = torch.cat([torch.linspace(0, -20, 40001), torch.tensor([-torch.inf, -28.0])])[None]
    w = sampling._weights(x, torch.zeros(1, 1), torch.ones(1, 1))[0]
    exact = torch.exp2(40 + x[0, :-2].double() / torch.log(torch.tensor(2.0, dtype=torch.float64)))
    error = ((w[:-2] - exact).abs() - 1) / exact  # one is what floor takes
    assert w[0] == 2**40 and float(error[x[0, :-2] > -1].max()) < 3e-7 and float(error.max()) < 3e-6
    assert bool((w[:-2].diff() <= 0).all()) and w[-2:].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("counter", "key", "want"),
    [
        ((0, 0), 0, (0x6627E8D5, 0xE169C58D)),
        ((-1, -1), -1, (0x408F276D, 0x41C83B0E)),
        ((0x85A308D3243F6A88, 0x0370734413198A2E), 0x299F31D0A4093822, (0xD16CFE09, 0x94FDCCEB)),
    ],
)
def test_random_numbers(counter, key, want):
    """The known answers of Philox's authors, of which a draw takes the upper 31 bits of two words."""
    signed = [torch.tensor([v - 2**64 if v >= 2**63 else v]) for v in (key, *counter)]
    assert tuple(int(x) for x in sampling._random(*signed)) == tuple(w >> 1 for w in want)


def chi_square(counts, probabilities):
    """In standard deviations from its mean."""
    expected = probabilities * counts.sum()
    live = expected > 0
    assert int(counts[~live].sum()) == 0
    freedom = int(live.sum()) - 1
    return (float(((counts - expected)[live].square() / expected[live]).sum()) - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 9}, {"top_p": 0.9, "min_p": 0.02}])
@pytest.mark.parametrize("by", ["stream", "position", "seed"])
def test_distribution(options, by):
    n, x = 20000, draw(1, 23, seed=3) / 2
    numbers = {by: torch.arange(n) * (2**33 + 1) + 5}
    tokens = sample(x.expand(n, 23), **options, **({"stream": torch.zeros(n, dtype=torch.int64)} | numbers))
    p = (x.double() / options.get("temperature", 1.0)).masked_fill(~by_sorting(x, **options), -torch.inf).softmax(-1)[0]
    assert abs(chi_square(tokens.bincount(minlength=23).double(), p)) < 5


def test_neighbours_are_independent():
    """Pairs of draws: of one row at two positions, of two rows at one, and with two seeds."""
    n, flat = 20000, torch.zeros(20000, 5)
    first = sample(flat)
    for other in (sample(flat, position=1), sample(flat, seed=1), sample(flat, stream=torch.arange(n) + 1)):
        pairs = (5 * first + other).bincount(minlength=25).double()
        assert abs(chi_square(pairs, torch.full((25,), 1 / 25))) < 5


def test_a_draw_depends_on_its_row_alone():
    x, n = draw(40, 97), 40
    options = dict(
        temperature=torch.linspace(0.0, 2.0, n), top_k=torch.arange(n), top_p=torch.linspace(0.2, 1.0, n), min_p=torch.linspace(0.2, 0.0, n),
        seed=torch.arange(n) % 3, position=torch.arange(n) * 7, stream=torch.arange(n) * 11,
    )  # fmt: skip
    want = sample(x, **options)
    some = torch.tensor([39, 3, 17, 3])
    assert torch.equal(sample(x[some], **{k: v[some] for k, v in options.items()}), want[some])
    alone = sample(x[5:6], **{k: v[5:6] if k == "stream" else v[5].item() for k, v in options.items()})
    assert alone.tolist() == want[5:6].tolist()
    assert len({tuple(sample(x, position=i).tolist()) for i in range(5)}) == 5
    assert torch.equal(sample(x), sample(x, top_k=torch.zeros(n, dtype=torch.int64)))  # with a search, and without
    counted = torch.tensor(3), torch.tensor(0.7)
    assert torch.equal(sample(x, position=counted[0], temperature=counted[1]), sample(x, position=3, temperature=0.7))
    assert torch.equal(sample(x.half()), sample(x.half().float()))


def test_temperature_zero_takes_the_first_of_the_largest():
    x = torch.tensor([[1.0, 2.0, 2.0], [0.0, -0.0, -1.0], [-torch.inf, -3e38, -3.1e38]])
    for temperature in (0.0, torch.zeros(3), -torch.zeros(3)):
        assert sample(x, temperature=temperature).tolist() == [1, 0, 1]
        assert sample(x, temperature=temperature, top_k=2, top_p=0.5, min_p=0.5).tolist() == [1, 0, 1]


def test_nan_infinity_and_bad_options_are_visible():
    x = torch.zeros(5, 4)
    x[0, 2], x[1, 0], x[2] = torch.nan, -torch.nan, -torch.inf
    x[3, 1], x[4, 1:3] = -torch.inf, torch.inf
    for options in ({}, {"top_k": 2}, {"top_p": 0.5}, {"temperature": 0.0}):
        many = torch.stack([sample(x, position=i, **options) for i in range(40)])
        assert many[:, :3].unique().tolist() == [-1]
        assert 1 not in many[:, 3] and set(many[:, 4].tolist()) <= {1, 2}
    assert set(many[:, 4].tolist()) == {1} and torch.equal(sample(x), sample(x.double().float()))
    bad = {"temperature": [-1.0, torch.nan, torch.inf], "top_p": [0.0, 1.5, torch.nan], "min_p": [-0.1, 1.1, torch.nan]}
    for name, values in bad.items():
        assert sample(torch.zeros(4, 4), **{name: torch.tensor([*values, 1.0])}).tolist()[:3] == [-1, -1, -1]
    assert sample(torch.zeros(2, 4), top_k=torch.tensor([-1, 1])).tolist()[0] == -1
    assert int(sample(torch.zeros(2, 4), temperature=torch.tensor([-1.0, 1.0]))[1]) >= 0


def test_sizes():
    assert sample(torch.zeros(0, 4)).shape == (0,) and sample(torch.zeros(0, 4), top_k=2).dtype == torch.int64
    assert sample(torch.full((3, 1), -5.0), top_k=1, top_p=0.1, min_p=1.0).tolist() == [0, 0, 0]
    x = draw(6, 50)
    assert torch.equal(sample(x.mT.contiguous().mT, top_p=0.9), sample(x, top_p=0.9))
    assert not sample(x.requires_grad_()).requires_grad


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"logits": torch.zeros(4)}, r"logits \(4,\), required \[rows, vocabulary\]"),
        ({"logits": torch.zeros(2, 0)}, r"logits \(2, 0\)"),
        ({"logits": torch.zeros(2, 4, dtype=torch.float64)}, "logits torch.float64.*float32"),
        ({"temperature": -1.0}, "temperature=-1.0, required >= 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0, required 0 < top_p <= 1"),
        ({"min_p": 1.5}, "min_p=1.5"),
        (
            {"top_k": torch.tensor([1.0, 2.0])},
            r"top_k \(2,\) torch.float32 on cpu, required a number, or \(\) or \(2,\) torch.int64",
        ),
        ({"temperature": torch.ones(3)}, r"temperature \(3,\)"),
        ({"stream": torch.zeros(2)}, r"stream \(2,\) torch.float32"),
        ({"temperature": 0.0, "seed": torch.zeros(3, dtype=torch.int64)}, r"seed \(3,\)"),
    ],
)
def test_bad_input(options, says):
    with pytest.raises(ValueError, match=says):
        sample(**({"logits": torch.zeros(2, 4)} | options))
