"""Frozen parameters in blocks of codes: what is stored, what is computed, and what goes over the wire."""

import math

import pytest
import ranks
import torch
import zoo
from torch import nn

import fds


def adapted(*chain, targets="*.q_proj", family="llama"):
    program, params = fds.functionalize(zoo.build(family))
    return fds.chain(fds.lora(rank=2, targets=targets), *chain)(program), params


@pytest.mark.parametrize("format", ["int8", "int4", "e4m3", "e5m2"])
def test_round_trip_within_the_declared_tolerance(format):
    program, params = adapted(fds.quantize_frozen(format, block=64))
    stored = program.place(params)
    back = program.restore(stored)
    for k, v in params.items():
        error = float((back[k].float() - v.float()).abs().max()) if v.is_floating_point() else 0.0
        small = v.numel() < 1024
        assert torch.equal(back[k], v) if small else 0 < error <= program.tol * float(v.abs().max()), k
    again = program.place(back)
    assert all(torch.equal(a, b) for a, b in zip(fds.tree.flat(again), fds.tree.flat(stored), strict=True))


def test_it_computes_with_what_it_stores():
    """Loss and the adapters' gradients are those of a base that is what the codes say, bit by bit; nothing else is trainable."""
    program, params = adapted(fds.quantize_frozen("int8"))
    stored, rows = program.place(params), zoo.batch("llama")
    plain, _ = adapted()
    base = plain.place(program.restore(stored))
    got, want = (fds.value_and_grad(lambda s, b, p=p: zoo.loss(p, s, b), wrt=p)(t, rows) for p, t in ((program, stored), (plain, base)))  # fmt: skip
    assert torch.equal(got[0], want[0])
    trained = fds.tree.named(program.trainable(got[1]))
    assert trained and all("lora_" in k for k in trained)
    assert all(torch.equal(g, fds.tree.named(want[1])[k]) for k, g in trained.items())
    assert any(bool(g.any()) for g in trained.values())


def sharded():
    """int8 under `shard`: codes and scales are what is gathered; with a quantised wire for the adapters, and bfloat16 around all."""
    axis = fds.sharding.mesh(dp=-1)["dp"]
    wire = fds.quantized(weights="int8", gradients="int8")
    program, params = adapted(fds.quantize_frozen("int8"), fds.shard(axis), wire, fds.cast("bfloat16"))
    stored, rows = program.place(params), zoo.batch("llama")
    mine = {k: v.chunk(axis.size)[axis.rank] for k, v in rows.items()}
    with fds.sharding.record() as counted:
        value, _ = fds.value_and_grad(lambda s, b: zoo.loss(program, s, b), wrt=program)(stored, mine)
    size = {"shard.int8.frozen": 1.0, "shard.float32.frozen": 2.0}
    sent = sum(axis.size * x.numel() * size[k] for part in program.spec.values() for k, x in part.items() if k in size)
    lora = [part["shard.float32"].numel() for part in program.spec.values() if "shard.float32" in part]
    assert counted.bytes["gather"] == sent + sum(axis.size * (m + 2 * math.ceil(m / 128)) for m in lora)
    want, _ = zoo.reference("llama", rows)
    assert abs(float(axis.mean(value) - want)) < 0.05
    assert counted.bytes["gather"] < 0.4 * sum(4 * v.numel() for v in params.values())


def test_under_shard():
    ranks.run(2, sharded)


def test_a_state_goes_on(tmp_path):
    for chain in ([], [fds.shard(fds.sharding.mesh(dp=1)["dp"])]):
        program, params = adapted(fds.quantize_frozen("int4"), *chain)
        step = fds.train_step(program, fds.optim.sgd(0.1), loss=zoo.loss)
        state, _ = step(step.init(params), zoo.batch("llama"))
        fds.save_state(tmp_path, step, state)
        again = fds.load_state(tmp_path, step)
        assert all(torch.equal(a, b) for a, b in zip(fds.tree.flat(state), fds.tree.flat(again), strict=True))


def test_what_is_refused():
    program, _ = fds.functionalize(nn.Linear(64, 32))
    with pytest.raises(ValueError, match=r"no frozen leaf.*after lora"):
        fds.quantize_frozen()(program)
    for options, said in (({"format": "int3"}, "'int3'.*int8"), ({"block": 8}, "block=8"), ({"threshold": -1}, "threshold -1")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            fds.quantize_frozen(**options)
    frozen, _ = fds.functionalize(nn.Linear(64, 32).double().requires_grad_(False))
    with pytest.raises(ValueError, match=r"weight is torch.float64"):
        fds.quantize_frozen(frozen)
    low, _ = fds.functionalize(nn.Linear(64, 32).requires_grad_(False))
    with pytest.raises(ValueError, match=r"chain\(quantize_frozen\(.*shard"):
        fds.chain(fds.shard(fds.sharding.mesh(dp=1)["dp"]), fds.quantize_frozen())(low)
