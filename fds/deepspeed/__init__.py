"""The front door for those who come from DeepSpeed: their configuration, and their training loop, over fds's transformations.

Names are loaded when they are used, so that `import fds` stays light.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fds.accelerator import get_accelerator
    from fds.deepspeed import checkpointing, zero
    from fds.deepspeed.arguments import add_config_arguments
    from fds.deepspeed.config import DeepSpeedConfig
    from fds.deepspeed.device import OnDevice
    from fds.deepspeed.engine import Engine
    from fds.deepspeed.entry import initialize
    from fds.deepspeed.errors import DeepSpeedConfigError, UnsupportedKeyWarning
    from fds.deepspeed.logging import log_dist, logger
    from fds.deepspeed.profiler import get_model_profile
    from fds.deepspeed.schedules import add_tuning_arguments
    from fds.deepspeed.transformer import DeepSpeedTransformerConfig, DeepSpeedTransformerLayer
    from fds.version import __git_branch__, __git_hash__, is_compile_supported

_MODULES = ("checkpointing", "zero")
_WHERE = {  # a module of this package; with a dot, of fds itself
    "DeepSpeedConfig": "config",
    "DeepSpeedConfigError": "errors",
    "DeepSpeedTransformerConfig": "transformer",
    "DeepSpeedTransformerLayer": "transformer",
    "Engine": "engine",
    "OnDevice": "device",
    "UnsupportedKeyWarning": "errors",
    "__git_branch__": ".version",
    "__git_hash__": ".version",
    "add_config_arguments": "arguments",
    "add_tuning_arguments": "schedules",
    "get_accelerator": ".accelerator",
    "get_model_profile": "profiler",
    "initialize": "entry",
    "is_compile_supported": ".version",
    "log_dist": "logging",
    "logger": "logging",
}

__all__ = [
    "DeepSpeedConfig",
    "DeepSpeedConfigError",
    "DeepSpeedTransformerConfig",
    "DeepSpeedTransformerLayer",
    "Engine",
    "OnDevice",
    "UnsupportedKeyWarning",
    "__git_branch__",
    "__git_hash__",
    "add_config_arguments",
    "add_tuning_arguments",
    "checkpointing",
    "get_accelerator",
    "get_model_profile",
    "initialize",
    "is_compile_supported",
    "log_dist",
    "logger",
    "zero",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"fds.deepspeed.{name}")
    if name not in _WHERE:
        raise AttributeError(f"module 'fds.deepspeed' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
