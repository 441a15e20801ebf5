"""One process, no sharding: the module as it is, with torch's fused AdamW. Options: `compile`."""

import torch
from common import LEARNING_RATE, Job, llama
from torch import Tensor
from worker import Built


def build(job: Job) -> Built:
    """The plain training loop that a reader would write first."""
    model = llama(job)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    forward = torch.compile(model) if job.options.get("compile") else model

    def step(ids: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=job.low):
            loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return Built(step, facts={"optimizer": "torch AdamW(fused)"})
