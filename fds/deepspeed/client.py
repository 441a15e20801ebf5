"""Optimizers of torch, as the client made them, and groups of parameters: which leaves, which rule, which numbers."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from fds import tree
from fds.deepspeed.recipe import Call

# How fds calls what torch calls so; betas are two.
_NUMBERS = {"lr": "learning_rate", "eps": "eps", "weight_decay": "weight_decay", "momentum": "momentum"}
_ADAM = ("lr", "betas", "eps", "weight_decay")
_LIKE: dict[str, tuple[str, tuple[str, ...]]] = {  # class -> the name of its rule, and the settings that it reads
    "AdamW": ("AdamW", _ADAM),
    "Adam": ("Adam", _ADAM),
    "FusedAdam": ("Adam", (*_ADAM, "bias_correction")),
    "DeepSpeedCPUAdam": ("Adam", (*_ADAM, "bias_correction")),
    "SGD": ("SGD", ("lr", "momentum", "nesterov", "weight_decay")),
    "Adagrad": ("Adagrad", ("lr", "eps", "weight_decay", "lr_decay", "initial_accumulator_value")),
    "Lion": ("Lion", ("lr", "betas", "weight_decay")),
    "FusedLion": ("Lion", ("lr", "betas", "weight_decay")),
    "DeepSpeedCPULion": ("Lion", ("lr", "betas", "weight_decay")),
}
_OFF = ("amsgrad", "maximize", "differentiable")  # settings that change what is computed, and that no rule here has
_ZERO = ("dampening",)


@attrs.frozen
class Group:
    """Parameters with an optimizer of their own: patterns of leaves, DeepSpeed's name of the rule and its parameters."""

    name: str
    patterns: tuple[str, ...]
    type: str
    params: Mapping[str, Any]
    schedule: Call | None = None


def groups_of(config: Any, model: nn.Module, parameters: Any = None) -> list[Group]:
    """The groups of a configuration's optimizer; none where it has no optimizer.

    `parameters`: what `initialize` was given as `model_parameters`: parameters, or dictionaries with settings of their own, as torch's optimizers
    take them. Default: all of the model's.
    """
    type, params = config.optimizer.type, dict(config.optimizer.params or {})
    if not type:
        return []
    found = _by_settings(parameters) if parameters is not None else [({}, list(model.parameters()))]
    named = _names(model, [leaves for _, leaves in found], "model_parameters")
    made = [(leaves, {**params, **own}) for leaves, (own, _) in zip(named, found, strict=True) if leaves]
    scheduled = [(leaves, own, schedule_of(config, own)) for leaves, own in made]
    if all(own == scheduled[0][1] for _, own, _ in scheduled):
        scheduled = [([k for leaves, _, _ in scheduled for k in leaves], *scheduled[0][1:])]
    everything = trainable(model)
    each = [patterns(leaves, everything) for leaves, _, _ in scheduled]
    return [
        Group(f"group{i}", p, type, own, schedule)
        for i, (p, (_, own, schedule)) in enumerate(zip(each, scheduled, strict=True))
    ]


def schedule_of(config: Any, params: Mapping[str, Any]) -> Call | None:
    """The call that makes a configuration's schedules, for a group with these parameters; None where it has none."""
    name = config.scheduler.type
    return Call("schedules.build", name, dict(config.scheduler.params or {}), params.get("lr", 1e-3)) if name else None


def _by_settings(parameters: Any) -> list[tuple[dict[str, Any], list[Tensor]]]:
    plain: list[Tensor] = []
    found: list[tuple[dict[str, Any], list[Tensor]]] = []
    for p in [parameters] if isinstance(parameters, Tensor) else parameters:
        if isinstance(p, Mapping):
            own: dict[str, Any] = {str(k): v for k, v in p.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
            given = own.pop("params", None)
            if given is None:
                raise ValueError(f"model_parameters: a group has keys {sorted(own)}, and no 'params'")
            found.append((own, [given] if isinstance(given, Tensor) else list(given)))
        elif isinstance(p, tuple) and len(p) == 2 and isinstance(p[1], Tensor):  # pyright: ignore[reportUnknownArgumentType]
            plain.append(p[1])  # pyright: ignore[reportUnknownArgumentType]
        else:
            plain.append(p)  # pyright: ignore[reportArgumentType]  # `_names` says what is no parameter
    return [*found, *([({}, plain)] if plain else [])]


def trainable(model: nn.Module) -> list[str]:
    """Names of the leaves that take gradients, each once."""
    return [name for name, p in model.named_parameters() if p.requires_grad]


def _names(model: nn.Module, groups: Sequence[Iterable[Any]], what: str) -> list[list[str]]:
    """Names of the trainable parameters in each group."""
    known = {id(p): name for name, p in model.named_parameters()}
    seen: set[str] = set()
    found: list[list[str]] = []
    for i, group in enumerate(groups):
        found.append([])
        for p in group:
            name = known.get(id(p))
            if name is None:
                got = f"a tensor of shape {tuple(p.shape)}" if isinstance(p, Tensor) else type(p).__name__
                raise ValueError(f"{what}: group {i} has {got}, which is no parameter of the model; make the optimizer from model.parameters() of the model that is given to initialize")  # fmt: skip
            if name in seen:
                raise ValueError(f"{what}: {name} comes more than once; a parameter is in one group")
            seen.add(name)
            found[-1] += [name] if p.requires_grad else []
    if not any(found):
        raise ValueError(f"{what}: no parameter takes gradients; set requires_grad on what is to be trained")
    return found


def patterns(leaves: Sequence[str], everything: Sequence[str]) -> tuple[str, ...]:
    """Few patterns that name just these leaves of `everything`.

    >>> names = ["emb.weight", "h.0.norm.weight", "h.1.norm.weight", "h.0.up.weight"]
    >>> patterns(names[1:3], names), patterns(names, names), patterns(names[:2], names)
    (('h.*.norm.weight',), ('*',), ('emb.weight', 'h.0.norm.weight'))
    """
    own = set(leaves)
    if own == set(everything):
        return ("*",)
    short = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", k) for k in leaves))
    exact = all((k in own) == any(tree.matches(p, k) for p in short) for k in everything)
    return tuple(short if exact else leaves)


def of_torch(optimizer: torch.optim.Optimizer, model: nn.Module, *, apart: bool) -> list[Group]:
    """The groups of a client's optimizer. `apart`: keep those apart that have the same numbers now: a scheduler may change them differently.

    Raises `ValueError` for a class that no rule here equals, a setting that it does not have, parameters of another model.
    """
    kind = next((c.__name__ for c in type(optimizer).__mro__ if c.__name__ in _LIKE), None)
    if kind is None:
        raise ValueError(
            f"initialize: optimizer is {type(optimizer).__name__}, and fds has no rule like it; {tree.suggest(type(optimizer).__name__, _LIKE)}, or name one in the configuration; any rule of your own as an (init, update) pair goes into fds.train_step"
        )
    name, settings = _LIKE[kind]
    if any(
        float(s.get("step", 1)) > 0 for s in optimizer.state.values()
    ):  # Adagrad makes its state before the first step
        raise ValueError(
            f"initialize: the {kind} has made steps already, and its state is not taken over; pass it before its first step, or resume by load_checkpoint"
        )
    named = _names(model, [g["params"] for g in optimizer.param_groups], "optimizer")
    found: list[tuple[list[str], dict[str, Any]]] = []
    for group, leaves in zip(optimizer.param_groups, named, strict=True):
        for key in (*_OFF, *_ZERO):
            if group.get(key, False):
                raise ValueError(
                    f"initialize: {kind}({key}={group[key]!r}) has no rule like it in fds; leave {key} out"
                )
        own = {k: _plain(group[k]) for k in settings if k in group}
        if "bias_correction" in own:
            own["bias_correction"] = bool(own["bias_correction"])
        if name == "Adam":
            modes: dict[str, Any] = {"FusedAdam": getattr(optimizer, "adam_w_mode", 1), "DeepSpeedCPUAdam": getattr(optimizer, "adam_w_mode", True)}  # fmt: skip
            decoupled = bool(group.get("decoupled_weight_decay", modes.get(kind, False)))
            own["adam_w_mode"] = decoupled or (own.get("weight_decay", 0.0) == 0.0 and not apart)
        found.append((leaves, own))
    found = [(leaves, own) for leaves, own in found if leaves]
    if not apart and all(own == found[0][1] for _, own in found):
        found = [([k for leaves, _ in found for k in leaves], found[0][1])]
    everything = trainable(model)
    return [Group(f"group{i}", patterns(leaves, everything), name, own) for i, (leaves, own) in enumerate(found)]


def _plain(x: Any) -> Any:
    if isinstance(x, Tensor):
        return float(x)
    return tuple(map(_plain, x)) if isinstance(x, tuple | list) else x  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]


def left_out(groups: Sequence[Group], model: nn.Module) -> list[str]:
    """Leaves that take gradients in the model, and that no group has: an optimizer that does not know them does not train them."""
    named = {g.name: g.patterns for g in groups}
    return [k for k in trainable(model) if tree.group_of(k, named) is None]


def numbers(group: Mapping[str, Any]) -> dict[str, float]:
    """What of a group of torch's is a hyperparameter here, under its name here.

    >>> numbers({"lr": 0.1, "betas": (0.9, 0.99), "params": []})
    {'learning_rate': 0.1, 'b1': 0.9, 'b2': 0.99}
    """
    found = {_NUMBERS[k]: float(v) for k, v in group.items() if k in _NUMBERS and isinstance(v, int | float | Tensor)}
    betas = group.get("betas")
    return found | ({} if betas is None else {"b1": float(betas[0]), "b2": float(betas[1])})
