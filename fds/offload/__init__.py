"""Where parameters live: `offload`."""

from typing import Any

import torch
from torch import Tensor

from fds import tree
from fds.program import Lens
from fds.transform import Transform, direct, through
from fds.tree import Params

__all__ = ["compute_device", "offload", "to_host"]


def compute_device() -> torch.device:
    """Where calls run: the accelerator if there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def to_host(x: Tensor) -> Tensor:
    """`x` in host memory, page-locked where there is a CUDA device to copy to."""
    return x.to("cpu").pin_memory() if torch.cuda.is_available() and not x.is_meta else x if x.is_meta else x.to("cpu")


@direct
def offload(store: str = "cpu") -> Transform:
    """Keep parameters in host memory and bring them to the device where they are used, site by site.

    Gradients go back the same way. On a machine without an accelerator the host *is* the device, and nothing moves.

    Law: bitwise the same values as without it.
    """
    if store != "cpu":
        raise ValueError(f"offload: store {store!r} is unknown; {tree.suggest(str(store), ['cpu'])}")

    def make(spec: Params) -> Lens | None:
        def put(params: Params) -> Params:
            return {k: to_host(v) for k, v in params.items()}

        def get(stored: Params) -> Params:
            device: Any = compute_device()
            return {k: v if v.is_meta else v.to(device, non_blocking=True) for k, v in stored.items()}

        return Lens(put, get) if spec else None

    return through(make, name="offload", options={"store": store}, provides=["offload"], conflicts=["offload", "whole"])
