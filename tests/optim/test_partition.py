"""`partition`: each leaf as if its rule were alone; under what it can stand, and what is refused."""

import pytest
import torch

import fds
from fds import optim, tree
from fds.offload import HostStore
from fds.sharding.mesh import Axis

ONE = Axis("dp", 1, 0, "")


def params():
    g = torch.Generator().manual_seed(0)
    make = lambda *s: torch.randn(*s, generator=g)  # noqa: E731
    return {"": {"embed.weight": make(6, 4), "norm": make(4)}, "h.0": {"h.0.up": make(4, 5), "h.0.bias": make(5)}}


def labels(name, leaf):
    assert name in ("embed.weight", "norm", "h.0.up", "h.0.bias")
    return "muon" if leaf.dim() == 2 and "embed" not in name else "rest"


RULES = {"muon": optim.muon(0.02, dtype=torch.float32), "rest": optim.adamw(0.01, weight_decay=0.1)}


def gradients(step):
    g = torch.Generator().manual_seed(step + 1)
    return tree.map(lambda p: torch.randn(p.shape, generator=g), params())


def run(tx, p, pick=lambda g: g, steps=4):
    state = tx.init(p)
    for i in range(steps):
        updates, state = tx.update(tx.reduce(pick(gradients(i))), state, p)
        p = optim.apply_updates(p, updates)
    return p, state


def test_each_leaf_is_its_rules():
    got, state = run(optim.partition(RULES, labels), params())
    alone = {"muon": {"h.0": ["h.0.up"]}, "rest": {"": ["embed.weight", "norm"], "h.0": ["h.0.bias"]}}
    for rule, sites in alone.items():
        pick = lambda x, sites=sites: {s: {k: x[s][k] for k in names} for s, names in sites.items()}  # noqa: E731
        want, _ = run(RULES[rule], pick(params()), pick)
        for k, w in tree.named(want).items():
            assert torch.equal(tree.named(got)[k], w)
    assert state.keys() == RULES.keys()
    assert optim.get_hyperparams(optim.set_hyperparams(state, learning_rate=0.5))["learning_rate"] == 0.5


def test_the_norm_is_that_of_all():
    clip = lambda: optim.chain(optim.clip_by_global_norm(0.3), optim.sgd(0.1))  # noqa: E731
    got, _ = run(optim.partition({"muon": clip(), "rest": clip()}, labels), params())
    want, _ = run(clip(), params())
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(got), tree.leaves(want), strict=True))


PLACED = {
    "sharded": lambda: optim.sharded(optim.partition(RULES, labels), ONE),
    "offloaded inside": lambda: optim.partition({k: optim.offloaded(r) for k, r in RULES.items()}, labels),
    "master": lambda: optim.sharded(optim.with_master(optim.partition(RULES, labels)), ONE),
}


@pytest.mark.parametrize("name", PLACED)
def test_it_can_be_placed(name):
    got, _ = run(PLACED[name](), params())
    want, _ = run(optim.partition(RULES, labels), params())
    for a, b in zip(tree.leaves(got), tree.leaves(want), strict=True):
        torch.testing.assert_close(a, b)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = torch.nn.Linear(4, 6), torch.nn.LayerNorm(6), torch.nn.Linear(6, 4)

    def forward(self, x):
        return self.down(self.norm(self.up(x)))


def stepped(tx, steps, state=None):
    torch.manual_seed(0)
    program, p = fds.functionalize(Net())
    step = fds.train_step(program, tx, loss=lambda f, s, b: (f(s, b["x"]) - b["x"]).square().mean())
    state = step.init(p) if state is None else state
    for i in steps:
        state, _ = step(state, {"x": torch.randn(4, 4, generator=torch.Generator().manual_seed(i))})
    return step, state


@pytest.mark.parametrize("wrap", ["plain", "streamed"])
def test_a_state_is_saved_and_goes_on_under_another_placement(wrap, tmp_path):
    by_shape = lambda name, leaf: "muon" if leaf.dim() == 2 else "rest"  # noqa: E731
    rules = RULES if wrap == "plain" else {k: optim.streamed(r, HostStore(), bucket_bytes=0) for k, r in RULES.items()}
    step, state = stepped(optim.partition(rules, by_shape), range(2))
    fds.save_state(tmp_path, step, state)
    other, _ = stepped(optim.sharded(optim.partition(RULES, by_shape), ONE), [])
    want = tree.named(stepped(optim.partition(RULES, by_shape), range(4))[1].params)
    state = fds.load_state(tmp_path, other)
    got = tree.named(stepped(other.tx, (2, 3), state)[1].params)
    for k, w in want.items():
        torch.testing.assert_close(got[k], w)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: optim.partition(RULES, lambda name, leaf: "mun").init(params()), r"label 'mun'; did you mean 'muon'"),
        (lambda: optim.partition({"a": optim.sharded(optim.sgd(0.1), ONE)}, labels), r"sharded\(partition"),
        (lambda: optim.offloaded(optim.partition(RULES, labels)), r"partition\(\{label: offloaded\(tx\)"),
        (lambda: optim.streamed(optim.partition(RULES, labels), HostStore()), r"partition\(\{label: streamed\(tx, store"),
    ],
)  # fmt: skip
def test_what_cannot_be(make, words):
    with pytest.raises(ValueError, match=words):
        make()
