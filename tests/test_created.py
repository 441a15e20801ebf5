"""Parameters that never exist all at once: modules on the meta device, initialised or loaded where they are stored."""

import laws
import pytest
import ranks
import torch
import zoo
from torch import nn

import fds

FAMILIES = [f for f in zoo.FAMILIES if f != "convnet"]


def on_meta(family):
    with torch.device("meta"):
        return zoo.FAMILIES[family][0]()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_module_on_meta_loads(tmp_path, family):
    """The same output as the module whose files they are, buffers that no file holds included."""
    model = zoo.build(family)
    program, params = fds.functionalize(model)
    fds.save(tmp_path, program, program.place(params))
    program, _ = fds.functionalize(on_meta(family).eval())
    loaded = fds.load(tmp_path, program)
    assert list(loaded) == list(params) and all(torch.equal(loaded[k], v) for k, v in params.items())
    with torch.no_grad():
        got, want = program(program.place(loaded), **zoo.batch(family)), model(**zoo.batch(family))
    assert torch.equal(got.logits, want.logits)


@pytest.mark.parametrize("family", [*FAMILIES, "convnet"])
def test_initialised_as_by_the_constructor(family):
    """Leaf by leaf: constants and buffers are the same, random ones have the same mean and deviation, none equals another."""
    torch.manual_seed(3)
    _, want = fds.functionalize(zoo.FAMILIES[family][0]())
    program, _ = fds.functionalize(on_meta(family))
    before = torch.get_rng_state()
    got = fds.init_params(program, seed=1)
    seen = []
    for k, w in want.items():
        x = got[k]
        assert x.dtype == w.dtype and x.shape == w.shape
        if k in program.marks["buffer"] or float(w.float().std(correction=0)) == 0:
            assert torch.equal(x, w), k
            continue
        deviation = float(w.std())
        assert abs(float(x.std()) / deviation - 1) < 6 / w.numel() ** 0.5, k
        assert abs(float(x.mean())) < 6 * deviation / w.numel() ** 0.5, k
        assert not any(torch.equal(x, y) for y in seen if y.shape == x.shape), k
        seen.append(x)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(fds.init_params(program, seed=1)[k], x) and len(seen) > 3
    assert not any(torch.equal(x, y) for x in fds.init_params(program, seed=2).values() for y in seen)


def created(family, name):
    """Under the law table's transformation: what was stored, whole again."""
    program, *_ = laws.setting(family, name)
    bare, _ = fds.functionalize(on_meta(family))
    program = fds.chain(*program.history)(bare)
    return program.restore(fds.train_step(program, tx(name), loss=zoo.loss).init(fds.init_params(program)).params)


def tx(name):
    return fds.optim.streamed(fds.optim.sgd(0.1), laws.HOST) if "store" in name else fds.optim.sgd(0.1)


@pytest.mark.parametrize(("n", "name"), [(2, "shard"), (2, "tensor"), (2, "shard, store, checkpoint"), (4, "tensor, shard, checkpoint")])  # fmt: skip
def test_the_same_on_every_mesh(n, name):
    for family in ("llama-tied", "gpt2"):
        want = created(family, "nothing")
        for got in ranks.run(n, created, family, name):
            assert all(torch.equal(got[k], v) for k, v in want.items())


class Scaled(nn.Module):
    """A model that initialises leaves inside of its blocks from outside, as GPT-2's residual projections were."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)) for _ in range(2))
        self.head = nn.Linear(32, 4)
        self.apply(self._init_weights)

    def _init_weights(self, module):
        if module is self:
            for name, p in module.named_parameters():
                if name.endswith("1.weight"):
                    nn.init.normal_(p, std=1e-3)


def test_what_the_model_does_to_its_blocks_is_done():
    with torch.device("meta"):
        module = Scaled()
    program, _ = fds.functionalize(module, sites="blocks.*")
    got = fds.init_params(program)
    for i in range(2):
        assert float(got[f"blocks.{i}.1.weight"].std()) == pytest.approx(1e-3, rel=0.2)
        assert float(got[f"blocks.{i}.0.weight"].std()) > 0.05
    assert not torch.equal(got["blocks.0.1.weight"], got["blocks.1.1.weight"])


class Computed(nn.Module):
    """What only a constructor makes: a parameter, and buffers."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.linspace(0, 1, 3))
        self.register_buffer("mask", torch.ones(2, dtype=torch.int64).cumsum(0), persistent=False)
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(x * self.gate) + self.mask


def test_what_nothing_initialises_is_named(tmp_path):
    with torch.device("meta"):
        module = Computed()
    program, _ = fds.functionalize(module)
    with pytest.raises(ValueError, match=r"nothing initialises 'gate', 'mask'.*values="):
        program.place(fds.init_params(program))
    some = {"gate": torch.full((3,), 0.5), "mask": torch.tensor([1, 2])}
    stored = program.place(fds.init_params(program, values=lambda name, leaf: some.get(name)))
    assert torch.equal(stored[""]["mask"], some["mask"]) and not stored[""]["layer.weight"].isnan().any()
    with pytest.raises(ValueError, match=r"gate: .*values\(\) gave has \(2,\)"):
        fds.init_params(program, values=lambda name, leaf: torch.zeros(2) if name == "gate" else None)["gate"]
    drawn = [fds.init_params(program, values=lambda _, leaf: torch.randn(leaf.shape).to(leaf.dtype))["gate"] for _ in range(2)]  # fmt: skip
    assert torch.equal(*drawn)
    real, params = fds.functionalize(Computed())
    fds.save(tmp_path, real, real.place(params))
    with pytest.raises(ValueError, match=r"nothing initialises 'mask'.*buffers are real"):
        fds.load(tmp_path, program)
    assert torch.equal(fds.load(tmp_path, real)["mask"], some["mask"])


BLOCKS = 24


def stack():
    with torch.device("meta"):
        module = nn.Sequential(*(nn.Linear(laws.WIDTH, laws.WIDTH) for _ in range(BLOCKS)))
    return fds.functionalize(module, sites="*")[0]


def peaks(directory):
    """Bytes of tensors alive at once while parameters are initialised, written, and loaded; what is stored; what a site has."""
    base = stack()
    program = fds.shard(base, fds.sharding.mesh(dp=-1)["dp"])
    step = fds.train_step(program, fds.optim.sgd(0.1))
    with laws.Live(()) as made:
        state = step.init(fds.init_params(program))
    with laws.Live(state.params) as written:
        fds.save(directory, program, state.params, max_shard_size=100_000)
    with laws.Live(()) as loaded:
        again = step.init(fds.load(directory, program))
    same = all(torch.equal(a, b) for a, b in zip(fds.tree.flat(state), fds.tree.flat(again), strict=True))
    stored = fds.tree.nbytes(state.params)
    return same, [x.peak for x in (made, written, loaded)], stored, fds.tree.nbytes(base.spec) // BLOCKS


def test_no_rank_holds_more_than_its_part_and_one_site(tmp_path):
    for same, got, stored, site in ranks.run(2, peaks, str(tmp_path)):
        assert same and stored * 2 == BLOCKS * site
        for peak in got:
            assert stored < peak <= stored + 3 * site, (got, stored, site)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
