"""Triton, where it is installed (Linux): its names, or stand-ins that let a kernel's module be imported without it."""

import os
from typing import TYPE_CHECKING, Any

import torch

# Whether a * b + c is one instruction with one rounding: its default changes in Triton 3.10, and with it the last bit of results.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


if TYPE_CHECKING:
    import triton
    import triton.language as tl

    def jit(f: Any) -> Any:
        """Triton's; its own type has no way to say that a constant goes where a `constexpr` is declared."""
else:
    try:
        import triton
        import triton.language as tl
        from triton import jit
    except ImportError:  # no kernel can be launched then, and none has to be: there is no CUDA device
        triton = None

        class tl:
            constexpr = Any

        def jit(f: Any) -> Any:
            return f


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Run `kernel` over `grid`; a compiler sees the launch as a node of its graph. An empty grid is nothing to do."""
    if all(n > 0 for n in grid):
        interpreted = not isinstance(
            kernel, triton.JITFunction
        )  # TRITON_INTERPRET=1: torch before 2.13 does not know what that makes of one
        (kernel if interpreted else torch.library.wrap_triton(kernel))[grid](*args, **meta)


__all__ = ["jit", "launch", "tl", "triton"]
