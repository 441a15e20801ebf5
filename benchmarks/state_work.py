"""fds and `torch.save` as contenders of the state group: parameters and Adam's moments, split over the ranks."""

import time
from pathlib import Path
from typing import Any

import torch
from common import LEARNING_RATE, SIZES, Job, batch, llama
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


STEPS = 5  # from one save to the next


def fds_asynchronous(job: Job) -> Built:
    """Seconds of eager steps, with a save in the background that begins before the first of them and without one, in turns."""
    program, params = fds.functionalize(llama(job))
    program = fds.chain(fds.shard(fds.sharding.mesh(dp=job.world)["dp"]), fds.checkpoint())(program)
    step = fds.train_step(program, fds.optim.adamw(LEARNING_RATE))
    state, done = step.init(params), 0
    del params

    def steps(save: bool) -> tuple[float, float]:
        nonlocal state, done
        start = time.perf_counter()
        future = fds.save_state("states", step, state, keep=1, asynchronous=True) if save else None
        returned = time.perf_counter() - start
        for _ in range(STEPS):
            state, _ = step(state, {"input_ids": batch(job, done)})
            done += 1
        took = time.perf_counter() - start
        if future is not None:
            future.result()
        return took, returned

    def measure() -> dict[str, Any]:
        plain, (saving, returned) = steps(False)[0], steps(True)
        return {"steps": STEPS, "plain_s": plain, "saving_s": saving, "asynchronous_s": returned}

    steps(False)  # warm
    return Built(measure=measure)


def torch_states(job: Job) -> Built:
    """`torch.save` of as many tensors by each rank into a file of its own, which no other number of ranks could read."""
    fds.sharding.mesh(dp=job.world)  # a process group
    Path("states").mkdir(exist_ok=True)
    mine, path = tensors(SIZES[job.size].parameters // job.world), f"states/{job.rank}.pt"
    return measured(job, "states", lambda: torch.save(mine, path), lambda: torch.load(path, weights_only=True))
