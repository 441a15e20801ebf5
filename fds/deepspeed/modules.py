"""What the front door asks of a module, and the few things it does to a copy of one."""

import copy
from typing import Any

import torch
from torch import nn

from fds import tree
from fds.frame import Apply
from fds.transform import Transform, around


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


def autocast(dtype: torch.dtype | str = "bfloat16") -> Transform:
    """Run the model's call in `torch.autocast`: torch's lists say which operators compute in `dtype`; what is stored and sent stays as it is.

    >>> autocast("float16")
    autocast(dtype='float16')
    """
    name = str(dtype).removeprefix("torch.")
    name = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32", "float": "float32"}.get(name, name)  # fmt: skip
    known = ("bfloat16", "float16", "float32")
    if name not in known:
        raise ValueError(f"autocast: dtype {dtype!r} is unknown; {tree.suggest(str(dtype), known)}")
    low: torch.dtype = getattr(torch, name)

    def wrap(apply: Apply) -> Apply:
        def run(*args: Any, **kwargs: Any) -> Any:
            kind = "cuda" if torch.cuda.is_available() else "cpu"
            with torch.autocast(kind, low):
                return apply(*args, **kwargs)

        return run

    return around(wrap, name="autocast", scope="root", options={"dtype": name}, conflicts=["whole"])
