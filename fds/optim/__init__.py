"""Optimizers as pairs of pure functions, `(init, update)`."""

from fds.optim.base import Optimizer, apply_updates, chain, get_hyperparams, set_hyperparams
from fds.optim.lamb import lamb
from fds.optim.master import with_master
from fds.optim.muon import muon
from fds.optim.onebit import onebit_adam, onebit_lamb
from fds.optim.partition import partition
from fds.optim.placement import offloaded, sharded
from fds.optim.rules import adagrad, adam, adamw, adamw8bit, clip_by_global_norm, lion, scale, scale_by_schedule, sgd
from fds.optim.schedules import (
    Schedules,
    constant,
    linear_warmup,
    lr_range_test,
    one_cycle,
    one_cycle_momentum,
    warmup,
    warmup_cosine,
    warmup_cosine_floor,
    warmup_decay,
)
from fds.optim.streaming import streamed
from fds.optim.torch_schedules import torch_schedule
from fds.optim.zero_one import zero_one_adam

__all__ = [
    "Optimizer", "Schedules", "adagrad", "adam", "adamw", "adamw8bit", "apply_updates", "chain", "clip_by_global_norm", "constant", "get_hyperparams", "lamb",
    "linear_warmup", "lion", "lr_range_test", "muon", "offloaded", "one_cycle", "one_cycle_momentum", "onebit_adam", "onebit_lamb", "partition", "scale",
    "scale_by_schedule", "set_hyperparams", "sgd", "sharded", "streamed", "torch_schedule", "warmup", "warmup_cosine", "warmup_cosine_floor", "warmup_decay",
    "with_master", "zero_one_adam",
]  # fmt: skip
