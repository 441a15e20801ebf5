"""ZeRO's stages and hierarchical forms in training: values, bytes on each axis, microbatches, frozen leaves, empty shards, states.

Four ranks, on two nodes. What the laws' table says of every transformation (tests/test_laws.py) is not repeated here.
"""

import functools

import pytest
import ranks
import torch
import torch.nn.functional as F
from live import Live
from torch import nn

import fds
from fds import optim, tree
from fds.sharding import Axis, zero


class Net(nn.Module):
    """Two blocks of odd sizes and a root, with dropout: masks depend on the row's place in the global batch."""

    def __init__(self):
        super().__init__()
        block = lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Dropout(0.2), nn.Linear(7, 5))  # noqa: E731
        self.blocks = nn.ModuleList(block() for _ in range(2))
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class Small(nn.Module):
    """Fewer elements than ranks: a number, a leaf without elements, a dtype without elements, a block of two elements."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(1, 1)])
        self.number = nn.Parameter(torch.tensor(0.75))
        self.none = nn.Parameter(torch.zeros(0, 3))
        self.low = nn.Parameter(torch.zeros(0, dtype=torch.bfloat16))

    def forward(self, x):
        return self.blocks[0](x[:, :1] * self.number) + self.none.sum() + self.low.float().sum()


def build(module=Net):
    torch.manual_seed(0)
    return fds.functionalize(module().eval(), sites="blocks.*")


@functools.cache
def axes():
    """All ranks, the ranks of a node, the nodes. Rows are counted along the last axis of a mesh first."""
    mesh = fds.sharding.mesh(node=min(2, fds.sharding.mesh(dp=-1).size), local=-1)
    return fds.sharding.mesh(dp=-1)["dp"], mesh["local"], mesh["node"]


def forms(name, dp, local, node):
    """The transformation and the placement of the optimizer that a test's name stands for."""
    keep = zero(0, dp)  # for its `place`, which does nothing
    return {
        "stage 0": zero(0, dp),
        "stage 1": zero(1, dp),
        "stage 2": zero(2, dp),
        "stage 3": zero(3, dp),
        "stage 3 again": keep._replace(transform=fds.chain(fds.shard(dp), fds.checkpoint())),
        "stage 0, replicas": zero(0, local, replicas=node),
        "stage 2, replicas": zero(2, local, replicas=node),
        "stage 3, replicas": zero(3, local, replicas=node),
        "replicas again": keep._replace(transform=fds.chain(fds.shard(local), fds.replicate(node), fds.checkpoint())),
        "hierarchical": keep._replace(transform=fds.chain(fds.shard(local), fds.shard(node), fds.checkpoint())),
        "secondary": keep._replace(transform=fds.chain(fds.shard(local), fds.checkpoint(), fds.shard(node))),
        "threshold": keep._replace(
            transform=fds.chain(fds.shard(local, threshold=8), fds.shard(node, threshold=30), fds.checkpoint())
        ),
        "nothing": keep._replace(transform=fds.chain()),
    }[name.removesuffix(", held")]


NAMES = ["stage 0", "stage 1", "stage 2", "stage 3", "stage 3 again", "stage 0, replicas", "stage 2, replicas", "stage 3, replicas", "replicas again", "hierarchical", "secondary", "stage 3, held", "secondary, held"]  # fmt: skip
LORA = fds.lora(rank=2, targets="*.0.weight")


def error(program, stored, batch):
    return (program(stored, batch["x"]) - batch["x"][:, :1]).square().mean()


def rows(i=0):
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(i))


def make(name, lora=False, microbatches=1, module=Net):
    """A train step, and the parameters that it starts from."""
    program, params = build(module)
    transform, place = forms(name, *axes())
    dp, _, node = axes()
    hold = {"stage 3, held": dp, "secondary, held": node}.get(name)
    program = fds.chain(*([LORA] if lora else []), transform)(program.train())
    tx = optim.chain(optim.clip_by_global_norm(0.05), optim.adamw(0.05))  # clips: every gradient's norm is larger
    return fds.train_step(program, place(tx), loss=error, microbatches=microbatches, seed=3, hold=hold), params


def train(step, state, which, run=None):
    """Losses and norms of some steps, the state after them, and what the last one sent."""
    dp, *_ = axes()
    seen, wires = [], []
    for i in which:
        with fds.sharding.record() as wire:
            state, metrics = (run or step)(state, {"x": rows(i).chunk(dp.size)[dp.rank]})
        seen.append((float(metrics["loss"]), float(metrics["grad_norm"])))
        wires.append(wire)
    return seen, state, wires[-1]


def three_steps(name, lora=False, microbatches=1, module=Net, compiled=False):
    """Losses and norms, parameters, and bytes by operator on each axis."""
    step, params = make(name, lora, microbatches, module)
    run = fds.compile(step, backend="aot_eager") if compiled else None
    seen, state, wire = train(step, step.init(params), range(3), run)
    return seen, step.program.restore(state.params), [dict(wire.on(a)) for a in axes()]


def follows(got, want):
    torch.testing.assert_close(torch.tensor(got[0]), torch.tensor(want[0]), rtol=1e-5, atol=1e-6)
    for k, v in want[1].items():
        torch.testing.assert_close(got[1][k], v, rtol=1e-4, atol=1e-5)


# --- values, and bytes ---


def up(x, n):
    """`x` elements padded to a multiple of n."""
    return -(-x // n) * n


def numbers(name, buffers, leaves):
    """Bytes of the step's metrics on each axis: the loss, squared norms of what is split, and of a sharded optimizer's leaves."""
    name = name.removesuffix(", held")
    dp, local, node = 0, 0, 0
    if "replicas" in name or name in ("hierarchical", "secondary"):
        local, node = 1, 1
    else:
        dp = 1
    if name in ("stage 1", "stage 2"):
        dp += 1 + leaves
    elif name == "stage 2, replicas":
        local, node = local + 1 + leaves, node + leaves
    elif name in ("stage 3", "stage 3 again"):
        dp += buffers
    elif name in ("stage 3, replicas", "replicas again"):
        local += buffers
    elif name in ("hierarchical", "secondary"):
        local, node = local + buffers, node + buffers
    return dp, local, node


def closed_form(name, lora, m):
    """Bytes by operator on each axis for one step of m microbatches, from the sizes of the model's leaves alone."""
    program = fds.chain(*([LORA] if lora else []))(build()[0])
    leaves = {s: list(part.values()) for s, part in program.spec.items()}
    train = {s: sum(x.numel() for x in part if x.requires_grad) for s, part in leaves.items()}
    frozen = {s: sum(x.numel() for x in part if not x.requires_grad) for s, part in leaves.items()}
    whole = sum(train.values())
    dp, local, node = {}, {}, {}
    own = 1 if "held" in name else m  # of the last shard

    def gathers(of, times):
        """Elements of all sites, the blocks so many times."""
        return sum((times if s else 1) * (of(train[s]) + of(frozen[s])) for s in leaves)

    def sums(of):
        return sum(of(x) for x in train.values())

    four, two = (lambda x: up(x, 4)), (lambda x: up(x, 2))
    again = lambda x: up(two(x) // 2, 2)  # noqa: E731  # a shard of a shard, gathered over the nodes
    if name == "stage 0":
        dp = {"total": whole}
    elif name in ("stage 1", "stage 2"):
        dp = {"scatter": four(whole), "gather": four(whole)}
    elif name in ("stage 3", "stage 3 again", "stage 3, held"):
        dp = {"scatter": own * sums(four), "gather": own * gathers(four, 2 if "again" in name else 1)}
    elif name == "stage 0, replicas":
        local, node = {"total": whole}, {"total": whole}
    elif name == "stage 2, replicas":
        local, node = {"scatter": two(whole), "gather": two(whole)}, {"total": two(whole) // 2}
    elif name in ("stage 3, replicas", "replicas again"):
        local = {"scatter": m * sums(two), "gather": m * gathers(two, 2 if "again" in name else 1)}
        node = {"total": sums(two) // 2}
    else:
        local = {"scatter": m * sums(two), "gather": m * gathers(two, 2)}
        node = {"scatter": own * sums(again), "gather": own * gathers(again, 2 if name == "hierarchical" else 1)}
    counts = numbers(
        name, sum(bool(x) for x in train.values()), sum(x.requires_grad for p in leaves.values() for x in p)
    )
    out = []
    for moved, count in zip((dp, local, node), counts, strict=True):
        moved = {**moved, "total": moved.get("total", 0) + count}
        out.append({k: 4 * v for k, v in moved.items() if v})
    return out


@pytest.mark.parametrize("lora", [False, True], ids=["all", "lora"])
@pytest.mark.parametrize("name", NAMES)
def test_training_follows_one_process_and_sends_what_the_closed_form_says(name, lora):
    want = three_steps("nothing", lora)
    for m in (1, 2):
        for got in ranks.run(4, three_steps, name, lora, m):
            follows(got, want)
            assert got[2] == closed_form(name, lora, m)


def test_a_compiled_step_sends_and_computes_the_same():
    for got in ranks.run(4, three_steps, "secondary, held", False, 1, Net, True):
        follows(got, three_steps("nothing"))
        assert got[2] == closed_form("secondary, held", False, 1)


def test_the_secondary_shard_spares_the_second_gather_over_the_nodes():
    (_, _, (_, _, twice)), (_, _, (_, _, once)) = (
        ranks.run(4, three_steps, n)[0] for n in ("hierarchical", "secondary")
    )
    root = 4 * 10  # elements of the root's shard of a node, 3 x 5 + 3 over two ranks, padded
    assert once["scatter"] == twice["scatter"] and twice["gather"] - root == 2 * (once["gather"] - root)


def bitwise():
    """Forward and gradient of the hierarchical forms, by how much is kept."""
    out = []
    for order in (["shard", "again", "checkpoint"], ["shard", "checkpoint", "again"], ["checkpoint", "shard", "again"]):
        dp, local, node = axes()
        parts = {"shard": fds.shard(local), "again": fds.shard(node), "checkpoint": fds.checkpoint()}
        program, params = build()
        program = fds.chain(*[parts[k] for k in order])(program)
        x = {"x": rows().chunk(dp.size)[dp.rank]}
        out.append(fds.value_and_grad(lambda s, b, p=program: error(p, s, b))(program.place(params), x))
    return all(torch.equal(a, b) for o in out[1:] for a, b in zip(tree.leaves(o), tree.leaves(out[0]), strict=True))


def test_what_is_kept_changes_no_bit():
    assert ranks.run(4, bitwise) == [True] * 4


def reduced_in_backward(name):
    """Bytes on the axis of all ranks; a lens after `replicate`, or a sum in place of the mean, keep the reduction where it is."""
    dp, *_ = axes()
    program, params = build()
    chain = {
        "bfloat16 on the wire": [fds.replicate(dp), fds.cast("bfloat16")],
        "float32 on the wire": [fds.cast("bfloat16"), fds.replicate(dp)],
        "sum": [fds.replicate(dp, reduce="sum")],
    }[name]
    step = fds.train_step(fds.chain(*chain)(program), optim.sgd(0.1), loss=error, microbatches=2)
    _, _, wire = train(step, step.init(params), range(1))
    return wire.on(dp)["total"]


def test_replicate_reduces_where_the_order_says():
    whole = sum(x.numel() for x in build()[1].values())
    for name, want in (("bfloat16 on the wire", 2 * 2), ("float32 on the wire", 4), ("sum", 2 * 4)):
        assert ranks.run(2, reduced_in_backward, name) == [want * whole + 4] * 2  # and the loss


def inner_gradient():
    """A loss that takes a gradient of its own: that one is reduced by nobody else, whatever the step does later."""
    dp, *_ = axes()
    program, params = build()

    def loss(program, stored, batch):
        _, grads = fds.value_and_grad(lambda s: error(program, s, batch), wrt=program)(stored)
        return error(program, stored, batch), {"inner": tree.square_sum(tree.leaves(grads))}

    step = fds.train_step(fds.replicate(dp)(program), optim.sgd(0.1), loss=loss)
    _, metrics = step(step.init(params), {"x": rows().chunk(dp.size)[dp.rank]})
    return float(metrics["inner"])


def test_gradients_inside_of_a_loss_are_reduced_too():
    want = inner_gradient()
    assert ranks.run(2, inner_gradient) == [pytest.approx(want, rel=1e-5)] * 2


# --- buckets ---


def in_buckets(bucket_bytes):
    """Three steps of a sharded optimizer, and how many messages the last one sent to and fro."""
    dp, *_ = axes()
    program, params = build()
    tx = optim.sharded(optim.adamw(0.05), dp, bucket_bytes=bucket_bytes)
    step = fds.train_step(program, tx, loss=error, seed=3)
    seen, state, wire = train(step, step.init(params), range(3))
    return seen, tree.flat(state), (wire.calls["scatter"], wire.calls["gather"], wire.bytes["scatter"])


def test_the_size_of_buckets_changes_no_bit():
    """182 elements on four ranks: shards of 46. A bucket of 64 bytes has four elements of each, one of a byte a single one."""
    want = ranks.run(4, in_buckets, 2**28)
    assert [w[2] for w in want] == [(1, 1, 4 * 184)] * 4
    for nbytes, messages in ((64, 12), (1, 46), (4 * 184, 1), (4 * 184 - 1, 2)):
        for got, same in zip(ranks.run(4, in_buckets, nbytes), want, strict=True):
            assert got[0] == same[0] and all(torch.equal(a, b) for a, b in zip(got[1], same[1], strict=True))
            assert got[2] == (messages, messages, 4 * 184)


def held(bucket_bytes):
    """Bytes that a reduce-scatter needs at most at once, besides the 64 KiB that go in."""
    dp, *_ = axes()
    grads = {str(i): torch.ones(32, 32) for i in range(16)}
    tx = optim.sharded(optim.sgd(0.1), dp, bucket_bytes=bucket_bytes)
    with Live(grads) as live:
        tx.reduce(grads)
    return live.peak - tree.nbytes(grads)


def test_a_bucket_bounds_the_copies_for_the_wire():
    """Shards of 16 KiB, in pieces and joined; and three copies of a message: gloo's thread may hold one a moment longer."""
    assert all(n >= 2**16 for n in ranks.run(4, held, 2**28))
    assert all(n <= 2 * 2**14 + 3 * 2**10 for n in ranks.run(4, held, 2**10))


def end_of_backward(name):
    """Bytes of the gradients that a rank has when backward is over."""
    step, params = make(name)
    x = {"x": rows().chunk(axes()[0].size)[axes()[0].rank]}
    _, grads = fds.value_and_grad(lambda s, b: error(step.program.eval(), s, b), wrt=step.program)(
        step.init(params).params, x
    )
    return tree.nbytes(step.program.trainable(grads))


def test_stage_2_adds_up_whole_gradients_and_stage_3_shards_of_them():
    whole = 4 * sum(x.numel() for x in build()[1].values())
    assert ranks.run(4, end_of_backward, "stage 2") == [whole] * 4
    assert ranks.run(4, end_of_backward, "stage 3") == [4 * (2 * 21 + 5)] * 4  # two blocks of 82 elements, a root of 18


# --- empty shards, thresholds ---


@pytest.mark.parametrize("name", ["stage 0", "stage 1", "stage 3", "stage 2, replicas", "replicas again", "secondary"])
def test_more_ranks_than_elements(name):
    want = three_steps("nothing", module=Small)
    assert want[0][0][1] > 0
    for got in ranks.run(4, three_steps, name, False, 1, Small):
        follows(got, want)
        assert {k: (tuple(v.shape), v.dtype) for k, v in got[1].items()} == {
            k: (tuple(v.shape), v.dtype) for k, v in want[1].items()
        }


def threshold():
    """Which leaves a rank has as they are under two thresholds; and the training."""
    step, _ = make("threshold")
    return {s: sorted(part) for s, part in step.program.spec.items()}, three_steps("threshold")


def test_small_leaves_stay_whole_on_both_axes():
    """The first shard leaves biases of fewer than 8 elements whole; the second one what is smaller than 30, the root's shard of 8 too."""
    for leaves, got in ranks.run(4, threshold):
        follows(got, three_steps("nothing"))
        assert leaves[""] == ["head.bias", "shard.float32"]
        assert leaves["blocks.0"] == ["blocks.0.0.bias", "blocks.0.3.bias", "shard.float32.local"]


def test_a_shard_over_one_rank_and_one_over_more_have_names_of_their_own():
    program, params = build()
    one, other = Axis("local", 1, 0), Axis("node", 1, 0)
    both = fds.chain(fds.shard(one, threshold=8), fds.shard(other, threshold=4))(program)
    back = both.restore(both.place(params))
    assert list(back) == list(params) and all(torch.equal(back[k], v) for k, v in params.items())


# --- states ---


def two_steps(directory, name, first):
    """Train two steps and save, or load and train two more."""
    step, params = make(name, lora=True)
    state = step.init(params) if first else fds.load_state(directory, step)
    seen, state, _ = train(step, state, range(2) if first else range(2, 4))
    if first:
        fds.save_state(directory, step, state)
    return seen, step.program.restore(state.params)


@pytest.mark.parametrize(
    ("n", "before", "m", "after"),
    [
        (4, "secondary", 4, "replicas again"),
        (4, "replicas again", 4, "stage 2, replicas"),
        (4, "stage 2, replicas", 1, "nothing"),
        (1, "nothing", 4, "secondary"),
        (4, "hierarchical", 2, "stage 3"),
    ],
)
def test_a_state_goes_on_in_another_form(tmp_path, n, before, m, after):
    step, params = make("nothing", lora=True)
    seen, state, _ = train(step, step.init(params), range(4))
    run = lambda k, *args: ranks.run(k, two_steps, *args) if k > 1 else [two_steps(*args)]  # noqa: E731
    run(n, str(tmp_path), before, True)
    for got in run(m, str(tmp_path), after, False):
        follows(got, (seen[2:], step.program.restore(state.params)))


# --- what cannot be ---


@pytest.mark.parametrize(("arguments", "words"), [
    ((4, Axis("dp", 2, 0)), r"stage=4, required 0 \(nothing\), 1 or 2"),
    ((True, Axis("dp", 2, 0)), r"stage=True"),
    (("3", Axis("dp", 2, 0)), r"stage='3'"),
    ((3, fds.sharding.Mesh({"dp": Axis("dp", 1, 0)}, torch.device("cpu"))), r"got Mesh\(dp=1\), required an axis of a mesh, as in zero\(3, mesh\['dp'\]\)"),
])  # fmt: skip
def test_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        zero(*arguments)


MESH = fds.sharding.Mesh({"dp": Axis("dp", 1, 0)}, torch.device("cpu"))  # has a size and a rank as an axis has


@pytest.mark.parametrize(("make", "words"), [
    (lambda: fds.shard(MESH), r"shard: got Mesh\(dp=1\), required an axis of a mesh, as in shard\(mesh\['dp'\]\)"),
    (lambda: fds.replicate("dp"), r"replicate: got 'dp', required an axis"),
    (lambda: fds.tensor_parallel(MESH), r"tensor_parallel: got Mesh\(dp=1\), required an axis"),
    (lambda: fds.replicate(MESH["dp"], reduce="maen"), r"'maen' is unknown; did you mean 'mean'"),
    (lambda: fds.shard(MESH["dp"], reduce="maen"), r"'maen' is unknown; did you mean 'mean'"),
    (lambda: fds.shard(MESH["dp"], threshold=1.5), r"threshold=1.5, required a number of elements"),
    (lambda: fds.shard(MESH["dp"], threshold=-1), r"threshold=-1, required"),
])  # fmt: skip
def test_bad_arguments_of_the_parts(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_group_without_leaves_is_refused():
    program, _ = build()
    with pytest.raises(
        ValueError, match=r"shard: group 'low': pattern '\*.bais' matches no leaf; did you mean '\*.bias'"
    ):
        fds.shard(MESH["dp"], groups={"low": "*.bais", "rest": "*"})(program)
    with pytest.raises(ValueError, match=r"group 'low' \(\*.bias\) has no leaf that groups before it do not name"):
        fds.shard(MESH["dp"], groups={"rest": "*", "low": "*.bias"})(program)
    with pytest.raises(ValueError, match="group 'low'"):  # frozen leaves have no group
        fds.shard(MESH["dp"], groups={"low": "*.0.weight", "rest": "*"})(LORA(program))


def test_buffers_of_groups_have_names_of_their_own():
    """A bias of 5 is small for the first shard and not for the second one; the buffer of the one of 7 has 4 elements on a rank, and stays."""
    program, params = build()
    groups = {"low": "*.bias", "rest": "*"}
    shards = (fds.shard(Axis(n, 2, 0), threshold=t, groups=groups) for n, t in (("a", 6), ("b", 5)))
    stored = fds.chain(*shards)(program).place(params)["blocks.0"]
    assert set(stored) == {"shard.float32.a.rest", "shard.float32.low", "shard.float32.b.low"}
    assert torch.equal(stored["shard.float32.low"], params["blocks.0.0.bias"][:4])
    assert torch.equal(stored["shard.float32.b.low"], params["blocks.0.3.bias"][:3])


def test_one_axis_is_reduced_over_once():
    axis = Axis("dp", 2, 0)
    with pytest.raises(ValueError, match="reduced twice"):
        fds.chain(fds.shard(axis), fds.shard(axis))(build()[0])
    transform, place = zero(1, axis, replicas=axis)
    with pytest.raises(ValueError, match="reduces its gradients already"):
        fds.train_step(transform(build()[0]), place(optim.sgd(0.1)), loss=F.mse_loss)


def test_only_the_last_shard_can_be_held():
    axis, other = Axis("local", 2, 0), Axis("node", 2, 0)
    for chain, hold in (
        ([fds.shard(axis), fds.shard(other)], axis),
        ([fds.shard(axis), fds.cast("bfloat16")], axis),
        ([fds.replicate(axis)], axis),
        ([], axis),
    ):
        with pytest.raises(ValueError, match=r"hold=Axis\(name='local'.*the order that works: chain\(\.\.\., shard"):
            fds.train_step(fds.chain(*chain)(build()[0]), optim.sgd(0.1), loss=error, hold=hold)
