"""The quantised collective: values, every derivative, bytes, and the error that is fed back."""

import functools
import math

import pytest
import ranks
import torch
from torch import nn

import fds
from fds import sharding
from fds.kernels import block_dequantize, block_quantize
from fds.sharding import ErrorFeedback, collectives
from fds.sharding.quantized import quantized_gather

M, BLOCK = 75, 32  # elements of a shard: two whole blocks and a short one, and an odd number for int4
FORMATS = ["int8", "int4", "e4m3", "e5m2"]


@functools.cache  # every mesh starts process groups
def axis():
    return sharding.mesh(dp=-1)["dp"]


def shards(n):
    """What the ranks hold, [rank, M]."""
    return torch.randn(n, M, generator=torch.Generator().manual_seed(0))


def cotangents(n):
    """Rank r's loss is sum(cotangents[r] * gathered): other on every rank, so that a missing reduction shows."""
    return torch.randn(n, n * M, generator=torch.Generator().manual_seed(1))


def rounded(x, format):
    return block_dequantize(*block_quantize(x, format=format, block=BLOCK), format=format, block=BLOCK, length=M)


def gatherer(weights="", gradients="", beta=0.0, mean=True):
    a = axis()

    def gather(x, error=None, passes=None):
        return quantized_gather(x, error, passes, a.size, a.group, mean, weights, gradients, BLOCK, beta)

    return gather


def wanted(gradients, mean=True):
    """The gradient of the reduced loss by this rank's shard, without a collective."""
    a = axis()
    parts = cotangents(a.size).view(a.size, a.size, M)[:, a.rank]
    total = (rounded(parts, gradients) if gradients else parts).sum(0)
    return total / a.size if mean else total


def loss(**formats):
    a, gather = axis(), gatherer(**formats)
    w = cotangents(a.size)[a.rank]
    return lambda x: (w * gather(x)).sum()


def near(got, want):
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


# --- the collective by itself ---


def values():
    a = axis()
    mine = shards(a.size)[a.rank]
    for format in FORMATS:
        for dtype in (torch.float32, torch.bfloat16):
            got = gatherer(weights=format)(mine.to(dtype))
            want = rounded(shards(a.size).to(dtype), format).flatten().to(dtype)
            assert torch.equal(got, want) and got.dtype == dtype
            error = float((got.float() - shards(a.size).to(dtype).flatten().float()).abs().max())
            assert 0 < error < fds.quantize.tolerance(format, dtype) * float(shards(a.size).abs().max())
    assert torch.equal(gatherer(gradients="int8")(mine), shards(a.size).flatten())


def gradients():
    a = axis()
    mine = shards(a.size)[a.rank]
    for format in [*FORMATS, ""]:
        for mean in (True, False):
            f = loss(weights="int8", gradients=format, mean=mean)
            x = mine.clone().requires_grad_()
            near(torch.autograd.grad(f(x), x)[0], wanted(format, mean))
            near(torch.func.grad(f)(mine), wanted(format, mean))


def batched():
    """One message for a batch; the same as one by one."""
    a = axis()
    mine = shards(a.size)[a.rank]
    rows, scale = torch.stack([mine, 10 * mine, -mine]), torch.tensor([1.0, 0.5, -3.0])
    for format in ("int8", "int4"):
        run = gatherer(weights=format)
        with sharding.record() as wire:
            got = torch.func.vmap(run)(rows)
        assert wire.calls == {"gather": 1}
        assert torch.equal(got, torch.stack([run(x) for x in rows]))
        near(torch.func.vmap(run, in_dims=1)(rows.T), got)
        one = loss(weights="int8", gradients=format)
        grad = torch.func.grad(lambda x, c, one=one: c * one(x))
        with sharding.record() as wire:
            got = torch.func.vmap(grad, in_dims=(None, 0))(mine, scale)
        assert wire.calls == {"gather": 1, "all_to_all": 1}
        near(got, torch.stack([grad(mine, c) for c in scale]))
        both = torch.func.grad(lambda x, one=one: torch.func.vmap(one)(x).sum())(rows)
        near(both, wanted(format).expand(3, M))


def forward_mode_and_second_derivatives():
    a = axis()
    mine, w = shards(a.size)[a.rank], cotangents(a.size)[a.rank]
    tangent = torch.full((M,), float(a.rank + 1))
    exact = torch.arange(1.0, a.size + 1).repeat_interleave(M)
    _, moved = torch.func.jvp(gatherer(weights="int4", gradients="int4"), (mine,), (tangent,))
    near(moved, exact)

    def squares(**formats):
        gather = gatherer(weights="int8", **formats)
        return lambda x: (w * gather(x).pow(2)).sum()

    _, product = torch.func.jvp(torch.func.grad(squares()), (mine,), (tangent,))
    near(product, 2 * cotangents(a.size).mean(0).view(a.size, M)[a.rank] * tangent)
    twice = torch.func.grad(lambda x: torch.func.grad(squares())(x).sum())(mine)
    near(twice, 2 * cotangents(a.size).mean(0).view(a.size, M)[a.rank] / a.size)
    for nested in (
        lambda f: torch.func.jvp(torch.func.grad(f), (mine,), (tangent,)),
        lambda f: torch.func.grad(lambda x: torch.func.grad(f)(x).sum())(mine),
    ):
        with pytest.raises(ValueError, match="no derivative"):
            nested(squares(gradients="int8"))


def compiled():
    a = axis()
    mine = shards(a.size)[a.rank]
    torch._dynamo.reset()
    f = torch.func.grad(loss(weights="int8", gradients="int4"))
    near(torch.compile(f, fullgraph=True)(mine), wanted("int4"))


def bytes_on_the_wire():
    a = axis()
    n, mine, blocks = a.size, shards(a.size)[a.rank], math.ceil(M / BLOCK)
    for weights, sent in (("int8", M + 2 * blocks), ("int4", math.ceil(M / 2) + 2 * blocks), ("", 4 * M)):
        for grads, back in (("e4m3", M + 2 * blocks), ("int4", math.ceil(M / 2) + 2 * blocks), ("", 4 * M)):
            with sharding.record() as wire:
                torch.func.grad(loss(weights=weights, gradients=grads))(mine)
            assert wire.bytes == {"gather": n * sent, "all_to_all" if grads else "scatter": n * back}


COLLECTIVE = [values, gradients, batched, forward_mode_and_second_derivatives, compiled, bytes_on_the_wire]


@pytest.mark.parametrize("law", COLLECTIVE)
def test_the_collective_on_two_ranks(law):
    ranks.run(2, law)


@pytest.mark.parametrize("law", [values, gradients])
def test_the_collective_on_four_ranks(law):
    ranks.run(4, law)


# --- the error of a gradient ---


def nothing_is_lost(beta):
    """The same gradient again and again, most of it too small for its block. What was sent, against what should have been."""
    a, steps = axis(), 40
    g = torch.full((a.size * M,), 0.03)
    g[::16] = 1.0 + a.rank
    error, passes, sent = torch.zeros(g.shape, dtype=torch.bfloat16), torch.zeros(()), torch.zeros(M)
    plain, x, gather = torch.zeros(M), torch.zeros(M), gatherer(gradients="int4", beta=beta)
    f = torch.func.grad(lambda *leaves: (g * gather(*leaves)).sum(), (0, 1, 2))
    for _ in range(steps):
        part, error, uses = f(x, error, passes)
        sent, plain = sent + part, plain + torch.func.grad(lambda x: (g * gather(x)).sum())(x)
        assert float(uses) == 1.0
    want = steps * collectives.scatter(g, a)
    late = collectives.scatter(error.float(), a) / (1 - beta)
    assert float((plain - want).abs().max()) > 0.9  # 40 times 0.03, never sent
    return float((sent + late - want).abs().max()), float((sent - want).abs().max())


def test_what_was_sent_and_what_is_late_add_up():
    for beta in (0.0, 0.8):
        for rest, gap in ranks.run(2, nothing_is_lost, beta):
            assert rest < 0.06 and gap < 0.5, (beta, rest, gap)  # the error is kept in bfloat16


class Calls(nn.Module):
    """A block that is called twice, and one that is not."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.twice, self.never = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x):
        return self.twice(self.twice(x).tanh())


def uses_of_a_site():
    program, params = fds.functionalize(Calls(), sites=["twice", "never"])
    program = fds.chain(fds.shard(axis()), fds.quantized(gradients="int4", feedback=ErrorFeedback(0.0, 3)))(program)
    stored, x = program.place(params), torch.randn(3, 12)
    error, passes = "shard.float32.error", "shard.float32.passes"
    for part in ("twice", "never"):
        stored[part][error], stored[part][passes] = torch.full_like(stored[part][error], 0.25), torch.ones(())
    _, grads = fds.value_and_grad(lambda s, x: program(s, x).square().mean(), wrt=program)(stored, x)
    assert float(grads["twice"][passes]) == 2.0 and float(grads["never"][passes]) == 0.0
    following = program.carry(stored, grads)
    assert torch.equal(following["twice"][error], grads["twice"][error] / 2)
    assert torch.equal(following["never"][error], stored["never"][error])
    assert set(program.trainable(stored)["twice"]) == {"shard.float32"}
    for want in (2.0, 0.0):
        stored = {s: {**stored[s], **program.carry(stored, grads).get(s, {})} for s in stored}
        assert float(stored["twice"][passes]) == want
    assert not stored["twice"][error].any() and stored["never"][error].all()  # after 3 passes, and after 1


def test_a_site_that_is_called_twice_or_not_at_all():
    ranks.run(2, uses_of_a_site)
