"""Files: transformers and PEFT read ours, we read theirs, and a bad file is named, not loaded."""

import pickle
import subprocess
import sys

import laws
import pytest
import ranks
import torch
import zoo

import fds


def logits(model, rows):
    with torch.no_grad():
        return model(**rows).logits


def same(again, model, rows):
    """Weights bitwise; results not: transformers may choose another implementation of experts, and matrix products depend on alignment."""
    assert all(torch.equal(x, again.state_dict()[k]) for k, x in model.state_dict().items())
    torch.testing.assert_close(logits(again, rows), logits(model, rows), rtol=0, atol=1e-6)


def test_a_save_over_one_of_another_number_of_files_is_the_one_that_counts(tmp_path):
    model = zoo.build("llama")
    program, params = fds.functionalize(model)
    for number, size in enumerate((2_000_000_000, 20_000, 2_000_000_000)):
        now = {k: v + number for k, v in params.items()}
        fds.save(tmp_path, program, program.place(now), max_shard_size=size)
        got = fds.load(tmp_path, program)
        assert all(torch.equal(got[k], now[k]) for k, _ in model.named_parameters())
        several = size < 1_000_000
        assert (tmp_path / "model.safetensors").exists() != several
        assert (tmp_path / "model.safetensors.index.json").exists() == bool(list(tmp_path.glob("model-*"))) == several


@pytest.mark.parametrize("size", [0, -1, "2GB", True])
def test_a_size_of_files_that_is_none_is_refused(tmp_path, size):
    program, params = fds.functionalize(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=f"save: max_shard_size={size!r}, required a whole number >= 1"):
        fds.save(tmp_path / "out", program, program.place(params), max_shard_size=size)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("size", [2_000_000_000, 20_000])
def test_transformers_loads_what_we_save(tmp_path, family, size):
    model = zoo.build(family)
    program, params = fds.functionalize(model)
    train = fds.chain(fds.shard(fds.sharding.mesh(dp=-1)["dp"]), fds.cast("bfloat16"))(program)
    fds.save(tmp_path, train, train.place(params), max_shard_size=size)
    assert (tmp_path / "model.safetensors").exists() == (size > 1_000_000)
    again = type(model).from_pretrained(tmp_path).eval()
    same(again, model, zoo.batch(family))
    for k, v in fds.load(tmp_path, program).items():
        assert torch.equal(v, params[k]), k


@pytest.mark.parametrize("family", ["llama-tied", "gpt2"])
def test_we_load_what_transformers_saves(tmp_path, family):
    model = zoo.build(family)
    model.save_pretrained(tmp_path)
    program, params = fds.functionalize(zoo.build(family))
    assert all(torch.equal(v, params[k]) for k, v in fds.load(tmp_path, program).items())


def exported(directory, family, name):
    import laws

    if name == "threshold, cast":
        program, params = fds.functionalize(zoo.build(family))
        axis = fds.sharding.mesh(dp=-1)["dp"]
        program = fds.chain(fds.shard(axis, threshold=100), fds.cast("bfloat16"))(program)
    else:
        program, params, *_ = laws.setting(family, name)
    fds.save(directory, program, program.place(params), max_shard_size=30_000)


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "mixtral"])
def test_every_mesh_exports_the_same_model(tmp_path, family):
    model = zoo.build(family)
    rows = zoo.batch(family)
    for n, name in [(2, "shard"), (2, "tensor"), (4, "tensor, shard, checkpoint"), (2, "shard, store, checkpoint"), (2, "threshold, cast")]:  # fmt: skip
        ranks.run(n, exported, str(tmp_path), family, name)  # over the files of the one before
        assert (tmp_path / "model.safetensors.index.json").exists()
        again = type(model).from_pretrained(tmp_path).eval()
        same(again, model, rows)


def failing_export(directory):
    """Rank 0 cannot write: both say so, and nothing new is there."""
    import importlib

    files = importlib.import_module("fds.checkpoint")  # the name in fds is the transformation's
    program, params = fds.functionalize(zoo.build("llama"))
    whole = files.tensor_file
    files.tensor_file = lambda path, spec: whole(path.parent / "no" / "such" / path.name, spec)
    try:
        fds.save(directory, program, program.place(params))
    except (ValueError, OSError) as error:
        return str(error)
    finally:
        files.tensor_file = whole


def test_an_export_that_fails_leaves_the_old_files(tmp_path):
    model = zoo.build("llama")
    model.save_pretrained(tmp_path)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    assert all("no/such" in said for said in ranks.run(2, failing_export, str(tmp_path)))
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


def adapted(family, **options):
    model = zoo.build(family)
    program, params = fds.functionalize(model)
    chain = fds.chain(
        fds.lora(rank=2, alpha=8, targets=zoo.FAMILIES[family][1], **options),
        fds.shard(fds.sharding.mesh(dp=-1)["dp"]),
        fds.checkpoint(),
    )
    train = chain(program)
    step = fds.train_step(train, fds.optim.adamw(1e-1), loss=zoo.loss)
    state, _ = step(step.init(params), zoo.batch(family))
    return model, train, params, state.params


@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"dora": True}, {"dora": True, "rslora": True}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_peft_both_ways(tmp_path, family, options):
    import peft

    model, train, params, stored = adapted(family, **options)
    fds.save_adapters(tmp_path / "ours", train, stored)
    loaded = peft.PeftModel.from_pretrained(zoo.build(family), tmp_path / "ours", is_trainable=True).eval()
    rows = zoo.batch(family)
    with torch.no_grad():
        want = train(stored, **rows).logits
    assert not torch.allclose(want, logits(model, rows), atol=1e-3)
    assert torch.allclose(logits(loaded, rows), want, atol=2e-6)
    loaded.save_pretrained(tmp_path / "theirs")
    back = fds.load_adapters(tmp_path / "theirs", train, train.place(params))
    with torch.no_grad():
        assert torch.equal(train(back, **rows).logits, want)
    _, grads = fds.value_and_grad(lambda s, b: zoo.loss(train, s, b), wrt=train)(stored, rows)
    zoo.loss_of(loaded(**rows)).backward()
    theirs = {k.replace(".default", "").removeprefix("base_model.model."): p.grad for k, p in loaded.named_parameters() if p.requires_grad}  # fmt: skip
    ours = {k: v for part in train.before("lora", grads)[1].values() for k, v in part.items() if "lora_" in k}
    theirs = {k.replace("vector.weight", "vector"): v for k, v in theirs.items()}
    assert ours.keys() == theirs.keys() and laws.distance(ours, theirs) < 1e-5


def carried(where, family, name, dora):
    """Adapters read under a mesh, and written again from there; what they change."""
    mesh = fds.sharding.mesh(dp=-1, tp=2 if "tensor" in name else 1)
    program, params = fds.functionalize(zoo.build(family))
    steps = {
        "shard": [fds.shard(mesh["dp"])],
        "tensor": [fds.tensor_parallel(mesh["tp"])],
        "tensor, shard": [fds.tensor_parallel(mesh["tp"]), fds.shard(mesh["dp"])],
        "store": [fds.shard(mesh["dp"]), fds.offload(fds.HostStore())],
    }[name]
    train = fds.chain(fds.lora(rank=2, alpha=8, targets=zoo.FAMILIES[family][1], dora=dora), *steps)(program)
    stored = fds.load_adapters(f"{where}/given", train, train.place(params))
    fds.save_adapters(f"{where}/{name}", train, stored)
    return train.restore(stored)


@pytest.mark.parametrize(("family", "dora"), [("llama", False), ("llama", True), ("gpt2", True)])
def test_adapters_under_every_mesh(tmp_path, family, dora):
    from safetensors.torch import load_file

    _, train, _, stored = adapted(family, dora=dora)
    fds.save_adapters(tmp_path / "given", train, stored)
    want, given = train.restore(stored), load_file(tmp_path / "given" / "adapter_model.safetensors")
    for n, name in [(2, "shard"), (2, "tensor"), (4, "tensor, shard"), (2, "store")]:
        for got in ranks.run(n, carried, str(tmp_path), family, name, dora):
            assert all(torch.allclose(got[k], v, atol=1e-6) for k, v in want.items()), name
        got = load_file(tmp_path / name / "adapter_model.safetensors")
        assert got.keys() == given.keys() and all(torch.equal(got[k], v) for k, v in given.items())


def test_other_adapters_are_refused(tmp_path):
    _, train, params, stored = adapted("llama")
    fds.save_adapters(tmp_path, train, stored)
    for change, words in (
        (dict(rank=4, alpha=8, targets="*.q_proj"), "r is 2"),
        (dict(rank=2, alpha=4, targets="*.q_proj"), "lora_alpha"),
        (dict(rank=2, alpha=8, targets="*.k_proj"), "targets"),
        (dict(rank=2, alpha=8, targets="*.q_proj", dora=True), "use_dora is False"),
    ):
        other = fds.lora(**change)(train.origin)
        with pytest.raises(ValueError, match=words):
            fds.load_adapters(tmp_path, other, other.place(params))


def stepper():
    program, params = fds.functionalize(zoo.build("llama"))
    train = fds.chain(fds.lora(rank=2, targets="*.q_proj"), fds.shard(fds.sharding.mesh(dp=-1)["dp"]))(program)
    return fds.train_step(
        train, fds.optim.chain(fds.optim.clip_by_global_norm(1.0), fds.optim.offloaded(fds.optim.adamw(1e-2)))
    ), params


def resumed(directory):
    """On each rank: two steps in one go, and with a save and a load between them."""
    step, params = stepper()
    state, _ = step(step.init(params), zoo.batch("llama"))
    fds.save_state(directory, step, state)
    straight, a = step(state, zoo.batch("llama", seed=2))
    other, _ = stepper()
    back, b = other(fds.load_state(directory, other), zoo.batch("llama", seed=2))
    same = all(torch.equal(x, y) for x, y in zip(fds.tree.flat(straight), fds.tree.flat(back), strict=True))
    return same and torch.equal(a["loss"], b["loss"])


def test_resume_is_bitwise(tmp_path):
    assert resumed(tmp_path / "one")
    assert ranks.run(2, resumed, str(tmp_path / "two")) == [True, True]
    assert int(fds.load_state(tmp_path / "two", stepper()[0]).step) == 1  # here too, where there is one rank


def test_foreign_files_are_not_read(tmp_path):
    program, _ = fds.functionalize(zoo.build("llama"))
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        fds.load(tmp_path, program)
    fds.save(tmp_path, program, program.place(fds.functionalize(zoo.build("llama"))[1]))
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()

    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    for content in (whole[:-10], whole[:4], b"garbage" * 100, pickle.dumps(Bomb())):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="not a complete safetensors file"):
            fds.load(tmp_path, program)
    file.write_bytes(whole)
    other, _ = fds.functionalize(zoo.build("gpt2"))
    with pytest.raises(ValueError, match="missing"):
        fds.load(tmp_path, other)


_KILLS = """
import json, os, signal, sys, time, torch, fds, fds.state_files
from test_checkpoint import small
torch.set_num_threads(1)
where, moments, parent = sys.argv[1], [float(x) for x in sys.argv[2:]], os.getpid()
def saves():
    return json.load(open(where + "/state.json"))["saves"]
step, state = small()
fds.save_state(where, step, state)
last = 0
for moment in moments:
    before, child = saves(), os.fork()
    if child == 0:
        while os.getppid() == parent:
            state = state._replace(step=state.step + 1)
            fds.save_state(where, step, state, keep=1)
        os._exit(0)
    while saves() == before:
        time.sleep(0.001)
    time.sleep(moment)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    state = fds.load_state(where, step)
    assert int(state.step) > last, (int(state.step), last)
    assert all(torch.equal(p, torch.full_like(p, 0.5)) for p in fds.tree.leaves(state.params))
    last = int(state.step)
print(last)
"""


def small():
    """A step and its state: weights of 0.5 throughout, so that a torn file shows."""
    program, params = fds.functionalize(torch.nn.Sequential(torch.nn.Linear(200, 200), torch.nn.Linear(200, 1)))
    step = fds.train_step(program, fds.optim.sgd(0.1), loss=lambda p, s, b: p(s, b["x"]).mean())
    return step, step.init({k: torch.full_like(v, 0.5) for k, v in params.items()})


def test_a_kill_leaves_a_checkpoint(tmp_path):
    """kill -9 at sixteen moments of a loop of saves: what is there afterwards loads, whole, and is newer than before, as each loop saves once."""
    moments = [f"{0.002 + 0.007 * i:.4f}" for i in range(16)]
    out = subprocess.run(
        [sys.executable, "-c", _KILLS, str(tmp_path), *moments], capture_output=True, text=True, env=_env(), timeout=120
    )
    assert out.returncode == 0, out.stderr
    step, _ = small()
    state = fds.load_state(tmp_path, step)
    assert int(state.step) == int(out.stdout) >= 16, "the loop does nothing else, so kills fall into saves"
    fds.save_state(tmp_path, step, state, keep=1)
    assert len(list(tmp_path.iterdir())) == 2  # the leftovers are gone


def _env():
    import os

    return os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
