"""Contenders of the offload groups: AdamW on 100M parameters, and train steps whose state and parameters are in files.

Files go to the worker's own folder, which is in the system's temporary one: TMPDIR says which disk is measured.
"""

import time
from statistics import median
from typing import Any

import torch
from common import LEARNING_RATE, Job, adam_leaves, llama, updates
from torch import Tensor
from worker import Built

import fds
from fds.offload import FileStore, record
from fds.offload.aio import Engine, empty
from fds.optim.base import guarded_step

DISK = 2**30  # bytes


def step(job: Job) -> Built:
    """A compiled train step. Options: `state` (moments in files), `params` (parameters and gradients too), `recompute`."""
    program, params = fds.functionalize(llama(job))
    tx = fds.optim.adamw(LEARNING_RATE)
    parts = []
    if job.options.get("state") or job.options.get("params"):
        store = FileStore(".")
        tx = fds.optim.streamed(tx, store)
        parts += [fds.offload(store)] if job.options.get("params") else []
    parts += [fds.checkpoint()] if job.options.get("recompute") else []
    compiled = fds.compile(fds.train_step(fds.chain(*parts)(program), tx))
    state = compiled.init(params)
    del params, program
    facts: dict[str, Any] = {"optimizer": "fds adamw", "io": []}

    def run(ids: Tensor) -> float:
        nonlocal state
        with record() as events:
            state, metrics = compiled(state, {"input_ids": ids})
            loss = float(metrics["loss"])
        moved = {k: sum(e.nbytes for e in events if e.kind == k) for k in ("read", "write")}
        facts["io"] = moved | {"waited_s": sum(e.stop - e.start for e in events if e.kind == "wait")}
        return loss

    return Built(run, facts=facts)


def disk(job: Job) -> Built:
    """GB/s of this disk through `fds.offload.aio`, written over and read back."""
    whole, engine = empty(DISK), Engine()
    whole.random_(256)
    engine.write("disk", whole).result()

    def measure() -> dict[str, Any]:
        rates = {}
        for name, call in (("write", engine.write), ("read", engine.read)):
            start = time.perf_counter()
            call("disk", whole).result()
            rates[f"{name}_gb_s"] = 1e-9 * DISK / (time.perf_counter() - start)
        return rates

    return Built(measure=measure)


def copy(job: Job) -> Built:
    """GB/s of a copy of 1 GiB by all threads: bytes read and bytes written."""
    source, target = torch.ones(2**28), torch.ones(2**28)

    def measure() -> dict[str, Any]:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            target.copy_(source)
            times.append(time.perf_counter() - start)
        return {"gb_s": 1e-9 * 2 * source.nbytes / median(times)}

    return Built(measure=measure)


def adamw(job: Job) -> Built:
    """`fds.optim.adamw`, as a donated train step calls it. Options: `grads` ("fp32" or "bf16")."""
    params, grads = adam_leaves(job)
    tx = fds.optim.adamw(LEARNING_RATE)
    state = tx.init(params)
    ok, norm = torch.ones((), dtype=torch.bool), torch.ones(())

    def update() -> None:
        nonlocal state, params
        params, state = guarded_step(tx, grads, state, params, norm=lambda _: norm, ok=ok, donated=True)

    return Built(measure=lambda: updates(update, params))
