"""The sections "optimizer" and "scheduler": names and parameters, with DeepSpeed's defaults."""

from collections.abc import Mapping
from typing import Any

import attrs

from fds.deepspeed.fields import BOOLEAN, MAPPING, TEXT, Kind, either, integer, key, listing, maybe, number, one_of

Params = dict[str, tuple[Any, Kind]]  # default and kind by name; None: no default, it has to be given
_RATE = number(0)
_FRACTION = number(0, below=1)
_BETAS = listing(_FRACTION, 2)
_RATES = either(_RATE, listing(_RATE))
_ADAM: Params = {
    "lr": (1e-3, _RATE), "betas": ([0.9, 0.999], _BETAS), "eps": (1e-8, _RATE), "weight_decay": (0.0, _RATE), "bias_correction": (True, BOOLEAN), "adam_w_mode": (True, BOOLEAN),
    "torch_adam": (False, BOOLEAN), "amsgrad": (False, one_of(False)), "set_grad_none": (True, BOOLEAN), "fused": (False, BOOLEAN), "foreach": (False, BOOLEAN),
}  # fmt: skip
_CPU_ADAM: Params = {**{k: v for k, v in _ADAM.items() if k not in ("adam_w_mode", "torch_adam", "fused", "foreach", "set_grad_none")},
                     "adamw_mode": (True, BOOLEAN), "adam_w_mode": (True, BOOLEAN), "fp32_optimizer_states": (True, one_of(True))}  # fmt: skip
_LAMB: Params = {
    "lr": (1e-3, _RATE), "betas": ([0.9, 0.999], _BETAS), "eps": (1e-8, _RATE), "eps_inside_sqrt": (False, BOOLEAN), "weight_decay": (0.0, _RATE), "bias_correction": (True, BOOLEAN),
    "max_coeff": (10.0, _RATE), "min_coeff": (0.01, _RATE), "amsgrad": (False, one_of(False)),
}  # fmt: skip
_WIRE: Params = {
    "cuda_aware": (False, BOOLEAN),
    "comm_backend_name": ("nccl", TEXT),
}  # of the one-bit family; groups are torch's here
_ONE_BIT: Params = {
    **{k: v for k, v in _ADAM.items() if k in ("lr", "betas", "eps", "weight_decay", "amsgrad")},
    "bias_correction": (False, BOOLEAN), "eps_inside_sqrt": (False, BOOLEAN), **_WIRE,
}  # fmt: skip

OPTIMIZERS: dict[str, Params] = {
    "Adam": _ADAM,
    "AdamW": _ADAM,
    "FusedAdam": {k: v for k, v in _ADAM.items() if k not in ("torch_adam", "fused", "foreach")},
    "CPUAdam": _CPU_ADAM,
    "DeepSpeedCPUAdam": _CPU_ADAM,
    "Adagrad": {"lr": (1e-2, _RATE), "eps": (1e-10, _RATE), "weight_decay": (0.0, _RATE), "amsgrad": (False, one_of(False)), "lr_decay": (0.0, _RATE), "initial_accumulator_value": (0.0, _RATE)},
    "Lamb": _LAMB,
    "FusedLamb": _LAMB,
    "Lion": {"lr": (1e-3, _RATE), "betas": ([0.9, 0.999], _BETAS), "weight_decay": (0.0, _RATE), "set_grad_none": (True, BOOLEAN)},
    "Muon": {
        "lr": (0.02, _RATE), "momentum": (0.95, _FRACTION), "weight_decay": (0.0, _RATE), "muon_lr": (0.02, _RATE), "adam_lr": (3e-4, _RATE), "betas": ([0.9, 0.95], _BETAS),
        "eps": (1e-10, _RATE), "ns_method": ("gram", one_of("gram", "standard")), "adam_w_mode": (True, BOOLEAN), "torch_adam": (False, BOOLEAN),
    },
    "SGD": {"lr": (1e-3, _RATE), "momentum": (0.0, _RATE), "dampening": (0.0, number()), "weight_decay": (0.0, _RATE), "nesterov": (False, BOOLEAN), "maximize": (False, BOOLEAN), "foreach": (False, BOOLEAN), "fused": (False, BOOLEAN)},
    "OneBitAdam": {**_ONE_BIT, "freeze_step": (100_000, integer(1))},
    "ZeroOneAdam": {**_ONE_BIT, "var_freeze_step": (100_000, integer(1)), "var_update_scaler": (16, integer(1)), "local_step_scaler": (32_678, integer(1)), "local_step_clipper": (16, integer(1))},
    "OneBitLamb": {
        **_ONE_BIT, "freeze_step": (100_000, integer(1)), "max_coeff": (10.0, _RATE), "min_coeff": (0.01, _RATE), "coeff_beta": (0.9, _FRACTION), "factor_max": (4.0, _RATE), "factor_min": (0.5, _RATE),
        "factor_threshold": (0.1, _RATE),
    },
}  # fmt: skip
MUP = ("MuAdam", "MuAdamW", "MuSGD")
ONE_BIT = ("OneBitAdam", "ZeroOneAdam", "OneBitLamb")

_WARMUP: Params = {"warmup_num_steps": (1000, integer(1)), "warmup_type": ("log", one_of("log", "linear")), "last_batch_iteration": (-1, integer(-1))}  # fmt: skip
SCHEDULERS: dict[str, Params] = {
    "LRRangeTest": {
        "lr_range_test_min_lr": (1e-3, _RATES), "lr_range_test_step_size": (2000, integer(1)), "lr_range_test_step_rate": (1.0, number()), "lr_range_test_staircase": (False, BOOLEAN),
        "last_batch_iteration": (-1, integer(-1)),
    },
    "OneCycle": {
        "cycle_min_lr": (None, _RATES), "cycle_max_lr": (None, _RATES), "decay_lr_rate": (0.0, _RATE), "cycle_first_step_size": (2000, integer(1)), "cycle_second_step_size": (None, maybe(integer(1))),
        "cycle_first_stair_count": (0, integer(0)), "cycle_second_stair_count": (None, maybe(integer(0))), "decay_step_size": (0, integer(0)), "cycle_momentum": (True, BOOLEAN),
        "cycle_min_mom": (0.8, _FRACTION), "cycle_max_mom": (0.9, _FRACTION), "decay_mom_rate": (0.0, _RATE), "last_batch_iteration": (-1, integer(-1)),
    },
    "WarmupLR": {"warmup_min_lr": (0.0, _RATES), "warmup_max_lr": (None, maybe(_RATES)), **_WARMUP},
    "WarmupDecayLR": {"total_num_steps": (None, integer(1)), "warmup_min_lr": (0.0, _RATES), "warmup_max_lr": (1e-3, maybe(_RATES)), **_WARMUP},
    "WarmupCosineLR": {"total_num_steps": (None, integer(1)), "warmup_min_ratio": (0.0, _RATE), "cos_min_ratio": (1e-4, _RATE), **_WARMUP},
}  # fmt: skip
REQUIRED = {"WarmupDecayLR": ("total_num_steps",), "WarmupCosineLR": ("total_num_steps",), "OneCycle": ("cycle_min_lr", "cycle_max_lr")}  # fmt: skip

# A key is a line.
# fmt: off


@attrs.frozen(kw_only=True)
class Optimizer:
    """ "optimizer"."""

    type: str | None = key(None, maybe(TEXT), "yes", "see the table of optimizers")
    params: Mapping[str, Any] = key({}, MAPPING, "yes", "see the table of optimizers; an unknown one is an error")
    legacy_fusion: bool = key(False, BOOLEAN, "design", "updates are compiled with the step, or one fused call")


@attrs.frozen(kw_only=True)
class Scheduler:
    """ "scheduler"."""

    type: str | None = key(None, maybe(TEXT), "yes", "see the table of schedules")
    params: Mapping[str, Any] = key({}, MAPPING, "yes", "see the table of schedules; an unknown one is an error")


def named(type: str, table: Mapping[str, Params]) -> str | None:
    """The name in a table that a type means, however its letters are written.

    >>> named("adamw", OPTIMIZERS)
    'AdamW'
    """
    return next((name for name in table if name.lower() == type.lower()), None)
