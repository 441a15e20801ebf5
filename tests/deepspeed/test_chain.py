"""What configurations mean, as they are printed; on one process, for any number of ranks."""

import pytest
import zoo

from fds.deepspeed import DeepSpeedConfig, DeepSpeedConfigError
from fds.deepspeed.chain import recipe
from fds.deepspeed.client import groups_of
from fds.deepspeed.recipe import Call, Line, Name, Recipe

ADAM = {"type": "AdamW", "params": {"lr": 1e-3}}
RULE = "fds.optim.adamw(0.001, b1=0.9, b2=0.999, eps=1e-08, weight_decay=0.0)"
DP, ZERO = 'mesh["dp"]', "zero_optimization"


def lines(given, *, world=4, checkpointing=False):
    """``{name: expression}`` of the printed program."""
    model = zoo.build("llama")
    if checkpointing:
        model.gradient_checkpointing_enable()
    full = {"train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0, "optimizer": ADAM, **given}
    plan = recipe(DeepSpeedConfig.load(full, world_size=world), model)
    compile(plan.source(), "printed", "exec")
    return {", ".join(x.names): x.expression.source() if hasattr(x.expression, "source") else x.expression for x in plan.lines}  # fmt: skip


def zero(stage, **more):
    return {ZERO: {"stage": stage, **more}}


CHAINS = {
    "plain": ({}, f"fds.replicate({DP})"),
    "sum": ({"gradient_allreduce_op": "sum"}, f'fds.replicate({DP}, reduce="sum")'),
    "bf16": ({"bf16": {"enabled": True}}, f'fds.cast("bfloat16"), fds.replicate({DP})'),
    "bf16 on the wire": ({"bf16": {"enabled": True}, "communication_data_type": "bf16"}, f'fds.replicate({DP}), fds.cast("bfloat16")'),
    "zero-2": (zero(2), ""),
    "zero-2, bf16": ({**zero(2), "bf16": {"enabled": True}}, 'fds.cast("bfloat16", stored=True)'),
    "zero-2, fp16": ({**zero(2), "fp16": {"enabled": True}}, 'fds.cast("float16")'),
    "zero-2, wide gradients": ({**zero(2), "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}, 'fds.cast("bfloat16")'),
    "zero-3": (zero(3), f"fds.shard({DP})"),
    "zero-3, bf16": ({**zero(3), "bf16": {"enabled": True}}, f'fds.shard({DP}), fds.cast("bfloat16")'),
    "zero-3, wide wire": ({**zero(3), "bf16": {"enabled": True}, "communication_data_type": "fp32"}, f'fds.cast("bfloat16"), fds.shard({DP})'),
    "persistent": (zero(3, stage3_param_persistence_threshold=100), f"fds.shard({DP}, threshold=100)"),
    "large": (zero(3, stage3_max_live_parameters=100), f'fds.shard({DP}), fds.checkpoint("matmul")'),
    "mics": (zero(3, mics_shard_size=2), 'fds.shard(mesh["local"]), fds.replicate(mesh["node"])'),
    "mics, sum": ({**zero(3, mics_shard_size=2), "gradient_allreduce_op": "sum"}, 'fds.shard(mesh["local"], reduce="sum"), fds.replicate(mesh["node"], reduce="sum")'),
    "tensor parallel, stage 2": ({**zero(2), "bf16": {"enabled": True}, "tensor_parallel": {"autotp_size": 2}}, f'fds.tensor_parallel(mesh["tp"]), fds.shard({DP}), fds.cast("bfloat16")'),
    "hpz": (zero(3, zero_hpz_partition_size=2), 'fds.shard(mesh["local"]), fds.checkpoint("matmul"), fds.shard(mesh["node"])'),
    "zero++": (zero(3, zero_quantized_weights=True, zero_quantized_gradients=True, zeropp_loco_param={"err_beta": 0.5}),
               f'fds.shard({DP}), fds.quantized(weights="int8", gradients="int4", feedback=fds.sharding.ErrorFeedback(beta=0.5, reset=1024))'),
    "frozen in 8 bits": (zero(3, zero_quantized_nontrainable_weights=True), f'fds.quantize_frozen("int8"), fds.shard({DP})'),
    "tensor parallel": ({**zero(3), "tensor_parallel": {"autotp_size": 2}}, f'fds.tensor_parallel(mesh["tp"]), fds.shard({DP})'),
    "autocast": ({"torch_autocast": {"enabled": True}}, f'fds.replicate({DP}), fds.autocast("bfloat16")'),
    "recompute": ({**zero(3), "activation_checkpointing": {}}, f"fds.shard({DP}), fds.checkpoint()"),
    "activations away": ({**zero(1), "activation_checkpointing": {"cpu_checkpointing": True}}, "fds.checkpoint(store=activations)"),
    "all away": (zero(3, offload_param={"device": "cpu", "buffer_count": 3}, offload_optimizer={"device": "cpu"}), f"fds.shard({DP}), fds.offload(host, window=3)"),
    "one-bit": ({"optimizer": {"type": "OneBitAdam", "params": {"lr": 1e-3, "freeze_step": 10}}}, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
def test_the_chain(name):
    given, want = CHAINS[name]
    assert lines(given)["transform"] == f"fds.chain({want})"


OPTIMIZERS = {
    "plain": ({}, RULE),
    "clipped": ({"gradient_clipping": 0.5}, f"fds.optim.chain(fds.optim.clip_by_global_norm(0.5), {RULE})"),
    "zero-1": (zero(1), f"fds.optim.sharded({RULE}, {DP})"),
    "masters": ({**zero(2), "bf16": {"enabled": True}}, f"fds.optim.sharded(fds.optim.with_master({RULE}), {DP})"),
    "wide sums": ({**zero(2), "bf16": {"enabled": True}, "communication_data_type": "fp32"}, f"fds.optim.sharded(fds.optim.with_master({RULE}), {DP}, sum_dtype=torch.float32)"),
    "beside tensor parallelism": ({**zero(2), "bf16": {"enabled": True}, "tensor_parallel": {"autotp_size": 2}}, RULE),
    "away": (zero(2, offload_optimizer={"device": "cpu"}), f"fds.optim.sharded(fds.optim.streamed({RULE}, host), {DP})"),
    "in files": (zero(3, offload_optimizer={"device": "nvme", "nvme_path": "/x"}), f"fds.optim.streamed({RULE}, files)"),
    "lion": ({"optimizer": {"type": "Lion", "params": {"lr": 1e-4}}}, "fds.optim.lion(0.0001, b1=0.9, b2=0.999, weight_decay=0.0)"),
    "scheduled": ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}}, RULE.replace("0.001", "schedule.learning_rate")),
    "cycled": ({"scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 0, "cycle_max_lr": 1e-3}}},
               f"fds.optim.scheduled({RULE.replace('0.001', 'schedule.learning_rate').replace('b2=0.999', 'b2=0.99')}, b1=schedule.momentum)"),
    "one-bit": ({"optimizer": {"type": "OneBitAdam", "params": {"lr": 1e-3, "freeze_step": 10}}}, "fds.optim.onebit_adam(0.001, b1=0.9, b2=0.999, eps=1e-08, weight_decay=0.0, freeze_step=10, axis=mesh[\"dp\"])"),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizer(name):
    given, want = OPTIMIZERS[name]
    assert lines(given)["tx"] == want


def test_other_lines():
    found = lines({"gradient_accumulation_steps": 4, "fp16": {"enabled": True, "loss_scale": 128}, "compile": {"deepcompile": True}})  # fmt: skip
    assert found["step"] == "fds.compile(step)"
    assert lines({"fp16": {"enabled": True}})["step"].endswith(
        "loss_scale=fds.DynamicLossScale(initial_power=16, window=1000, hysteresis=2, consecutive_hysteresis=False, minimum=1.0))"
    )
    low = lines({"torch_autocast": {"enabled": True, "dtype": "fp16"}})
    assert low["step"].endswith("loss_scale=fds.DynamicLossScale(window=2000, hysteresis=1))")
    assert "loss_scale" not in lines({"torch_autocast": {"enabled": True}})["step"]
    assert lines({"tensor_parallel": {"autotp_size": 2}})["mesh"] == "fds.sharding.mesh(dp=-1, tp=2)"
    aio = {"block_size": 8192, "intra_op_parallelism": 2}
    files = lines({**zero(3, offload_param={"device": "nvme", "nvme_path": "/x", "max_in_cpu": 1000}, offload_optimizer={"device": "nvme", "nvme_path": "/x"}), "aio": aio})  # fmt: skip
    assert files["files"].startswith('fds.FileStore("/x", settings=aio.Settings.of({"block_size": 8192,')
    assert files["parameters"].endswith("budget=4000)")
    assert "without_checkpointing" in lines({}, checkpointing=True)["model"]
    assert lines({"hybrid_engine": {"enabled": True}})["serving"].startswith("fds.inference.hybrid(program, max_out_tokens=512")  # fmt: skip


def test_what_does_not_fit_names_its_key():
    for given, key in (
        ({"communication_data_type": "fp16"}, "communication_data_type"),
        ({**zero(2), "communication_data_type": "bf16"}, "communication_data_type"),
        ({**zero(2), "fp16": {"enabled": True}, "communication_data_type": "fp16"}, "communication_data_type"),
        ({"bf16": {"enabled": True}, "optimizer": {"type": "OneBitAdam"}, "communication_data_type": "bf16"}, "communication_data_type"),
        ({**zero(3, mics_shard_size=2), "tensor_parallel": {"autotp_size": 2}}, "tensor_parallel.autotp_size, zero_optimization.mics_shard_size"),
    ):  # fmt: skip
        with pytest.raises(DeepSpeedConfigError) as error:
            lines(given)
        assert ", ".join(error.value.keys) == key


def test_one_bit_has_one_group():
    model = zoo.build("llama")
    groups = [{"params": [model.lm_head.weight], "weight_decay": 0.1}, {"params": [model.model.norm.weight]}]
    found = DeepSpeedConfig.load({"train_batch_size": 2, "optimizer": {"type": "OneBitAdam"}})
    with pytest.raises(DeepSpeedConfigError, match=r"optimizer\.type='OneBitAdam'.*there are 2 groups"):
        recipe(found, model, groups=groups_of(found, model, groups))


def test_a_recipe_prints_what_it_runs():
    plan = Recipe((Line(("p",), Call("pathlib.PurePath", "a", "b")), Line(("x", "y"), (Name("p", attribute="name"), {"k": [1, 0.5]}), "two")))  # fmt: skip
    names: dict = {}
    exec(plan.source().replace("import fds", "import pathlib"), names)
    built = plan.build()
    assert (names["x"], names["y"]) == (built["x"], built["y"]) == ("b", {"k": [1, 0.5]})
    assert plan.source().endswith('x, y = (p.name, {"k": [1, 0.5]})  # two\n')
    assert plan["p"] == Call("pathlib.PurePath", "a", "b")
