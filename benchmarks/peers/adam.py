"""AdamW of torch and of DeepSpeed on the CPU, on the leaves that fds updates too."""

from typing import Any

import torch
from common import LEARNING_RATE, Job, adam_leaves, updates
from worker import Built


def torch_fused(job: Job) -> Built:
    return _built(job, lambda params: torch.optim.AdamW(params, lr=LEARNING_RATE, weight_decay=0.0, fused=True))


def deepspeed(job: Job) -> Built:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return _built(job, lambda params: DeepSpeedCPUAdam(params, lr=LEARNING_RATE, weight_decay=0.0))


def _built(job: Job, make: Any) -> Built:
    leaves, grads = adam_leaves(job)
    params = [torch.nn.Parameter(p) for p in leaves.values()]
    for p, g in zip(params, grads.values(), strict=True):
        p.grad = g
    optimizer = make(params)
    return Built(measure=lambda: updates(optimizer.step, leaves))
