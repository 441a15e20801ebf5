"""Groups of parameters with optimizers of their own, over every placement; schedules of other numbers than the learning rate."""

import pytest
import ranks
import torch
from torch import nn

import fds
from fds import optim

GROUPS = {"plain": ("*.bias", "blocks.*.1"), "rest": ("*",)}
RULES = {"plain": lambda: optim.sgd(0.5), "rest": lambda: optim.adamw(0.05, weight_decay=0.1)}
STEPS = 3


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        block = lambda: nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 5))  # noqa: E731
        self.blocks, self.head = nn.ModuleList(block() for _ in range(2)), nn.Linear(5, 3)

    def forward(self, x):
        for b in self.blocks:
            x = x + b(x)
        return self.head(x)


def build():
    torch.manual_seed(0)
    return Net()


def rows(i):
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(i))


def loss(program, stored, batch):
    return program(stored, batch["x"]).square().mean()


def in_torch():
    model = build()
    norm = lambda k: k.endswith("bias") or (k.startswith("blocks") and k.split(".")[2] == "1")  # noqa: E731
    plain = [p for k, p in model.named_parameters() if norm(k)]
    rest = [p for k, p in model.named_parameters() if not norm(k)]
    both = [torch.optim.SGD(plain, 0.5), torch.optim.AdamW(rest, 0.05, weight_decay=0.1)]
    for i in range(STEPS):
        model(rows(i)).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for tx in both:
            tx.step()
            tx.zero_grad()
    return {k: p.detach() for k, p in model.named_parameters()}


def clipped(rule, place=lambda tx: tx):
    return place(optim.chain(optim.clip_by_global_norm(0.5), rule()))


def trained(kind):
    world = fds.sharding.mesh(dp=-1)
    axis, store = world["dp"], fds.HostStore()
    place = {
        "sharded": lambda tx: optim.sharded(tx, axis),
        "offloaded": optim.offloaded,
        "streamed": lambda tx: optim.streamed(tx, store),
        "sharded, streamed": lambda tx: optim.sharded(optim.streamed(tx, store), axis),
        "shard, offload": lambda tx: optim.streamed(tx, store),
    }.get(kind, lambda tx: tx)
    chain = {
        "shard": [fds.shard(axis, groups=GROUPS)],
        "shard, offload": [fds.shard(axis, groups=GROUPS), fds.offload(store, groups=GROUPS)],
        "offloaded": [fds.replicate(axis)],
        "streamed": [fds.replicate(axis)],
        "plain": [fds.replicate(axis)],
    }.get(kind, [])
    program, params = fds.functionalize(build(), sites="blocks.*")
    program = fds.chain(*chain)(program)
    tx = optim.grouped({k: clipped(r, place) for k, r in RULES.items()}, GROUPS)
    step = fds.train_step(program, tx, loss=loss)
    state = step.init(params)
    for i in range(STEPS):
        state, _ = step(state, {"x": rows(i).chunk(axis.size)[axis.rank]})
    return program.restore(state.params)


@pytest.mark.parametrize("kind", ["plain", "shard", "sharded", "offloaded", "streamed", "sharded, streamed", "shard, offload"])  # fmt: skip
def test_groups_follow_torch_wherever_they_are(kind):
    want = in_torch()
    for got in ranks.run(2, trained, kind):
        for k, x in got.items():
            torch.testing.assert_close(x, want[k], rtol=0, atol=2e-6)


def test_a_state_of_groups_is_saved_and_loaded_under_another_layout(tmp_path):
    def step(*chain):
        program, params = fds.functionalize(build(), sites="blocks.*")
        tx = optim.grouped({k: r() for k, r in RULES.items()}, GROUPS)
        return fds.train_step(fds.chain(*chain)(program), tx, loss=loss), params

    one, params = step()
    state, _ = one(one.init(params), {"x": rows(0)})
    fds.save_state(tmp_path, one, state)
    other, _ = step(fds.shard(fds.sharding.mesh(dp=1)["dp"], groups=GROUPS))
    (a, _), (b, _) = one(state, {"x": rows(1)}), other(fds.load_state(tmp_path, other), {"x": rows(1)})
    for k, x in one.program.restore(a.params).items():
        torch.testing.assert_close(x, other.program.restore(b.params)[k], rtol=0, atol=1e-6)


def test_errors_name_the_group():
    rule = optim.sgd(0.1)
    with pytest.raises(ValueError, match=r"'b' has no patterns"):
        optim.grouped({"a": rule, "b": rule}, {"a": "*"})
    with pytest.raises(ValueError, match=r"no group names 'w'"):
        optim.grouped({"a": rule}, {"a": "x"}).init({"": {"w": torch.ones(1)}})
    with pytest.raises(ValueError, match=r"'b' \(x\) has no trainable leaf"):
        optim.grouped({"a": rule, "b": rule}, {"a": "*", "b": "x"}).init({"": {"w": torch.ones(1)}})
    axis = fds.sharding.mesh(dp=1)["dp"]
    with pytest.raises(ValueError, match=r"shard all of them over one axis"):
        optim.grouped({"a": rule, "b": optim.sharded(rule, axis)}, {"a": "x", "b": "*"})
    program, _ = fds.functionalize(build(), sites="blocks.*")
    with pytest.raises(ValueError, match=r"no group names .*shard.float32'.*groups="):
        fds.train_step(fds.shard(axis)(program), optim.grouped({"a": rule}, {"a": "*.weight"}), loss=loss)


def test_scheduled_momentum_is_torchs_with_its_groups_changed():
    w = torch.ones(3, requires_grad=True)
    tx, p = (
        optim.scheduled(optim.sgd(0.1, momentum=0.9), momentum=lambda n: 0.9 / (1 + n.double())),
        {"w": torch.ones(3)},
    )
    theirs, state = torch.optim.SGD([w], 0.1, momentum=0.9), tx.init(p)
    for i in range(4):
        theirs.param_groups[0]["momentum"] = 0.9 / (1 + i)
        w.grad = torch.arange(3.0) + i
        theirs.step()
        updates, state = tx.update({"w": torch.arange(3.0) + i}, state, p)
        p = optim.apply_updates(p, updates)
    torch.testing.assert_close(p["w"], w.detach())
    with pytest.raises(ValueError, match=r"no hyperparameter 'b1'"):
        optim.scheduled(optim.sgd(0.1), b1=lambda n: n).init(p)


def test_update_alone_clips_by_the_norm_of_all():
    tx = optim.grouped({k: clipped(lambda: optim.sgd(1.0)) for k in ("one", "two")}, {"one": "a", "two": "*"})
    p = {"": {"a": torch.zeros(1), "b": torch.zeros(1)}}
    grads = {"": {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}}
    updates, _ = tx.update(grads, tx.init(p), p)
    torch.testing.assert_close(updates[""], {"a": torch.tensor([-0.3]), "b": torch.tensor([-0.4])})
