"""The collectives on two ranks: values, every transformation of torch, the compiler, traffic. `rank` here is 0 or 1."""

import pytest
import ranks
import torch
import torch.distributed as dist

from fds import sharding
from fds.sharding import collectives

M = 3  # elements of a shard


def axis():
    return sharding.mesh(dp=2)["dp"]


def shards():
    """What both ranks hold, [rank, M]."""
    return torch.arange(1.0, 2 * M + 1).view(2, M)


def weights():
    """Rank r's loss is sum(weights[r] * gathered): other on every rank, so that a missing reduction shows."""
    return torch.stack([torch.linspace(-1, 2, 2 * M), torch.linspace(3, -2, 2 * M)])


def losses(reduce="mean"):
    a, w = axis(), weights()[dist.get_rank()]
    return lambda x: (w * collectives.gather(x, a, reduce=reduce).pow(2)).sum()


def wanted(reduce):
    """The gradient of the reduced loss by this rank's shard, without a collective."""
    whole = shards().flatten()
    grad = 2 * weights() * whole
    return (grad.mean(0) if reduce == "mean" else grad.sum(0)).view(2, M)[dist.get_rank()]


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def values():
    a, mine = axis(), shards()[dist.get_rank()]
    close(collectives.gather(mine, a), shards().flatten())
    for reduce, scale in (("mean", 0.5), ("sum", 1.0)):
        close(collectives.scatter(weights()[a.rank], a, reduce=reduce), scale * weights().sum(0).view(2, M)[a.rank])
        close(collectives.total(mine, a, reduce=reduce), scale * shards().sum(0))
    assert torch.equal(collectives.replicate(mine, a), mine)
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.int64):
        got = collectives.scatter(weights()[a.rank].to(dtype), a, reduce="sum")
        assert got.dtype == dtype
        close(got, weights().to(dtype).sum(0).view(2, M)[a.rank])


def gradients():
    mine = shards()[dist.get_rank()]
    for reduce in ("mean", "sum"):
        x = mine.clone().requires_grad_()
        close(torch.autograd.grad(losses(reduce)(x), x)[0], wanted(reduce))
        close(torch.func.grad(losses(reduce))(mine), wanted(reduce))
        _, pull = torch.func.vjp(losses(reduce), mine)
        close(pull(torch.tensor(2.0))[0], 2 * wanted(reduce))


def gradients_of_the_others():
    a, mine = axis(), shards()[dist.get_rank()]
    close(torch.func.grad(lambda x: (collectives.replicate(x, a) * (a.rank + 1)).sum())(mine), torch.full((M,), 1.5))
    both = weights()[a.rank]
    got = torch.func.grad(lambda x: (collectives.scatter(x, a) * (a.rank + 1)).sum())(both)
    close(got, torch.tensor([1.0, 2.0]).repeat_interleave(M) / 2)
    close(torch.func.grad(lambda x: (collectives.total(x, a) * (a.rank + 1)).sum())(mine), torch.full((M,), 3.0))


def nested():
    """A tangent that is zero, or a second derivative that is, would be silent: values are compared."""
    a, mine = axis(), shards()[dist.get_rank()]
    tangent = torch.full((M,), float(a.rank + 1))
    _, moved = torch.func.jvp(lambda x: collectives.gather(x, a), (mine,), (tangent,))
    close(moved, torch.tensor([1.0, 2.0]).repeat_interleave(M))
    _, product = torch.func.jvp(torch.func.grad(losses()), (mine,), (tangent,))
    close(product, (2 * weights().mean(0).view(2, M)[a.rank]) * tangent)
    # The mean over ranks of each rank's sum over its own entries of the mean gradient 2 w x: w, not 2 w.
    twice = torch.func.grad(lambda x: torch.func.grad(losses())(x).sum())(mine)
    close(twice, weights().mean(0).view(2, M)[a.rank])


def batched():
    a, mine = axis(), shards()[dist.get_rank()]
    rows = torch.stack([mine, 10 * mine, -mine])
    close(
        torch.func.vmap(lambda x: collectives.gather(x, a))(rows),
        torch.stack([k * shards().flatten() for k in (1, 10, -1)]),
    )
    both = torch.stack([weights()[a.rank], -weights()[a.rank]])
    want = weights().mean(0).view(2, M)[a.rank]
    close(torch.func.vmap(lambda x: collectives.scatter(x, a))(both), torch.stack([want, -want]))
    close(
        torch.func.vmap(lambda x: collectives.total(x, a), in_dims=1)(rows.T),
        torch.stack([k * shards().sum(0) for k in (1, 10, -1)]),
    )
    per_row = torch.func.vmap(torch.func.grad(losses()))(rows)
    close(per_row, torch.stack([k * wanted("mean") for k in (1, 10, -1)]))


def compiled():
    """torch 2.13 drops the backward of an autograd.Function in a strict compile of func.grad, without a word: not these."""
    mine = shards()[dist.get_rank()]
    for backend in ("aot_eager", "inductor"):
        torch._dynamo.reset()
        close(torch.compile(torch.func.grad(losses()), fullgraph=True, backend=backend)(mine), wanted("mean"))
    torch._dynamo.reset()
    x = mine.clone().requires_grad_()
    torch.compile(losses(), fullgraph=True, backend="aot_eager")(x).backward()
    close(x.grad, wanted("mean"))


def counted():
    mine = shards()[dist.get_rank()]
    with collectives.record() as outer, collectives.record() as wire:
        torch.func.grad(losses())(mine)
    with collectives.record() as compiled:
        torch.compile(torch.func.grad(losses()), fullgraph=True, backend="aot_eager")(mine)
    assert wire == outer == compiled
    assert wire.calls == {"gather": 1, "scatter": 1} and wire.bytes == {"gather": 8 * M, "scatter": 8 * M}
    assert wire.total == 16 * M


@pytest.mark.parametrize("law", [values, gradients, gradients_of_the_others, nested, batched, compiled, counted])
def test_on_two_ranks(law):
    ranks.run(2, law)


def test_a_bf16_sum_is_rounded_once():
    got = ranks.run(4, low_precision)
    want = torch.stack([_low(r) for r in range(4)]).float().sum(0).bfloat16()
    assert torch.equal(torch.cat(got), want)


def in_low_precision():
    """Of a sum in bfloat16: the result, what was recorded, and what was handed to torch; seven elements do not divide by the ranks."""
    a, sent = sharding.mesh(dp=-1)["dp"], []

    def watched(f):
        def run(*tensors, **kwargs):
            sent.append((f.__name__, tensors[0].dtype, tensors[0].numel()))
            return f(*tensors, **kwargs)

        return run

    with pytest.MonkeyPatch.context() as patched, collectives.record() as wire:
        for name in ("all_reduce", "all_to_all_single", "broadcast"):
            patched.setattr(dist, name, watched(getattr(dist, name)))
        out = collectives.total(_low(a.rank)[:7], a, reduce="mean")
    return out, wire.bytes, sent


def test_an_all_reduce_sends_the_dtype_that_it_is_of_and_rounds_once():
    for n in (2, 4):
        for out, wire, sent in ranks.run(n, in_low_precision):
            want = torch.stack([_low(r) for r in range(n)]).float().mean(0).bfloat16()[:7]
            assert torch.equal(out, want) and wire == {"total": 2 * 7}
            assert sent == [("all_to_all_single", torch.bfloat16, 8), *[("broadcast", torch.bfloat16, 8 // n)] * n]


def _low(rank):
    return torch.randn(8, generator=torch.Generator().manual_seed(rank)).bfloat16()


def low_precision():
    return collectives.scatter(_low(dist.get_rank()), sharding.mesh(dp=4)["dp"], reduce="sum")


def test_one_rank_needs_no_group_and_sends_nothing():
    one, x = sharding.mesh(dp=1)["dp"], torch.ones(3)
    with collectives.record() as wire:
        assert all(
            f(x, one) is x for f in (collectives.gather, collectives.scatter, collectives.replicate, collectives.total)
        )
    assert wire.total == 0
    with pytest.raises(ValueError, match=r"'maen'.*did you mean 'mean'"):
        collectives.gather(x, one, reduce="maen")
