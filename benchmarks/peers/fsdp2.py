"""torch's own ZeRO-3, `fully_shard` (FSDP2), on CPU with gloo. Options: `compile` (None, "model" or "layers"), `adam`, `regather`."""

from typing import Any

import torch
from common import LEARNING_RATE, Job, llama
from torch import Tensor
from worker import Built


def build(job: Job) -> Built:
    """Every decoder layer and the root sharded; bf16 by `MixedPrecisionPolicy`, with float32 masters and bf16 on the wire."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh("cpu", (job.world,))
    model: Any = llama(job)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if job.low else None)
    # None: torch's default, which gathers the layers again in backward and keeps the root's parameters
    settings: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "reshard_after_forward": job.options.get("regather")}
    how = job.options.get("compile")
    for layer in model.model.layers:
        if how == "layers":
            layer.compile()
        fully_shard(layer, **settings)
    fully_shard(model, **settings)
    adam = job.options.get("adam", "fused")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, **{adam: True})
    forward = torch.compile(model) if how == "model" else model

    def step(ids: Tensor) -> Tensor:
        loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return Built(step, facts={"optimizer": f"torch AdamW({adam})", "compile": how or "none"})
