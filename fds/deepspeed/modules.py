"""What the front door asks of a module, and the few things it does to a copy of one."""

import copy

from torch import nn


def checkpoints_itself(module: nn.Module) -> bool:
    """Whether a model of transformers has its gradient checkpointing on."""
    return any(getattr(m, "gradient_checkpointing", False) for m in module.modules())


def without_checkpointing(module: nn.Module) -> nn.Module:
    """A copy with gradient checkpointing off, over the same tensors: `fds.checkpoint` takes its place. The module itself stays as it is.

    >>> module = nn.Linear(1, 1)
    >>> module.gradient_checkpointing = True
    >>> copied = without_checkpointing(module)
    >>> copied.gradient_checkpointing, module.gradient_checkpointing, copied.weight is module.weight
    (False, True, True)
    """
    made = shallow(module)
    for m in made.modules():
        if getattr(m, "gradient_checkpointing", False):
            m.__dict__["gradient_checkpointing"] = False  # a plain attribute, which a class may also declare
    return made


def shallow(module: nn.Module) -> nn.Module:
    """A copy of a module that shares its tensors."""
    return copy.deepcopy(module, {id(t): t for t in [*module.parameters(), *module.buffers()]})
