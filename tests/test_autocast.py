"""`autocast`: the module called in torch.autocast, value and gradient bit for bit, with recompute on either side of it."""

import laws
import pytest
import ranks
import torch
import zoo

import fds


def plain(family, rows, dtype=torch.bfloat16, loss=lambda out, rows: zoo.loss_of(out)):
    """Loss and gradients by name of the module called in torch.autocast."""
    model = zoo.build(family)
    with torch.autocast("cpu", dtype=dtype, cache_enabled=False):
        out = model(**rows)
    value = loss(out, rows)
    names, params = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(value, params, allow_unused=True, materialize_grads=True)
    return value.detach(), dict(zip(names, grads, strict=True))


def chains(axis):
    return {
        "autocast": fds.autocast(),
        "half": fds.autocast("float16"),
        "autocast, checkpoint": fds.chain(fds.autocast(), fds.checkpoint()),
        "checkpoint, autocast": fds.chain(fds.checkpoint(), fds.autocast()),
        "checkpoint matmul, autocast": fds.chain(fds.checkpoint("matmul"), fds.autocast()),
        "shard, checkpoint, autocast": fds.chain(fds.shard(axis), fds.checkpoint(), fds.autocast()),
    }


def gradient(family, name, how="eager"):
    axis = fds.sharding.mesh(dp=-1)["dp"]
    program, params = fds.functionalize(zoo.build(family))
    program, rows = chains(axis)[name](program), zoo.batch(family)
    mine = {k: v.chunk(axis.size)[axis.rank] for k, v in rows.items()}
    value, grads = laws.differentiate(program, how)(program.place(params), mine)
    want_value, want = plain(family, rows, torch.float16 if name == "half" else torch.bfloat16)
    got = program.restore(grads)
    assert all(got[k].dtype == torch.float32 for k in want)
    return abs(float(laws.mean(value, axis) - want_value)), laws.distance(got, want)


@pytest.mark.parametrize("name", chains(fds.sharding.Axis("dp", 1, 0)))
@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "bert", "mixtral", "convnet"])
def test_value_and_gradient_are_the_modules(family, name):
    assert gradient(family, name) == (0.0, 0.0)


def test_it_is_not_the_modules_in_float32():
    assert abs(float(plain("llama", zoo.batch("llama"))[0] - zoo.reference("llama", zoo.batch("llama"))[0])) > 1e-6


@pytest.mark.parametrize("how", ["func", "traced"])
def test_under_torch_func_and_traced(how):
    value, error = gradient("llama", "checkpoint, autocast", how)
    assert value < 1e-3 and error < 2e-2


def test_two_ranks():
    for value, error in ranks.run(2, gradient, "llama", "shard, checkpoint, autocast"):
        assert value < 1e-3 and error < 2e-2


def test_the_loss_calls_the_output_layer_as_autocast_does():
    """`causal_lm` never makes the logits: what it is given for them is what the layer would have been."""
    program, params = fds.functionalize(zoo.build("llama"))
    program, rows = fds.autocast(program), zoo.batch("llama")
    value, grads = fds.value_and_grad(lambda s, b: fds.losses.causal_lm(program, s, b), wrt=program)(program.place(params), rows)  # fmt: skip

    def loss(out, rows):
        logits, targets = out.logits[:, :-1].flatten(0, 1).float(), rows["input_ids"][:, 1:].flatten()
        return torch.nn.functional.cross_entropy(logits, targets)

    want_value, want = plain("llama", rows, loss=loss)
    assert float(value) == pytest.approx(float(want_value), rel=1e-3)
    assert laws.distance(program.restore(grads), want) < 2e-2
    heads = []
    with fds.frame.scoped(heads=heads):
        program(program.place(params), **rows)
    assert heads[0].hidden.dtype == heads[0].weight.dtype == torch.bfloat16


def test_some_modules_only():
    program, params = fds.functionalize(zoo.build("llama"))
    rows, want = zoo.batch("llama"), zoo.build("llama")
    for block in want.model.layers:
        block.mlp.forward = torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False)(block.mlp.forward)
    for t in (fds.at("*.mlp", fds.autocast()), fds.chain(fds.at("*.mlp", fds.autocast()), fds.checkpoint())):
        got = t(program)(t(program).place(params), **rows).logits
        assert torch.equal(got, want(**rows).logits)


def test_a_step_trains_in_it_compiled():
    program, params = fds.functionalize(zoo.build("llama"))
    program = fds.chain(fds.checkpoint(), fds.autocast())(program)
    step = fds.train_step(program, fds.optim.sgd(0.5))
    eager, traced = step.init(params), step.init(params)
    run = fds.compile(step, backend="aot_eager")
    for i in range(4):
        rows = zoo.batch("llama", seed=i % 2)
        eager, a = step(eager, rows)
        traced, b = run(traced, rows)
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=2e-3)
    assert all(x.dtype == torch.float32 for x in fds.tree.leaves(eager.params) if x.is_floating_point())


def test_what_is_refused():
    with pytest.raises(ValueError, match="bfloat16 or float16"):
        fds.autocast("float32")
    with pytest.raises(ValueError, match="autocast: 'int8' is not a floating dtype"):
        fds.autocast("int8")
    program, _ = fds.functionalize(zoo.build("llama"))
    with pytest.raises(ValueError, match="one autocast"):
        fds.chain(fds.autocast(), fds.autocast("float16"))(program)
