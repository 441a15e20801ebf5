"""Operators where a hand-written kernel beats what a compiler makes. `operators()` lists them; `define` makes new ones."""

from fds.kernels.adamw8bit import adamw8bit_update
from fds.kernels.attention import decode_attention, paged_decode_attention
from fds.kernels.cross_entropy import linear_cross_entropy, linear_log_probabilities
from fds.kernels.glu import geglu, swiglu
from fds.kernels.inject import use
from fds.kernels.lamb import lamb_update
from fds.kernels.lora import lora_fuse, lora_linear
from fds.kernels.norms import layer_norm, rms_norm
from fds.kernels.optimizer import adamw_update, lion_update, sgd_update
from fds.kernels.quantize import block_dequantize, block_quantize, block_quantized_sum
from fds.kernels.registry import Configured, Operator, define, operators
from fds.kernels.rope import rope, rope_angles, rope_frequencies
from fds.kernels.rounding import stochastic_round
from fds.kernels.sampling import sample
from fds.kernels.triton_or_not import jit, launch, tl

__all__ = [
    "Configured",
    "Operator",
    "adamw8bit_update",
    "adamw_update",
    "block_dequantize",
    "block_quantize",
    "block_quantized_sum",
    "decode_attention",
    "define",
    "geglu",
    "jit",
    "lamb_update",
    "launch",
    "layer_norm",
    "linear_cross_entropy",
    "linear_log_probabilities",
    "lion_update",
    "lora_fuse",
    "lora_linear",
    "operators",
    "paged_decode_attention",
    "rms_norm",
    "rope",
    "rope_angles",
    "rope_frequencies",
    "sample",
    "sgd_update",
    "stochastic_round",
    "swiglu",
    "tl",
    "use",
]
