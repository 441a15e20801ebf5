"""DeepSpeed's `checkpoint` and `configure`: against the plain call, outside and inside of programs; what is kept; what is not there."""

import gc
import json
import logging
import weakref
from types import SimpleNamespace

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import nn

import fds
from fds.deepspeed import checkpointing
from fds.deepspeed.checkpointing import checkpoint

WIDTH = 8


@pytest.fixture(autouse=True)
def _unconfigured(monkeypatch):
    monkeypatch.setattr(checkpointing, "_ACTIVE", None)


class Block(nn.Module):
    """A block that recomputes a part of itself, or not."""

    def __init__(self, inner, dropout):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("scale", torch.tensor(0.5))
        self.inner = inner

    def mlp(self, x, gain):
        return self.dropout(self.down(torch.relu(self.up(x)))) * gain * self.scale

    def forward(self, x):
        return x + (checkpoint(self.mlp, x, gain=2.0) if self.inner else self.mlp(x, gain=2.0))


class Model(nn.Module):
    """`how`: None; "inner", in blocks; "blocks", around each; "segment", around several by a closure."""

    def __init__(self, how, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block(how == "inner", dropout) for _ in range(4))
        self.how = how

    def segment(self, start, stop):
        def run(x):
            for block in self.blocks[start:stop]:
                x = block(x)
            return x + self.first.bias

        return run

    def forward(self, x):
        x = self.first(x)
        if self.how == "blocks":
            for i, block in enumerate(self.blocks):
                x = checkpoint(block, x)
                x = x + self.first.bias if i % 2 else x
            return x
        if self.how == "segment":
            return checkpoint(self.segment(2, 4), checkpoint(self.segment(0, 2), x))
        return self.segment(2, 4)(self.segment(0, 2)(x))


def rows(n=4):
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(1))


def plain(how, dropout):
    model, x = Model(how, dropout), rows().requires_grad_()
    torch.manual_seed(3)
    out = model(x)
    out.square().mean().backward()
    return out.detach(), x.grad, {k: p.grad for k, p in model.named_parameters()}


def same(a, b):
    assert all(torch.equal(x, y) for x, y in zip(fds.tree.leaves(a), fds.tree.leaves(b), strict=True))


def close(a, b):
    torch.testing.assert_close(fds.tree.leaves(a), fds.tree.leaves(b), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_plain_modules(dropout):
    """`backward`, with what is closed over and torch's generator: bitwise."""
    want = plain(None, dropout)
    for how in ("inner", "blocks", "segment"):
        same(plain(how, dropout), want)
    checkpointing.configure(None, checkpoint_in_cpu=True, synchronize=True)
    for how in ("inner", "blocks", "segment"):
        same(plain(how, dropout), want)


def in_program(how, dropout, *transforms, seeded=True):
    program, params = fds.functionalize(Model(how, dropout))
    program = fds.chain(*transforms)(program)
    f = fds.value_and_grad(lambda p, x: program(p, x).square().mean(), wrt=program)
    stored = program.place(params)
    value, grads = fds.with_seed(f)(torch.tensor(3), stored, rows()) if seeded else f(stored, rows())
    return value, program.restore(grads)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_programs(dropout):
    """Around sites, inside of them, and across them: the same masks and gradients as without."""
    want = in_program(None, dropout)
    one = fds.sharding.mesh(dp=1)["dp"]
    for how in ("inner", "blocks", "segment"):
        close(in_program(how, dropout), want)
        close(in_program(how, dropout, fds.shard(one), fds.checkpoint()), want)
        close(in_program(how, dropout, fds.lora(rank=2, targets="*.up")), in_program(None, dropout, fds.lora(rank=2, targets="*.up")))  # fmt: skip


class Words(nn.Module):
    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.out, self.how = nn.Embedding(11, WIDTH), nn.Linear(WIDTH, 11), how

    def get_output_embeddings(self):
        return self.out

    def forward(self, input_ids):
        hidden = self.words(input_ids).sin()
        return SimpleNamespace(logits=checkpoint(self.out, hidden) if self.how else self.out(hidden))


def test_an_output_layer_inside_of_it():
    """Whose arguments a loss would otherwise be handed, out of reach of the recompute."""
    grads = []
    for how in (False, True):
        program, params = fds.functionalize(Words(how))
        f = fds.value_and_grad(lambda p, b, program=program: fds.losses.causal_lm(program, p, b), wrt=program)
        grads.append(f(program.place(params), {"input_ids": torch.arange(10).view(2, 5)}))
    close(grads[1], grads[0])
    assert float(grads[1][1][""]["out.weight"].abs().max()) > 0


def test_compiled_step_with_dropout():
    results = []
    for how in (None, "segment"):
        program, params = fds.functionalize(Model(how, 0.3))
        step = fds.train_step(program, fds.optim.sgd(0.5), loss=lambda p, s, b: p(s, b["x"]).square().mean())
        state = step.init(params)
        if how:
            step = fds.compile(step, backend="aot_eager")
        for _ in range(3):
            state, metrics = step(state, {"x": rows()})
        results.append((metrics["loss"], metrics["grad_norm"], fds.tree.named(state.params)))
    close(results[1], results[0])


def test_randomness_without_a_seed_in_a_program_is_an_error():
    for how in ("inner", "segment"):
        with pytest.raises(ValueError, match="needs an explicit seed"):
            in_program(how, 0.4, seeded=False)


def kept(f):
    found = {}

    def pack(t):
        found[t.untyped_storage().data_ptr()] = (t.untyped_storage().nbytes(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        f()
    return sum(n for n, _ in found.values())


def test_only_arguments_are_kept():
    block = Block(False, 0.4)
    x = torch.randn(16, WIDTH, requires_grad=True)
    own = sum(p.untyped_storage().nbytes() for p in block.parameters())
    assert kept(lambda: checkpoint(block, x)) == own + x.nbytes
    assert kept(lambda: block(x)) > own + 3 * x.nbytes
    checkpointing.configure(checkpoint_in_cpu=True)
    assert kept(lambda: checkpoint(block, x)) == own + 24  # a handle


def test_memory_comes_back_without_the_garbage_collector():
    gc.collect()
    gc.disable()
    try:
        block, x = Block(True, 0.0), torch.randn(3, WIDTH, requires_grad=True)
        y = x * 2
        out, kept = checkpoint(block, y), weakref.ref(y)
        del y
        assert kept() is not None
        out.sum().backward()
        del out
        assert kept() is None
    finally:
        gc.enable()


def test_trees_and_other_things():
    def f(pair, *, scale, flag):
        a, b = pair["a"], pair["n"]
        return {"sum": a * b, "same": a, "count": b + 1, "flag": flag}, a * scale

    a, n, scale = torch.randn(3, requires_grad=True), torch.arange(3), torch.tensor(2.0, requires_grad=True)
    results = []
    for call in (lambda *x, **k: f(*x, **k), lambda *x, **k: checkpoint(f, *x, **k)):
        out, scaled = call({"a": a, "n": n}, scale=scale, flag="x")
        assert out["flag"] == "x" and out["count"].dtype == torch.int64 and not out["count"].requires_grad
        grads = torch.autograd.grad((out["sum"] + out["same"]).sum() + scaled.sum(), [a, scale])
        results.append((out["sum"].detach(), out["count"], *grads))
    same(results[1], results[0])
    with torch.no_grad():
        assert not checkpoint(f, {"a": a, "n": n}, scale=scale, flag=0)[1].requires_grad
    assert not checkpoint(lambda x: x + 1, torch.ones(2)).requires_grad


def test_autocast_is_the_forwards():
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    seen = []

    def f(x):
        seen.append(layer(x).dtype)
        return layer(x)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = checkpoint(f, x)
    out.float().sum().backward()
    assert seen == [torch.bfloat16] * 2


def test_torch_func():
    w, x = torch.randn(3, 3), torch.randn(5, 3)
    f = lambda w, x: checkpoint(lambda w, x: torch.tanh(x @ w), w, x).sum()  # noqa: E731
    g = lambda w, x: torch.tanh(x @ w).sum()  # noqa: E731
    close(torch.func.grad(f)(w, x), torch.func.grad(g)(w, x))
    close(torch.func.vmap(torch.func.grad(f), (None, 0))(w, x), torch.func.vmap(torch.func.grad(g), (None, 0))(w, x))
    close(torch.func.jvp(f, (w, x), (w, x)), torch.func.jvp(g, (w, x), (w, x)))
    with pytest.raises(
        ValueError, match=r"1 tensors that take a gradient and are not its arguments, the first \(3, 3\)"
    ):
        torch.func.grad(lambda w: checkpoint(lambda x: x @ w, x).sum())(w)


def test_second_derivatives_are_refused():
    x = torch.randn(3, requires_grad=True)
    with pytest.raises(ValueError, match="create_graph=True"):
        torch.autograd.grad(checkpoint(torch.sin, x).sum(), x, create_graph=True)


def test_configure(tmp_path, caplog):
    assert not checkpointing.is_configured()
    checkpointing.configure()
    assert checkpointing.is_configured()
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"activation_checkpointing": {"cpu_checkpointing": True, "profile": True}}))
    for source in (path, str(path), json.loads(path.read_text())):
        checkpointing.configure(None, source)
        assert checkpointing._ACTIVE.stash is not None and checkpointing._ACTIVE.profile
    checkpointing.configure(None, path, checkpoint_in_cpu=False)
    assert checkpointing._ACTIVE.stash is None
    with caplog.at_level(logging.INFO, logger="fds.deepspeed"):
        logging.getLogger("fds.deepspeed").addHandler(caplog.handler)
        checkpoint(torch.sin, torch.ones(2, requires_grad=True)).sum().backward()
        logging.getLogger("fds.deepspeed").removeHandler(caplog.handler)
    assert {"checkpoint sin: forward", "checkpoint sin: backward"} <= {r.message.rsplit(" ", 2)[0] for r in caplog.records}  # fmt: skip
    compiled = fds.compile(lambda x: checkpoint(torch.sin, x).sum(), backend="aot_eager")
    with pytest.raises(Exception) as caught:
        compiled(torch.ones(2, requires_grad=True))
    chain = [caught.value]
    while chain[-1].__context__ is not None:  # Dynamo hides the cause
        chain.append(chain[-1].__context__)
    assert any("synchronize and profile are for eager calls" in str(e) for e in chain), chain


def test_reset_lets_go_of_what_no_backward_asks_for():
    checkpointing.configure(checkpoint_in_cpu=True)
    x = torch.randn(4, requires_grad=True)
    dropped, wanted = checkpoint(torch.sin, x), checkpoint(torch.sin, x)
    before = weakref.ref(checkpointing._ACTIVE.stash)
    checkpointing.reset()
    assert checkpointing.is_configured() and not checkpointing._ACTIVE.stash.places and before() is not None
    del dropped
    wanted.sum().backward()
    same(x.grad, x.detach().cos())
    del wanted
    gc.collect()
    assert before() is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(contiguous_checkpointing=True), "contiguous_checkpointing .* is not there"),
        (dict(deepspeed_config={"activation_checkpointing": {"contiguous_memory_optimization": True}}), "is not there"),
        (dict(partition_activations=True), "needs mpu_"),
        (dict(mpu_=object(), partition_activations=True), "mpu_ is object, required get_model_parallel_rank"),
        (dict(deepspeed_config={"activation_checkpointing": {"cpu_checkpoint": True}}), "did you mean 'cpu_checkpointing'"),
        (dict(deepspeed_config={"activation_checkpointing": True}), "required a mapping"),
        (dict(deepspeed_config=3), "deepspeed_config is int"),
    ],
)  # fmt: skip
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        checkpointing.configure(**arguments)
    assert not checkpointing.is_configured()


class Mpu:
    def get_model_parallel_rank(self):
        return dist.get_rank()

    def get_model_parallel_world_size(self):
        return dist.get_world_size()

    def get_model_parallel_group(self):
        return dist.group.WORLD


def partitioned(cpu):
    want = plain("segment", 0.0)
    block, x = Block(False, 0.0), torch.randn(17, WIDTH, generator=torch.Generator().manual_seed(2)).requires_grad_()
    own = sum(p.untyped_storage().nbytes() for p in block.parameters())
    checkpointing.configure(Mpu(), partition_activations=True, checkpoint_in_cpu=cpu)
    try:
        got = plain("segment", 0.0)
        bytes_kept = kept(lambda: checkpoint(block, x)) - own
    finally:
        checkpointing._ACTIVE = None
    same(got, want)
    return bytes_kept


def test_partitioned_over_two_ranks():
    assert ranks.run(2, partitioned, False) == [17 * WIDTH * 4 // 2] * 2
    assert ranks.run(2, partitioned, True) == [24] * 2
