"""Schedules: pure functions of the number of updates so far (0-D int64 tensor) to a 0-D float64 tensor."""

import math

import torch
from torch import Tensor

from fds.optim.base import Schedule, checked


def constant(value: float) -> Schedule:
    """The same value at every step."""
    checked("value", value)
    return lambda count: torch.full((), value, dtype=torch.float64, device=count.device)


def linear_warmup(peak: float, warmup_steps: int) -> Schedule:
    """From peak / warmup_steps at step 0 in equal steps to `peak`, then constant.

    >>> [round(float(linear_warmup(1.0, 4)(torch.tensor(i))), 2) for i in range(6)]
    [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    """
    checked("peak", peak)
    if warmup_steps < 0:
        raise ValueError(f"linear_warmup: warmup_steps={warmup_steps}, required >= 0")
    return lambda count: peak * ((count.double() + 1) / max(warmup_steps, 1)).clamp(max=1.0)


def warmup_cosine(peak: float, *, warmup_steps: int, total_steps: int, end: float = 0.0) -> Schedule:
    """Linear warm-up to `peak`, then a half cosine down to `end` at `total_steps`, then constant.

    >>> [round(float(warmup_cosine(1.0, warmup_steps=2, total_steps=6)(torch.tensor(i))), 2) for i in range(8)]
    [0.5, 1.0, 1.0, 0.85, 0.5, 0.15, 0.0, 0.0]
    """
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warmup_cosine: warmup_steps={warmup_steps}, total_steps={total_steps}; required 0 <= warmup_steps < total_steps"
        )
    checked("end", end)
    warm = linear_warmup(peak, warmup_steps)

    def schedule(count: Tensor) -> Tensor:
        done = ((count.double() - warmup_steps) / (total_steps - warmup_steps)).clamp(0.0, 1.0)
        return torch.where(
            count < warmup_steps, warm(count), end + (peak - end) * 0.5 * (1 + torch.cos(math.pi * done))
        )

    return schedule
