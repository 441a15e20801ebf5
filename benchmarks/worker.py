"""One rank of a contender: builds it, then waits for commands on standard input and answers on standard output, a JSON line each.

While it waits it sleeps in a read, so contenders that are not running cost memory but no time.
"""

import argparse
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from common import Job, batch, peak_rss, reset_peak
from torch import Tensor


@dataclass
class Built:
    """What a contender's `build(job)` returns: a step ``ids -> loss``, or a `measure`; and what is worth knowing about it."""

    step: Callable[[Tensor], Tensor | float] | None = None
    measure: Callable[[], dict[str, Any]] | None = None
    facts: dict[str, Any] = field(default_factory=dict)


class Worker:
    """The commands. Each returns what is answered."""

    def __init__(self, contender: str, job: Job) -> None:
        module, _, function = contender.partition(":")
        started = time.perf_counter()
        self.job, self.done, self.life = job, 0, 0
        self.built: Built = getattr(importlib.import_module(module), function)(job)
        self.setup = time.perf_counter() - started

    def hello(self) -> dict[str, Any]:
        return {"setup_s": self.setup, "facts": self.built.facts}

    def steps(self, n: int) -> dict[str, Any]:
        """Run `n` steps and time each: seconds, the losses, and the processor time that all threads of this rank used."""
        if self.built.step is None:
            raise ValueError("this contender measures, it has no steps")
        times, losses = [], []
        _meet()
        used, begun = time.process_time(), time.perf_counter()
        for _ in range(n):
            ids = batch(self.job, self.done)
            start = time.perf_counter()
            losses.append(float(self.built.step(ids)))
            times.append(time.perf_counter() - start)
            self.done += 1
        return {
            "times": times,
            "losses": losses,
            "cpu_s": time.process_time() - used,
            "wall_s": time.perf_counter() - begun,
        }

    def measure(self) -> dict[str, Any]:
        if self.built.measure is None:
            raise ValueError("this contender has steps, it measures nothing else")
        _meet()
        return self.built.measure()

    def settle(self) -> dict[str, Any]:
        """The peak of start-up, compilation and first steps; what comes after is counted anew."""
        self.life = max(self.life, peak_rss())
        reset_peak()
        return {"life": self.life}

    def memory(self) -> dict[str, Any]:
        steady = peak_rss()
        return {"steady": steady, "life": max(self.life, steady), "facts": self.built.facts}


def _meet() -> None:
    if dist.is_initialized():
        dist.barrier()


def _serve(worker: Worker, answer: Callable[[dict[str, Any]], None]) -> None:
    answer(worker.hello())
    for line in sys.stdin:
        command = json.loads(line)
        name = command.pop("do")
        if name == "stop":
            return
        answer(getattr(worker, name)(**command))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender", help="module:function; the function takes a Job and returns a Built")
    parser.add_argument("job", help="JSON: size, dtype, options")
    args = parser.parse_args()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to standard output: that goes to the log, the protocol keeps the pipe

    def answer(reply: dict[str, Any]) -> None:
        out.write(json.dumps(reply) + "\n")
        out.flush()

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    job = Job(
        rank=int(os.environ.get("RANK", "0")), world=int(os.environ.get("WORLD_SIZE", "1")), **json.loads(args.job)
    )
    try:
        _serve(Worker(args.contender, job), answer)
    except Exception as error:
        traceback.print_exc()
        answer({"error": f"{type(error).__name__}: {error}"})
    out.flush()
    os._exit(0)  # the other rank may be gone already: no farewell that could hang


if __name__ == "__main__":
    main()
