"""DeepSpeed's optimizers and schedules by name, as the calls that make them here."""

from collections.abc import Mapping
from typing import Any

from fds.deepspeed.recipe import Call

_RENAMED = {"eps": "eps", "weight_decay": "weight_decay", "momentum": "momentum", "nesterov": "nesterov"}
_ADAMS = ("adam", "adamw", "fusedadam", "cpuadam", "deepspeedcpuadam")


def rule(type: str, params: Mapping[str, Any], schedule: Call | None = None) -> Call:
    """The call that makes the optimizer: an expression of `fds.optim`, or, for one with settings of its own, `optimizers.build`.

    >>> print(rule("AdamW", {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}).source())
    fds.optim.adamw(0.001, b1=0.9, b2=0.95, weight_decay=0.1)
    """
    name, rate = type.lower(), schedule if schedule is not None else params.get("lr", 1e-3)
    options = {_RENAMED[k]: v for k, v in params.items() if k in _RENAMED}
    if "betas" in params:
        options = {"b1": params["betas"][0], "b2": params["betas"][1], **options}
    if name in _ADAMS:
        options.pop("momentum", None)
        options.pop("nesterov", None)
        decoupled = params.get("adam_w_mode", params.get("adamw_mode", True))
        options |= {} if params.get("bias_correction", True) else {"bias_correction": False}
        return Call("fds.optim.adamw" if decoupled else "fds.optim.adam", rate, **options)
    if name == "sgd":
        return Call("fds.optim.sgd", rate, **options)
    if name == "lion":
        return Call("fds.optim.lion", rate, **options)
    own = {} if schedule is None else {"schedule": schedule}
    return Call("optimizers.build", type, dict(params), **own)
