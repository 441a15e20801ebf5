"""DeepSpeed's optimizers by name, as the calls that make them: expressions of a recipe."""

from collections.abc import Mapping
from typing import Any

from fds.deepspeed import optimizers
from fds.deepspeed.recipe import Call, Name, Reference
from fds.deepspeed.schema.methods import ONE_BIT, OPTIMIZERS, named


def rule(type: str, params: Mapping[str, Any], schedule: Call | None = None, axis: Name | None = None) -> Call:
    """The call that makes an optimizer, as `optimizers.build` would; `schedule` takes the place of every learning rate.

    >>> print(rule("AdamW", {"lr": 1e-3, "betas": (0.9, 0.95)}).source())
    fds.optim.adamw(0.001, b1=0.9, b2=0.95, eps=1e-08, weight_decay=0.0)
    """
    return _call(optimizers.rule(type, params), schedule, axis)


def _call(made: optimizers.Rule, schedule: Call | None, axis: Name | None) -> Call:
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
