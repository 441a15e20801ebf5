"""The nine laws of fds (docs/architecture.md) over one table of transformations. Adding a transformation = adding a row.

Every function here runs on one rank of `world`; `test_laws.py` calls it directly for one process and through `ranks.run` for several.
"""

import functools
import gc
import math

import torch
import torch.distributed as dist
import zoo
from live import Live

import fds

HOST = fds.HostStore()


def table(axis, targets="*.q_proj", tensor=None, node=None):
    """Name -> transformation. `axis` is the data axis, `tensor` that of tensor parallelism, `targets` a linear layer of the family.

    `node` is a second data axis, for names that end in "nodes".
    """
    tensor, node = tensor or fds.sharding.Axis("tp", 1, 0), node or fds.sharding.Axis("node", 1, 0)
    return {
        "nothing": fds.chain(),
        "shard": fds.shard(axis),
        "shard small whole": fds.shard(axis, threshold=100),
        "replicate": fds.replicate(axis),
        "checkpoint": fds.checkpoint(),
        "checkpoint matmul": fds.checkpoint("matmul"),
        "shard, checkpoint": fds.chain(fds.shard(axis), fds.checkpoint()),
        "checkpoint, shard": fds.chain(fds.checkpoint(), fds.shard(axis)),
        "offload": fds.offload("cpu"),
        "offload, shard, checkpoint": fds.chain(fds.shard(axis), fds.offload("cpu"), fds.checkpoint()),
        "store": fds.offload(HOST),
        "shard, store, checkpoint": fds.chain(fds.shard(axis), fds.offload(HOST, ratio=0.7), fds.checkpoint()),
        "shard, quantized, checkpoint": fds.chain(
            fds.shard(axis), fds.quantized(weights="int8", gradients="int8", block=32), fds.checkpoint()
        ),
        "cast": fds.cast("bfloat16"),
        "shard, cast, checkpoint": fds.chain(fds.shard(axis), fds.cast("bfloat16"), fds.checkpoint()),
        "lora": fds.lora(rank=2, targets=targets),
        "lora, shard, checkpoint": fds.chain(fds.lora(rank=2, targets=targets), fds.shard(axis), fds.checkpoint()),
        "at": fds.at("*.0", fds.checkpoint()),
        "tensor": fds.tensor_parallel(tensor),
        "tensor, shard, checkpoint": fds.chain(fds.tensor_parallel(tensor), fds.shard(axis), fds.checkpoint()),
        "shard, checkpoint, replicas, nodes": fds.chain(fds.shard(axis), fds.checkpoint(), fds.replicate(node)),
        "shard, shard, checkpoint, nodes": fds.chain(fds.shard(axis), fds.shard(node), fds.checkpoint()),
        "shard, checkpoint, shard, nodes": fds.chain(fds.shard(axis), fds.checkpoint(), fds.shard(node)),
    }


NODES = (
    "shard, checkpoint, replicas, nodes",
    "shard, shard, checkpoint, nodes",
    "shard, checkpoint, shard, nodes",
)  # HSDP or MiCS; the hierarchical gather; hpZ
EXACT = ("nothing", "shard", "shard small whole", "replicate", "checkpoint", "checkpoint matmul", "shard, checkpoint", "checkpoint, shard", "offload", "offload, shard, checkpoint", "store", "shard, store, checkpoint", "shard, quantized, checkpoint", "at", *NODES)  # fmt: skip


@functools.cache
def nodes():
    """A mesh of two nodes; of one node on one rank."""
    return fds.sharding.mesh(node=min(fds.sharding.mesh(dp=-1).size, 2), local=-1)


def setting(family, name, *, training=False):
    """This rank's program, parameters and rows, the global rows, and an axis of all ranks with rows of their own.

    With tensor parallelism two ranks, or all of them, share their rows.
    """
    world = fds.sharding.mesh(dp=-1).size
    mesh = fds.sharding.mesh(dp=-1, tp=1 if "tensor" not in name else min(world, 2) if "shard" in name else world)
    axis = mesh["dp"]
    program, params = fds.functionalize(zoo.build(family, training=training))
    rows = zoo.batch(family)
    mine = {k: v.chunk(axis.size)[axis.rank] for k, v in rows.items()}
    targets = zoo.FAMILIES[family][1]
    if name in NODES:
        return table(nodes()["local"], targets, node=nodes()["node"])[name](program), params, mine, rows, axis
    return table(axis, targets, mesh["tp"])[name](program), params, mine, rows, axis


def mean(x, axis):
    return axis.sum(x.detach().clone()) / axis.size


def distance(got, want):
    """The largest difference of a leaf, relative to that leaf and a little of all (a key's bias has no gradient but noise)."""
    whole = math.sqrt(sum(float(w.double().square().sum()) for w in want.values()))
    return max(
        float((got[k].double() - w.double()).norm() / (w.double().norm() + 1e-3 * whole + 1e-30))
        for k, w in want.items()
    )


def round_trip(family, name):
    program, params, *_ = setting(family, name)
    back = program.restore(program.place(params))
    assert list(back) == list(params)
    for k, v in params.items():
        assert torch.equal(back[k], v), k


def meaning(family, name):
    """Law 2: the same output as the module, bitwise in eager where nothing is rounded; the inputs are not written (law 9)."""
    program, params, mine, _, _ = setting(family, name)
    stored = program.place(params)
    before = fds.tree.map(torch.clone, stored)
    with torch.no_grad():
        got, want = zoo.loss_of(program(stored, **mine)), zoo.loss_of(zoo.build(family)(**mine))
    if program.tol:
        assert abs(float(got - want)) < 16 * program.tol * abs(float(want))
    else:
        assert torch.equal(got, want) if name in EXACT else torch.allclose(got, want, rtol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(fds.tree.leaves(stored), fds.tree.leaves(before), strict=True))


def gradient(family, name, how="eager"):
    """Law 3: restored gradients are those of the plain module on the global batch, in eager, under torch.func, and compiled."""
    program, params, mine, rows, axis = setting(family, name)
    stored = program.place(params)
    value, grads = differentiate(program, how)(stored, mine)
    want_value, want = zoo.reference(family, rows)
    got = program.restore(grads)
    eps = max(program.tol, torch.finfo(torch.float32).eps)
    error = distance(got, want)
    # T5's blocks share one position bias, whose gradients recompute adds up in another order.
    exact = (
        name in EXACT
        and axis.size == 1
        and how == "eager"
        and not (family == "t5" and ("checkpoint" in name or name == "at"))
    )
    assert (
        torch.equal(mean(value, axis), want_value) if exact else abs(float(mean(value, axis) - want_value)) < 64 * eps
    )
    assert error == 0.0 if exact else error < 64 * eps, error


def leftovers(family, name):
    """Law 7: a step leaves nothing alive but the new state. A circle through autograd's nodes is seen by no collector."""
    program, params, mine, _, _ = setting(family, name, training=True)
    loss = fds.losses.causal_lm if family.startswith("llama") else zoo.loss
    tx = fds.optim.sgd(0.01, momentum=0.9)
    step = fds.train_step(program, fds.optim.streamed(tx, HOST) if "store" in name else tx, loss=loss)
    state, counts = step.init(params), []
    for _ in range(4):
        state, _ = step(state, mine)
        if step.tx.stream is not None:
            step.tx.stream.wait()
        gc.collect()
        counts.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))
    assert counts[1] == counts[3], counts


def differentiate(program, how):
    def f(stored, batch):
        return zoo.loss(program, stored, batch)

    if how == "eager":
        return fds.value_and_grad(f)
    if how == "func":

        def run(stored, batch):
            floats = {s: {k: v for k, v in part.items() if v.is_floating_point()} for s, part in stored.items()}
            rest = {s: {k: v for k, v in part.items() if not v.is_floating_point()} for s, part in stored.items()}
            grads, value = torch.func.grad_and_value(lambda t: f({s: {**t[s], **rest[s]} for s in t}, batch))(floats)
            return value.detach(), {s: {**grads[s], **rest[s]} for s in grads}

        return run
    torch._dynamo.reset()
    return torch.compile(fds.value_and_grad(f), fullgraph=True, backend="aot_eager" if how == "traced" else "inductor")


def adapters(family, how="eager", name="shard, checkpoint"):
    """Law 3 for LoRA: gradients of A and B against the plain formula, dW chained through W + s B A."""
    outer, params, mine, rows, _ = setting(family, name)
    base = outer.origin
    lora = fds.lora(rank=2, alpha=6, targets=zoo.FAMILIES[family][1])
    plain = lora(base)
    inner = plain.place(params)
    for part in inner.values():  # B starts at zero, which would hide the gradient of A
        for k in part:
            if "lora_B" in k:
                part[k] = torch.randn(part[k].shape, generator=torch.Generator().manual_seed(3)) * 0.1
    _, want = fds.value_and_grad(lambda s, b: zoo.loss_of(base(_fused_by_hand(inner, s, plain), **b)))(
        _adapters(inner), rows
    )
    program = fds.chain(*outer.history)(plain)
    stored = program.after(plain, inner)  # the same B through `shard`
    _, grads = differentiate(program, how)(stored, mine)
    _, back = program.before("lora", grads)
    got = {k: v for part in back.values() for k, v in part.items() if "lora_" in k}
    want = {k: v for part in want.values() for k, v in part.items()}
    assert want and distance(got, want) < 64 * torch.finfo(torch.float32).eps
    assert all(float(v.norm()) > 0 for v in want.values())


def _adapters(inner):
    return {s: {k: v for k, v in part.items() if "lora_" in k} for s, part in inner.items()}


def _fused_by_hand(inner, adapters, plain):
    scale = next(t.settings.scale for t in plain.history)
    out = {}
    for s, part in inner.items():
        out[s] = {k: v for k, v in part.items() if "lora_" not in k}
        for k in adapters[s]:
            if "lora_A" in k:
                w = k.replace(".lora_A", "")
                delta = scale * adapters[s][k.replace("lora_A", "lora_B")] @ adapters[s][k]
                out[s][w] = out[s][w] + (delta.T if w in plain.marks["transposed"] else delta)
    return out


def traffic(family, name, gathers, how="eager"):
    """Law 8: bytes on the wire are the closed form: every site `gathers` times, the root once, and each gradient once."""
    program, params, mine, _, axis = setting(family, name)
    stored = program.place(params)
    run = differentiate(program, how)
    with fds.sharding.record() as wire:
        run(stored, mine)
    size = {
        s: sum(v.numel() * v.element_size() for k, v in part.items() if k.startswith("shard.")) * axis.size
        for s, part in program.spec.items()
    }
    wire_share = 0.5 if "cast" in name else 1.0
    sites = sum(v for s, v in size.items() if s)
    assert wire.bytes["gather"] == wire_share * (gathers * sites + size[""])
    assert wire.bytes["scatter"] == wire_share * (sites + size[""])
    return wire.calls


WIDTH, ROWS = 64, 2


def memory(blocks, name):
    """Law 7: the peak of a gradient, for a stack of equal blocks, lies within what is declared; in bytes.

    Four sites in flight: the gathered weights, their gradient, and two copies on the wire, which gloo's threads may hold a moment longer.
    """
    axis = fds.sharding.mesh(dp=-1)["dp"]
    module = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(blocks)))
    base, params = fds.functionalize(module, sites="*")
    program = {
        "shard": fds.shard(axis),
        "shard, checkpoint": fds.chain(fds.shard(axis), fds.checkpoint()),
        "checkpoint, shard": fds.chain(fds.checkpoint(), fds.shard(axis)),
        **{k: v for k, v in table(nodes()["local"], node=nodes()["node"]).items() if k in NODES},
    }[name](base)
    stored, x = program.place(params), torch.ones(ROWS, WIDTH)
    del params, module
    run = fds.value_and_grad(lambda s, x: program(s, x).square().mean())
    with Live((stored, x)) as live:
        run(stored, x)
    shard = fds.tree.nbytes(stored) // blocks
    site, activation = WIDTH * (WIDTH + 1) * 4, x.nbytes
    kept = {  # gathered weights, less the gradients that replace them
        "shard": site - shard,
        "checkpoint, shard": site - shard,
        "shard, checkpoint, shard, nodes": site // nodes()["local"].size - shard,
    }.get(name, 0)
    allowed = 2 * blocks * shard + 4 * site + blocks * (kept + activation)
    assert blocks * (2 * shard + kept) < live.peak <= allowed, (live.peak, allowed)


CHAINABLE = (
    "tensor",
    "shard",
    "quantized",
    "checkpoint",
    "cast",
    "lora",
    "offload",
    "store",
    "replicate",
    "at",
    "fuse",
)


def any_chain(names):
    """Laws 1 to 3 for a chain drawn at random; an impossible order has to say so, with one that works."""
    axis = fds.sharding.mesh(dp=-1)["dp"]
    build = {
        "tensor": lambda: fds.tensor_parallel(fds.sharding.Axis("tp", 1, 0)),
        "shard": lambda: fds.shard(axis),
        "quantized": lambda: fds.quantized(weights="int8", gradients="int8"),
        "checkpoint": fds.checkpoint,
        "cast": lambda: fds.cast("bfloat16"),
        "lora": lambda: fds.lora(rank=2, targets="*.q_proj"),
        "offload": fds.offload,
        "store": lambda: fds.offload(HOST),
        "replicate": lambda: fds.replicate(axis),
        "at": lambda: fds.at("*.mlp", fds.checkpoint()),
        "fuse": fds.fuse_lora,
    }
    program, params = fds.functionalize(zoo.build("llama"))
    try:
        result = fds.chain(*[build[n]() for n in names])(program)
    except ValueError as error:
        said = str(error)
        assert any(n in said for n in [*names, "fuse_lora"]) and ("chain(" in said or "leave one" in said)
        return
    rows, stored = zoo.batch("llama"), result.place(params)
    back = result.restore(stored)
    assert all(torch.equal(back[k], v) for k, v in params.items())
    if axis.size > 1 and not {"shard", "replicate"} & set(names):
        mine = rows  # nothing says that ranks see different rows: each computes them all
    else:
        mine = {k: v.chunk(axis.size)[axis.rank] for k, v in rows.items()}
    value, grads = fds.value_and_grad(lambda s, b: zoo.loss(result, s, b), wrt=result)(stored, mine)
    want, plain = zoo.reference("llama", rows)
    tolerance = 0.1 if result.tol else 1e-5
    assert abs(float(mean(value, axis) - want)) < tolerance
    if "lora" not in names:
        got = result.restore(grads)
        total = math.sqrt(sum(float(g.square().sum()) for g in plain.values()))
        assert math.sqrt(sum(float((got[k] - g).square().sum()) for k, g in plain.items())) < tolerance * total


def ten_steps(family, name, microbatches=1, how="eager", optimizer="adamw", training=False, loss_scale=None):
    """Laws 2, 4 and 6: ten training steps; returns the losses and the final logical parameters."""
    program, params, mine, _, axis = setting(family, name, training=training)
    tx = fds.optim.chain(fds.optim.clip_by_global_norm(0.5), fds.optim.adamw(1e-2, weight_decay=0.1))
    tx = {
        "adamw": tx,
        "offloaded": fds.optim.offloaded(tx),
        "sharded": fds.optim.sharded(tx, axis),
        "sharded offloaded": fds.optim.sharded(fds.optim.offloaded(tx), axis),
        "streamed": fds.optim.streamed(tx, HOST, bucket_bytes=0),
        "sharded streamed": fds.optim.sharded(fds.optim.streamed(tx, HOST, bucket_bytes=0), axis),
    }[optimizer]
    step = fds.train_step(program, tx, loss=zoo.loss, microbatches=microbatches, seed=5, loss_scale=loss_scale)
    run = fds.compile(step) if how == "compiled" else step
    state = step.init(params)
    losses, norms = [], []
    for _ in range(10):
        state, metrics = run(state, mine)
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    return losses, norms, {k: v.clone() for k, v in program.restore(state.params).items()}


def ragged(microbatches):
    """A padded batch: every rank and microbatch has another number of real tokens."""
    axis = fds.sharding.mesh(dp=-1)["dp"]
    program, params = fds.functionalize(zoo.build("llama"))
    rows = zoo.batch("llama")["input_ids"]
    mask = (torch.arange(12) < torch.tensor([[12], [3], [7], [2]])).long()
    mine = {"input_ids": rows.chunk(axis.size)[axis.rank], "attention_mask": mask.chunk(axis.size)[axis.rank]}
    step = fds.train_step(fds.shard(axis)(program), fds.optim.sgd(0.1), microbatches=microbatches)
    state, metrics = step(step.init(params), mine)
    return float(metrics["loss"]), float(metrics["grad_norm"]), step.program.restore(state.params)


def seen_by(rank_of_interest=0):
    """World size and rank, as the worker sees them."""
    return dist.get_world_size(), dist.get_rank()
