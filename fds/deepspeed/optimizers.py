"""DeepSpeed's optimizers by their names: which rule of `fds.optim` each is, with DeepSpeed's parameters and defaults.

`build` makes the optimizer; `rule` says what it makes, and prints as Python.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from fds import optim, tree
from fds.deepspeed.errors import DeepSpeedConfigError
from fds.deepspeed.schema.methods import MUP, ONE_BIT, OPTIMIZERS, named
from fds.deepspeed.schema.top import MISTAKEN
from fds.optim.base import Axis, Optimizer, Schedule

_PATH = "optimizer.params"
NO_EFFECT = {  # parameters that change how DeepSpeed computes, and not what
    "fused": "a compiled step, or one call for all leaves, is what there is",
    "foreach": "a compiled step, or one call for all leaves, is what there is",
    "set_grad_none": "gradients are values, which nothing keeps",
    "cuda_aware": "the process group of the axis carries the messages",
    "comm_backend_name": "the process group of the axis carries the messages",
    "fp32_optimizer_states": "moments are always float32",
}


@attrs.frozen
class Rule:
    """A function of `fds.optim` and its arguments, some of which may be rules themselves.

    >>> Rule("sgd", {"learning_rate": 0.1, "momentum": 0.9})
    fds.optim.sgd(learning_rate=0.1, momentum=0.9)
    """

    function: str
    settings: Mapping[str, Any]
    parts: tuple["Rule", ...] = ()  # before the settings

    def __repr__(self) -> str:
        given = [*map(repr, self.parts), *(f"{k}={_source(v)}" for k, v in self.settings.items())]
        return f"fds.optim.{self.function}({', '.join(given)})"

    def made(self, axis: Axis | None = None, schedule: Schedule | None = None) -> Optimizer:
        """The optimizer. `schedule` takes the place of every learning rate; `axis` is for rules that talk to other ranks."""
        settings = {k: _made(v, axis, schedule) for k, v in self.settings.items()}
        if schedule is not None and "learning_rate" in settings:
            settings["learning_rate"] = schedule
        if self.function in ("onebit_adam", "onebit_lamb", "zero_one_adam"):
            settings["axis"] = axis
        return getattr(optim, self.function)(*(p.made(axis, schedule) for p in self.parts), **settings)


def build(type: str, params: Mapping[str, Any] | None = None, *, axis: Axis | None = None, schedule: Schedule | None = None) -> Optimizer:  # fmt: skip
    """The optimizer that DeepSpeed's ``"optimizer": {"type": type, "params": params}`` asks for.

    Args:
        type: DeepSpeed's name, in any spelling of capitals: Adam, AdamW, FusedAdam, DeepSpeedCPUAdam, Adagrad, Lamb, Lion, Muon, SGD,
            OneBitAdam, ZeroOneAdam, OneBitLamb. Where it runs is not said by the name: ``optim.offloaded`` and ``streamed`` say that.
        params: its parameters, with DeepSpeed's names and defaults; "Adam" has decoupled decay unless ``adam_w_mode`` is False.
        axis: the data-parallel axis of the mesh; the one-bit family exchanges momentum over it, and needs it.
        schedule: learning rate as a function of the number of updates, in place of ``lr`` (and Muon's ``muon_lr`` and ``adam_lr``).

    `DeepSpeedConfigError` for an unknown name or parameter, with the nearest one, for a value out of range, and for what no rule here does.

    >>> tx = build("AdamW", {"lr": 1e-4, "betas": [0.9, 0.95]})
    >>> optim.get_hyperparams(tx.init({"w": torch.zeros(2)}))["b2"]
    0.95
    """
    made = rule(type, params)
    if named(type, OPTIMIZERS) in ONE_BIT and axis is None:
        raise DeepSpeedConfigError(
            f"optimizer.type: {type} exchanges momentum between data-parallel ranks; give axis=mesh['dp']",
            ["optimizer.type"],
        )
    try:
        return made.made(axis, schedule)
    except DeepSpeedConfigError:
        raise
    except ValueError as error:
        raise DeepSpeedConfigError(f"{_PATH}: {error}", [_PATH]) from None


def rule(type: str, params: Mapping[str, Any] | None = None) -> Rule:
    """What `build` makes; errors as there.

    >>> rule("Adam", {"lr": 1e-3, "weight_decay": 0.1, "adam_w_mode": False})
    fds.optim.adam(learning_rate=0.001, b1=0.9, b2=0.999, eps=1e-08, weight_decay=0.1)
    """
    name = named(type, OPTIMIZERS)
    if name is None:
        raise DeepSpeedConfigError(f"optimizer.type: {_no_rule(type)}", ["optimizer.type"])
    return _RULES[name](_Given(name, _checked(name, params or {})))


def without_effect(params: Mapping[str, Any]) -> dict[str, str]:
    """Those of an optimizer's parameters that change nothing here, and why.

    >>> without_effect({"lr": 1e-3, "foreach": True})
    {'foreach': 'a compiled step, or one call for all leaves, is what there is'}
    """
    return {k: NO_EFFECT[k] for k in params if k in NO_EFFECT}


def muon_label(name: str, leaf: Tensor) -> str:
    """ "muon" for matrices in the inside of a network, "rest" for all else; as DeepSpeed tells them apart, by name and shape.

    >>> muon_label("h.0.mlp.up.weight", torch.zeros(2, 2)), muon_label("embed_tokens.weight", torch.zeros(2, 2))
    ('muon', 'rest')
    """
    outside = any(word in name.lower() for word in ("embed", "lm_head"))
    return "muon" if leaf.dim() >= 2 and not outside else "rest"


# --- parameters ---


def _no_rule(type: str) -> str:
    if type.lower() in [n.lower() for n in MUP]:
        return f"{type!r} is not there (a rate for each width); give each width a rate of its own by optim.partition"
    if inspect.isclass(getattr(torch.optim, type, None)):
        return f"{type!r} is torch's, and no rule here; there are {', '.join(OPTIMIZERS)}"
    return f"{type!r} is unknown; {tree.suggest(type, OPTIMIZERS)}"


def _checked(name: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters that the optimizer has, of the kinds that they should be; the error has all that are not."""
    table, found = OPTIMIZERS[name], dict[str, Any]()
    problems: dict[str, str] = {}
    for k, v in params.items():
        where = f"{_PATH}.{k}"
        if k not in table:
            problems[where] = MISTAKEN.get(where) or f"{name} has no such parameter; {tree.suggest(str(k), table)}"
            continue
        try:
            found[k] = table[k][1].read(v)
        except (ValueError, TypeError, OverflowError):
            problems[where] = f"given {v!r}, allowed {table[k][1].says}"
    if problems:
        raise DeepSpeedConfigError("\n".join(f"{k}: {text}" for k, text in problems.items()), list(problems))
    return found


class _Given:
    """An optimizer's parameters: what was given, else DeepSpeed's default."""

    def __init__(self, name: str, params: Mapping[str, Any]) -> None:
        self.name, self.params = name, params

    def __contains__(self, key: str) -> bool:
        return key in self.params

    def __getitem__(self, key: str) -> Any:
        return self.params.get(key, OPTIMIZERS[self.name][key][0])

    def get(self, key: str, default: Any = None) -> Any:
        """What was given, or `default`."""
        return self.params.get(key, default)

    def common(self, *more: str, **own: Any) -> dict[str, Any]:
        """learning_rate, the betas and those of `more`, by fds's names."""
        found: dict[str, Any] = {"learning_rate": self["lr"]}
        if "betas" in OPTIMIZERS[self.name]:
            found |= dict(zip(("b1", "b2"), self["betas"], strict=True))
        return {**found, **{k: self[k] for k in more}, **own}

    def refuse(self, key: str, why: str) -> DeepSpeedConfigError:
        return DeepSpeedConfigError(f"{_PATH}.{key}: given {self[key]!r}, {why}", [f"{_PATH}.{key}"])


# --- the rules ---


def _adam(p: _Given) -> Rule:
    modes = {k: p[k] for k in ("adam_w_mode", "adamw_mode") if k in p}
    if len(set(modes.values())) > 1:
        raise p.refuse("adamw_mode", f"and adam_w_mode {p['adam_w_mode']!r}; they mean the same")
    decoupled = next(iter(modes.values()), True)
    if p.name == "AdamW" and not decoupled:
        raise p.refuse("adam_w_mode", "and type AdamW has decoupled decay in any case; use type Adam for the decay of L2 regularisation")  # fmt: skip
    decay = p["weight_decay"]
    if p.get("torch_adam"):
        decay = decay if "weight_decay" in p or not decoupled else 0.01  # the default of torch.optim.AdamW
        if "bias_correction" in p:
            raise p.refuse("bias_correction", "and torch_adam, which has no such parameter; leave one of them out")
    settings = p.common("eps", weight_decay=decay)
    settings |= {} if p["bias_correction"] else {"bias_correction": False}
    return Rule("adamw" if decoupled else "adam", settings)


def _adagrad(p: _Given) -> Rule:
    more = {"rate_decay": p["lr_decay"], "initial": p["initial_accumulator_value"]}
    return Rule("adagrad", p.common("eps", "weight_decay", **{k: v for k, v in more.items() if v}))


def _lamb(p: _Given) -> Rule:
    settings = p.common("eps", "weight_decay", min_ratio=p["min_coeff"], max_ratio=p["max_coeff"])
    settings["correction"] = "rate" if p["bias_correction"] else "none"
    return Rule("lamb", settings | ({"eps_inside": True} if p["eps_inside_sqrt"] else {}))


def _lion(p: _Given) -> Rule:
    return Rule("lion", p.common("weight_decay"))


def _muon(p: _Given) -> Rule:
    # A rate of its own, else the one for both, else the default of each.
    rates = {k: p[k] if k in p or "lr" not in p else p["lr"] for k in ("muon_lr", "adam_lr")}
    gram = p["ns_method"] == "gram"
    low = torch.bfloat16 if not gram else torch.float16 if torch.cuda.is_available() else torch.float32
    matrices = {"learning_rate": rates["muon_lr"], "momentum": p["momentum"], "weight_decay": p["weight_decay"], "method": p["ns_method"], "dtype": low}  # fmt: skip
    decay = 0.01 if p["torch_adam"] and p["adam_w_mode"] and "weight_decay" not in p else p["weight_decay"]
    others = p.common("eps", weight_decay=decay) | {"learning_rate": rates["adam_lr"]}
    rules = {"muon": Rule("muon", matrices), "rest": Rule("adamw" if p["adam_w_mode"] else "adam", others)}
    return Rule("partition", {"optimizers": rules, "labels": muon_label})


def _sgd(p: _Given) -> Rule:
    if p["dampening"]:
        raise p.refuse("dampening", "and the rule here has none; leave it out")
    sgd = Rule("sgd", p.common("momentum", "weight_decay", **({"nesterov": True} if p["nesterov"] else {})))
    return sgd if not p["maximize"] else Rule("chain", {}, (Rule("scale", {"factor": -1.0}), sgd))


def _one_bit(function: str, *more: str, corrected: bool = False) -> Callable[[_Given], Rule]:
    def make(p: _Given) -> Rule:
        if p["eps_inside_sqrt"]:
            raise p.refuse("eps_inside_sqrt", "and DeepSpeed itself never reads it there; leave it out")
        if not corrected and p["bias_correction"]:
            raise p.refuse("bias_correction", "and the method has none; leave it out")
        names = {"max_coeff": "max_ratio", "min_coeff": "min_ratio"}
        own = {names.get(k, k): p[k] for k in more}
        own |= {"bias_correction": True} if p["bias_correction"] else {}
        return Rule(function, p.common("eps", "weight_decay", **own))

    return make


_RULES: dict[str, Callable[[_Given], Rule]] = {
    **dict.fromkeys(("Adam", "AdamW", "FusedAdam", "CPUAdam", "DeepSpeedCPUAdam"), _adam),
    "Adagrad": _adagrad,
    **dict.fromkeys(("Lamb", "FusedLamb"), _lamb),
    "Lion": _lion,
    "Muon": _muon,
    "SGD": _sgd,
    "OneBitAdam": _one_bit("onebit_adam", "freeze_step", corrected=True),
    "ZeroOneAdam": _one_bit("zero_one_adam", "var_freeze_step", "var_update_scaler", "local_step_scaler", "local_step_clipper"),
    "OneBitLamb": _one_bit("onebit_lamb", "freeze_step", "max_coeff", "min_coeff", "coeff_beta", "factor_max", "factor_min", "factor_threshold"),
}  # fmt: skip


def _source(x: Any) -> str:
    if isinstance(x, Mapping):
        return "{" + ", ".join(f"{k!r}: {_source(v)}" for k, v in x.items()) + "}"
    return f"{x.__module__}.{x.__name__}" if callable(x) and hasattr(x, "__name__") else repr(x)


def _made(x: Any, axis: Axis | None, schedule: Schedule | None) -> Any:
    if isinstance(x, Rule):
        return x.made(axis, schedule)
    return {k: _made(v, axis, schedule) for k, v in x.items()} if isinstance(x, Mapping) else x
