"""The front door for those who come from DeepSpeed: their configuration, and their training loop, over fds's transformations.

Names are loaded when they are used, so that `import fds` stays light.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fds.deepspeed.arguments import add_config_arguments
    from fds.deepspeed.config import DeepSpeedConfig
    from fds.deepspeed.engine import Engine
    from fds.deepspeed.entry import initialize
    from fds.deepspeed.errors import DeepSpeedConfigError, UnsupportedKeyWarning

_WHERE = {
    "DeepSpeedConfig": "config",
    "DeepSpeedConfigError": "errors",
    "Engine": "engine",
    "UnsupportedKeyWarning": "errors",
    "add_config_arguments": "arguments",
    "initialize": "entry",
}

__all__ = [
    "DeepSpeedConfig",
    "DeepSpeedConfigError",
    "Engine",
    "UnsupportedKeyWarning",
    "add_config_arguments",
    "initialize",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'fds.deepspeed' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fds.deepspeed.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
