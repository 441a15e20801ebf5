"""Serving: key-value caches, decoding, sampling, rules that put operators into models, and an engine by DeepSpeed's settings."""

from fds.inference.adapters import NONE, adapters, choose, load_adapter
from fds.inference.cache import CacheConfig
from fds.inference.config import InferenceConfig
from fds.inference.decoding import Decoding
from fds.inference.engine import InferenceEngine, default_inference_config, init_inference
from fds.inference.generate import Generated, Sampling, generate
from fds.inference.hybrid import Hybrid, Statistics, hybrid
from fds.inference.policies import (
    INFERENCE_GENERIC_MODE,
    INFERENCE_SPECIALIZED_MODE,
    policies,
    replace_transformer_layer,
    report,
    revert_transformer_layer,
)
from fds.inference.speculative import Draft
from fds.inference.workspace import Workspace

__all__ = [
    "INFERENCE_GENERIC_MODE",
    "INFERENCE_SPECIALIZED_MODE",
    "NONE",
    "CacheConfig",
    "Decoding",
    "Draft",
    "Generated",
    "Hybrid",
    "InferenceConfig",
    "InferenceEngine",
    "Sampling",
    "Statistics",
    "Workspace",
    "adapters",
    "choose",
    "default_inference_config",
    "generate",
    "hybrid",
    "init_inference",
    "load_adapter",
    "policies",
    "replace_transformer_layer",
    "report",
    "revert_transformer_layer",
]
