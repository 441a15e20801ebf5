"""The section "scheduler": DeepSpeed's policies by its names, parameters and defaults, as pure functions of the count of updates.

DeepSpeed's scheduler is stepped after each update that was applied; so the rate of update n, counted from 0, is its formula at n - 1. For
the first update it has other values than its formulas, which are kept: a momentum at its lower end in `OneCycle`, and a rate of zero in
`WarmupCosineLR`.
"""

import inspect
import warnings
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fds.deepspeed.errors import DeepSpeedConfigError
from fds.optim.base import Schedule
from fds.optim.schedules import (
    Schedules,
    lr_range_test,
    one_cycle,
    one_cycle_momentum,
    warmup,
    warmup_cosine_floor,
    warmup_decay,
)
from fds.optim.torch_schedules import torch_schedule
from fds.tree import suggest

_PATH = "scheduler.params"
_FIRST = -1  # last_batch_iteration before the first update


def build(type: str, params: Mapping[str, Any], base_lr: float) -> Schedules:
    """The policy that a configuration means. `base_lr`: the optimizer's own ``lr``.

    `type`: LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR, however their letters are written, or a name of
    `torch.optim.lr_scheduler` (`optim.torch_schedule`). The result's `momentum` and `b2` are what OneCycle does to Adam's betas: it sets the second
    to 0.99.

    Raises `DeepSpeedConfigError` that names the key for what is unknown, missing or out of range. A list for parameter groups has one value.

    >>> policy = build("WarmupLR", {"warmup_num_steps": 4, "warmup_type": "linear"}, 0.8)
    >>> [round(float(policy.learning_rate(torch.tensor(i))), 2) for i in range(7)]
    [0.0, 0.0, 0.2, 0.4, 0.6, 0.8, 0.8]
    """
    name = next((n for n in POLICIES if n.lower() == str(type).lower()), None)
    if name is None:
        return _torch(str(type), params, base_lr)
    known = inspect.signature(POLICIES[name]).parameters
    given = {k: _of_one_group(k, v) for k, v in params.items()}
    if given.pop("last_batch_iteration", _FIRST) != _FIRST:
        raise _error(
            "last_batch_iteration", "a state has its own count of updates: resume with load_checkpoint; leave it out"
        )
    for k in given:
        if k not in known or k == "base_lr":
            raise _error(k, f"{name} has no such parameter; {suggest(k, [n for n in known if n != 'base_lr'])}")
    for k, p in known.items():
        if p.default is inspect.Parameter.empty and k != "base_lr" and k not in given:
            raise _error(k, f"{name} needs it, and it is not given")
    return POLICIES[name](base_lr, **given)


def _torch(type: str, params: Mapping[str, Any], base_lr: float) -> Schedules:
    if not hasattr(torch.optim.lr_scheduler, type):
        raise DeepSpeedConfigError(
            f"scheduler.type: {type!r} is unknown; {suggest(type, POLICIES)}; or a name of torch.optim.lr_scheduler",
            ["scheduler.type"],
        )
    given = {k: v if k == "milestones" else _of_one_group(k, v) for k, v in params.items()}
    if given.pop("last_epoch", _FIRST) != _FIRST:
        raise _error("last_epoch", "a state has its own count of updates: resume with load_checkpoint; leave it out")
    try:
        return torch_schedule(type, base_lr, **given)
    except ValueError as error:
        raise DeepSpeedConfigError(f"scheduler: {error}", ["scheduler.type", _PATH]) from error


def _lr_range_test(
    base_lr: float,
    lr_range_test_min_lr: float = 1e-3,
    lr_range_test_step_size: int = 2000,
    lr_range_test_step_rate: float = 1.0,
    lr_range_test_staircase: bool = False,
) -> Schedules:
    low = _number("lr_range_test_min_lr", lr_range_test_min_lr, least=0)
    size = _whole("lr_range_test_step_size", lr_range_test_step_size, least=1)
    rate = _number("lr_range_test_step_rate", lr_range_test_step_rate)
    stairs = _flag("lr_range_test_staircase", lr_range_test_staircase)
    return Schedules(lr_range_test(low, step_size=size, step_rate=rate, staircase=stairs))


def _one_cycle(
    base_lr: float,
    cycle_min_lr: float,
    cycle_max_lr: float,
    decay_lr_rate: float = 0.0,
    cycle_first_step_size: int = 2000,
    cycle_second_step_size: int | None = None,
    cycle_first_stair_count: int = 0,
    cycle_second_stair_count: int | None = None,
    decay_step_size: int = 0,
    cycle_momentum: bool = True,
    cycle_min_mom: float = 0.8,
    cycle_max_mom: float = 0.9,
    decay_mom_rate: float = 0.0,
) -> Schedules:
    first = _number("cycle_first_step_size", cycle_first_step_size, above=0)
    second = cycle_second_step_size
    shape: dict[str, Any] = {
        "first_steps": first,
        "second_steps": None if second is None else _number("cycle_second_step_size", second, least=0),
        "first_stairs": _whole("cycle_first_stair_count", cycle_first_stair_count, least=0),
        "second_stairs": None if cycle_second_stair_count is None else _whole("cycle_second_stair_count", cycle_second_stair_count, least=0),
        "decay_steps": _number("decay_step_size", decay_step_size, least=0),
    }  # fmt: skip
    low, high = _number("cycle_min_lr", cycle_min_lr, least=0), _number("cycle_max_lr", cycle_max_lr, least=0)
    rate = one_cycle(low, high, decay_rate=_number("decay_lr_rate", decay_lr_rate, least=0), **shape)
    if not _flag("cycle_momentum", cycle_momentum):
        return Schedules(rate)
    slow, fast = _number("cycle_min_mom", cycle_min_mom, least=0), _number("cycle_max_mom", cycle_max_mom, least=0)
    momentum = one_cycle_momentum(slow, fast, decay_rate=_number("decay_mom_rate", decay_mom_rate, least=0), **shape)
    return Schedules(rate, _from(slow, momentum), 0.99)


def _warmup(
    base_lr: float,
    warmup_min_lr: float = 0.0,
    warmup_max_lr: float | None = None,
    warmup_num_steps: int = 1000,
    warmup_type: str = "log",
) -> Schedules:
    low, high, steps, shape = _warmup_options(base_lr, warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type)
    return Schedules(warmup(high, steps=steps, low=low, shape=shape))


def _warmup_decay(
    base_lr: float,
    total_num_steps: int,
    warmup_min_lr: float = 0.0,
    warmup_max_lr: float | None = 0.001,
    warmup_num_steps: int = 1000,
    warmup_type: str = "log",
) -> Schedules:
    low, high, steps, shape = _warmup_options(base_lr, warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type)
    total = _total(total_num_steps, steps)
    return Schedules(warmup_decay(high, steps=steps, total_steps=total, low=low, shape=shape))


def _warmup_cosine(
    base_lr: float,
    total_num_steps: int,
    warmup_min_ratio: float = 0.0,
    warmup_num_steps: int = 1000,
    cos_min_ratio: float = 0.0001,
    warmup_type: str = "log",
) -> Schedules:
    start, floor = (_number(k, v, least=0) for k, v in (("warmup_min_ratio", warmup_min_ratio), ("cos_min_ratio", cos_min_ratio)))  # fmt: skip
    _, _, steps, shape = _warmup_options(base_lr, 0.0, None, warmup_num_steps, warmup_type)
    total = _total(total_num_steps, steps)
    return Schedules(_from(0.0, warmup_cosine_floor(base_lr, steps=steps, total_steps=total, start=start, floor=floor, shape=shape)))  # fmt: skip


POLICIES: dict[str, Callable[..., Schedules]] = {
    "LRRangeTest": _lr_range_test,
    "OneCycle": _one_cycle,
    "WarmupLR": _warmup,
    "WarmupDecayLR": _warmup_decay,
    "WarmupCosineLR": _warmup_cosine,
}


def _from(first: float, schedule: Schedule) -> Schedule:
    """`schedule`, with another value for the first update."""

    def run(count: Tensor) -> Tensor:
        return torch.where(count < 1, first, schedule(count))

    return run


def _warmup_options(base_lr: float, low: Any, high: Any, steps: Any, shape: Any) -> tuple[float, float, int, str]:
    if shape not in ("log", "linear"):
        raise _error("warmup_type", f"{shape!r} is unknown; {suggest(str(shape), ['log', 'linear'])}")
    peak = base_lr if high is None else _number("warmup_max_lr", high, least=0)
    return _number("warmup_min_lr", low, least=0), peak, _whole("warmup_num_steps", steps, least=1), shape


def _total(total: Any, steps: int) -> int:
    total = _whole("total_num_steps", total, least=1)
    if total < max(steps, 2):
        warnings.warn(
            f"{_PATH}.total_num_steps={total} is less than {_PATH}.warmup_num_steps={steps}: there is nothing between the warm-up and the end",
            stacklevel=2,
        )
    return total


def _error(key: str, said: str) -> DeepSpeedConfigError:
    return DeepSpeedConfigError(f"{_PATH}.{key}: {said}", [f"{_PATH}.{key}"])


def _of_one_group(key: str, value: Any) -> Any:
    """DeepSpeed takes a list with a value for each parameter group."""
    if not isinstance(value, list | tuple):
        return value
    if len(value) != 1:
        raise _error(key, f"{len(value)} values for parameter groups, and there is one group here; give a number")
    return value[0]


def _number(key: str, value: Any, *, least: float | None = None, above: float | None = None) -> float:
    wanted = "a number" + ("" if least is None else f" >= {least}") + ("" if above is None else f" > {above}")
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")
    if not number or (least is not None and value < least) or (above is not None and value <= above):
        raise _error(key, f"given {value!r}, required {wanted}")
    return value


def _whole(key: str, value: Any, *, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise _error(key, f"given {value!r}, required a whole number >= {least}")
    return value


def _flag(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _error(key, f"given {value!r}, required true or false")
    return value


# --- command line ---

# What DeepSpeed's arguments are when they are not given, where that is another value than the parameter's own default.
_DEFAULTS: dict[str, Any] = {
    "lr_range_test_step_size": 1000,
    "cycle_first_step_size": 1000,
    "decay_step_size": 1000,
    "cycle_min_lr": 0.01,
    "cycle_max_lr": 0.1,
    "warmup_max_lr": 0.001,
    "warmup_min_ratio": 0.01,
    "cos_min_ratio": 0.01,
    "total_num_steps": None,
}
_TYPES: dict[str, Callable[[str], Any]] = {"warmup_type": str}
_WHOLE_NUMBERS = ("step_size", "stair_count", "num_steps")


def add_tuning_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add ``--lr_schedule NAME`` and an argument for each parameter of a policy, with DeepSpeed's names and defaults; `scheduler_from_arguments` reads them.

    Three things differ: what DeepSpeed's defaults leave to the policy is None here and not -1, which its policy refuses; ``--cycle_momentum`` (on
    unless ``--no-cycle_momentum``) has an effect; and there is ``--total_num_steps``, which two of the policies need.

    >>> add_tuning_arguments(ArgumentParser()).parse_args(["--lr_schedule", "OneCycle"]).cycle_first_step_size
    1000
    """
    group = parser.add_argument_group("Convergence Tuning", "a schedule of the learning rate")
    group.add_argument("--lr_schedule", type=str, default=None, metavar="NAME", help=", ".join(POLICIES))
    for key, default in _parameters().items():
        users = [n for n, f in POLICIES.items() if key in inspect.signature(f).parameters]
        options: dict[str, Any] = {"default": default, "help": f"of {', '.join(users)}; default: {default}"}
        if isinstance(default, bool):
            group.add_argument(f"--{key}", action=BooleanOptionalAction, **options)
            continue
        whole = key.endswith(_WHOLE_NUMBERS)
        group.add_argument(f"--{key}", type=_TYPES.get(key, int if whole else float), metavar="N" if whole else "X", **options)  # fmt: skip
    return parser


def _parameters() -> dict[str, Any]:
    """All parameters of all policies, with the defaults of their arguments."""
    found: dict[str, Any] = {}
    for policy in POLICIES.values():
        for key, p in inspect.signature(policy).parameters.items():
            if key != "base_lr":
                found.setdefault(key, _DEFAULTS.get(key, None if p.default is inspect.Parameter.empty else p.default))
    return found


def scheduler_from_arguments(args: Namespace) -> dict[str, Any] | None:
    """The section ``{"type": ..., "params": {...}}`` that arguments of `add_tuning_arguments` mean; None without ``--lr_schedule``.

    Raises `DeepSpeedConfigError` for an unknown name, and where ``--total_num_steps`` is needed and not given.

    >>> args = add_tuning_arguments(ArgumentParser()).parse_args("--lr_schedule WarmupLR --warmup_num_steps 10".split())
    >>> scheduler_from_arguments(args)["params"]["warmup_num_steps"]
    10
    """
    name = getattr(args, "lr_schedule", None)
    if name is None:
        return None
    if name not in POLICIES:
        raise DeepSpeedConfigError(f"--lr_schedule: {name!r} is unknown; {suggest(name, POLICIES)}", ["scheduler.type"])
    params = {k: getattr(args, k, None) for k in inspect.signature(POLICIES[name]).parameters if k != "base_lr"}
    if "total_num_steps" in params and params["total_num_steps"] is None:
        raise DeepSpeedConfigError(f"--total_num_steps: {name} needs it, and it is not given", [f"{_PATH}.total_num_steps"])  # fmt: skip
    return {"type": name, "params": {k: v for k, v in params.items() if v is not None}}


__all__ = ["add_tuning_arguments", "build", "scheduler_from_arguments"]
