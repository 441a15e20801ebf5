"""What the states of rules are made of."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fds import tree
from fds.optim.base import Hyper, Schedule

Rate = float | Tensor | Schedule


class RuleState(NamedTuple):
    """State of a rule: updates so far (0-D int64), its moments by name, its hyperparameters."""

    updates: Tensor
    moments: dict[str, Any]
    hyper: Hyper


def home(params: Any) -> torch.device:
    """The device of the parameters; the host where they are on several: a number there meets tensors of every device."""
    devices = {x.device for x in tree.leaves(params)}
    return devices.pop() if len(devices) == 1 else torch.device("cpu")


def counter(params: Any) -> Tensor:
    """No updates so far."""
    return torch.zeros((), dtype=torch.int64, device=home(params))


def wide(dtype: torch.dtype) -> torch.dtype:
    """What moments of a parameter are kept in: a second moment below 2^-24 is lost in bfloat16."""
    return torch.float32 if dtype.itemsize < 4 else dtype


def moment(params: Any) -> Any:
    """Zeros like `params`, in float32 for low-precision parameters."""
    return tree.map(lambda p: torch.zeros_like(p, dtype=wide(p.dtype)), params)


def rate_of(rate: Rate, state: RuleState) -> Tensor:
    """The learning rate of the next update."""
    return rate(state.updates) if callable(rate) and not isinstance(rate, Tensor) else state.hyper["learning_rate"]


def beside(hyper: Hyper, params: Any) -> Hyper:
    """Hyperparameters on the device of the parameters."""
    return {k: v.to(home(params)) for k, v in hyper.items()}


def decayed(grads: Any, params: Any, moments: Any, weight_decay: Tensor) -> Any:
    """``grad + weight_decay * param``, in the dtype of the moments."""

    def one(g: Tensor, p: Tensor, m: Tensor) -> Tensor:
        return (g.to(m.dtype) + weight_decay * p.to(m.dtype)).to(m.dtype)

    return tree.map(one, grads, params, moments)


def mass(b: Tensor, count: Tensor) -> Tensor:
    """``1 - b**count``, as an expm1: Inductor computes that once, where it would put a power into the inner loop of every leaf."""
    return -torch.expm1(count * b.log())
