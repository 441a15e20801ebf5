"""fds and `torch.save` as contenders of the state group: parameters and Adam's moments, split over the ranks."""

from pathlib import Path

import torch
from common import LEARNING_RATE, SIZES, Job, llama
from states import measured, tensors
from worker import Built

import fds


def fds_states(job: Job) -> Built:
    """`save_state` of a ZeRO-3 step; it has waited for the disk when it returns."""
    program, params = fds.functionalize(llama(job))
    step = fds.train_step(fds.shard(fds.sharding.mesh(dp=job.world)["dp"])(program), fds.optim.adamw(LEARNING_RATE))
    state = step.init(params)
    del params, program
    return measured(
        job, "states", lambda: fds.save_state("states", step, state, keep=1), lambda: fds.load_state("states", step)
    )


def torch_states(job: Job) -> Built:
    """`torch.save` of as many tensors by each rank into a file of its own, which no other number of ranks could read."""
    fds.sharding.mesh(dp=job.world)  # a process group
    Path("states").mkdir(exist_ok=True)
    mine, path = tensors(SIZES[job.size].parameters // job.world), f"states/{job.rank}.pt"
    return measured(job, "states", lambda: torch.save(mine, path), lambda: torch.load(path, weights_only=True))
