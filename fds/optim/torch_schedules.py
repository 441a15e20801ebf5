"""The policies of `torch.optim.lr_scheduler` that are formulas, by torch's names and with its parameters, as pure functions of the count of updates."""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fds import tree
from fds.optim.base import Schedule, checked
from fds.optim.schedules import Schedules, cycle_height

_NOT = {  # torch's policies that are no functions of the count
    "ReduceLROnPlateau": "looks at a metric, and a schedule is a function of the number of updates; lower the rate in your loop, with optim.set_hyperparams(state, learning_rate=...)",
    "MultiplicativeLR": "is a product over all steps so far, and no formula in the step; write its product as LambdaLR",
    "SequentialLR": "takes schedulers, which belong to an optimizer of torch's; write a function of the count with torch.where",
    "ChainedScheduler": "takes schedulers, which belong to an optimizer of torch's; write a function of the count that multiplies",
}


def torch_schedule(name: str, learning_rate: float, **params: Any) -> Schedules:
    """The policy that torch calls `name`, of an optimizer's `learning_rate`, stepped once per update. Parameters and defaults are torch's.

    `LambdaLR` calls its function with the count as a 0-D float64 tensor, in the traced step. `OneCycleLR` stays where its last step is. With
    ``cycle_momentum`` (the default) `CyclicLR` and `OneCycleLR` have a momentum as well.

    Raises `ValueError` for what is no formula (`ReduceLROnPlateau`), an unknown name or parameter, and values out of range.

    >>> half = torch_schedule("StepLR", 0.8, step_size=2, gamma=0.5).learning_rate
    >>> [float(half(torch.tensor(i))) for i in range(5)]
    [0.8, 0.8, 0.4, 0.4, 0.2]
    """
    checked("learning_rate", learning_rate)
    if name in _NOT:
        raise ValueError(f"{name} {_NOT[name]}")
    if name not in TORCH:
        raise ValueError(f"no schedule {name!r} in torch.optim.lr_scheduler; {tree.suggest(name, TORCH)}")
    known = inspect.signature(TORCH[name]).parameters
    names = list(known)[1:]
    for given in params:
        if given not in names:
            raise ValueError(f"{name}: no parameter {given!r}; {tree.suggest(given, names)}")
    for missing in names:
        if known[missing].default is inspect.Parameter.empty and missing not in params:
            raise ValueError(f"{name}: {missing} is not given, and has no default")
    return TORCH[name](learning_rate, **params)


def _by(schedule: Schedule, momentum: Schedule | None = None) -> Schedules:
    return Schedules(schedule, momentum)


def _times(rate: float, factor: Schedule) -> Schedules:
    return _by(lambda count: rate * factor(count.double()))


def _step(rate: float, step_size: int, gamma: float = 0.1) -> Schedules:
    _whole("StepLR", 1, step_size=step_size)
    return _times(rate, lambda t: gamma ** (t / step_size).floor())


def _multi_step(rate: float, milestones: Sequence[int], gamma: float = 0.1) -> Schedules:
    for m in milestones:
        _whole("MultiStepLR", 0, milestones=m)

    def factor(t: Tensor) -> Tensor:
        return gamma ** sum(((t >= m).double() for m in milestones), torch.zeros_like(t))

    return _times(rate, factor)


def _constant(rate: float, factor: float = 1.0 / 3, total_iters: int = 5) -> Schedules:
    _fraction("ConstantLR", factor=factor)
    return _times(rate, lambda t: torch.where(t >= total_iters, 1.0, torch.full_like(t, factor)))


def _linear(rate: float, start_factor: float = 1.0 / 3, end_factor: float = 1.0, total_iters: int = 5) -> Schedules:
    _fraction("LinearLR", start_factor=start_factor, end_factor=end_factor)
    if start_factor == 0:
        raise ValueError("LinearLR: start_factor=0, required > 0 and <= 1")
    _whole("LinearLR", 1, total_iters=total_iters)
    return _times(rate, lambda t: start_factor + (end_factor - start_factor) * t.clamp(max=total_iters) / total_iters)


def _exponential(rate: float, gamma: float) -> Schedules:
    return _times(rate, lambda t: gamma**t)


def _polynomial(rate: float, total_iters: int = 5, power: float = 1.0) -> Schedules:
    _whole("PolynomialLR", 1, total_iters=total_iters)
    return _times(rate, lambda t: (1.0 - t.clamp(max=total_iters) / total_iters) ** power)


def _cosine(rate: float, T_max: int, eta_min: float = 0.0) -> Schedules:
    _whole("CosineAnnealingLR", 1, T_max=T_max)
    return _by(lambda count: eta_min + (rate - eta_min) * (1 + torch.cos(math.pi * count.double() / T_max)) / 2)


def _restarts(rate: float, T_0: int, T_mult: int = 1, eta_min: float = 0.0) -> Schedules:
    _whole("CosineAnnealingWarmRestarts", 1, T_0=T_0, T_mult=T_mult)
    begins = [0]  # of the periods; later ones are never reached
    while T_mult > 1 and begins[-1] < 2**52:
        begins.append(begins[-1] + T_0 * T_mult ** (len(begins) - 1))

    def schedule(count: Tensor) -> Tensor:
        t = count.double()
        if T_mult == 1:
            at = (t % T_0) / T_0
        else:
            known = torch.tensor(begins, dtype=torch.float64, device=count.device)
            n = (t >= known).sum() - 1
            at = (t - torch.where(t >= known, known, 0.0).max()) / (T_0 * float(T_mult) ** n.double())
        return eta_min + (rate - eta_min) * (1 + torch.cos(math.pi * at)) / 2

    return Schedules(schedule)


def _lambda(rate: float, lr_lambda: Callable[[Tensor], Any]) -> Schedules:
    from torch._subclasses.fake_tensor import FakeTensorMode

    if not callable(lr_lambda):
        raise ValueError(f"LambdaLR: lr_lambda={lr_lambda!r}, required a function of the count of updates")
    try:
        with FakeTensorMode():
            got = lr_lambda(torch.zeros((), dtype=torch.float64))
            shape = torch.as_tensor(got).shape
    except Exception as error:
        raise ValueError(
            f"LambdaLR: lr_lambda is part of the traced step, where the count is a tensor without a value ({type(error).__name__}); write it with torch.where and clamp in place of if, min and max"
        ) from error
    if shape:
        raise ValueError(f"LambdaLR: lr_lambda returns {tuple(shape)}, required a 0-D tensor or a number")
    if not isinstance(got, Tensor):
        raise ValueError(f"LambdaLR: lr_lambda returned the number {got!r} for a tensor: it does not look at the count")
    return _by(lambda count: (rate * lr_lambda(count.double())).double())


def _cyclic(
    rate: float,
    base_lr: float,
    max_lr: float,
    step_size_up: int = 2000,
    step_size_down: int | None = None,
    mode: str = "triangular",
    gamma: float = 1.0,
    scale_fn: Any = None,
    scale_mode: str = "cycle",
    cycle_momentum: bool = True,
    base_momentum: float = 0.8,
    max_momentum: float = 0.9,
) -> Schedules:
    if scale_fn is not None or scale_mode != "cycle":
        raise ValueError("CyclicLR: scale_fn and scale_mode have no place here; give a mode, or write a LambdaLR")
    modes = ["triangular", "triangular2", "exp_range"]
    if mode not in modes:
        raise ValueError(f"CyclicLR: mode={mode!r}; {tree.suggest(mode, modes)}")
    height, total = cycle_height(step_size_up, step_size_down)

    def share(count: Tensor) -> Tensor:
        t = count.double()
        if mode == "triangular":
            return height(count)
        return height(count) * (gamma**t if mode == "exp_range" else 0.5 ** (t / total).floor())

    momentum: Schedule = lambda count: max_momentum - (max_momentum - base_momentum) * share(count)  # noqa: E731
    return _by(lambda count: base_lr + (max_lr - base_lr) * share(count), momentum if cycle_momentum else None)


def _one_cycle(
    rate: float,
    max_lr: float,
    total_steps: int | None = None,
    epochs: int | None = None,
    steps_per_epoch: int | None = None,
    pct_start: float = 0.3,
    anneal_strategy: str = "cos",
    cycle_momentum: bool = True,
    base_momentum: float = 0.85,
    max_momentum: float = 0.95,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    three_phase: bool = False,
) -> Schedules:
    if total_steps is None:
        if epochs is None or steps_per_epoch is None:
            raise ValueError("OneCycleLR: total_steps is not given, required it, or epochs and steps_per_epoch")
        _whole("OneCycleLR", 1, epochs=epochs, steps_per_epoch=steps_per_epoch)
        total_steps = epochs * steps_per_epoch
    _whole("OneCycleLR", 1, total_steps=total_steps)
    _fraction("OneCycleLR", pct_start=pct_start)
    if anneal_strategy not in ("cos", "linear"):
        raise ValueError(
            f"OneCycleLR: anneal_strategy={anneal_strategy!r}; {tree.suggest(anneal_strategy, ['cos', 'linear'])}"
        )
    first = max_lr / div_factor
    ends = [pct_start * total_steps - 1, *([2 * pct_start * total_steps - 2] if three_phase else []), total_steps - 1.0]
    rates = [first, max_lr, *([first] if three_phase else []), first / final_div_factor]
    momenta = [max_momentum, base_momentum, *([max_momentum] if three_phase else []), max_momentum]

    def along(values: list[float]) -> Schedule:
        def schedule(count: Tensor) -> Tensor:
            t, begin = count.double().clamp(max=total_steps - 1), 0.0
            out, before = torch.full_like(t, values[0]), torch.zeros_like(t, dtype=torch.bool)
            for i, end in enumerate(ends):
                part = (t - begin) / (end - begin) if end != begin else torch.ones_like(t)
                share = (1 - torch.cos(math.pi * part)) / 2 if anneal_strategy == "cos" else part
                here = ~before if i == len(ends) - 1 else ~before & (t <= end)
                out = torch.where(here, values[i] + (values[i + 1] - values[i]) * share, out)
                before, begin = before | here, end
            return out

        return schedule

    return Schedules(along(rates), along(momenta) if cycle_momentum else None)


def _whole(what: str, least: int, **values: Any) -> None:
    for name, x in values.items():
        if not isinstance(x, int) or isinstance(x, bool) or x < least:
            raise ValueError(f"{what}: {name}={x!r}, required a whole number >= {least}")


def _fraction(what: str, **values: float) -> None:
    for name, x in values.items():
        if not 0.0 <= x <= 1.0:
            raise ValueError(f"{what}: {name}={x!r}, required 0 <= {name} <= 1")


TORCH: dict[str, Callable[..., Schedules]] = {
    "ConstantLR": _constant,
    "CosineAnnealingLR": _cosine,
    "CosineAnnealingWarmRestarts": _restarts,
    "CyclicLR": _cyclic,
    "ExponentialLR": _exponential,
    "LambdaLR": _lambda,
    "LinearLR": _linear,
    "MultiStepLR": _multi_step,
    "OneCycleLR": _one_cycle,
    "PolynomialLR": _polynomial,
    "StepLR": _step,
}
