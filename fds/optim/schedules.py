"""Schedules: pure functions of the number of updates so far (0-D int64 tensor) to a 0-D float64 tensor."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fds import tree
from fds.optim.base import Schedule, checked


class Schedules(NamedTuple):
    """What a policy says at every update.

    * `learning_rate`
    * `momentum`: SGD's momentum or Adam's b1, of a policy that cycles it
    * `b2`: what such a policy sets Adam's b2 to
    """

    learning_rate: Schedule
    momentum: Schedule | None = None
    b2: float | None = None


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


# --- policies that come from DeepSpeed ---


def lr_range_test(low: float, *, step_size: int, step_rate: float = 1.0, staircase: bool = False) -> Schedule:
    """Ever larger rates, to see at which training diverges: ``low (1 + step_rate count / step_size)``; a staircase takes the floor of the quotient.

    Smith 2018, arXiv:1803.09820.

    >>> [round(float(lr_range_test(0.1, step_size=2, staircase=True)(torch.tensor(i))), 2) for i in range(5)]
    [0.1, 0.1, 0.2, 0.2, 0.3]
    """
    checked("low", low)
    _check_steps("lr_range_test", step_size=step_size)

    def schedule(count: Tensor) -> Tensor:
        at = count.double() / step_size
        return low * (1 + step_rate * (at.floor() if staircase else at))

    return schedule


def one_cycle(
    low: float,
    high: float,
    *,
    first_steps: float = 2000,
    second_steps: float | None = None,
    first_stairs: int = 0,
    second_stairs: int | None = None,
    decay_rate: float = 0.0,
    decay_steps: float = 0,
) -> Schedule:
    """Up from `low` to `high` in `first_steps`, down in `second_steps` (default: as many), then ``low / (1 + decay_rate n / decay_steps)``.

    Args:
        first_stairs: so many equal stairs instead of a line, on the way up; 0: a line. `second_stairs`: on the way down (default: as many).
        decay_rate: with `decay_steps`, of the n updates after the cycle; 0 in either: the rate stays at `low`.

    Smith 2018, arXiv:1803.09820.

    >>> cycle = one_cycle(1.0, 3.0, first_steps=2, second_steps=4, decay_rate=1.0, decay_steps=1)
    >>> [round(float(cycle(torch.tensor(i))), 2) for i in range(9)]
    [1.0, 2.0, 3.0, 2.5, 2.0, 1.5, 1.0, 0.5, 0.33]
    """
    return _cycle(low, high, True, (first_steps, second_steps, first_stairs, second_stairs), decay_rate, decay_steps)


def one_cycle_momentum(
    low: float,
    high: float,
    *,
    first_steps: float = 2000,
    second_steps: float | None = None,
    first_stairs: int = 0,
    second_stairs: int | None = None,
    decay_rate: float = 0.0,
    decay_steps: float = 0,
) -> Schedule:
    """The momentum that goes with `one_cycle`: down from `high` to `low` where the rate goes up, and back; then ``high (1 + decay_rate n / decay_steps)``."""
    return _cycle(low, high, False, (first_steps, second_steps, first_stairs, second_stairs), decay_rate, decay_steps)


def _cycle(low: float, high: float, up: bool, shape: tuple[float, float | None, int, int | None], decay_rate: float, decay_steps: float) -> Schedule:  # fmt: skip
    """From one end to the other and back, up or down first; then on from where it began."""
    for name, value in {"low": low, "high": high, "decay_rate": decay_rate}.items():
        checked(name, value)
    height, total = cycle_height(*shape)
    decay = decay_rate / decay_steps if decay_steps else 0.0
    start, turn = (low, high) if up else (high, low)

    def schedule(count: Tensor) -> Tensor:
        grown = 1 + decay * (count.double() - total).clamp(min=0.0)
        after = start / grown if up else start * grown
        return torch.where(count >= total + 1, after, start + (turn - start) * height(count))

    return schedule


def cycle_height(
    first: float, second: float | None, first_stairs: int = 0, second_stairs: int | None = None
) -> tuple[Schedule, float]:
    """The height in a cycle, from 0 to 1 and back, and how many updates a cycle has."""
    second = first if second is None else second
    second_stairs = first_stairs if second_stairs is None else second_stairs
    if not 0 < first < math.inf or not 0 <= second < math.inf:
        raise ValueError(f"one_cycle: first_steps={first!r}, second_steps={second!r}; required > 0, and >= 0")
    total = first + second

    def stairs(x: Tensor, steps: float, n: int) -> Tensor:
        return (x * n / steps).floor() / n if n > 0 else x / steps

    def height(count: Tensor) -> Tensor:
        at = count.double() % total
        up = stairs(at, first, first_stairs)
        return torch.where(at <= first, up, stairs(total - at, second, second_stairs)) if second else up

    return height, total


def warmup(peak: float, *, steps: int, low: float = 0.0, shape: str = "log") -> Schedule:
    """From `low` to `peak`, then constant. "log": by log(count) / log(steps); "linear": by (count - 1) / steps. Steps below 2 are 2.

    These are DeepSpeed's counts: update 1 is the first that the formula is for, and update 0 has `low`. `linear_warmup` begins above zero.

    >>> [round(float(warmup(1.0, steps=4, shape="linear")(torch.tensor(i))), 2) for i in range(7)]
    [0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    """
    checked("peak", peak)
    checked("low", low)
    share = _warm(steps, shape)
    return lambda count: low + (peak - low) * share(count)


def warmup_decay(peak: float, *, steps: int, total_steps: int, low: float = 0.0, shape: str = "log") -> Schedule:
    """`warmup`, then a line down to `low` at update `total_steps` + 1.

    >>> [round(float(warmup_decay(1.0, steps=2, total_steps=4, shape="linear")(torch.tensor(i))), 2) for i in range(7)]
    [0.0, 0.0, 0.5, 1.0, 0.5, 0.0, 0.0]
    """
    checked("peak", peak)
    checked("low", low)
    share, steps = _warm(steps, shape), max(steps, 2)

    def schedule(count: Tensor) -> Tensor:
        left = (total_steps - (count.double() - 1)).clamp(min=0.0) / max(1.0, total_steps - steps)
        return low + (peak - low) * torch.where(count <= steps, share(count), left)

    return schedule


def warmup_cosine_floor(peak: float, *, steps: int, total_steps: int, start: float = 0.0, floor: float = 1e-4, shape: str = "log") -> Schedule:  # fmt: skip
    """`warmup` from ``start peak``, then a half cosine down to ``floor peak`` at update `total_steps`, then constant.

    >>> cosine = warmup_cosine_floor(1.0, steps=2, total_steps=4, floor=0.5, shape="linear")
    >>> [round(float(cosine(torch.tensor(i))), 2) for i in range(6)]
    [0.0, 0.0, 0.5, 0.75, 0.5, 0.5]
    """
    checked("peak", peak)
    share, steps = _warm(steps, shape), max(steps, 2)

    def schedule(count: Tensor) -> Tensor:
        done = ((count.double() - steps) / max(1, total_steps - steps)).clamp(0.0, 1.0)
        cosine = (floor + (1 - floor) * 0.5 * (1 + torch.cos(math.pi * done))).clamp(min=0.0)
        return peak * torch.where(count <= steps, start + (1 - start) * share(count), cosine)

    return schedule


def _warm(steps: int, shape: str) -> Schedule:
    """From 0 to 1."""
    _check_steps("warmup", steps=steps)
    if shape not in ("log", "linear"):
        raise ValueError(f"warmup: shape={shape!r}; {tree.suggest(shape, ['log', 'linear'])}")
    steps = max(steps, 2)
    if shape == "linear":
        return lambda count: ((count.double() - 1) / steps).clamp(0.0, 1.0)
    return lambda count: (count.double().clamp(min=1.0).log() / math.log(steps)).clamp(max=1.0)


def _check_steps(what: str, **steps: Any) -> None:
    for name, n in steps.items():
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise ValueError(f"{what}: {name}={n!r}, required a whole number of updates >= 1")
