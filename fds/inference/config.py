"""The settings of `init_inference`: DeepSpeed's names and defaults, strict. A key that nothing would come of is an error, not silence."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch

from fds import tree
from fds.files import read_json

_DTYPES = {
    **dict.fromkeys(("fp16", "float16", "half"), torch.float16), **dict.fromkeys(("fp32", "float32", "float"), torch.float32),
    **dict.fromkeys(("bf16", "bfloat16", "bfloat"), torch.bfloat16), "int8": torch.int8,
}  # fmt: skip
_ALIASES = {"kernel_inject": "replace_with_kernel_inject", "tp": "tensor_parallel", "max_tokens": "max_out_tokens", "min_tokens": "min_out_tokens", "tm": "triangular_masking",
            "ckpt_config": "checkpoint_config", "injection_dict": "injection_policy", "args": "config"}  # fmt: skip
# What is known, may be given with its default, and is nothing here; with the reason.
_NOTHING: dict[str, tuple[Any, str]] = {
    "use_triton": (False, "operators choose their Triton kernels by device; leave it out"),
    "triton_autotune": (False, "kernels have their configurations fixed, and tested ahead of time; leave it out"),
    "triangular_masking": (True, "a model's own masks hold; leave it out"),
    "moe": ({}, "experts are the model's own modules; leave it out"),
    "keep_module_on_host": (False, "give zero={'stage': 3, 'offload_param': {'device': 'cpu'}} for weights in host memory"),
    "base_dir": ("", "give the whole path as checkpoint"),
    "set_empty_params": (False, "build the model under torch.device('meta') and give checkpoint="),
    "save_mp_checkpoint_path": (None, "fds.save writes safetensors that every mesh reads"),
    "checkpoint_config": ({}, "give the directory of safetensors as checkpoint"),
    "return_tuple": (True, "modules return what they return"),
    "training_mp_size": (1, "safetensors know no mesh"),
    "replace_method": ("auto", "deprecated; leave it out"),
    "injection_policy": (None, "rules are chains: at(pattern, use(operator)); for tensor parallelism tensor_parallel={'plan': {pattern: style}}"),
    "injection_policy_tuple": (None, "see injection_policy"),
    "transposed_mode": (False, "weights stay as the model has them"),
    "ep_size": (1, "expert parallelism is not there yet"),
    "ep_group": (None, "expert parallelism is not there yet"),
    "ep_mp_group": (None, "expert parallelism is not there yet"),
    "moe_experts": ([1], "experts are the model's own modules; leave it out"),
    "moe_type": ("standard", "experts are the model's own modules; leave it out"),
    "config": (None, "give its keys themselves"),
    "mpu": (None, "give tensor_parallel={'tp_size': n}; meshes are torch's"),
}  # fmt: skip


@attrs.frozen(kw_only=True)
class InferenceConfig:
    """Settings of an engine.

    dtype: of the weights; "int8" stores them in blocks of int8 and computes in bfloat16. DeepSpeed's default, float16.
    tensor_parallel: ``{"tp_size": n, "plan": {...}}``; see `sharding.tensor_parallel`.
    max_out_tokens: of prompt and new ones together, at most; a call for more is an error.
    min_out_tokens: new tokens that a prompt has to leave room for; else an error before anything is computed.
    replace_with_kernel_inject: "specialized" mode; see `inference.policies`.
    enable_cuda_graph: record the decode step as a CUDA graph (`generate(cuda_graph=True)`). An error without CUDA, and with `zero` or ranks that share
        weights. Never run on a GPU so far.
    quant: ``{"weight": {"num_bits": 8 or 4, "q_groups": ...}}``; a block of 128 has a scale, whatever `q_groups` says, which is refused if given.
    checkpoint: a directory of safetensors; weights come from there, leaf by leaf.
    zero: ``{"stage": 3, "offload_param": {"device": "cpu" or "nvme", "nvme_path": ...}}``: weights in host memory or files (ZeRO-Inference).
    """

    dtype: torch.dtype = torch.float16
    tensor_parallel: Mapping[str, Any] = {}
    max_out_tokens: int = 1024
    min_out_tokens: int = 1
    replace_with_kernel_inject: bool = False
    enable_cuda_graph: bool = False
    quant: Mapping[str, Any] = {}
    checkpoint: str | Path | None = None
    zero: Mapping[str, Any] = {}

    def __attrs_post_init__(self) -> None:
        for name in ("max_out_tokens", "min_out_tokens"):
            tree.positive(name, getattr(self, name))
        if self.min_out_tokens > self.max_out_tokens:
            raise ValueError(f"min_out_tokens: given {self.min_out_tokens}, required at most max_out_tokens, which is {self.max_out_tokens}")  # fmt: skip
        for name in ("replace_with_kernel_inject", "enable_cuda_graph"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name}: given {getattr(self, name)!r}, required true or false")
        if not isinstance(self.checkpoint, str | Path | None):
            raise ValueError(f"checkpoint: given {self.checkpoint!r}, required a directory of safetensors")
        _known("tensor_parallel", self.tensor_parallel, {"enabled": True, "tp_size": 1, "plan": None})
        tree.positive("tensor_parallel.tp_size", self.tensor_parallel.get("tp_size", 1))
        _known("quant", self.quant, {"enabled": True, "weight": {}})
        _known("quant.weight", self.quant.get("weight", {}), {"enabled": True, "num_bits": 8, "q_type": "symmetric"})
        for name, given in (("tensor_parallel", self.tensor_parallel), ("quant", self.quant), ("quant.weight", self.quant.get("weight", {}))):  # fmt: skip
            if type(on := given.get("enabled", True)) is not bool:
                raise ValueError(f"{name}.enabled: given {on!r}, required true or false")
        _known("zero", self.zero, {"stage": 0, "offload_param": None})
        if (bits := self.bits) is not None and (type(bits) is not int or bits not in (4, 8)):
            raise ValueError(f"quant.weight.num_bits: given {bits!r}, allowed 4 or 8")
        if self.dtype == torch.int8 and (bits != 8 or not self._quantized(self.quant)):
            raise ValueError(
                f"quant: given {dict(self.quant)!r} with dtype int8, which is 8 bits; leave one of them out"
            )
        if (kind := self.quant.get("weight", {}).get("q_type", "symmetric")) != "symmetric":
            raise ValueError(f"quant.weight.q_type: given {kind!r}, allowed 'symmetric'")
        if self.zero and (self.zero.get("stage") != 3 or not self.zero.get("offload_param")):
            raise ValueError(
                f"zero: given {dict(self.zero)!r}, allowed stage 3 with offload_param; to split weights over ranks, use tensor_parallel"
            )
        if self.zero:
            away = self.zero["offload_param"]
            _known("zero.offload_param", away, {"device": "cpu", "nvme_path": None, "pin_memory": False})
            if (where := away.get("device")) not in ("cpu", "nvme"):
                raise ValueError(f"zero.offload_param.device: given {where!r}, allowed 'cpu' or 'nvme'")
            if (where == "nvme") != bool(path := away.get("nvme_path")):
                raise ValueError(f"zero.offload_param.nvme_path: given {path!r} with device {where!r}; required for 'nvme', a directory, and for no other")  # fmt: skip
            if away.get("pin_memory", False):
                raise ValueError("zero.offload_param.pin_memory: given True, which has no effect here; leave it out")
        if self.enable_cuda_graph and (self.zero or self.tp_size > 1):
            what = "zero" if self.zero else "tensor_parallel"
            raise ValueError(
                f"enable_cuda_graph: given True with {what}, whose weights or sums a recorded step does not wait for; leave out one of them"
            )
        if self.enable_cuda_graph and not torch.cuda.is_available():
            raise ValueError("enable_cuda_graph: given True, and there is no CUDA here; leave it out")

    @property
    def tp_size(self) -> int:
        """Ranks that weights are split over."""
        return self.tensor_parallel.get("tp_size", 1) if self.tensor_parallel.get("enabled", True) else 1

    @property
    def bits(self) -> int | None:
        """Of stored weights; None: those of `dtype`."""
        if self.quant and self._quantized(self.quant):
            return self.quant.get("weight", {}).get("num_bits", 8)
        return 8 if self.dtype == torch.int8 else None

    @staticmethod
    def _quantized(quant: Mapping[str, Any]) -> bool:
        """Unless it is switched off."""
        return quant.get("enabled", True) and quant.get("weight", {}).get("enabled", True)

    @classmethod
    def of(cls, config: Any = None, **options: Any) -> "InferenceConfig":
        """From a dictionary, the path of a JSON file, or keywords; these may not contradict each other.

        Raises `ValueError` that names the key: unknown (with the nearest), given twice with two values, or such that nothing would come of it.

        >>> InferenceConfig.of({"dtype": "bf16"}, kernel_inject=True).replace_with_kernel_inject
        True
        """
        given: dict[str, Any] = {}
        read: Any = read_json(Path(config)) if isinstance(config, str | Path) else {} if config is None else config
        if not tree.is_mapping(read):
            raise ValueError(f"init_inference: config is {read!r}, required a dictionary, or the path of a JSON file with one")  # fmt: skip
        for key, value in [*read.items(), *options.items()]:
            name = "tensor_parallel" if key == "mp_size" else _ALIASES.get(key, key)
            value = {"tp_size": value} if key == "mp_size" else value
            if name in given and given[name] != value:
                raise ValueError(f"init_inference: {name} is {given[name]!r} and {value!r} (as {key!r}); give it once")
            given[name] = value
        for name in list(given):
            if name in _NOTHING:
                default, fix = _NOTHING[name]
                if (got := given.pop(name)) != default:
                    raise ValueError(f"init_inference: {name}={got!r} has no effect here: {fix}")
        if unknown := given.keys() - {f.name for f in attrs.fields(cls)}:
            name = min(unknown)
            known = [f.name for f in attrs.fields(cls)] + list(_ALIASES)
            raise ValueError(f"init_inference: {name!r} is unknown; {tree.suggest(name, known)}")
        if isinstance(named := given.get("dtype"), str):
            if (short := named.removeprefix("torch.")) not in _DTYPES:
                raise ValueError(f"dtype: {named!r} is unknown; {tree.suggest(short, _DTYPES)}")
            given["dtype"] = _DTYPES[short]
        if given.get("dtype", torch.float16) not in _DTYPES.values():
            raise ValueError(
                f"dtype: given {given['dtype']!r}, allowed {', '.join(map(str, dict.fromkeys(_DTYPES.values())))}"
            )
        return cls(**given)


def _known(what: str, given: Any, known: Mapping[str, Any]) -> None:
    if not isinstance(given, Mapping):
        raise ValueError(f"{what}: given {given!r}, required a dictionary with keys of {', '.join(known)}")
    for key in given:  # pyright: ignore[reportUnknownVariableType]
        if key not in known:
            raise ValueError(f"{what}: {key!r} is unknown or has no effect here; {tree.suggest(str(key), known)}")  # pyright: ignore[reportUnknownArgumentType]


def default_inference_config() -> dict[str, Any]:
    """The keys of `init_inference` and their defaults, as a dictionary that it takes.

    >>> default_inference_config()["max_out_tokens"]
    1024
    """
    out = {f.name: f.default for f in attrs.fields(InferenceConfig)}
    return {**out, "dtype": "float16"} | {k: v for k, (v, _) in _NOTHING.items()}
