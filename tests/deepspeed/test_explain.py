"""What a configuration is said to cost is what a step on two ranks holds and sends."""

import json
import subprocess
import sys

import pytest
import ranks
import torch
import zoo

import fds
from fds import tree
from fds.deepspeed import DeepSpeedConfig
from fds.deepspeed.account import abstract, drifts, memory, traffic
from fds.deepspeed.chain import recipe
from fds.deepspeed.explain import explain, main, model_of

ZERO = "zero_optimization"
ADAM = {"type": "AdamW", "params": {"lr": 1e-3}}
BF16 = {"bf16": {"enabled": True}}
CASES = {
    "stage 0": {},
    "stage 0, bf16": BF16,
    "stage 0, bf16 on the wire": {**BF16, "communication_data_type": "bf16"},
    "stage 1": {ZERO: {"stage": 1}},
    "stage 2, bf16": {ZERO: {"stage": 2}, **BF16},
    "stage 2, bf16, summed in float32": {ZERO: {"stage": 2}, **BF16, "communication_data_type": "fp32"},
    "stage 2, bf16, wide": {ZERO: {"stage": 2}, **BF16, "data_types": {"grad_accum_dtype": "fp32"}},
    "stage 3": {ZERO: {"stage": 3}},
    "stage 3, recomputed": {ZERO: {"stage": 3}, "activation_checkpointing": {}},
    "stage 3, bf16": {ZERO: {"stage": 3}, **BF16, "activation_checkpointing": {}},
    "one bit": {"optimizer": {"type": "OneBitAdam", "params": {"lr": 1e-3}}},
    "stage 3, bf16, float32 on the wire": {ZERO: {"stage": 3}, **BF16, "communication_data_type": "fp32"},
}
OPERATIONS = {"gather": "gather", "reduce-scatter": "scatter", "all-reduce": "total"}
SLACK = 256  # bytes: padding of shards, and the scalars of losses and norms, which the closed forms leave out


def config(changes, world=2):
    return DeepSpeedConfig.load({"train_batch_size": 8, "gradient_accumulation_steps": 2, "optimizer": ADAM, **changes}, world_size=world)  # fmt: skip


def one_step(changes):
    """Bytes that one step held (parameters, state) and sent, on this rank."""
    model = zoo.build("llama", training=True)
    made = recipe(config(changes), model).build(model=model)
    step = made["step"]
    state = step.init(made["params"])
    held = tree.nbytes(state.params), tree.nbytes(state.optimizer)
    rank = fds.sharding.mesh(dp=-1)["dp"].rank
    ids = zoo.batch("llama", 8, seed=0)["input_ids"].chunk(2)[rank]
    with fds.sharding.record() as wire:
        step(state, {"input_ids": ids, "labels": ids})
    return held, dict(wire.bytes)


@pytest.mark.parametrize("name", CASES)
def test_memory_and_traffic_are_what_happens(name):
    with torch.device("meta"):
        model = zoo.build("llama", training=True)
    step = abstract(config(CASES[name]), model)
    said = memory(config(CASES[name]), step)
    wanted = dict.fromkeys(OPERATIONS.values(), 0)
    for m in traffic(config(CASES[name]), step):
        assert m.axis == "dp" and m.exact == (name != "one bit")  # its warm-up is exact, and what comes after it is not
        wanted[OPERATIONS[m.operation]] += m.nbytes
    for held, sent in ranks.run(2, one_step, CASES[name]):
        assert held == (said.parameters, said.optimizer)
        for operation, n in wanted.items():
            assert abs(sent.get(operation, 0) - n) <= SLACK, (operation, sent, wanted)


def test_one_rank_sends_nothing_and_offload_moves_the_state():
    with torch.device("meta"):
        model = zoo.build("llama", training=True)
    changes = {ZERO: {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/nowhere"}}}
    step = abstract(config(changes, world=1), model)
    m = memory(config(changes, world=1), step)
    assert (
        traffic(config(changes, world=1), step) == []
        and m.where_optimizer == "files"
        and m.where_parameters == "device"
    )
    assert m.device == m.parameters + m.gradients + m.in_use
    both = {ZERO: {"stage": 3, "offload_param": {"device": "cpu"}}}
    m = memory(config(both), abstract(config(both), model))
    assert (m.where_parameters, m.where_optimizer, m.device) == ("host memory", "host memory", m.in_use)


def test_a_hybrid_engine_is_explained_without_its_ranks():
    with torch.device("meta"):
        model = zoo.build("llama", training=True)
    said = explain(
        config({ZERO: {"stage": 3}, "hybrid_engine": {"enabled": True, "inference_tp_size": 2}}, world=4), model
    )
    assert "serving = fds.inference.hybrid(" in said and "# Memory of a rank" in said


def test_two_levels_go_over_two_axes():
    with torch.device("meta"):
        model = zoo.build("llama", training=True)
    given = config({ZERO: {"stage": 3, "mics_shard_size": 2}}, world=4)
    found = traffic(given, abstract(given, model))
    assert [(m.operation, m.axis) for m in found] == [("gather", "local"), ("reduce-scatter", "local"), ("all-reduce", "node")]  # fmt: skip
    assert found[2].nbytes * 2 * 2 == found[1].nbytes  # half of it, and once for two microbatches


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "gradient_clipping is not given: 1.0"),
        ({}, "steps_per_print is not given"),
        (BF16, "bf16: a step that is not finite"),
        ({ZERO: {"stage": 3}}, "stage3_prefetch_bucket_size is not given: 5e7"),
        ({ZERO: {"stage": 3}}, "overlap_comm is not given: true"),
        ({ZERO: {"stage": 3, "offload_param": {}}}, "offload_param.device is not given"),
        ({ZERO: {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "pin_memory is not given: true"),
        ({"comms_logger": {"verbose": True}}, "comms_logger.enabled is false: off"),
        ({"optimizer": {"type": "Adam"}}, "decoupled decay"),
        ({"activation_checkpointing": {}}, "every block is recomputed"),
    ],
)
def test_drifts(changes, words):
    assert any(words in d for d in drifts(config(changes)))


def test_what_is_given_drifts_no_more():
    given = {"gradient_clipping": 0.5, "steps_per_print": 10, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
    assert list(drifts(config(given))) == []


LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}  # fmt: skip


@pytest.fixture
def files(tmp_path):
    (tmp_path / "model.json").write_text(json.dumps(LLAMA))
    (tmp_path / "ds.json").write_text(json.dumps({"train_batch_size": 8, "optimizer": {"type": "AdamW", "params": {"lr": "auto"}}, ZERO: {"stage": 3}}))  # fmt: skip
    return str(tmp_path / "ds.json"), str(tmp_path / "model.json")


def test_the_command(files, capsys):
    ds, model = files
    assert main([ds, "--model", model, "--world", "4", "--auto", "optimizer.params.lr=1e-4"]) == 0
    out = capsys.readouterr().out
    for words in ('"stage": 3', "# optimizer.params.lr = 0.0001: answered", 'fds.shard(mesh["dp"])', "# Memory of a rank", "gather", "# Not what it seems"):  # fmt: skip
        assert words in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "optimizer.params.lr"),
        (["--auto", "optimizer.params.lr"], "required KEY=VALUE"),
        (["--auto", "optimizer.params.lr=x"], "required KEY=VALUE with JSON"),
        (["--model", "no/such/config.json"], "--model no/such/config.json"),
    ],
)
def test_the_command_says_what_is_wrong(files, capsys, arguments, words):
    ds, model = files
    assert main([ds, "--model", model, *arguments]) == 1
    assert words in capsys.readouterr().err


def test_the_chain_that_is_printed_runs(files):
    model = model_of(files[1])
    text = explain(config({ZERO: {"stage": 3}}, world=1), model)
    code = text.split("# Chain\n")[1].split("\n# Memory")[0]
    names = {"model": model}
    exec(code, names)
    assert [t.name for t in names["step"].program.history] == ["shard"]


def test_without_an_optimizer_there_is_no_step_to_count(files):
    ds = DeepSpeedConfig.load({"train_batch_size": 2})
    assert "there is none in the configuration" in explain(ds, model_of(files[1]))


def test_reading_a_configuration_loads_no_model_library():
    code = "import sys, fds.deepspeed; fds.deepspeed.DeepSpeedConfig({'train_batch_size': 1}); print('transformers' in sys.modules, 'triton' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert out.stdout.split() == ["False", "False"]
