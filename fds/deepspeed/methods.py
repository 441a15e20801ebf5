"""DeepSpeed's optimizers by name, as the calls that make them: expressions of a recipe."""

from collections.abc import Mapping
from typing import Any

import attrs

from fds.deepspeed import optimizers
from fds.deepspeed.recipe import Call, Name, Reference
from fds.deepspeed.schema.methods import ONE_BIT, OPTIMIZERS, named


def rule(type: str, params: Mapping[str, Any], policy: Name | None = None, axis: Name | None = None, *, momentum: bool = False, b2: float | None = None) -> Call:  # fmt: skip
    """The call that makes an optimizer, as `optimizers.build` would.

    `policy`: the `optim.Schedules` whose learning rate takes the place of every one; with `momentum`, also its momentum, and `b2` that of the rule.

    >>> print(rule("AdamW", {"lr": 1e-3, "betas": (0.9, 0.95)}).source())
    fds.optim.adamw(0.001, b1=0.9, b2=0.95, eps=1e-08, weight_decay=0.0)
    """
    rate = None if policy is None else attrs.evolve(policy, attribute="learning_rate")
    if b2 is not None and "betas" in complete(type, params):
        params = {**params, "betas": [complete(type, params)["betas"][0], b2]}
    made = _call(optimizers.rule(type, params), rate, axis)
    if policy is None or not momentum:
        return made
    name = next((k for k in ("b1", "momentum") if made.kwargs.get(k)), None)
    return made if name is None else Call("fds.optim.scheduled", made, **{name: attrs.evolve(policy, attribute="momentum")})  # fmt: skip


def _call(made: optimizers.Rule, schedule: Name | None, axis: Name | None) -> Call:
    def expression(x: Any) -> Any:
        if isinstance(x, optimizers.Rule):
            return _call(x, schedule, axis)
        if x is optimizers.muon_label:
            return Reference("optimizers.muon_label")
        return {k: expression(v) for k, v in x.items()} if isinstance(x, Mapping) else x  # pyright: ignore[reportUnknownVariableType]

    settings = {k: expression(v) for k, v in made.settings.items()}
    first = [expression(p) for p in made.parts]
    if "learning_rate" in settings:
        rate = settings.pop("learning_rate")
        first.append(rate if schedule is None else schedule)
    if made.function in ("onebit_adam", "onebit_lamb", "zero_one_adam"):
        settings["axis"] = axis
    return Call(f"fds.optim.{made.function}", *first, **settings)


def is_one_bit(type: str) -> bool:
    """Whether an optimizer reduces gradients itself."""
    return named(type, OPTIMIZERS) in ONE_BIT


def complete(type: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's parameters with DeepSpeed's defaults.

    >>> complete("SGD", {"lr": 0.1})["momentum"]
    0.0
    """
    name = named(type, OPTIMIZERS)
    return {**({k: default for k, (default, _) in OPTIMIZERS[name].items()} if name else {}), **params}
