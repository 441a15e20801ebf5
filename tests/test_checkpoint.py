"""Files: transformers and PEFT read ours, we read theirs, and a bad file is named, not loaded."""

import json
import pickle
import signal
import subprocess
import sys
import time

import pytest
import ranks
import torch
import zoo

import fds


def logits(model, rows):
    with torch.no_grad():
        return model(**rows).logits


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("size", [2_000_000_000, 20_000])
def test_transformers_loads_what_we_save(tmp_path, family, size):
    model = zoo.build(family)
    program, params = fds.functionalize(model)
    train = fds.chain(fds.shard(fds.sharding.mesh(dp=-1)["dp"]), fds.cast("bfloat16"))(program)
    fds.save(tmp_path, train, train.place(params), max_shard_size=size)
    assert (tmp_path / "model.safetensors").exists() == (size > 1_000_000)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, zoo.batch(family)), logits(model, zoo.batch(family)))
    for k, v in fds.load(tmp_path, program).items():
        assert torch.equal(v, params[k]), k


@pytest.mark.parametrize("family", ["llama-tied", "gpt2"])
def test_we_load_what_transformers_saves(tmp_path, family):
    model = zoo.build(family)
    model.save_pretrained(tmp_path)
    program, params = fds.functionalize(zoo.build(family))
    assert all(torch.equal(v, params[k]) for k, v in fds.load(tmp_path, program).items())


def adapted(family):
    model = zoo.build(family)
    program, params = fds.functionalize(model)
    chain = fds.chain(
        fds.lora(rank=2, alpha=8, targets=zoo.FAMILIES[family][1]),
        fds.shard(fds.sharding.mesh(dp=-1)["dp"]),
        fds.checkpoint(),
    )
    train = chain(program)
    step = fds.train_step(train, fds.optim.adamw(1e-1), loss=zoo.loss)
    state, _ = step(step.init(params), zoo.batch(family))
    return model, train, params, state.params


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_peft_both_ways(tmp_path, family):
    import peft

    model, train, params, stored = adapted(family)
    fds.save_adapters(tmp_path / "ours", train, stored)
    loaded = peft.PeftModel.from_pretrained(zoo.build(family), tmp_path / "ours").eval()
    rows = zoo.batch(family)
    with torch.no_grad():
        want = train(stored, **rows).logits
    assert not torch.allclose(want, logits(model, rows), atol=1e-3)
    assert torch.allclose(logits(loaded, rows), want, atol=2e-6)
    loaded.save_pretrained(tmp_path / "theirs")
    back = fds.load_adapters(tmp_path / "theirs", train, train.place(params))
    with torch.no_grad():
        assert torch.equal(train(back, **rows).logits, want)


def test_other_adapters_are_refused(tmp_path):
    _, train, params, stored = adapted("llama")
    fds.save_adapters(tmp_path, train, stored)
    for change, words in (
        (dict(rank=4, alpha=8, targets="*.q_proj"), "r is 2"),
        (dict(rank=2, alpha=4, targets="*.q_proj"), "lora_alpha"),
        (dict(rank=2, alpha=8, targets="*.k_proj"), "targets"),
    ):
        other = fds.lora(**change)(train.origin)
        with pytest.raises(ValueError, match=words):
            fds.load_adapters(tmp_path, other, other.place(params))


def stepper(rank=2):
    program, params = fds.functionalize(zoo.build("llama"))
    train = fds.chain(fds.lora(rank=rank, targets="*.q_proj"), fds.shard(fds.sharding.mesh(dp=-1)["dp"]))(program)
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
    with pytest.raises(ValueError, match="2 ranks"):
        fds.load_state(tmp_path / "two", stepper()[0])


def test_bad_states(tmp_path):
    step, params = stepper()
    with pytest.raises(ValueError, match="no checkpoint"):
        fds.load_state(tmp_path, step)
    fds.save_state(tmp_path, step, step.init(params))
    with pytest.raises(ValueError, match=r"required \(|missing"):
        fds.load_state(tmp_path, stepper(rank=3)[0])
    file = next(tmp_path.glob("state-*.safetensors"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=f"{len(whole) - 100} bytes, {len(whole)} expected"):
        fds.load_state(tmp_path, step)


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


_LOOP = """
import sys, torch, fds, zoo
from test_checkpoint import stepper
step, params = stepper()
state = step.init(params)
fds.save_state(sys.argv[1], step, state)
print("ready", flush=True)
while True:
    state = state._replace(step=state.step + 1)
    fds.save_state(sys.argv[1], step, state)
"""


def test_a_kill_leaves_a_checkpoint(tmp_path):
    """kill -9 at ten moments of a loop of saves; what is there afterwards always loads."""
    step, _ = stepper()
    worker = subprocess.Popen([sys.executable, "-c", _LOOP, str(tmp_path)], stdout=subprocess.PIPE, env=_env())
    try:
        assert worker.stdout.readline() == b"ready\n"
        for i in range(10):
            time.sleep(0.013 * (i + 1))
            worker.send_signal(signal.SIGSTOP)  # frozen at any moment, the folder is what a kill would leave
            assert int(fds.load_state(tmp_path, step).step) >= 0
            worker.send_signal(signal.SIGCONT)
    finally:
        worker.kill()
        worker.wait()
        worker.stdout.close()
    assert json.loads((tmp_path / "state.json").read_text())["step"] == int(fds.load_state(tmp_path, step).step)
    fds.save_state(tmp_path, step, fds.load_state(tmp_path, step))
    assert len(list(tmp_path.iterdir())) == 2  # the leftovers are gone


def _env():
    import os

    return os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
