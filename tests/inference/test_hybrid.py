"""The hybrid engine: rollouts of the training weights, free switches where nothing changes, and no bit of the training weights touched."""

import weakref

import pytest
import ranks
import torch
import zoo

import fds
from fds import tree
from fds.inference import Hybrid, Workspace, hybrid
from fds.offload import HostStore


def ids(rows=4):
    return zoo.batch("llama", rows)["input_ids"]


def adapted(*more):
    """A program with adapters that are not zero, and its stored weights."""
    program, params = fds.functionalize(zoo.build("llama"))
    train = fds.chain(fds.lora(rank=2, targets="*_proj", alpha=4), *more)(program)
    plain = fds.lora(rank=2, targets="*_proj", alpha=4)(program)
    stored = plain.place(params)
    g = torch.Generator().manual_seed(3)
    for part in stored.values():
        for k in [k for k in part if "lora_B" in k]:
            part[k] = 0.1 * torch.randn(part[k].shape, generator=g)
    return train, fds.relayout(plain, train)(stored), plain, stored


def text(program, stored, **options):
    return fds.generate(program, stored, ids(), max_new_tokens=10, compile=False, **options)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("chain", ["plain", "shard", "offload"])
def test_rollouts_are_those_of_the_training_program(chain, fuse):
    with HostStore() as store:
        axis = fds.sharding.mesh(dp=-1)["dp"]
        more = {"plain": [], "shard": [fds.shard(axis), fds.checkpoint()], "offload": [fds.shard(axis), fds.offload(store)]}[chain]  # fmt: skip
        train, stored, plain, whole = adapted(*more)
        engine = hybrid(train, fuse=fuse)
        got = engine.generate(stored, ids(), max_new_tokens=10, compile=False, details=True)
        assert torch.equal(got.tokens, text(plain, whole))
        logits = plain(whole, input_ids=got.tokens).logits[:, ids().shape[1] - 1 : -1]
        want = logits.log_softmax(-1).gather(2, got.tokens[:, ids().shape[1] :, None])[..., 0]
        torch.testing.assert_close(got.logprobs, want, rtol=0, atol=1e-5)


def test_a_thousand_switches_change_no_bit():
    train, stored, _, _ = adapted()
    before = [x.clone() for x in tree.leaves(stored)]
    engine = hybrid(train, pin_parameters=False)
    first = tree.map(lambda x: x.clone(), engine.weights(stored))
    for _ in range(1000):
        engine.release()
        last = engine.weights(stored)
    assert all(torch.equal(a, b) for a, b in zip(before, tree.leaves(stored), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(first), tree.leaves(last), strict=True))


def test_a_switch_is_free_where_nothing_changes():
    """Without adapters, and with adapters beside: the training tensors themselves. Fused: made once for these weights."""
    program, params = fds.functionalize(zoo.build("llama"))
    train = fds.checkpoint()(program)
    stored = train.place(params)
    assert all(a is b for a, b in zip(tree.leaves(hybrid(train).weights(stored)), tree.leaves(stored), strict=True))
    train, stored, _, _ = adapted(fds.checkpoint())
    beside = hybrid(train, fuse=False).weights(stored)
    assert all(a is b for a, b in zip(tree.leaves(beside), tree.leaves(stored), strict=True))
    engine = hybrid(train)
    once = engine.weights(stored)
    assert engine.weights(stored) is once and once[""] is not stored[""]
    other = tree.map(lambda x: x.clone(), stored)
    before = engine.weights(other)
    assert before is not once, "other tensors"
    next(iter(other["model.layers.0"].values())).add_(1)
    changed = engine.weights(other)
    assert changed is not before and engine.weights(other) is changed, "written in place: made anew, once"


@pytest.mark.parametrize("pin", [True, False])
def test_weights_are_made_once_or_for_each_call(monkeypatch, pin):
    """And the ones before are gone by then."""
    train, stored, _, _ = adapted()
    engine, made, run = hybrid(train, pin_parameters=pin), [], Hybrid._moved
    monkeypatch.setattr(Hybrid, "_moved", lambda e, s: (made.append([r() for r in old]), run(e, s))[1])
    old = []
    for _ in range(2):
        engine.generate(stored, ids(), max_new_tokens=1, compile=False)
    assert len(made) == (1 if pin else 2)
    old = [weakref.ref(x) for part in engine.weights(stored).values() for k, x in part.items() if "q_proj" in k]
    engine.weights(tree.map(lambda x: x.clone(), stored))
    assert len(old) == 2 and made[-1] == [None, None]


@pytest.mark.parametrize("inner", ["around", "cast"])
def test_what_is_restricted_and_computes_something_serves_too(inner):
    """`at` of a wrapper that changes values, or of a cast; of recompute alone nothing is left."""
    program, params = fds.functionalize(zoo.build("llama"))
    doubled = fds.around(lambda apply: lambda *a, **k: 2 * apply(*a, **k), name="doubled")
    train = fds.chain(fds.at("*.mlp" if inner == "around" else "*.mlp.*", {"around": doubled, "cast": fds.cast("bfloat16")}[inner]), fds.at("*.mlp", fds.checkpoint()))(program)  # fmt: skip
    stored, engine = train.place(params), hybrid(train)
    got = engine.serve(engine.weights(stored), input_ids=ids()).logits
    assert torch.equal(got, train(stored, input_ids=ids()).logits) and not torch.equal(got, program(program.place(params), input_ids=ids()).logits)  # fmt: skip
    assert len(engine.serve.history) == 1 and "checkpoint" not in str(engine.serve.history)


def test_sites_are_moved_a_few_at_a_time(monkeypatch):
    train, stored, _, _ = adapted()
    engine = hybrid(train, tp_gather_partition_size=1)
    import importlib

    module, made, most = importlib.import_module("fds.inference.hybrid"), [], []

    def watched(src, dst, f=fds.transform.bridge):
        down, up = f(src, dst)
        return lambda x: (made.append(1), most.append(len(made)), down(x))[2], lambda x: (up(x), made.pop())[0]

    monkeypatch.setattr(module, "bridge", watched)
    engine.weights(stored)
    assert max(most) == 1 and len(most) == 3


def kept_alive():
    """Of sites: the bytes of what serves, and of the buffers that it keeps alive; with adapters on every layer, the same by `relayout`, without adapters."""
    axis = fds.sharding.mesh(dp=2)["dp"]
    train, stored, _, _ = adapted(fds.shard(axis))
    plain = fds.shard(axis)(train.origin)
    trees = [
        hybrid(train).weights(stored),
        fds.relayout(train, fds.fuse_lora()(train.without("shard")))(stored),
        hybrid(plain).weights(plain.place(train.restore(stored))),
    ]
    return [[_alive(part) for part in found.values()] for found in trees]


def _alive(part):
    buffers = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in part.values()}
    return tree.nbytes(part), sum(buffers.values()), len(buffers)


def test_what_serves_keeps_nothing_else_alive():
    """Norms are views of a gathered buffer, whose weights adapters have made anew; where all of it is used, nothing is copied."""
    for adapters, moved, plain in ranks.run(2, kept_alive):
        assert all(held < 1.1 * size for size, held, _ in adapters + moved + plain)
        assert min(buffers for *_, buffers in plain) == 1 < max(buffers for *_, buffers in adapters)


def served_by_two():
    """Sharded training over two ranks, served by both together: the same prompts on both."""
    axis = fds.sharding.mesh(dp=2)["dp"]
    train, stored, _, _ = adapted(fds.shard(axis))
    engine = hybrid(train, inference_tp_size=2)
    return engine.generate(stored, ids(), max_new_tokens=10, compile=False), tree.nbytes(engine.weights(stored))


def test_two_ranks_serve_together():
    _, _, plain, whole = adapted()
    size = sum(p.nbytes for p in zoo.build("llama").parameters())
    for tokens, nbytes in ranks.run(2, served_by_two):
        assert torch.equal(tokens, text(plain, whole)) and nbytes < 0.7 * size


def test_training_and_generating_by_turns():
    train, stored, *_ = adapted()
    step = fds.train_step(train, fds.optim.adamw(0.01))
    state = step.init(train.restore(stored))
    engine, texts = hybrid(train), []
    for _ in range(3):
        texts.append(engine.generate(state.params, ids(), max_new_tokens=10, compile=False))
        engine.generate(state.params, ids(), max_new_tokens=1, compile=False, n=2, temperature=1.0)
        with engine.measured("train"):
            state, _ = step(state, {"input_ids": ids()})
    assert not torch.equal(texts[0], texts[2])
    found = engine.statistics()
    assert found.samples == 12 + 2 * 12 and min(found.gather, found.generate, found.train) > 0
    assert found.gather + found.generate + found.train <= found.end_to_end
    assert "samples/s" in str(found) and engine.statistics().samples == 0


def test_memory_is_given_back_and_taken_back():
    program, params = fds.functionalize(zoo.build("llama"))
    stored, room = program.place(params), Workspace()
    want = text(program, stored)
    assert room.retake() == 0
    assert torch.equal(text(program, stored, workspace=room), want)
    held = room.nbytes
    assert held > 4 * 64 * 2 * 2 * 2 * 8 * 4 - 1 and room.release() == held and room.nbytes == 0
    assert room.retake() == held and torch.equal(text(program, stored, workspace=room), want)
    empty = room.take({"x": torch.empty(3, device="meta")})
    assert room.release() == 12 and room.retake() == 12 and empty["x"].device.type == room._held["x"].device.type
    assert room.take({"x": torch.ones(3)})["x"].tolist() == [1.0] * 3, "of another device: other buffers"
    for release, kept in ((False, True), (True, False)):
        engine = hybrid(program, release_inference_cache=release)
        engine.generate(stored, ids(), max_new_tokens=10, compile=False)
        assert (engine.workspace is not None and engine.workspace.nbytes > 0) == kept
        engine.release()


def test_what_cannot_be_is_refused():
    program, params = fds.functionalize(zoo.build("llama"))
    stored, engine = program.place(params), hybrid(program, max_out_tokens=16)
    with pytest.raises(ValueError, match=r"12 \+ 8 new tokens = 20, max_out_tokens is 16.*hybrid"):
        engine.generate(stored, ids(), max_new_tokens=8)
    for bad in ({"max_out_tokens": 0}, {"inference_tp_size": 1.5}, {"tp_gather_partition_size": -1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            hybrid(program, **bad)
    other, _ = fds.functionalize(zoo.build("gpt2"))
    with pytest.raises(ValueError, match="hybrid: the programs have different sites"):
        hybrid(program, other)
    with pytest.raises(ValueError, match="give one of them"):
        hybrid(program, program, inference_tp_size=2)
    for bad in ({"pin_parameters": "no"}, {"release_inference_cache": 1}, {"fuse": None}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}=.*True or False"):
            hybrid(program, **bad)
    with pytest.raises(ValueError, match="required a program"):
        hybrid(zoo.build("llama"))
    with pytest.raises(ValueError, match="the engine's own"):
        engine.generate(stored, ids(), max_new_tokens=2, workspace=Workspace())
    with pytest.raises(ValueError, match="input_ids is a list"):
        engine.generate(stored, ids().tolist(), max_new_tokens=2)
    with pytest.raises(ValueError, match="'gather'"):
        engine.measured("gatherr").__enter__()
