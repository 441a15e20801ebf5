"""Loss scaling: gradients of float16 that are too small to be held are held multiplied, and divided again in float32.

The scale is state of the train step like any other: `init` makes it, `update` is a pure function of it and of whether a step overflowed.
"""

import math
from typing import Any, NamedTuple, Protocol

import attrs
import torch
from torch import Tensor

from fds import tree

_LARGEST = 2.0**126  # its reciprocal is the smallest normal number of float32


class LossScale(Protocol):
    """What a train step asks of a loss scale. States are trees of 0-D tensors."""

    @property
    def dynamic(self) -> bool: ...
    def init(self) -> Any: ...
    def scale(self, state: Any) -> Tensor: ...
    def update(self, state: Any, overflow: Tensor) -> Any: ...
    def at_minimum(self, state: Any) -> Tensor: ...


class LossScaleState(NamedTuple):
    """State of `DynamicLossScale`: 0-D tensors."""

    scale: Tensor  # float32: what the next loss is multiplied by
    hysteresis: Tensor  # int64: overflows until the scale is lowered; the one that lowers it counts
    good: Tensor  # int64: steps without overflow since the last one


@attrs.frozen
class DynamicLossScale:
    """A scale that follows the gradients: halved when they overflow, doubled when they have not for a while.

    For `train_step(loss_scale=)`. Lower bounds and counters are those of DeepSpeed's ``fp16`` section, under which the same overflows give the
    same scales; a step that overflows at the minimum is skipped as others are, and says so (``metrics["scale_at_minimum"]``).

    Args:
        initial_power: the first scale is 2 to this power.
        window: so many steps without overflow, and one that follows, double the scale; then every `window` steps more.
        hysteresis: so many overflows lower the scale for the first time; later ones lower it each, until the hysteresis is full again.
        consecutive_hysteresis: it is full again after each step without overflow; else when the scale is doubled.
        minimum: the scale is never lowered below.

    Micikevicius et al. 2018, arXiv:1710.03740, section 3.2.

    Raises `ValueError` for counts below 1, a minimum that is not positive, or a first scale below the minimum.

    >>> scaling = DynamicLossScale(initial_power=3, window=2, hysteresis=1)
    >>> state, scales = scaling.init(), []
    >>> for overflow in (True, False, False, False, True):
    ...     state = scaling.update(state, torch.tensor(overflow))
    ...     scales.append(float(state.scale))
    >>> scales
    [4.0, 4.0, 4.0, 8.0, 4.0]
    """

    initial_power: int = 16
    window: int = 1000
    hysteresis: int = 2
    consecutive_hysteresis: bool = False
    minimum: float = 1.0

    def __attrs_post_init__(self) -> None:
        power, least = self.initial_power, self.minimum
        if not _is_int(power) or not -126 <= power <= 126:
            raise ValueError(f"DynamicLossScale: initial_power={power!r}, required a whole number from -126 to 126")
        for name in ("window", "hysteresis"):
            tree.positive(f"DynamicLossScale: {name}", getattr(self, name))
        tree.switch("DynamicLossScale: consecutive_hysteresis", self.consecutive_hysteresis)
        if not _is_positive(least) or least > 2.0**power:
            raise ValueError(
                f"DynamicLossScale: minimum={least!r}, required a number > 0 and not above the first scale, 2**initial_power = {2.0**power:g}"
            )

    @property
    def dynamic(self) -> bool:
        return True

    def init(self) -> LossScaleState:
        """The state before the first step."""
        count = torch.zeros((), dtype=torch.int64)
        return LossScaleState(torch.full((), 2.0**self.initial_power), count + self.hysteresis, count)

    def scale(self, state: LossScaleState) -> Tensor:
        """What the loss is multiplied by."""
        return state.scale

    def update(self, state: LossScaleState, overflow: Tensor) -> LossScaleState:
        """The state after a step; `overflow`: a 0-D bool."""
        last = state.hysteresis <= 1
        lowered = torch.where(last, (state.scale / 2).clamp(min=self.minimum), state.scale)
        left = torch.where(last, state.hysteresis, state.hysteresis - 1)
        due = (state.good > 0) & (state.good % self.window == 0)
        raised = torch.where(due, (state.scale * 2).clamp(max=_LARGEST), state.scale)
        full = torch.full_like(state.hysteresis, self.hysteresis)
        refilled = full if self.consecutive_hysteresis else torch.where(due, full, state.hysteresis)
        return LossScaleState(
            torch.where(overflow, lowered, raised),
            torch.where(overflow, left, refilled),
            torch.where(overflow, 0, state.good + 1),
        )

    def at_minimum(self, state: LossScaleState) -> Tensor:
        """0-D bool: an overflow cannot lower the scale any more."""
        return (state.hysteresis <= 1) & (state.scale <= self.minimum)


@attrs.frozen
class StaticLossScale:
    """One number for all steps; it has no state."""

    value: float

    @property
    def dynamic(self) -> bool:
        return False

    def init(self) -> tuple[()]:
        return ()

    def scale(self, state: Any) -> Tensor:
        return torch.full((), self.value)

    def update(self, state: Any, overflow: Tensor) -> tuple[()]:
        return ()

    def at_minimum(self, state: Any) -> Tensor:
        return torch.zeros((), dtype=torch.bool)


def as_loss_scale(given: Any) -> LossScale | None:
    """What a step was given as `loss_scale`: a number, a dynamic scale or None. `ValueError` for anything else."""
    if given is None or isinstance(given, DynamicLossScale | StaticLossScale):
        return given
    if not _is_positive(given) or not 1 / _LARGEST <= given <= _LARGEST:
        raise ValueError(
            f"train_step: loss_scale={given!r}, required a number > 0, as 1024.0, or fds.DynamicLossScale(), or None for no scaling"
        )
    return StaticLossScale(float(given))


def unscaled(gradient: Tensor, inverse: Tensor) -> Tensor:
    """A gradient times the reciprocal of the scale, in float32 at least."""
    wide = gradient.float() if gradient.element_size() < 4 else gradient
    return wide * inverse.to(wide.device)


def _is_int(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _is_positive(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) and x > 0
