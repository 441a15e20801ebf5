"""What an engine answers about itself: the numbers of its configuration, of its optimizer and of its last step, by DeepSpeed's names."""

import os
from typing import Any

import torch

from fds.files import rank, ranks
from fds.offload import compute_device
from fds.train import TrainState, TrainStep


class Answers:
    """The questions of `Engine`; nothing here changes anything."""

    config: Any
    optimizer: Any
    metrics: dict[str, Any]
    _built: TrainStep | None
    _applied: bool

    @property
    def state(self) -> TrainState:
        raise NotImplementedError

    def get_global_grad_norm(self) -> float | None:
        """The norm of the last step's gradients before clipping, over all ranks; None before the first step."""
        return float(self.metrics["grad_norm"]) if self.metrics else None

    def get_lr(self) -> list[float]:
        """The learning rate of the next update, by group."""
        if self.optimizer is None:
            raise ValueError("get_lr: this engine has no optimizer")
        return [float(g["lr"]) for g in self.optimizer.param_groups]

    def get_mom(self) -> list[Any]:
        """Momentum (SGD) or betas, by group."""
        if self.optimizer is None:
            raise ValueError("get_mom: this engine has no optimizer")
        return [g.get("betas", g.get("momentum")) for g in self.optimizer.param_groups]

    def was_step_applied(self) -> bool:
        """Whether the last `step` changed parameters: it was at a boundary, and everything was finite."""
        return self._applied

    def loss_scale(self) -> float:
        """What losses are multiplied by now; 1 without fp16."""
        scale = self._built.scale(self.state) if self._built is not None else None
        return 1.0 if scale is None else float(scale)

    @property
    def cur_scale(self) -> float:
        return self.loss_scale()

    def train_batch_size(self) -> int:
        """Rows of a step, over all ranks."""
        return int(self.config.train_batch_size)

    def train_micro_batch_size_per_gpu(self) -> int:
        """Rows of a rank's microbatch."""
        return int(self.config.train_micro_batch_size_per_gpu)

    def gradient_accumulation_steps(self) -> int:
        """Microbatches of a step."""
        return int(self.config.gradient_accumulation_steps)

    def gradient_clipping(self) -> float:
        return float(self.config.gradient_clipping)

    def zero_optimization_stage(self) -> int:
        return int(self.config.zero_optimization.stage)

    def zero_optimization(self) -> bool:
        return self.zero_optimization_stage() > 0

    def fp16_enabled(self) -> bool:
        return bool(self.config.fp16.enabled)

    def bfloat16_enabled(self) -> bool:
        return bool(self.config.bf16.enabled)

    @property
    def device(self) -> torch.device:
        """Where calls run."""
        return compute_device()

    @property
    def local_rank(self) -> int:
        return int(os.environ.get("LOCAL_RANK", "0"))

    @property
    def global_rank(self) -> int:
        return rank()

    @property
    def world_size(self) -> int:
        return ranks()
