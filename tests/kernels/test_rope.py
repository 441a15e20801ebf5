"""Rotary embedding on the CPU path: frequencies and rotation against transformers, gradients, what is refused."""

import pytest
import torch

from fds.kernels.registry import operators
from fds.kernels.rope import rope, rope_angles, rope_frequencies

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 4.0, "original_max_position_embeddings": 32768}
PARAMETERS = [
    {"rope_type": "default", "rope_theta": 10000.0},
    {"rope_type": "default", "rope_theta": 1000000.0},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5, "partial_rotary_factor": 0.5},
    LLAMA3,
    LLAMA3 | {"factor": 32.0, "low_freq_factor": 2.0, "partial_rotary_factor": 0.75},
    YARN,
    YARN | {"truncate": False, "beta_fast": 16, "beta_slow": 2},
    YARN | {"attention_factor": 1.25, "factor": 40.0},
    YARN | {"mscale": 1.0, "mscale_all_dim": 0.5},
    YARN | {"factor": 1.0, "partial_rotary_factor": 0.5},
    YARN | {"original_max_position_embeddings": 4, "rope_theta": 10.0},
]


@pytest.mark.parametrize("parameters", PARAMETERS, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_frequencies_are_those_of_transformers(parameters, head_dim):
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_parameters=dict(parameters),
    )
    init = rope_utils.ROPE_INIT_FUNCTIONS.get(
        parameters["rope_type"], LlamaRotaryEmbedding.compute_default_rope_parameters
    )
    want, factor = init(config)
    got, scaling = rope_frequencies(config.rope_parameters, head_dim=head_dim, max_position_embeddings=131072)
    assert got.shape == want.shape and torch.allclose(got, want, rtol=1e-6, atol=0)
    assert scaling == pytest.approx(factor, rel=1e-12)


def test_yarn_takes_its_factor_from_the_lengths():
    given = {k: v for k, v in YARN.items() if k != "factor"}
    got, want = (
        rope_frequencies(given, head_dim=64, max_position_embeddings=131072),
        rope_frequencies(YARN, head_dim=64),
    )
    assert torch.equal(got[0], want[0]) and got[1] == want[1]


def arguments(dtype, batch=2, heads=4, kv=2, tokens=5, d=16, rotated=16, tables=1):
    g = torch.Generator().manual_seed(tokens)
    q, k = (torch.randn(batch, h, tokens, d, generator=g).to(dtype) for h in (heads, kv))
    frequencies, _ = rope_frequencies({"rope_theta": 100.0}, head_dim=rotated)
    positions = torch.arange(tokens)[None] + 3 * torch.arange(tables)[:, None]
    return (
        q,
        k,
        *rope_angles(positions, frequencies, 1.1, dtype=torch.float64 if dtype == torch.float64 else torch.float32),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tables", [1, 2])
@pytest.mark.parametrize("rotated", [16, 8, 2])
def test_rotation_is_that_of_transformers(dtype, tables, rotated):
    apply = pytest.importorskip("transformers.models.llama.modeling_llama").apply_rotary_pos_emb
    q, k, cos, sin = arguments(dtype, tables=tables, rotated=rotated)
    wide = [t.double() for t in (q[..., :rotated], k[..., :rotated])]
    want = apply(*wide, *(torch.cat([t, t], -1).double() for t in (cos, sin)))
    for x, got, expected in zip((q, k), rope(q, k, cos, sin), want, strict=True):
        eps = torch.finfo(dtype).eps
        assert got.dtype == dtype and torch.allclose(got[..., :rotated].double(), expected, rtol=eps, atol=4 * eps)
        assert torch.equal(got[..., rotated:], x[..., rotated:])


def test_angles_are_those_of_transformers():
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding

    config = LlamaConfig(hidden_size=64, num_attention_heads=4, rope_parameters=dict(YARN))
    positions = torch.tensor([[0, 1, 5000, 100000]])
    want = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    for got, expected in zip(rope_angles(positions, *rope_frequencies(YARN, head_dim=16)), want, strict=True):
        assert torch.allclose(torch.cat([got, got], -1), expected, atol=5e-3)  # of 1e5 radians float32 knows 4e-3
        assert torch.allclose(torch.cat([got, got], -1)[:, :2], expected[:, :2], atol=1e-6)


def test_a_transposed_tensor_is_taken_as_it_lies():
    q, k, cos, sin = arguments(torch.float32)
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k)]
    for got, want, x in zip(rope(*turned, cos, sin), rope(q, k, cos, sin), turned, strict=True):
        assert torch.equal(got, want) and got.stride() == x.stride() and not got.is_contiguous()


def test_the_gradient_is_the_rotation_back():
    q, k, cos, sin = arguments(torch.float64)
    angle = torch.atan2(sin, cos)
    cos, sin = angle.cos(), angle.sin()
    q, k = q.requires_grad_(), k.requires_grad_()
    out = rope(q, k, cos, sin)
    back = torch.autograd.grad(out, (q, k), [o.detach() for o in out])
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(back, (q, k), strict=True))
    (alone,) = torch.autograd.grad(rope(q, k, cos, sin)[1].sum(), (k,))
    assert torch.allclose(
        alone, torch.autograd.grad(operators()["rope"].reference(q, k, cos, sin, False)[1].sum(), (k,))[0]
    )
    assert (
        torch.autograd.grad(rope(q, k, cos, sin)[0].sum(), (q, k), allow_unused=True, materialize_grads=True)[1]
        .eq(0)
        .all()
    )
    with pytest.raises(ValueError, match=r"rope: .*takes no gradient"):
        rope(q, k, cos.requires_grad_(), sin)[0].sum().backward()


def test_of_nothing():
    for sizes in ({"batch": 0}, {"tokens": 0}, {"kv": 0}):
        q, k, cos, sin = arguments(torch.float32, **sizes)
        assert [t.shape for t in rope(q, k, cos, sin)] == [q.shape, k.shape]


Q, K, COS = torch.zeros(2, 4, 5, 16), torch.zeros(2, 2, 5, 16), torch.zeros(1, 5, 8)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: rope(Q, K[:, :, :4], COS, COS), r"q \(2, 4, 5, 16\), k \(2, 2, 4, 16\); required"),
        (lambda: rope(Q, K, COS[:, :4], COS[:, :4]), r"required \(2 or 1, 5, R / 2\)"),
        (lambda: rope(Q, K, COS.repeat(1, 1, 2), COS.repeat(1, 1, 2)), r"use cos\[..., :8\]"),
        (lambda: rope(Q, K.half(), COS, COS), "required q like k"),
        (lambda: rope(Q, K, COS.int(), COS.int()), "cos is torch.int32.*nearest is float32"),
        (lambda: rope(Q, K, COS.to("meta"), COS.to("meta")), "cos is on meta, required cpu"),
        (lambda: rope_frequencies({"rope_type": "yarm"}, head_dim=64), "did you mean 'yarn'"),
        (lambda: rope_frequencies({"rope_type": "linear", "rope_theta": 1e4}, head_dim=64), "'linear' requires factor"),
        (lambda: rope_frequencies({"rope_theta": 1e4}, head_dim=5), "5 rotated columns of 5"),
        (lambda: rope_frequencies({k: v for k, v in YARN.items() if k != "factor"}, head_dim=64), "requires a factor"),
    ],
)
def test_what_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()
