"""fds: models as pure functions over parameter trees; sharding, offload, adapters and precision as transformations that compose."""

import importlib
from typing import TYPE_CHECKING, Any

from fds import losses, optim, sharding, tree
from fds.checkpoint import load, load_adapters, save, save_adapters
from fds.compiling import compile
from fds.frame import with_seed, with_updates
from fds.functional import functionalize
from fds.grad import value_and_grad
from fds.inference.engine import default_inference_config, init_inference
from fds.inference.generate import generate
from fds.initial import init_params
from fds.lora import fuse_lora, lora
from fds.loss_scale import DynamicLossScale
from fds.offload import FileStore, HostStore, StoreError, offload
from fds.precision import autocast, cast, freeze
from fds.program import Lens, Program
from fds.quantize import quantize_frozen
from fds.remat import checkpoint
from fds.run_state import load_extra, load_state, save_state
from fds.sharding import init_distributed, launch, quantized, replicate, shard, tensor_parallel
from fds.train import NonFiniteError, TrainState, TrainStep, train_step
from fds.transform import Transform, around, at, chain, relayout, through

if TYPE_CHECKING:
    from fds.deepspeed import (
        DeepSpeedConfig,
        DeepSpeedConfigError,
        DeepSpeedTransformerConfig,
        DeepSpeedTransformerLayer,
        Engine,
        OnDevice,
        __git_branch__,
        __git_hash__,
        add_config_arguments,
        add_tuning_arguments,
        checkpointing,
        get_accelerator,
        get_model_profile,
        initialize,
        is_compile_supported,
        log_dist,
        logger,
        zero,
    )

__version__ = "0.1.0"

__all__ = [
    "DeepSpeedConfig",
    "DeepSpeedConfigError",
    "DeepSpeedTransformerConfig",
    "DeepSpeedTransformerLayer",
    "DynamicLossScale",
    "Engine",
    "FileStore",
    "HostStore",
    "Lens",
    "NonFiniteError",
    "OnDevice",
    "Program",
    "StoreError",
    "TrainState",
    "TrainStep",
    "Transform",
    "__git_branch__",
    "__git_hash__",
    "add_config_arguments",
    "add_tuning_arguments",
    "around",
    "at",
    "autocast",
    "cast",
    "chain",
    "checkpoint",
    "checkpointing",
    "compile",
    "default_inference_config",
    "freeze",
    "functionalize",
    "fuse_lora",
    "generate",
    "get_accelerator",
    "get_model_profile",
    "init_distributed",
    "init_inference",
    "init_params",
    "initialize",
    "is_compile_supported",
    "launch",
    "load",
    "load_adapters",
    "load_extra",
    "load_state",
    "log_dist",
    "logger",
    "lora",
    "losses",
    "offload",
    "optim",
    "quantize_frozen",
    "quantized",
    "relayout",
    "replicate",
    "save",
    "save_adapters",
    "save_state",
    "shard",
    "sharding",
    "tensor_parallel",
    "through",
    "train_step",
    "tree",
    "value_and_grad",
    "with_seed",
    "with_updates",
    "zero",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """The front door's names: it is imported when one of them is used."""
    if name not in __all__:
        raise AttributeError(f"module 'fds' has no attribute {name!r}")
    return getattr(importlib.import_module("fds.deepspeed"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
