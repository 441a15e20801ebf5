"""`init_inference`: a model and settings in, an engine out that shows the chain it is made of."""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from fds.checkpoint import load
from fds.functional import functionalize
from fds.inference.clock import now
from fds.inference.config import InferenceConfig, default_inference_config
from fds.inference.generate import generate
from fds.inference.policies import INFERENCE_GENERIC_MODE, INFERENCE_SPECIALIZED_MODE, replace_transformer_layer, report
from fds.inference.prompts import room
from fds.precision import cast, freeze
from fds.program import Program
from fds.quantize import quantize_frozen
from fds.transform import Transform, chain

__all__ = ["InferenceEngine", "default_inference_config", "init_inference"]

logger = logging.getLogger("fds.inference")


class InferenceEngine:
    """A program and its weights, called like the model. `program` and `stored` are the functional objects: leave the engine at any time."""

    def __init__(self, program: Program, stored: Any, config: InferenceConfig) -> None:
        self.program, self.stored, self.config = program, stored, config
        self._times: list[float] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, without gradients."""
        start = self._now()
        with torch.no_grad():
            out = self.program(self.stored, *args, **kwargs)
        self._note(start)
        return out

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, *, max_new_tokens: int | None = None, **options: Any) -> Any:  # fmt: skip
        """`fds.generate` of these weights; `max_new_tokens` is by default what `max_out_tokens` leaves room for.

        Raises `ValueError` before any work for more than `max_out_tokens` in all, and for a prompt that leaves less than `min_out_tokens`.
        """
        least = self.config.min_out_tokens if max_new_tokens is None else max_new_tokens
        left = room(input_ids, attention_mask, least, self.config.max_out_tokens, "init_inference")
        options = {"max_new_tokens": left if max_new_tokens is None else max_new_tokens, "cuda_graph": self.config.enable_cuda_graph, **options}  # fmt: skip
        start = self._now()
        out = generate(self.program, self.stored, input_ids, attention_mask, **options)
        self._note(start)
        return out

    def profile_model_time(self) -> None:
        """Measure every call from now on; `model_times` has the results."""
        self._times = []

    def model_times(self) -> list[float]:
        """Milliseconds of each call since the last question, the device's work included. `ValueError` before `profile_model_time`."""
        if self._times is None:
            raise ValueError("model_times: nothing was measured; call profile_model_time() first")
        found, self._times = self._times, []
        return found

    def _now(self) -> float:
        return 0.0 if self._times is None else now()

    def _note(self, start: float) -> None:
        if self._times is not None:
            self._times.append((self._now() - start) * 1e3)

    def __repr__(self) -> str:
        return f"InferenceEngine({', '.join(map(repr, self.program.history))})"


def init_inference(model: nn.Module, config: Any = None, **options: Any) -> InferenceEngine:
    """An engine for a model's forward and for text, by DeepSpeed's settings (`InferenceConfig`). The model is not changed.

    The chain that the settings mean is logged (logger ``fds.inference``) and in the engine's ``repr``.

    Args:
        model: any module; under ``torch.device("meta")`` with `checkpoint`, so that no rank holds more than its part.
        config: a dictionary, or the path of a JSON file; `options` are further keys.

    Raises:
        ValueError: see `InferenceConfig.of`; a model on the meta device without `checkpoint`; what the transformations refuse.

    >>> engine = init_inference(nn.Linear(2, 2), dtype="fp32")
    >>> engine
    InferenceEngine(freeze(), cast(dtype='float32', stored=True))
    >>> engine(torch.zeros(1, 2)).shape
    torch.Size([1, 2])
    """
    settings = InferenceConfig.of(config, **options)
    program, params = functionalize(model)
    if settings.checkpoint is None and any(x.is_meta for x in params.values()):
        raise ValueError(
            "init_inference: the model is on the meta device and has no weights; give checkpoint=, a directory of safetensors"
        )
    program = chain(*_transforms(settings))(program.eval())
    mode = INFERENCE_SPECIALIZED_MODE if settings.replace_with_kernel_inject else INFERENCE_GENERIC_MODE
    if settings.replace_with_kernel_inject:
        logger.info("%s", report(program))
    program = replace_transformer_layer(program, mode)
    source = params if settings.checkpoint is None else load(settings.checkpoint, program)
    engine = InferenceEngine(program, program.place(source), settings)
    logger.info("init_inference: %r", engine)
    return engine


def _transforms(settings: InferenceConfig) -> list[Transform]:
    """The chain that settings mean."""
    low = torch.bfloat16 if settings.dtype == torch.int8 else settings.dtype
    found = [freeze(), cast(low, stored=True)]
    if settings.tp_size > 1:
        from fds.sharding import mesh, tensor_parallel

        found.append(tensor_parallel(mesh(tp=settings.tp_size)["tp"], settings.tensor_parallel.get("plan")))
    if settings.bits is not None:
        found.append(quantize_frozen(f"int{settings.bits}"))
    if settings.zero:
        from fds.offload import FileStore, HostStore, offload

        where = settings.zero["offload_param"]
        found.append(offload(HostStore() if where["device"] == "cpu" else FileStore(where["nvme_path"])))
    return found
