"""Operators where a hand-written kernel beats what a compiler makes. `operators()` lists them; `define` makes new ones."""

from fds.kernels.cross_entropy import linear_cross_entropy, linear_log_probabilities
from fds.kernels.glu import geglu, swiglu
from fds.kernels.inject import use
from fds.kernels.lora import lora_fuse, lora_linear
from fds.kernels.norms import layer_norm, rms_norm
from fds.kernels.registry import Configured, Operator, define, operators
from fds.kernels.rope import rope, rope_angles, rope_frequencies
from fds.kernels.triton_or_not import jit, launch, tl

__all__ = [
    "Configured",
    "Operator",
    "define",
    "geglu",
    "jit",
    "launch",
    "layer_norm",
    "linear_cross_entropy",
    "linear_log_probabilities",
    "lora_fuse",
    "lora_linear",
    "operators",
    "rms_norm",
    "rope",
    "rope_angles",
    "rope_frequencies",
    "swiglu",
    "tl",
    "use",
]
