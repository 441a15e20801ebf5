"""Low-precision products by way of float32: the same numbers, on processors without instructions for them."""

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

import fds
from fds import lowering

LOW = torch.bfloat16
WIDE = frozenset([LOW])


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(LOW)


@pytest.mark.parametrize("b", [(64, 80), (2, 64, 80)])
def test_a_product_is_the_float32_product_rounded_once(b):
    x, w = drawn(*b[:-2], 96, 64), drawn(*b, seed=1)
    with lowering.WideProducts(WIDE):
        got = x @ w
        biased = torch.addmm(drawn(80), x, w, beta=0.5) if x.dim() == 2 else None
    assert torch.equal(got, (x.float() @ w.float()).to(LOW))
    if biased is not None:
        assert torch.equal(biased, torch.addmm(drawn(80).float(), x.float(), w.float(), beta=0.5).to(LOW))


def attention(q, k, v, mask=None):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


@pytest.mark.parametrize("mask", [None, drawn(64, 64, seed=7)])
def test_attention_and_its_gradients(mask):
    qkv = [drawn(2, 4, 64, 32, seed=i).requires_grad_() for i in range(3)]
    wide = [t.detach().float().requires_grad_() for t in qkv]
    with lowering.WideProducts(WIDE):
        out = attention(*qkv, mask)
        got = torch.autograd.grad(out.sum(), qkv)
    want = attention(*wide, None if mask is None else mask.float())
    assert out.dtype == LOW and torch.equal(out, want.to(LOW))
    for g, w in zip(got, torch.autograd.grad(want.sum(), wide), strict=True):
        assert g.dtype == LOW
        assert torch.allclose(g.float(), w, atol=2**-6 * float(w.abs().max()))


@pytest.mark.parametrize("masked", ["nothing", "later", "causal", "a whole row"])
def test_the_gradient_of_attention_by_products(masked):
    qkv = [drawn(2, 4, 48, 32, seed=i).requires_grad_() for i in range(3)]
    wide = [t.detach().float().requires_grad_() for t in qkv]
    mask = torch.ones(48, 48, dtype=torch.bool)
    mask = {"later": mask.tril(), "a whole row": mask.tril(-1)}.get(masked)

    def f(q, k, v):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=masked == "causal")
        return out.nan_to_num(0.0).float().square().sum()

    calls = []
    with lowering.AttentionByProducts(WIDE) as mode:
        real, mode._worth = mode._worth, lambda *a: calls.append(real(*a)) or calls[-1]
        got = torch.autograd.grad(f(*qkv), qkv)
    assert calls == [True]
    for g, w in zip(got, torch.autograd.grad(f(*wide), wide), strict=True):
        assert g.dtype == LOW
        assert torch.allclose(g.float(), w, atol=2**-5 * float(w.abs().max()))


def test_what_stays_with_the_kernel(monkeypatch):
    """Other dtypes, dropout, and more weights than fit into a cache."""
    q = drawn(1, 2, 16, 8)
    mode = lowering.AttentionByProducts(WIDE)
    assert mode._worth(q, q, q, 0.0)
    assert not mode._worth(q.float(), q.float(), q.float(), 0.0)
    assert not mode._worth(q, q, q, 0.1)
    monkeypatch.setattr(lowering, "_ATTENDED", 2 * 16 * 16 - 1)
    assert not mode._worth(q, q, q, 0.0)


def products(f, *args):
    """The dtype of every matrix product in the graph of `f`."""
    graph = make_fx(f, tracing_mode="fake")(*args).graph
    return {n.args[0].meta["val"].dtype for n in graph.nodes if str(n.target).startswith(("aten.mm", "aten.bmm"))}


def test_forward_and_backward_products_are_wide_and_small_ones_are_not(monkeypatch):
    def loss(p, x):
        return fds.value_and_grad(lambda p: (x @ p["w"]).float().pow(2).sum())(p)

    x, p = drawn(128, 128), {"w": drawn(128, 128, seed=1)}
    monkeypatch.setattr(lowering, "emulated", lambda: WIDE)
    assert products(loss, p, x) == {LOW}
    assert products(lowering.lowered(loss), p, x) == {torch.float32}
    assert products(lowering.lowered(loss), p, drawn(1, 128)) == {LOW}, "one token: conversion would cost more"
    monkeypatch.setattr(lowering, "emulated", lambda: frozenset())
    assert lowering.lowered(loss) is loss


def test_under_functional_transformations(monkeypatch):
    x, w = drawn(3, 96, 96), drawn(96, 96, seed=1)

    def f(w, x):
        return (x @ w).float().pow(2).sum()

    monkeypatch.setattr(lowering, "emulated", lambda: WIDE)
    got = lowering.lowered(torch.func.vmap(torch.func.grad(f), (None, 0)))(w, x)
    for g, one in zip(got, x, strict=True):
        want = torch.func.grad(f)(w.float(), one.float())
        assert torch.allclose(g.float(), want, atol=2**-6 * float(want.abs().max()))


def test_compiled_values_are_those_of_eager(monkeypatch):
    monkeypatch.setattr(lowering, "emulated", lambda: WIDE)
    module = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.GELU(), torch.nn.Linear(96, 64))
    program, params = fds.functionalize(module)
    program = fds.cast(program, "bfloat16")
    stored, x = program.place(params), torch.randn(64, 64)
    want = program(stored, x)
    got = fds.compile(program)(stored, x)
    assert got.dtype == LOW and torch.allclose(got.float(), want.float(), atol=0.02)


def test_the_processor_is_asked(monkeypatch):
    has = {"avx512_bf16": True, "amx_fp16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    monkeypatch.setattr(lowering.platform, "machine", lambda: "x86_64")
    assert lowering.emulated() == {torch.float16} and lowering.native() == {torch.bfloat16}
    monkeypatch.setattr(lowering.platform, "machine", lambda: "aarch64")
    assert lowering.emulated() == lowering.native() == frozenset(), "its instructions are not known here: left as it is"


def test_an_eager_train_step_is_lowered_and_a_program_by_itself_is_not(monkeypatch):
    seen = []
    monkeypatch.setattr(lowering, "emulated", lambda: WIDE)
    monkeypatch.setattr(lowering, "_pays", lambda *sizes: seen.append(sizes) or True)
    program, params = fds.functionalize(torch.nn.Linear(64, 64))
    program, batch = fds.cast(program, "bfloat16"), {"x": torch.randn(64, 64)}
    program(program.place(params), batch["x"])
    assert not seen
    step = fds.train_step(program, fds.optim.sgd(0.1), loss=lambda p, s, b: p(s, b["x"]).float().square().mean())
    step(step.init(params), batch)
    assert len(seen) == 2, "forward and the weight's gradient"


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("along", ["rows", "columns"])
def test_products_of_few_rows_are_float32_sums_rounded_once(rows, along):
    """By weights in either order, with a bias and without; more rows, and small weights, stay with the library."""
    x, w, bias = drawn(rows, 128), drawn(160, 128, seed=1), drawn(160, seed=2)
    w = w if along == "rows" else w.t().contiguous().t()
    with lowering.FewRows():
        got, biased = F.linear(x, w), F.linear(x, w, bias)
        many, small = F.linear(x.repeat(5, 1), w), F.linear(x[:, :8], w[:8, :8])
    torch.testing.assert_close(got, (x.float() @ w.float().t()).to(LOW), rtol=2**-7, atol=1e-3)
    torch.testing.assert_close(biased, (x.float() @ w.float().t() + bias).to(LOW), rtol=2**-7, atol=1e-3)
    assert torch.equal(many, F.linear(x.repeat(5, 1), w)) and torch.equal(small, F.linear(x[:, :8], w[:8, :8]))
    calls = make_fx(lambda x, w: lowering.few_rows(F.linear)(x, w))(x, w).code
    assert "mm" not in calls and "sum" in calls


@pytest.mark.parametrize("few", [1, 3])
@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"masked": True}])
def test_attention_of_few_queries_is_a_float32_sum(few, options):
    """In float64 for comparison; nearer to it than torch's kernel, which rounds weights to bfloat16."""
    q, k, v = drawn(2, 4, few, 32), drawn(2, 4, 40, 32, seed=1), drawn(2, 4, 40, 32, seed=2)
    mask = torch.rand(2, 1, few, 40, generator=torch.Generator().manual_seed(3)) < 0.4
    mask[..., 0] = True
    more = {"attn_mask": mask if options.get("masked") else None, "scale": options.get("scale")}
    want = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), **more)
    kernel = F.scaled_dot_product_attention(q, k, v, **more)
    with torch.no_grad(), lowering.FewRows():
        got = F.scaled_dot_product_attention(q, k, v, **more)
        long, causal = F.scaled_dot_product_attention(k, k, v), F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.equal(got, want.to(LOW)) or (got - want).abs().max() <= (kernel - want).abs().max()
    assert torch.equal(long, F.scaled_dot_product_attention(k, k, v))
    assert torch.equal(causal, F.scaled_dot_product_attention(q, k, v, is_causal=True))
    code = make_fx(lambda *t: lowering.few_rows(F.scaled_dot_product_attention)(*t))(q, k, v).code
    assert "flash" not in code and got.dtype == LOW
