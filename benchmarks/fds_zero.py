"""fds as a contender: ZeRO over the ranks as one compiled step, or the plain compiled step in one process. Options: `stage` (2; default 3), `regather`, `keep_memory`."""

from typing import Any

import torch
from common import LEARNING_RATE, SIZES, Job, llama
from torch import Tensor
from worker import Built

import fds
from fds.sharding import collectives


def build(job: Job) -> Built:
    """The step of the README. Keep: gathered weights stay for backward. Re-gather: they come again, and blocks are recomputed."""
    model, tx = llama(job), fds.optim.adamw(LEARNING_RATE)
    mesh = fds.sharding.mesh(dp=job.world)
    facts: dict[str, Any] = {"optimizer": "fds adamw"}
    if job.options.get("stage") == 2:  # and 1: gradients are values, which no rank keeps
        if job.low:  # DeepSpeed's way too: bfloat16 on every rank, 1/n of the float32 masters
            tx = fds.optim.with_master(tx)
            for p in model.parameters():
                p.data = p.data.to(torch.bfloat16)
        tx = fds.optim.sharded(tx, mesh["dp"])
    program, params = fds.functionalize(model)
    step = fds.compile(fds.train_step(_chain(job, mesh)(program), tx), keep_memory=job.options.get("keep_memory", True))
    state = step.init(params)
    del model, params, program

    def run(ids: Tensor) -> float:
        nonlocal state
        with collectives.record() as traffic:
            state, metrics = step(state, {"input_ids": ids})
        facts["traffic"] = _traffic(traffic, job)
        return float(metrics["loss"])

    return Built(run, facts=facts)


def _chain(job: Job, mesh: Any) -> Any:
    lower = job.options.get("stage") == 2
    parts = [] if lower or job.world == 1 else [fds.shard(mesh["dp"])]
    parts += [fds.cast(torch.bfloat16)] if job.low and not lower else []
    parts += [fds.checkpoint()] if job.options.get("regather") else []
    return fds.chain(*parts)


def _traffic(traffic: Any, job: Job) -> dict[str, Any]:
    """Calls and bytes of a step, and its large collectives in units of the parameters' size on the wire."""
    wire = SIZES[job.size].parameters * (2 if job.low else 4)
    moved = sum(n for name, n in traffic.bytes.items() if name in ("gather", "scatter"))
    return {"calls": dict(traffic.calls), "bytes": dict(traffic.bytes), "times_parameters": round(moved / wire, 4)}
