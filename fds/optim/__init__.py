"""Optimizers as pairs of pure functions, `(init, update)`."""

from fds.optim.base import Optimizer, apply_updates, chain, get_hyperparams, set_hyperparams
from fds.optim.groups import grouped
from fds.optim.master import with_master
from fds.optim.placement import offloaded, sharded
from fds.optim.rules import adamw, adamw8bit, clip_by_global_norm, lion, scale, scale_by_schedule, sgd
from fds.optim.schedules import constant, linear_warmup, warmup_cosine
from fds.optim.streaming import streamed

__all__ = [
    "Optimizer", "adamw", "adamw8bit", "apply_updates", "chain", "clip_by_global_norm", "constant", "get_hyperparams", "grouped", "linear_warmup", "lion", "offloaded", "scale", "scale_by_schedule",
    "set_hyperparams", "sgd", "sharded", "streamed", "warmup_cosine", "with_master",
]  # fmt: skip
