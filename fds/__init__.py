"""fds: models as pure functions over parameter trees; sharding, offload, adapters and precision as transformations that compose."""

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

__version__ = "0.1.0"

__all__ = [
    "DynamicLossScale",
    "FileStore",
    "HostStore",
    "Lens",
    "NonFiniteError",
    "Program",
    "StoreError",
    "TrainState",
    "TrainStep",
    "Transform",
    "around",
    "at",
    "autocast",
    "cast",
    "chain",
    "checkpoint",
    "compile",
    "default_inference_config",
    "freeze",
    "functionalize",
    "fuse_lora",
    "generate",
    "init_distributed",
    "init_inference",
    "init_params",
    "launch",
    "load",
    "load_adapters",
    "load_extra",
    "load_state",
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
]  # fmt: skip
