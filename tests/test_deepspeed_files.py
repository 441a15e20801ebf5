"""Checkpoints of the real DeepSpeed (written by deepspeed_fixture.py) against what DeepSpeed said was in them, and how its runs went on."""

import json
import shutil
import tarfile

import deepspeed_fixture as theirs
import pytest
import ranks
import torch
from safetensors.torch import load_file
from torch import nn

import fds
from fds import deepspeed_files, optim
from fds.offload import HostStore

CASES = {**{c: c for c in theirs.CASES}, **{u: c for c, u in theirs.UNIVERSAL.items()}}
FROZEN = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deepspeed")
    with tarfile.open(theirs.ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


def adamw():
    (b1, b2), rate = theirs.ADAM["betas"], theirs.ADAM["lr"]
    return optim.adamw(rate, b1=b1, b2=b2, eps=theirs.ADAM["eps"], weight_decay=theirs.ADAM["weight_decay"])


def stepper(*chain, tx=None, module=None):
    program, _ = fds.functionalize(module or theirs.build())
    return fds.train_step(fds.chain(*chain)(program), tx or adamw(), seed=5)


@pytest.mark.parametrize("case", CASES)
def test_what_deepspeed_said_is_in_it(files, case):
    said = load_file(files / CASES[case] / "report.safetensors")
    step, model = stepper(), theirs.build()
    state = deepspeed_files.load_state(files / case, step)
    params, moments = fds.tree.named(state.params), {k: fds.tree.named(m) for k, m in state.optimizer.moments.items()}
    names = [k for k, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 19 and moments["mu"].keys() == moments["nu"].keys() == set(names)
    for k in names:
        assert torch.equal(params[k], said[f"saved/fp32/{k}"]), k
        if case != "zero2-shuffled":  # of its moments it says nothing; how the run goes on tells
            assert torch.equal(moments["mu"][k], said[f"saved/exp_avg/{k}"]), k
            assert torch.equal(moments["nu"][k], said[f"saved/exp_avg_sq/{k}"]), k
        assert not torch.equal(params[k], model.get_parameter(k))
    rounded = model.get_parameter(FROZEN).bfloat16().float() if "bf16" in case else model.get_parameter(FROZEN)
    assert torch.equal(params[FROZEN], rounded.detach())
    assert torch.equal(params["model.scale"], model.model.scale)
    assert torch.equal(params["model.rotary_emb.inv_freq"], model.model.rotary_emb.inv_freq)
    assert int(state.step) == int(state.optimizer.updates) == theirs.BEFORE and int(state.skipped) == 0
    assert int(state.rng) == 5 and fds.optim.base.get_hyperparams(state.optimizer)["b2"] == 0.95
    loaded = deepspeed_files.load(files / case, step.program)
    assert all(torch.equal(loaded[k], v) for k, v in params.items()) and list(loaded) == list(step.program.order)


@pytest.mark.parametrize("case", CASES)
def test_the_run_goes_on_as_deepspeeds(files, case):
    low = "bf16" in case
    step = stepper(*([fds.cast("bfloat16")] if low else []))
    state, losses = deepspeed_files.load_state(files / case, step), []
    for i in range(theirs.BEFORE, theirs.BEFORE + theirs.AFTER):
        state, metrics = step(state, {"input_ids": theirs.rows(i)})
        losses.append(float(metrics["loss"]))
    want = json.loads((files / CASES[case] / "losses.json").read_text())
    assert losses == pytest.approx(want[theirs.BEFORE :], rel=1e-2 if low else 1e-5)
    assert min(abs(a - b) for a in want[:-1] for b in want[-1:]) > 1e-3  # the loss moves more than that
    said = load_file(files / CASES[case] / "report.safetensors")
    got = step.program.restore(state.params)
    ends = {k.removeprefix("end/fp32/"): v for k, v in said.items() if k.startswith("end/")}
    moved = sum(float((v - said[f"saved/fp32/{k}"]).square().sum()) for k, v in ends.items())
    off = sum(float((got[k] - v).square().sum()) for k, v in ends.items())
    assert ends and off < (0.1 if low else 1e-4) ** 2 * moved


def layouts(store):
    mesh = fds.sharding.mesh(dp=-1, tp=2)
    data = fds.sharding.mesh(dp=-1)["dp"]
    return {
        "shard": ([fds.shard(data), fds.checkpoint()], adamw()),
        "zero1": ([], optim.sharded(optim.offloaded(adamw()), data)),
        "store": ([fds.shard(data), fds.offload(store)], optim.streamed(adamw(), store, bucket_bytes=500)),
        "tensor": ([fds.tensor_parallel(mesh["tp"]), fds.shard(mesh["dp"])], adamw()),
    }


def loaded(where, case, layout, out):
    with HostStore() as store:
        chain, tx = layouts(store)[layout]
        step = stepper(*chain, tx=tx)
        fds.save_state(out, step, deepspeed_files.load_state(f"{where}/{case}", step))


def test_under_every_mesh(files, tmp_path):
    step = stepper()
    for n, case, layout in [
        (2, "zero1", "shard"),
        (4, "zero3", "tensor"),
        (2, "zero2-bf16", "zero1"),
        (2, "zero3", "store"),
        (4, "universal3", "shard"),
        (2, "universal1", "tensor"),
    ]:
        out = tmp_path / f"{case}-{layout}"
        ranks.run(n, loaded, str(files), case, layout, str(out))
        got, want = fds.load_state(out, step), deepspeed_files.load_state(files / case, step)
        assert all(torch.equal(a, b) for a, b in zip(fds.tree.flat(got), fds.tree.flat(want), strict=True)), (n, layout)


def test_a_chain_of_rules(files):
    step = stepper(
        tx=optim.chain(optim.clip_by_global_norm(1.0), adamw(), optim.scale_by_schedule(lambda i: 1.0 + 0 * i))
    )
    _, state, scale = deepspeed_files.load_state(files / "zero1", step, tag=f"global_step{theirs.BEFORE}").optimizer
    assert int(state.updates) == int(scale.updates) == theirs.BEFORE


def test_exported_to_hugging_face(files, tmp_path):
    step = stepper()
    fds.save(tmp_path, step.program, step.program.place(deepspeed_files.load(files / "zero3", step.program)))
    said = load_file(files / "zero3" / "report.safetensors")
    got = load_file(tmp_path / "model.safetensors")
    assert all(
        torch.equal(got[k.removeprefix("saved/fp32/")], v) for k, v in said.items() if k.startswith("saved/fp32")
    )


# --- errors ---


class Lacking(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(19, 8)
        self.other = nn.Linear(2, 2)


def test_leaves_missing_and_surplus_are_listed(files):
    for case in ("zero1", "zero3", "universal1"):
        with pytest.raises(ValueError) as error:
            deepspeed_files.load_state(files / case, stepper(module=Lacking()))
        for part in (
            "missing: other.",
            "other.weight (exp_avg_sq)",
            "surplus: ",
            "model.norm.weight (exp_avg)",
            FROZEN,
        ):
            assert part in str(error.value), (case, part)
    thawed = theirs.build().requires_grad_(True)
    with pytest.raises(ValueError, match=rf"missing: {FROZEN} \(exp_avg\).*surplus: none"):
        deepspeed_files.load_state(files / "zero3", stepper(module=thawed))
    with pytest.raises(ValueError, match=r"does not hold its values.*fds.cast"):
        deepspeed_files.load_state(files / "zero1", stepper(module=theirs.build().bfloat16()))
    wide = theirs.build()
    wide.model.norm.weight = nn.Parameter(torch.ones(9))
    for case in ("zero1", "universal3"):
        with pytest.raises(ValueError, match=r"'model.norm.weight' has \(8,\), required \(9,\)"):
            deepspeed_files.load_state(files / case, stepper(module=wide))
    for tx, words in ((optim.lion(1e-3), "has mu;"), (optim.adamw8bit(1e-3), "mu_scale"), (optim.sgd(0.1), "has none")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            deepspeed_files.load_state(files / "universal1", stepper(tx=tx))


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('unpickled')",))


def test_nothing_but_tensors_and_plain_values_is_unpickled(files, tmp_path):
    where = tmp_path / "zero1"
    shutil.copytree(files / "zero1", where)
    tag = (where / "latest").read_text()
    file = where / tag / "mp_rank_00_model_states.pt"
    found = torch.load(file, weights_only=True)
    torch.save({**found, "client": Bomb()}, file)
    with pytest.raises(ValueError, match=r"mp_rank_00_model_states.pt: has builtins.exec in it.*client_state"):
        deepspeed_files.load_state(where, stepper())
    torch.save({**found, "lr_scheduler": {"last": 3}}, file)
    deepspeed_files.load_state(where, stepper())
    whole = file.read_bytes()
    for bad in (whole[:-20], b"", b"garbage" * 50):
        file.write_bytes(bad)
        with pytest.raises(ValueError, match=r"mp_rank_00_model_states.pt: not a complete file"):
            deepspeed_files.load_state(where, stepper())


def test_what_is_no_checkpoint_is_named(files, tmp_path):
    with pytest.raises(ValueError, match="no checkpoint of DeepSpeed's ZeRO"):
        deepspeed_files.load_state(tmp_path, stepper())
    with pytest.raises(ValueError, match="global_step7: no checkpoint"):
        deepspeed_files.load_state(files / "zero1", stepper(), tag="global_step7")
    (tmp_path / "latest").write_text("../elsewhere")
    with pytest.raises(ValueError, match="plain name"):
        deepspeed_files.load_state(tmp_path, stepper())
    where = tmp_path / "zero3"
    shutil.copytree(files / "zero3", where)
    folder = where / (where / "latest").read_text()
    last = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    last.rename(folder / "zero_pp_rank_1_mp_rank_01_optim_states.pt")
    with pytest.raises(ValueError, match=r"mp_rank_01.*ds_to_universal"):
        deepspeed_files.load_state(where, stepper())
    (folder / "zero_pp_rank_1_mp_rank_01_optim_states.pt").unlink()
    with pytest.raises(ValueError, match="of 1 ranks, 2 expected"):
        deepspeed_files.load_state(where, stepper())
