"""The front door's configuration: what is read, what is resolved, and what is refused, as tables."""

import base64
import json
import sys
import warnings
from argparse import ArgumentError, ArgumentParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fds.deepspeed.table as table
from fds.deepspeed import DeepSpeedConfig, DeepSpeedConfigError, UnsupportedKeyWarning, add_config_arguments, batch
from fds.deepspeed.auto import Facts, resolve

ONE = {"train_batch_size": 8}
LEFT = None  # a value of the triangle that is not given


def load(extra: dict[str, Any], **options: Any) -> DeepSpeedConfig:
    return DeepSpeedConfig.load({**ONE, **extra}, **options)


def refused(extra: Any, **options: Any) -> DeepSpeedConfigError:
    with pytest.raises(DeepSpeedConfigError) as caught:
        load(extra, **options) if isinstance(extra, dict) else DeepSpeedConfig.load(extra, **options)
    return caught.value


# --- the batch triangle ---


@pytest.mark.parametrize(
    ("given", "ranks", "want"),
    [
        ((32, 4, 4), 2, (32, 4, 4)),
        ((32, 4, LEFT), 2, (32, 4, 4)),
        ((32, LEFT, 4), 2, (32, 4, 4)),
        ((LEFT, 4, 4), 2, (32, 4, 4)),
        ((32, LEFT, LEFT), 2, (32, 16, 1)),
        ((LEFT, 4, LEFT), 2, (8, 4, 1)),
        ((1, LEFT, LEFT), 1, (1, 1, 1)),
        ((LEFT, 3, 5), 7, (105, 3, 5)),
    ],
)
def test_triangle_closes(given: tuple[int | None, ...], ranks: int, want: tuple[int, ...]) -> None:
    assert tuple(batch.closed(*given, ranks=ranks)) == want
    names = dict(zip(batch.KEYS, given, strict=True))
    config = DeepSpeedConfig.load({k: v for k, v in names.items() if v is not None}, world_size=ranks)
    assert (config.train_batch_size, config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps) == want
    autos = DeepSpeedConfig.load({k: "auto" if v is None else v for k, v in names.items()}, world_size=ranks)
    assert autos == config
    found = {r.key for r in autos.resolved}
    assert {k for k, v in names.items() if v is None} <= found


@pytest.mark.parametrize(
    ("given", "ranks", "words"),
    [
        ((LEFT, LEFT, LEFT), 1, ["train_batch_size", "train_micro_batch_size_per_gpu", "give one of them"]),
        ((LEFT, LEFT, 4), 1, ["train_batch_size", "train_micro_batch_size_per_gpu"]),
        ((32, 4, 4), 1, ["32 != ", "4 x gradient_accumulation_steps 4 x 1 data-parallel rank = 16"]),
        ((10, 3, LEFT), 1, ["nearest legal train_batch_size: 9 or 12"]),
        ((10, LEFT, 4), 1, ["nearest legal train_batch_size: 8 or 12"]),
        ((7, LEFT, LEFT), 2, ["nearest legal train_batch_size: 6 or 8"]),
        ((2, 4, LEFT), 1, ["nearest legal train_batch_size: 4"]),
    ],
)
def test_triangle_does_not_close(given: tuple[int | None, ...], ranks: int, words: list[str]) -> None:
    with pytest.raises(DeepSpeedConfigError) as caught:
        batch.closed(*given, ranks=ranks)
    assert all(w in str(caught.value) for w in words) and set(caught.value.keys) <= set(batch.KEYS)


def test_ranks_of_tensor_parallelism_have_the_same_rows() -> None:
    config = load({"tensor_parallel": {"autotp_size": 2}, "gradient_accumulation_steps": 2}, world_size=4)
    assert (config.data_parallel_size, config.train_micro_batch_size_per_gpu, config.world_size) == (2, 2, 4)


def test_ranks_come_from_mpu_or_mesh_as_people_give_them() -> None:
    class Mpu:
        def get_data_parallel_world_size(self) -> int:
            return 4

    class Mesh:
        mesh_dim_names = ("data_parallel", "other")

        def size(self, dim: int) -> int:
            return (2, 5)[dim]

    assert DeepSpeedConfig(ONE, Mpu()).train_micro_batch_size_per_gpu == 2
    assert DeepSpeedConfig(ONE, None, Mesh()).train_micro_batch_size_per_gpu == 4
    with pytest.raises(DeepSpeedConfigError, match="get_data_parallel_world_size"):
        DeepSpeedConfig(ONE, object())
    with pytest.raises(DeepSpeedConfigError, match="data_parallel"):
        DeepSpeedConfig(ONE, None, object())


# --- sources ---


def test_every_source_is_the_same_configuration(tmp_path: Path) -> None:
    text = json.dumps({**ONE, "bf16": {"enabled": True}})
    path = tmp_path / "ds.json"
    path.write_text(text)
    wanted = DeepSpeedConfig.load(json.loads(text))
    encoded = base64.urlsafe_b64encode(text.encode()).decode()
    for source in (path, str(path), encoded, wanted.to_dict()):
        assert DeepSpeedConfig.load(source) == wanted


def test_a_configuration_is_read_from_a_copy() -> None:
    source = {**ONE, "optimizer": {"type": "Adam", "params": {"lr": 1e-3}}}
    config = DeepSpeedConfig.load(source)
    source["optimizer"]["params"]["lr"] = 2.0
    assert config.optimizer.params["lr"] == 1e-3 and config.source["optimizer"]["params"]["lr"] == 1e-3


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("no/such/file.json", "there is no such file"),
        ("?" * 300, "not base64"),
        ("\0", "no such file"),
        (base64.b64encode(b"[1, 2]").decode(), "holds list"),
        (7, "got int"),
        (None, "got NoneType"),
        (base64.b64encode(b'{"a": 1, "a": 2}').decode(), "given more than once in one section: a"),
        (base64.b64encode(b'{"fp16": {"enabled": true, "enabled": false}}').decode(), "more than once in one section: enabled"),
        (base64.b64encode(b"[" * 100_000).decode(), "base64"),
    ],
)  # fmt: skip
def test_what_is_no_configuration(source: Any, words: str) -> None:
    assert words in str(refused(source))


def test_a_directory_and_bytes_are_no_configuration(tmp_path: Path) -> None:
    assert "cannot be read" in str(refused(tmp_path))
    (tmp_path / "x").write_bytes(b"\xff\xfe\xff")
    assert "cannot be read" in str(refused(tmp_path / "x"))


HJSON = "{\n  # rows\n  train_batch_size: 8\n  optimizer: {\n    type: Adam\n  }\n}"


def test_hjson(tmp_path: Path) -> None:
    pytest.importorskip("hjson")
    (tmp_path / "ds.hjson").write_text(HJSON)
    assert DeepSpeedConfig.load(tmp_path / "ds.hjson").optimizer.type == "Adam"
    (tmp_path / "ds.hjson").write_text("{ a: 1\n a: 2 }")
    assert "more than once in one section: a" in str(refused(tmp_path / "ds.hjson"))


def test_hjson_without_its_parser_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hjson", None)
    (tmp_path / "ds.hjson").write_text(HJSON)
    assert "pip install hjson" in str(refused(tmp_path / "ds.hjson"))


# --- names ---


@pytest.mark.parametrize(
    ("extra", "key", "words"),
    [
        ({"grandient_accumulation_steps": 1}, "grandient_accumulation_steps", "did you mean 'gradient_accumulation_steps'?"),
        ({"stage": 2}, "stage", "did you mean 'zero_optimization.stage'?"),
        ({"zero_optimization": {"stag": 2}}, "zero_optimization.stag", "did you mean 'stage'?"),
        ({"zero_optimization": {"offload_param": {"devise": "cpu"}}}, "zero_optimization.offload_param.devise", "did you mean 'device'?"),
        ({"zero_optimization": {"grad_hooks": True}}, "zero_optimization.grad_hooks", "no such field"),
        ({"aio": {"thread_count": 4}}, "aio.thread_count", "intra_op_parallelism"),
        ({"bf16": {"check_overflow": True}}, "bf16.check_overflow", "check_grad_overflow"),
        ({"optimizer": {"type": "Adam", "params": {"max_grad_norm": 1.0}}}, "optimizer.params.max_grad_norm", "gradient_clipping"),
        ({"optimizer": {"type": "Adam", "params": {"learning_rate": 1.0}}}, "optimizer.params.learning_rate", "Adam has no such parameter"),
        ({"optimizer": {"type": "Adma"}}, "optimizer.type", "did you mean 'Adam'?"),
        ({"optimizer": {"type": "RMSprop"}}, "optimizer.type", "torch's"),
        ({"optimizer": {"type": "MuAdam"}}, "optimizer.type", "not there"),
        ({"optimizer": {"params": {"lr": 1.0}}}, "optimizer.params", "without optimizer.type"),
        ({"scheduler": {"type": "WarmupLr2"}}, "scheduler.type", "did you mean 'WarmupLR'?"),
        ({"scheduler": {"type": "WarmupDecayLR"}}, "scheduler.params.total_num_steps", "needs it"),
        ({"elasticity": {"enabled": False, "prefer_large_batch": True}}, "elasticity", "did you mean 'prefer_larger_batch'?"),
        ({5: 1}, "5", "a key has to be a string"),
        ({"fp32_allreduce": True}, "fp32_allreduce", "communication_data_type"),
    ],
)  # fmt: skip
def test_unknown_names(extra: dict[Any, Any], key: str, words: str) -> None:
    error = refused(extra)
    assert error.keys == (key,) and words in str(error) and key in str(error)


@pytest.mark.parametrize(
    ("extra", "path", "want"),
    [
        ({"bfloat16": {"enabled": True}}, "bf16.enabled", True),
        ({"zero_optimization": {"stage": 3, "prefetch_bucket_size": 7}}, "zero_optimization.stage3_prefetch_bucket_size", 7),
        ({"zero_optimization": {"gather_16bit_weights_on_model_save": True}}, "zero_optimization.stage3_gather_16bit_weights_on_model_save", True),
        ({"zero_optimization": {"stage3_gather_fp16_weights_on_model_save": True}}, "zero_optimization.stage3_gather_16bit_weights_on_model_save", True),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, "zero_optimization.offload_optimizer.device", "cpu"),
        ({"zero_optimization": {"stage": 3, "cpu_offload_param": True}}, "zero_optimization.offload_param.device", "cpu"),
        ({"zero_optimization": {"stage": 2, "cpu_offload": False}}, "zero_optimization.offload_optimizer.device", "none"),
        ({"zero_optimization": True}, "zero_optimization.stage", 1),
        ({"zero_optimization": {"reduce_bucket_size": 5e8}}, "zero_optimization.reduce_bucket_size", 500_000_000),
        ({"zero_optimization": {"offload_param": None}}, "zero_optimization.offload_param.device", "none"),
        ({"zero_optimization": {"leaf_module": {"names": "experts"}}}, "zero_optimization.leaf_module.names", ["experts"]),
        ({"optimizer": {"type": "adamw"}}, "optimizer.type", "AdamW"),
        ({"optimizer": {"type": "onebitadam"}}, "optimizer.type", "OneBitAdam"),
        ({"scheduler": {"type": "CosineAnnealingLR", "params": {"T_max": 3}}}, "scheduler.type", "CosineAnnealingLR"),
        ({"checkpoint": {"tag_validation": "Fail"}}, "checkpoint.tag_validation", "FAIL"),
        ({"torch_autocast": {"enabled": True, "dtype": "torch.bfloat16"}}, "torch_autocast.dtype", "bfloat16"),
        ({"comms_logger": {"verbose": True}}, "comms_logger.enabled", False),
        ({"steps_per_print": float("inf")}, "steps_per_print", None),
        ({"tensor_parallel": {"tensor_parallel": {"tp_size": 1}}}, "tensor_parallel.tp.tp_size", 1),
    ],
)  # fmt: skip
def test_aliases_deprecated_names_and_forms(extra: dict[str, Any], path: str, want: Any) -> None:
    found: Any = load(extra)
    for part in path.split("."):
        found = getattr(found, part)
    assert found == want


def test_deprecated_names_are_reported() -> None:
    with pytest.warns(DeprecationWarning, match="offload_optimizer"):
        load({"zero_optimization": {"stage": 2, "cpu_offload": True}})
    with pytest.warns(DeprecationWarning, match="stage3_gather_16bit_weights_on_model_save"):
        load({"zero_optimization": {"stage3_gather_fp16_weights_on_model_save": False}})


@pytest.mark.parametrize(
    ("extra", "keys"),
    [
        ({"bf16": {}, "bfloat16": {}}, ("bf16", "bfloat16")),
        ({"zero_optimization": {"prefetch_bucket_size": 1, "stage3_prefetch_bucket_size": 1}}, ("zero_optimization.prefetch_bucket_size", "zero_optimization.stage3_prefetch_bucket_size")),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True, "offload_optimizer": {"device": "cpu"}}}, ("zero_optimization.cpu_offload", "zero_optimization.offload_optimizer")),
    ],
)  # fmt: skip
def test_two_names_of_one_key(extra: dict[str, Any], keys: tuple[str, ...]) -> None:
    assert refused(extra).keys == keys


# --- values ---


@pytest.mark.parametrize(
    ("extra", "key", "allowed"),
    [
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage", "0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": "2"}}, "zero_optimization.stage", "0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage", "0, 1, 2 or 3"),
        ({"zero_optimization": 3}, "zero_optimization", "a section"),
        ({"zero_optimization": {"offload_param": "cpu"}}, "zero_optimization.offload_param", "a section"),
        ({"zero_optimization": {"offload_param": {"device": "gpu"}}}, "zero_optimization.offload_param.device", '"none", "cpu" or "nvme"'),
        ({"fp16": {"enabled": 1}}, "fp16.enabled", "true or false"),
        ({"fp16": {"loss_scale": -1}}, "fp16.loss_scale", "a number >= 0"),
        ({"fp16": {"loss_scale": float("nan")}}, "fp16.loss_scale", "a number >= 0"),
        ({"fp16": {"loss_scale_window": 0}}, "fp16.loss_scale_window", ">= 1"),
        ({"fp16": {"initial_scale_power": 1.5}}, "fp16.initial_scale_power", "a whole number"),
        ({"gradient_clipping": "1.0"}, "gradient_clipping", "a number >= 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps", ">= 1"),
        ({"gradient_accumulation_steps": [2]}, "gradient_accumulation_steps", ">= 1"),
        ({"communication_data_type": "fp8"}, "communication_data_type", '"fp32", "fp16" or "bf16"'),
        ({"optimizer": {"type": 3}}, "optimizer.type", "a string"),
        ({"optimizer": {"type": "Adam", "params": {"betas": 0.9}}}, "optimizer.params.betas", "a list of 2 times"),
        ({"optimizer": {"type": "Adam", "params": {"betas": [0.9, 1.0]}}}, "optimizer.params.betas", "< 1"),
        ({"optimizer": {"type": "Adam", "params": {"lr": "1e-4"}}}, "optimizer.params.lr", "a number >= 0"),
        ({"optimizer": {"type": "Adam", "params": {"amsgrad": True}}}, "optimizer.params.amsgrad", "False"),
        ({"aio": {"block_size": 1000}}, "aio.block_size", "a multiple of 4,096"),
        ({"log_level": "loud"}, "log_level", '"debug"'),
        ({"pipeline": 3}, "pipeline", "nothing"),
    ],
)  # fmt: skip
def test_wrong_values_say_what_is_allowed(extra: dict[str, Any], key: str, allowed: str) -> None:
    error = refused(extra)
    assert error.keys == (key,) and allowed in str(error)


@pytest.mark.parametrize(
    ("extra", "world", "keys"),
    [
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, 1, ("fp16.enabled", "bf16.enabled")),
        ({"bf16": {"enabled": True}, "torch_autocast": {"enabled": True}}, 1, ("bf16.enabled", "torch_autocast.enabled")),
        ({"data_types": {"grad_accum_dtype": "fp16"}}, 1, ("data_types.grad_accum_dtype",)),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, 1, ("zero_optimization.offload_param.device", "zero_optimization.stage")),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, 1, ("zero_optimization.offload_optimizer.device", "zero_optimization.stage")),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}}, 1, ("zero_optimization.offload_optimizer.device", "zero_optimization.stage")),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, 1, ("zero_optimization.offload_optimizer.nvme_path",)),
        ({"zero_optimization": {"stage": 2, "zero_quantized_weights": True}}, 1, ("zero_optimization.zero_quantized_weights", "zero_optimization.stage")),
        ({"zero_optimization": {"stage": 3, "zeropp_loco_param": {"err_beta": 0.8}}}, 1, ("zero_optimization.zeropp_loco_param", "zero_optimization.zero_quantized_gradients")),
        ({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True, "zeropp_loco_param": {"beta": 1}}}, 1, ("zero_optimization.zeropp_loco_param.beta",)),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 3}}, 4, ("zero_optimization.zero_hpz_partition_size",)),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2, "mics_shard_size": 2}}, 4, ("zero_optimization.mics_shard_size", "zero_optimization.zero_hpz_partition_size")),
        ({"tensor_parallel": {"autotp_size": 3}}, 4, ("tensor_parallel.autotp_size",)),
        ({"tensor_parallel": {"autotp_size": 2, "tp": {"tp_size": 4}}}, 4, ("tensor_parallel.tp.tp_size", "tensor_parallel.autotp_size")),
        ({"hybrid_engine": {"enabled": True, "inference_tp_size": 3}}, 4, ("hybrid_engine.inference_tp_size",)),
        ({"data_parallel_size": 3}, 4, ("data_parallel_size",)),
        ({"optimizer": {"type": "OneBitAdam"}, "zero_optimization": {"stage": 1}}, 1, ("optimizer.type", "zero_optimization.stage")),
        ({"optimizer": {"type": "OneBitAdam"}, "tensor_parallel": {"autotp_size": 2}}, 2, ("optimizer.type", "tensor_parallel.autotp_size")),
        ({"optimizer": {"type": "Muon"}, "zero_optimization": {"stage": 3}}, 1, ("optimizer.type", "zero_optimization.stage")),
        ({"optimizer": {"type": "Muon"}, "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}, 1, ("optimizer.type", "zero_optimization.offload_optimizer.device")),
        ({"optimizer": {"type": "Lamb"}, "tensor_parallel": {"autotp_size": 2}}, 2, ("optimizer.type", "tensor_parallel.autotp_size")),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}, "tensor_parallel": {"autotp_size": 2}}, 4, ("tensor_parallel.autotp_size", "zero_optimization.mics_shard_size")),
        ({"zero_optimization": {"stage": 2}, "communication_data_type": "bf16"}, 1, ("communication_data_type",)),
        ({"zero_optimization": {"stage": 2}, "tensor_parallel": {"autotp_size": 2}, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "bf16"}}, 2, ("data_types.grad_accum_dtype",)),
        ({"fp16": {"enabled": True, "initial_scale_power": 4, "min_loss_scale": 32}}, 1, ("fp16.min_loss_scale", "fp16.initial_scale_power")),
        ({"fp16": {"enabled": True, "initial_scale_power": 127}}, 1, ("fp16.initial_scale_power",)),
        ({"fp16": {"enabled": True, "loss_scale": 1e40}}, 1, ("fp16.loss_scale",)),
        ({"fp16": {"enabled": True}, "zero_optimization": {"stage": 3, "zero_quantized_gradients": True, "zeropp_loco_param": {}}}, 1, ("zero_optimization.zeropp_loco_param", "fp16.loss_scale")),
        ({"gradient_allreduce_op": "sum", "zero_optimization": {"stage": 2}}, 1, ("gradient_allreduce_op", "zero_optimization.stage")),
        ({"curriculum_learning": {"enabled": True, "min_difficulty": 8, "max_difficulty": 16, "schedule_type": "fixed_root"}}, 1,
         ("curriculum_learning.schedule_config.total_curriculum_step", "curriculum_learning.schedule_config.difficulty_step", "curriculum_learning.schedule_config.root_degree")),
        ({"curriculum_learning": {"enabled": True, "min_difficulty": 32, "max_difficulty": 16, "schedule_type": "fixed_discrete", "schedule_config": {"difficulty": [1, 2], "max_step": [1, 2]}}}, 1,
         ("curriculum_learning.min_difficulty", "curriculum_learning.max_difficulty", "curriculum_learning.schedule_config.difficulty", "curriculum_learning.schedule_config.max_step")),
    ],
)  # fmt: skip
def test_contradictions_name_all_keys(extra: dict[str, Any], world: int, keys: tuple[str, ...]) -> None:
    error = refused(extra, world_size=world)
    assert error.keys == keys and all(k in str(error) for k in keys)


def test_all_problems_come_at_once() -> None:
    error = refused({"zero_optimization": {"stage": 9, "stag": 1}, "fp16": {"enabled": "yes"}, "amp": {"enabled": True}})  # fmt: skip
    assert set(error.keys) == {"zero_optimization.stage", "zero_optimization.stag", "fp16.enabled", "amp"}


# --- what fds does not have ---


@pytest.mark.parametrize(
    ("extra", "key", "path", "neutral"),
    [
        ({"elasticity": {"enabled": True}}, "elasticity", "elasticity", {"enabled": False, "min_gpus": 2}),
        ({"autotuning": {"enabled": True}}, "autotuning", "autotuning", None),
        ({"weight_quantization": {"num_bits": 4}}, "weight_quantization", "weight_quantization", {"enabled": False}),
        ({"pipeline": {"stages": 2}}, "pipeline", "pipeline", {}),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size", "sequence_parallel_size", 1),
        ({"managed_gradient_accumulation": False}, "managed_gradient_accumulation", "managed_gradient_accumulation", True),
        ({"zero_optimization": {"stage": 3, "zenflow": {}}}, "zero_optimization.zenflow", "zero_optimization.zenflow", None),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, "zero_optimization.offload_optimizer.ratio", "zero_optimization.offload_optimizer.ratio", 1.0),
        ({"activation_checkpointing": {"partition_activations": True}}, "activation_checkpointing.partition_activations", "activation_checkpointing.partition_activations", False),
        ({"hybrid_engine": {"enabled": True, "enable_cuda_graph": True}}, "hybrid_engine.enable_cuda_graph", "hybrid_engine.enable_cuda_graph", False),
        ({"bf16": {"enabled": True, "bf16_optimizer_states": True}}, "bf16.bf16_optimizer_states", "bf16.bf16_optimizer_states", False),
        ({"compile": {"passes": ["z3"]}}, "compile.passes", "compile.passes", None),
    ],
)  # fmt: skip
def test_unsupported_keys_are_errors_or_warnings(extra: dict[str, Any], key: str, path: str, neutral: Any) -> None:
    error = refused(extra)
    assert error.keys == (key,) and "has no effect in fds" in str(error) and "warn" in str(error)
    with pytest.warns(UnsupportedKeyWarning, match="has no effect in fds"):
        config = load(extra, on_unsupported="warn")
    assert len(config.unsupported) == 1 and config.unsupported[0].startswith(key)
    names = path.split(".")
    nested: Any = neutral
    for name in reversed(names):
        nested = {name: nested}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(nested)


def test_what_is_switched_off_asks_for_nothing() -> None:
    assert not load({"hybrid_engine": {"enabled": False, "enable_cuda_graph": True}}).unsupported
    assert not load({"bf16": {"enabled": False, "bf16_optimizer_states": True}}).unsupported


def test_on_unsupported_is_one_of_two() -> None:
    with pytest.raises(ValueError, match="did you mean 'warn'"):
        load({}, on_unsupported="warm")


def test_a_vocabulary_that_is_no_multiple_of_eight() -> None:
    with pytest.warns(UserWarning, match="vocabulary_size: 50257"):
        load({"vocabulary_size": 50257})


# --- auto ---

HF = {
    "train_micro_batch_size_per_gpu": 4,
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {k: "auto" for k in ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps")},
    },
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
    },
}


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16, dtype=torch.bfloat16)
        self.config = type("Config", (), {"hidden_size": 16})()


def test_the_template_of_transformers_is_resolved_and_says_why() -> None:
    answers = {"optimizer.params.lr": 2e-4, "scheduler.params.warmup_num_steps": 10, "scheduler.params.total_num_steps": 100}  # fmt: skip
    config = DeepSpeedConfig.load(HF, world_size=2, auto=answers, model=Tiny())
    assert config.train_batch_size == 8 and config.gradient_clipping == 1.0 and config.bf16.enabled
    assert config.optimizer.params == {"lr": 2e-4, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
    assert config.scheduler.params == {"warmup_min_lr": 0.0, "warmup_max_lr": 2e-4, "warmup_num_steps": 10, "total_num_steps": 100}  # fmt: skip
    zero = config.zero_optimization
    assert (zero.reduce_bucket_size, zero.stage3_prefetch_bucket_size, zero.stage3_param_persistence_threshold) == (256, 230, 160)  # fmt: skip
    why = {r.key: r.why for r in config.resolved}
    assert "hidden size 16" in why["zero_optimization.reduce_bucket_size"]
    assert why["scheduler.params.warmup_max_lr"] == "the optimizer's lr"
    assert "bfloat16" in why["bf16.enabled"] and why["optimizer.params.lr"] == "answered in auto="
    assert all(f"# {r}" in str(config) for r in config.resolved)


def test_an_auto_that_nothing_resolves_names_itself() -> None:
    error = refused({**HF})
    assert set(error.keys) == {"optimizer.params.lr", "scheduler.params.warmup_max_lr", "scheduler.params.warmup_num_steps", "scheduler.params.total_num_steps"} - {"scheduler.params.warmup_max_lr"}  # fmt: skip
    assert 'auto={"optimizer.params.lr": ...}' in str(error)
    assert refused({"train_batch_size": "auto"}).keys == batch.KEYS[:2]


def test_an_answer_that_nobody_asked_for_is_an_error() -> None:
    assert refused({}, auto={"optimizer.params.lr": 1.0}).keys == ("optimizer.params.lr",)


def test_auto_that_is_a_value_stays() -> None:
    assert load({"data_types": {"keep_in_fp32_modules": "auto"}}).data_types.keep_in_fp32_modules == "auto"


def test_facts_of_a_model() -> None:
    assert Facts.of(Tiny()) == Facts(16, "bfloat16")
    assert Facts.of(object()) == Facts()
    vision = type("Vision", (), {"hidden_sizes": [8, 32], "text_config": None})()
    assert Facts.of(vision).hidden_size == 32


def test_the_pass_changes_nothing_else() -> None:
    given = {"train_batch_size": 4, "unknown": "auto", "fp16": {"enabled": False}, "optimizer": 3}
    assert resolve(given).config == given


# --- as a value ---


def test_defaults_are_those_of_the_code() -> None:
    config = load({})
    assert config.gradient_clipping == 1.0 and config.steps_per_print is None
    assert config.zero_optimization.offload_optimizer.pin_memory and not config.zero_optimization.stage
    assert config.fp16.initial_scale_power == 16 and config.aio.queue_depth == 8


def test_it_compares_prints_and_reads_itself() -> None:
    config = DeepSpeedConfig.load(HF, world_size=2, auto={"optimizer.params.lr": 1e-3, "scheduler.params.warmup_num_steps": 1, "scheduler.params.total_num_steps": 9})  # fmt: skip
    again = DeepSpeedConfig.load(config.to_dict(), world_size=2)
    assert again == config and json.loads(json.dumps(config.to_dict())) == config.to_dict()
    assert eval(repr(config)) == config
    assert load({}) != load({"bf16": {"enabled": True}})


def test_paths_that_were_given() -> None:
    config = load({"activation_checkpointing": {}, "zero_optimization": {"stage": 3}})
    assert config.given == {"train_batch_size", "activation_checkpointing", "zero_optimization", "zero_optimization.stage"}  # fmt: skip


def test_the_table_in_the_documents_is_the_code() -> None:
    path = Path(__file__).parents[2] / "docs" / "deepspeed.md"
    assert path.read_text() == table.written(path.read_text()), "run: python -m fds.deepspeed.table docs/deepspeed.md"
    with pytest.raises(ValueError, match="marks"):
        table.written("")


# --- arguments ---


def test_arguments() -> None:
    parser = add_config_arguments(ArgumentParser())
    none, all_of_it = parser.parse_args([]), parser.parse_args(["--deepspeed", "--deepspeed_config", "a.json", "--deepscale", "--deepscale_config", "b.json"])  # fmt: skip
    assert vars(none) == {"deepspeed": False, "deepspeed_config": None, "deepscale": False, "deepscale_config": None}
    assert vars(all_of_it) == {"deepspeed": True, "deepspeed_config": "a.json", "deepscale": True, "deepscale_config": "b.json"}  # fmt: skip
    with pytest.raises(ArgumentError):
        add_config_arguments(parser)
