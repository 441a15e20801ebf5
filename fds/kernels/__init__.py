"""Operators where a hand-written kernel beats what a compiler makes. `operators()` lists them; `define` makes new ones."""

from fds.kernels.cross_entropy import linear_cross_entropy, linear_log_probabilities
from fds.kernels.registry import Configured, Operator, define, operators
from fds.kernels.triton_or_not import jit, launch, tl

__all__ = [
    "Configured",
    "Operator",
    "define",
    "jit",
    "launch",
    "linear_cross_entropy",
    "linear_log_probabilities",
    "operators",
    "tl",
]
