"""Each trap of torch that would give a silently wrong gradient, and that fds must not fall into.

Collectives whose backward the compiler would drop: `sharding/test_collectives.py`, `compiled`. A zero tangent of `func.jvp`: `nested` there.
Legacy autograd Functions, tied leaves on the meta device, outputs that are not tensors, shared position biases: the families bloom, llama-tied, bert,
falcon and t5 of `test_laws.py`.
"""

import pytest
import ranks
import torch
import zoo
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import fds
from fds.sharding import collectives


def mlp():
    torch.manual_seed(0)
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3))
    return nn.Sequential(*blocks), torch.randn(4, 6)


def loss(program):
    return lambda stored, x: program(stored, x).square().mean()


def restored(program, grads):
    return list(program.restore(grads).values())


def strictly_compiled():
    """A user's own strict ``torch.compile(torch.func.grad(f))`` of a sharded program: right, or refused aloud; never a zero."""
    axis = fds.sharding.mesh(dp=-1)["dp"]
    module, x = mlp()
    program, params = fds.functionalize(module, sites="*")
    train = fds.shard(axis)(program)
    stored = train.place(params)
    mine = x.chunk(axis.size)[axis.rank]
    want = torch.autograd.grad(module(x).square().mean(), list(module.parameters()))
    try:
        grads = torch.compile(torch.func.grad(loss(train)), fullgraph=True, backend="aot_eager")(stored, mine)
    except torch._dynamo.exc.Unsupported as error:
        return str(error)
    for got, w in zip(restored(train, grads), want, strict=True):
        torch.testing.assert_close(got, w)
    return "right"


def test_a_strict_compile_of_func_grad_is_right_or_refused():
    for said in (strictly_compiled(), *ranks.run(2, strictly_compiled)):
        assert said == "right" or "Explanation" in said


def test_recompute_survives_the_compiler():
    """Common-subexpression elimination must not turn recompute into keeping: its matrix products are in the graph twice."""
    module, x = mlp()
    program, params = fds.functionalize(module, sites="*")
    counts = {}
    for name, transform in (("keep", fds.chain()), ("recompute", fds.checkpoint())):
        train, seen = transform(program), []

        def backend(graph, inputs, seen=seen):
            seen.append(sum("mm" in str(n.target) for n in graph.graph.nodes))
            return graph

        from torch._dynamo.backends.common import aot_autograd

        run = torch.compile(fds.value_and_grad(loss(train)), fullgraph=True, backend=aot_autograd(fw_compiler=backend))
        grads = run(train.place(params), x)[1]
        want = torch.autograd.grad(module(x).square().mean(), list(module.parameters()))
        assert all(torch.allclose(g, w) for g, w in zip(restored(train, grads), want, strict=True))
        (counts[name],) = seen
    assert counts["recompute"] == counts["keep"] + 3, counts


def order_of_collectives(how):
    """Gathers and scatters of a step in the order in which they ran (the sums of loss and norm are free to move)."""
    axis = fds.sharding.mesh(dp=-1)["dp"]
    module, x = mlp()
    program, params = fds.functionalize(module, sites="*")
    train = fds.chain(fds.shard(axis), fds.checkpoint())(program)
    step = fds.train_step(train, fds.optim.sgd(0.1), loss=lambda p, s, b: p(s, b["x"]).square().mean())
    run = fds.compile(step, prefetch=False, overlap=False) if how == "compiled" else step
    names, observed = [], collectives.observed
    collectives.observed = lambda name, *rest: (names.append(name), observed(name, *rest))[1]
    try:
        run(step.init(params), {"x": x.chunk(axis.size)[axis.rank]})
    finally:
        collectives.observed = observed
    return [n for n in names if n != "total"]


def test_a_compiled_step_keeps_the_order_of_the_trace():
    """Inductor takes the whole step for inference and would put all weight gradients last, with what they need kept alive."""
    eager, compiled = (ranks.run(2, order_of_collectives, how)[0] for how in ("eager", "compiled"))
    assert eager == compiled
    first, last = eager.index("scatter"), len(eager) - 1 - eager[::-1].index("gather")
    assert first < last, "a site's gradient leaves before the next site is gathered again"


def test_a_trace_by_make_fx_agrees():
    module, x = mlp()
    program, params = fds.functionalize(module, sites="*")
    train = fds.chain(fds.shard(fds.sharding.mesh(dp=1)["dp"]), fds.checkpoint())(program)
    stored = train.place(params)
    run = fds.value_and_grad(loss(train))
    want, got = run(stored, x), make_fx(run)(stored, x)(stored, x)
    assert all(torch.equal(a, b) for a, b in zip(fds.tree.leaves(got), fds.tree.leaves(want), strict=True))


def test_two_traced_functions_do_not_share_a_graph():
    """Dynamo does not guard on which nonstrict function it saw; with one code object the first one's graph answers for the second."""
    functions = [fds.value_and_grad(lambda p, k=k: (k * p["w"]).sum()) for k in (2.0, 3.0)]
    got = [torch.compile(f, fullgraph=True, backend="eager")({"w": torch.ones(2)})[0] for f in functions]
    assert [float(x) for x in got] == [4.0, 6.0]
    outer = lambda f: lambda p: f(p)  # noqa: E731
    got = [torch.compile(outer(f), fullgraph=True, backend="eager")({"w": torch.ones(2)})[0] for f in functions]
    assert [float(x) for x in got] == [4.0, 6.0]


def test_a_module_that_checkpoints_inside_itself_is_refused():
    model = zoo.build("llama", training=True)
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"checkpoints inside itself.*fds\.checkpoint"):
        fds.functionalize(model)

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(lambda x: self.a(x).sin(), x, use_reentrant=False).sum()

    program, params = fds.functionalize(Inner())
    with pytest.raises(RuntimeError, match="checkpoints inside itself"):
        fds.value_and_grad(program)(program.place(params), torch.ones(2, 3, requires_grad=True))


def test_the_key_value_cache_is_off_in_training():
    model = zoo.build("llama")
    program, params = fds.functionalize(model)
    assert model.config.use_cache is True
    with torch.no_grad():
        assert program(program.place(params), **zoo.batch("llama")).past_key_values is None
