"""DeepSpeed, ZeRO stage 1, 2 or 3, on CPU with gloo.

Options: `stage`, `adam` ("cpu", "fused" or "torch"), `zero` (further settings), `recompute`.
"""

import os
from typing import Any

import torch
from common import LEARNING_RATE, Job, batch, llama
from torch import Tensor, nn
from worker import Built


def build(job: Job) -> Built:
    """Train steps."""
    engine, name = _engine(job)

    def step(ids: Tensor) -> Tensor:
        loss = engine(input_ids=ids, labels=ids, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        return loss

    return Built(step, facts={"optimizer": name, "stage": job.options["stage"]})


def states(job: Job) -> Built:
    """`save_checkpoint` and `load_checkpoint`, after a step that made the moments."""
    from states import measured

    engine, _ = _engine(job)
    ids = batch(job, 0)
    engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
    engine.step()
    return measured(
        job, "states", lambda: engine.save_checkpoint("states", tag="0"), lambda: engine.load_checkpoint("states")
    )


def _engine(job: Job) -> tuple[Any, str]:
    """An engine with DeepSpeed's defaults for the stage: its bucket sizes, overlap, prefetch and persistence thresholds. And its optimizer's name."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # read at import
    import deepspeed

    deepspeed.init_distributed("gloo")
    model = llama(job)
    if job.options.get("recompute"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 10**9,
        "gradient_clipping": 0.0,  # its default is 1.0; nobody else here clips
        "bf16": {"enabled": job.low},
        "zero_optimization": {"stage": job.options["stage"], **job.options.get("zero", {})},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer, name = _adam(model, job.options.get("adam", "cpu"))
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0], name


def _adam(model: nn.Module, which: str) -> tuple[torch.optim.Optimizer, str]:
    """The optimizer and its name. "cpu" and "fused" are DeepSpeed's C++ kernels, which a compiler and ninja have to build first."""
    settings: dict[str, Any] = {"lr": LEARNING_RATE, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    if which == "cpu":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(model.parameters(), adamw_mode=True, **settings), "DeepSpeedCPUAdam"
    if which == "fused":
        from deepspeed.ops.adam import FusedAdam

        return FusedAdam(model.parameters(), adam_w_mode=True, **settings), "DeepSpeed FusedAdam"
    return torch.optim.AdamW(model.parameters(), fused=True, **settings), "torch AdamW(fused)"
