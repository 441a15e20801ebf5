"""`zero.Init`, `GatheredParameters`, `OnDevice` and the estimates: against plain construction, and against what programs really hold, on two ranks."""

from types import SimpleNamespace

import laws
import pytest
import ranks
import torch
import torch.distributed as dist
import zoo
from torch import nn

import fds
from fds.deepspeed import needs, zero
from fds.deepspeed.device import OnDevice

WIDTH, BLOCKS = 128, 12


class Net(nn.Module):
    """A constructor that does all kinds of things to its parameters."""

    def __init__(self, blocks=BLOCKS, width=WIDTH):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, width, bias=False)
        self.tied = nn.Linear(width, width, bias=False)
        self.tied.weight = self.head.weight
        self.free = nn.Parameter(torch.randn(width, width) * 3)
        self.register_buffer("table", torch.arange(width) ** 0.5)
        self.register_buffer("triangle", torch.full((width, width), 2.0).triu())
        with torch.no_grad():
            for i, block in enumerate(self.blocks):
                nn.init.orthogonal_(block.weight)
                block.weight[0].fill_(float(i))
                block.weight.data[1, 1:] = torch.arange(width - 1.0)
                block.bias.copy_(block.weight[:, 0] * 2)

    def forward(self, x):
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.tied(self.norm(x))


def test_what_a_constructor_does_is_done_leaf_by_leaf():
    torch.manual_seed(7)
    with zero.Init():
        model = Net()
    assert all(p.is_meta for p in model.parameters()) and not model.table.is_meta and model.triangle.is_meta
    got = zero.parameters(model)
    program, params = fds.functionalize(model)
    assert list(got) == list(params)
    stored = program.place(params)
    assert all(torch.equal(got[k], x) for part in stored.values() for k, x in part.items())
    for i in range(BLOCKS):
        w = got[f"blocks.{i}.weight"]
        assert torch.equal(w[0], torch.full((WIDTH,), float(i))) and torch.equal(w[1, 1:], torch.arange(WIDTH - 1.0))
        assert torch.allclose(w[2:] @ w[2:].T, torch.eye(WIDTH - 2), atol=1e-5)
        assert torch.equal(got[f"blocks.{i}.bias"], w[:, 0] * 2)
    assert float(got["free"].std()) == pytest.approx(3, rel=0.05)
    assert torch.equal(got["norm.weight"], torch.ones(WIDTH)) and torch.equal(got["triangle"], torch.full((WIDTH, WIDTH), 2.0).triu())  # fmt: skip
    assert torch.equal(got["free"], got["free"]) and not torch.equal(got["blocks.1.weight"], got["blocks.2.weight"])
    torch.manual_seed(7)
    with zero.Init():
        again = zero.parameters(Net())
    assert all(torch.equal(again[k], x) for k, x in got.items())
    torch.manual_seed(8)
    with zero.Init():
        other = zero.parameters(Net())
    assert not torch.equal(other["free"], got["free"])


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_families_are_initialised_as_by_the_constructor(family):
    torch.manual_seed(0)
    want = dict(fds.functionalize(zoo.FAMILIES[family][0]())[1])
    with zero.Init():
        model = zoo.FAMILIES[family][0]()
    program, got = fds.functionalize(model)
    stored = program.place(got)
    whole = program.restore(stored)
    assert list(whole) == list(want)
    for k, w in want.items():
        x = whole[k]
        assert x.dtype == w.dtype and x.shape == w.shape and not x.is_meta
        deviation = float(w.float().std(correction=0))
        if k in program.marks["buffer"] or deviation == 0:
            assert torch.equal(x, w), k
        else:
            assert abs(float(x.std()) / deviation - 1) < 6 / w.numel() ** 0.5, k
            assert abs(float(x.mean() - w.mean())) < 12 * deviation / w.numel() ** 0.5, k
    fds.train_step(program, fds.optim.sgd(0.1)).init(got)


def test_dtype_and_switches():
    with zero.Init(dtype=torch.bfloat16):
        model = Net(blocks=1)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and model.table.dtype == torch.float32
    assert model.tied.weight is model.head.weight
    got = zero.parameters(model)
    assert got["blocks.0.weight"].dtype == torch.bfloat16 and float(got["free"].float().std()) == pytest.approx(3, rel=0.05)  # fmt: skip
    with zero.Init(enabled=False):
        assert not nn.Linear(2, 2).weight.is_meta
    assert not nn.Linear(2, 2).weight.is_meta and not hasattr(nn.Linear(2, 2).weight, "fds_home")


class Real(laws.Live):
    """Bytes of real tensors: those on the meta device have none."""

    def see(self, tree):
        super().see([t for t in fds.tree.leaves(tree) if isinstance(t, torch.Tensor) and not t.is_meta])


def peaks():
    """Of building, placing and a step: bytes alive at most; whether all ranks have the same; what is stored, and what a site has."""
    torch.manual_seed(dist.get_rank())  # ranks agree on rank 0's seed
    with zero.Init(), Real(()) as built:
        model = Net(blocks=24)
    dp = fds.sharding.mesh(dp=-1)["dp"]
    base, params = fds.functionalize(model)
    program = fds.shard(base, dp)
    step = fds.train_step(program, fds.optim.sgd(0.1), loss=lambda p, s, b: p(s, b["x"]).square().mean())
    with Real(()) as placed:
        state = step.init(params)
    stored = fds.tree.nbytes(state.params)
    sites = [fds.tree.nbytes(p.spec) for p in base.sites.values()]
    state, metrics = step(state, {"x": torch.ones(2, WIDTH)})
    whole = program.restore(state.params)
    return built.peak, placed.peak, stored, sum(sites), max(sites), float(metrics["loss"]), float(sum(x.double().sum() for x in whole.values()))  # fmt: skip


def test_no_rank_holds_the_model():
    results = ranks.run(2, peaks)
    assert results[0][5:] == results[1][5:]
    for built, placed, stored, total, site, *_ in results:
        assert built < site < total / 5, "building allocates next to nothing"
        assert stored < 0.6 * total and placed <= stored + 4 * site


def test_write_what_was_built_under_init():
    """A state dict through `GatheredParameters`, module by module, as DeepSpeed's users load one."""
    model, source = zoo.build("llama"), zoo.build("llama").state_dict()
    with zero.Init():
        model = zoo.FAMILIES["llama"][0]()
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        with zero.GatheredParameters(own, modifier_rank=0) as params:
            assert all(not p.is_meta for p in params)
            module._load_from_state_dict(source, name + "." * bool(name), {}, True, [], [], [])
    assert all(p.is_meta or p.numel() < 1024 for p in model.parameters())
    assert all(torch.equal(zero.parameters(model)[k], source[k]) for k, _ in model.named_parameters())


def rank_writes():
    rank = dist.get_rank()
    with zero.Init():
        layer = nn.Linear(5, 3)
    with zero.GatheredParameters(layer.parameters(), modifier_rank=1), torch.no_grad():
        layer.weight.fill_(float(rank))  # both write; rank 1's counts
    with zero.GatheredParameters(layer.weight):
        seen = layer.weight.detach().clone()
    torch.manual_seed(0)
    existing = nn.Linear(5, 3)
    before = existing.weight.detach().clone()
    with torch.no_grad():
        existing.weight.add_(rank)  # rank 0's counts
    zero.Init(module=existing)
    assert existing.weight.is_meta and torch.equal(zero.parameters(existing)["weight"], before)
    whole = nn.Linear(2, 2)
    with zero.GatheredParameters(whole.weight, modifier_rank=1), torch.no_grad():
        whole.weight.fill_(float(rank))
    return seen, zero.parameters(layer)["weight"], before, whole.weight.detach()


def test_the_modifiers_write_is_everybodys():
    for seen, weight, _, whole in ranks.run(2, rank_writes):
        assert torch.equal(seen, torch.ones(3, 5)) and torch.equal(weight, torch.ones(3, 5))
        assert torch.equal(whole, torch.ones(2, 2))


def engine_like(*transforms, tx=None):
    model = zoo.build("llama")
    program, params = fds.functionalize(model)
    program = fds.chain(*transforms)(program)
    step = fds.train_step(program, tx or fds.optim.adamw(1e-2), loss=zoo.loss)
    return model, step, SimpleNamespace(program=program, state=step.init(params)) if not transforms else Owner(program, step.init(params))  # fmt: skip


class Owner:
    def __init__(self, program, state):
        self.program, self.state = program, state


def running_state():
    dp = fds.sharding.mesh(dp=-1)["dp"]
    model, step, owner = engine_like(fds.shard(dp), fds.cast("bfloat16"), fds.checkpoint())
    batch = zoo.batch("llama")
    owner.state, _ = step(owner.state, batch)
    name = "model.layers.1.self_attn.q_proj.weight"
    want = owner.program.restore(owner.state.params)
    zero.attach(model, owner, step.tx)
    p = dict(model.named_parameters())[name]
    with zero.GatheredParameters(p, modifier_rank=0):
        assert torch.equal(p.detach(), want[name])
        if dist.get_rank() == 0:
            with torch.no_grad():
                p.mul_(2)
    with zero.GatheredParameters(zero.leaves(owner, ["*.norm.weight", name])) as (again, norm):
        values = norm.detach().clone(), again.detach().clone()
    after = owner.program.restore(owner.state.params)
    for k, x in want.items():
        assert torch.equal(after[k], 2 * x if k == name or x is want[name] else x), k
    assert torch.equal(values[1], 2 * want[name]) and torch.equal(values[0], want["model.norm.weight"])
    _, metrics = step(owner.state, batch)  # goes on
    pure = zero.scattered(owner.program, owner.state.params, {name: want[name]})
    assert torch.equal(zero.gathered(owner.program, pure, name)[name], want[name])
    assert torch.equal(zero.gathered(owner.program, owner.state.params, name)[name], 2 * want[name])
    return float(metrics["loss"])


def test_the_leaves_of_a_running_state():
    losses = ranks.run(2, running_state)
    assert losses[0] == losses[1]


def lost_write():
    with zero.Init():
        layer = nn.Linear(2, 2)
    with zero.GatheredParameters(layer.weight), torch.no_grad():
        layer.weight.data.zero_()


def nested():
    with zero.Init():
        layer = nn.Linear(2, 2)
    with zero.GatheredParameters(layer.weight), zero.GatheredParameters(layer.parameters()):
        pass


def reads_numbers():
    with zero.Init():
        nn.Linear(int(torch.rand(1).item()), 2)


def blank():
    class Blank(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.empty(3))

    with zero.Init():
        model = Blank()
    zero.parameters(model)["w"]


def drawn_by_hand():
    with zero.Init():
        nn.init.normal_(torch.empty(3), generator=torch.Generator())


def writes_outside():
    out = torch.zeros(3)
    with zero.Init():
        out.copy_(torch.rand(3))


def with_adapters():
    _, _, owner = engine_like(fds.lora(rank=2, targets="*.q_proj"))
    zero.scattered(owner.program, owner.state.params, {"model.norm.weight": torch.ones(32), "model.layers.0.self_attn.q_proj.weight": torch.ones(32, 32)})  # fmt: skip


def with_copies():
    _, step, owner = engine_like(fds.chain(fds.cast("float32")), tx=fds.optim.with_master(fds.optim.adamw(1e-2)))
    with zero.GatheredParameters(zero.leaves(owner, "*.norm.weight", step.tx), modifier_rank=0) as (w,), torch.no_grad():  # fmt: skip
        w.zero_()


def meta():
    with torch.device("meta"):
        return nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lost_write, "without modifier_rank the write would be lost"),
        (nested, "gathered by an outer block already"),
        (reads_numbers, "reads a number out of a tensor that is not there yet"),
        (blank, "w: nothing initialises this leaf"),
        (drawn_by_hand, "generator= in an initialisation"),
        (writes_outside, "writes what is not there yet to a real tensor"),
        (with_adapters, "cannot be written under .*lora"),
        (with_copies, "float32 copy of the parameters"),
        (lambda: zero.parameters(meta())["weight"], "weight: on the meta device, and not built under zero.Init"),
        (lambda: zero.GatheredParameters(meta().weight).__enter__(), "made by no zero.Init"),
        (lambda: zero.GatheredParameters([torch.ones(2)]), "Tensor is no parameter"),
        (lambda: zero.Init(remote_device="nvme"), "remote_device is not there.*offload"),
        (lambda: zero.Init(pin_memory=True), "pin_memory is not there"),
        (lambda: zero.Init(zero_quantized_weights=True), "quantized"),
        (lambda: zero.Init(zero_quantized_nontrainable_weights=True), "quantize_frozen"),
        (lambda: zero.Init(zero_param_parallel_group=1), "hpZ"),
        (lambda: zero.Init(param_swapper=1), "param_swapper"),
        (lambda: zero.Init(tensor_overrides=1), "tensor_overrides"),
        (lambda: zero.Init(dtype=torch.int8), "dtype=torch.int8"),
        (lambda: zero.Init(data_parallel_group=object(), sequence_data_parallel_group=object()), "different groups"),
        (lambda: zero.scattered(engine_like()[2].program, {}, {"model.nrm.weight": torch.ones(1)}), "unknown; did you mean"),
        (lambda: OnDevice(torch.int8), "OnDevice: dtype=torch.int8"),
        (lambda: needs.states(1, 10), "stage=1"),
        (lambda: needs.states(3, 10, ranks=0), "required at least 0 on at least 1"),
        (lambda: zero.estimate_zero3_model_states_mem_needs(10, 1, cpu_offload=False), "cpu_offload_params without cpu_offload"),
    ],
)  # fmt: skip
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_after_an_exception_nothing_is_written():
    with zero.Init():
        layer = nn.Linear(2, 2)
    before = zero.parameters(layer)["weight"]
    with pytest.raises(KeyError), zero.GatheredParameters(layer.weight, modifier_rank=0), torch.no_grad():
        layer.weight.zero_()
        raise KeyError
    assert layer.weight.is_meta and torch.equal(zero.parameters(layer)["weight"], before)


class Uses(nn.Module):
    """A forward that gathers, as DeepSpeed's documentation has it."""

    def __init__(self, rank=None):
        super().__init__()
        self.first, self.rank = nn.Linear(2, 2), rank

    def forward(self, x):
        with zero.GatheredParameters(self.first.weight, modifier_rank=self.rank, fwd_module=self):
            return self.first(x) @ self.first.weight


def test_gathering_inside_of_a_forward():
    program, params = fds.functionalize(Uses())
    f = fds.value_and_grad(lambda p, x: program(p, x).sum(), wrt=program)
    value, grads = f(program.place(params), torch.ones(1, 2))
    w, b = (params[f"first.{k}"].clone().requires_grad_() for k in ("weight", "bias"))
    want = ((torch.ones(1, 2) @ w.T + b) @ w).sum()
    assert torch.allclose(value, want) and torch.allclose(grads[""]["first.weight"], torch.autograd.grad(want, w)[0])
    program, params = fds.functionalize(Uses(0))
    with pytest.raises(ValueError, match="a write inside of a program's call"):
        program(program.place(params), torch.ones(1, 2))


def test_on_device():
    with OnDevice(torch.float16, device="meta"):
        layer, ints = nn.Linear(3, 2), torch.full((2,), 3)
        with OnDevice(torch.float64, device="cpu"):
            inner = nn.Linear(3, 2)
        scale, given = torch.full((2,), 0.5), torch.zeros(1, dtype=torch.float32)
    assert (layer.weight.device.type, layer.weight.dtype) == ("meta", torch.float16)
    assert (inner.weight.device.type, inner.weight.dtype) == ("cpu", torch.float64)
    assert ints.dtype == torch.int64 and scale.dtype == torch.float16 and given.dtype == torch.float32
    after = nn.Linear(3, 2)
    assert (after.weight.device.type, after.weight.dtype) == ("cpu", torch.float32)
    with OnDevice(torch.float16, enabled=False):
        assert nn.Linear(3, 2).weight.dtype == torch.float32
    with OnDevice(torch.bfloat16):
        model = zoo.FAMILIES["llama"][0]()
    program, _ = fds.functionalize(model)
    stored = program.place(fds.init_params(program))
    assert stored["model.layers.0"]["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16


def held(stage):
    """Bytes of the state by kind, of gradients, and the estimate."""
    dp = fds.sharding.mesh(dp=-1)["dp"]
    model = zoo.build("llama").to(torch.bfloat16 if stage == 2 else torch.float32)
    total, largest = needs.sizes(model)
    assert total == sum(p.numel() for p in model.parameters())
    program, params = fds.functionalize(model)
    tx = fds.optim.adamw(1e-3)
    if stage == 2:
        tx = fds.optim.sharded(fds.optim.with_master(tx), dp)
    else:
        program = fds.chain(fds.shard(dp), fds.cast("bfloat16"), fds.checkpoint())(program)
    step = fds.train_step(program, tx, loss=zoo.loss)
    state = step.init(params)
    _, grads = fds.value_and_grad(lambda p, b: zoo.loss(program, p, b), wrt=program)(state.params, zoo.batch("llama"))
    buffers = sum(state.params[s][k].nbytes for s, p in program.sites.items() for k in p.marks["buffer"] & state.params[s].keys())  # fmt: skip
    counts = sum(x.nbytes for x in fds.tree.leaves(state.optimizer) if x.dim() == 0)
    got = (
        fds.tree.nbytes(state.params) - buffers,
        fds.tree.nbytes(state.optimizer) - counts,
        fds.tree.nbytes(program.trainable(grads)),
    )
    return got, needs.states(stage, total, largest, ranks=dp.size), len(program.sites)


@pytest.mark.parametrize("stage", [2, 3])
def test_the_estimate_is_what_programs_hold(stage):
    for (parameters, optimizer, gradients), want, sites in ranks.run(2, held, stage):
        padding = 8 * sites  # at most one element for each rank and buffer, of each of the three kinds
        assert 0 <= parameters - want.parameters <= padding
        assert 0 <= optimizer - want.optimizer <= 2 * padding
        assert 0 <= gradients - want.gradients <= padding


def test_estimates(capsys):
    billion = 10**9
    assert zero.estimate_zero2_model_states_mem_needs(billion, 8, 1, cpu_offload=False) == (int(4 * billion * 8 * 1.5), 4 * billion + 12 * billion // 8)  # fmt: skip
    assert zero.estimate_zero2_model_states_mem_needs(billion, 8, 2) == (int(4 * billion * 8 * 1.5), 4 * billion)
    assert zero.estimate_zero2_model_states_mem_needs(billion, additional_buffer_factor=1) == (12 * billion, 4 * billion)  # fmt: skip
    big = billion // 10
    assert zero.estimate_zero3_model_states_mem_needs(billion, big, 8, additional_buffer_factor=1) == (16 * billion, 4 * big, 4 * big)  # fmt: skip
    assert zero.estimate_zero3_model_states_mem_needs(billion, big, 8, cpu_offload_params=False)[1] == billion + 4 * big
    assert zero.estimate_zero3_model_states_mem_needs(billion, big, 8, 2, False, False, False) == (int(4 * billion * 8 * 1.5), billion + 4 * big, 4 * big)  # fmt: skip
    with torch.device("meta"):
        model = zoo.FAMILIES["llama-tied"][0]()
    zero.estimate_zero2_model_states_mem_needs_all_live(model, 2)
    zero.estimate_zero3_model_states_mem_needs_all_live(model, 2, 2)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 + 8 and "2 x 2 ranks" in lines[4] and "offload_param=cpu, offload_optimizer=cpu, zero_init=1" in lines[6]  # fmt: skip
