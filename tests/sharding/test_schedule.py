"""When collectives begin and end in a compiled step: the order of the graph, and no bit of a value."""

import pytest
import ranks
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import fds
from fds import tree
from fds.sharding import collectives, schedule
from tests.sharding.test_zero import axes, build, error, rows

BLOCKS = 3


def toy(x, *shards):
    """A loss of blocks with a gathered vector each, its value and gradients, and those again from what came out: two turns over the ranks."""
    axis = axes()[0]

    def loss(shards):
        y = x
        for s in shards:
            y = torch.tanh(y * collectives.gather(s.double().float(), axis))
        return y.sum()

    grads = torch.func.grad(loss)(shards)
    return grads, collectives.gather(torch.tanh(grads[0]), axis)


def chained(x, *shards):
    """A reduction whose result goes into the next one, as over two axes."""
    axis = axes()[0]
    first = collectives.scatter(x.reshape(-1), axis)
    return first, collectives.scatter(torch.cat([torch.tanh(first) * 2] * 2), axis)


def graphs(prefetch, overlap, f=toy):
    """Results of the graph as traced and as scheduled, the names of its collectives in order, what was sent, and how many each `finish` waits for."""
    torch.manual_seed(0)
    n, rank = axes()[0].size, axes()[0].rank
    args = [torch.randn(4, 6), *(torch.randn(n, 6 // n)[rank] for _ in range(BLOCKS))]
    traced = make_fx(f)(*args)
    want = traced(*args)
    schedule.scheduler(prefetch=prefetch, overlap=overlap)(traced.graph)
    traced.graph.lint()
    traced.recompile()
    with fds.sharding.record() as wire:
        got = traced(*args)
    names = [str(m.target).removeprefix("fds.").removesuffix(".default") for m in traced.graph.nodes]
    same = all(torch.equal(a, b) for a, b in zip(tree.leaves(got), tree.leaves(want), strict=True))
    after = [len(m.args[2]) for m in traced.graph.nodes if m.target is collectives.FINISH]
    order = [n for n in names if n in ("gather", "scatter", "begin_gather", "begin_scatter", "finish")]
    return same, order, wire.bytes, after


def test_collectives_begin_and_end_apart_one_site_from_each_other():
    once = [4 * 6 * (BLOCKS + 1), 4 * 6 * BLOCKS]
    for prefetch, overlap, want in (
        (False, False, ["gather"] * 3 + ["scatter"] * 3 + ["gather"]),
        (True, False, ["begin_gather"] * 2 + ["finish", "begin_gather"] + ["finish"] * 2 + ["scatter"] * 3 + ["gather"]),
        (False, True, ["gather"] * 3 + ["begin_scatter"] * 2 + ["finish", "begin_scatter"] + ["finish"] * 2 + ["gather"]),
    ):  # fmt: skip
        for same, order, wire, after in ranks.run(2, graphs, prefetch, overlap):
            assert same and order == want
            assert after == (
                [1, 1, 0] if prefetch or overlap else []
            )  # Inductor orders nodes once more: this keeps them
            assert [wire["gather"], wire["scatter"]] == once


def test_a_reduction_ends_before_its_result_is_used():
    for same, order, _, _ in ranks.run(2, graphs, False, True, chained):
        assert same and order == ["begin_scatter", "finish"] * 2


def steps(prefetch, overlap):
    """Two compiled steps under recompute: losses, parameters, and what went over the wire."""
    dp = axes()[0]
    program, params = build()
    program = fds.chain(fds.shard(dp), fds.cast("bfloat16"), fds.checkpoint())(program)
    step = fds.train_step(program, fds.optim.adamw(0.05), loss=error)
    run, state = fds.compile(step, prefetch=prefetch, overlap=overlap), step.init(params)
    with fds.sharding.CommsLogger(enabled=True) as log:  # then a collective ends where it begins
        state, metrics = run(state, {"x": rows(0).chunk(dp.size)[dp.rank]})
    with fds.sharding.record() as wire, torch.profiler.profile() as seen_by_torch:
        state, metrics = run(state, {"x": rows(1).chunk(dp.size)[dp.rank]})
    names = {e.key for e in seen_by_torch.key_averages()}
    assert [f"fds::{n}" in names for n in ("gather", "begin_gather", "begin_scatter")] == [
        not prefetch,
        prefetch,
        overlap,
    ]
    assert all(row.total_ms > 0 for row in log.summary().rows)
    return [metrics["loss"], *tree.flat(state.params)], wire.bytes, log.summary().operations


def test_no_bit_of_a_compiled_step_depends_on_the_schedule():
    plain, moved = (ranks.run(2, steps, on, on) for on in (False, True))
    for (a, sent, calls), (b, sent_too, calls_too) in zip(plain, moved, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        assert sent == sent_too and calls == calls_too


def test_a_schedule_that_cannot_be_had_is_an_error():
    program, _ = build()
    for options in (
        {"backend": "aot_eager"},
        {"mode": "max-autotune"},
        {"options": {"post_grad_custom_post_pass": print}},
    ):
        with pytest.raises(ValueError, match="prefetch=True, overlap=None are a pass of Inductor's"):
            fds.compile(program, prefetch=True, **options)
