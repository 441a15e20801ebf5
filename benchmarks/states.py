"""What the contenders of the state group share: how long a state of 1 GB takes to the disk and back. Peers import it too: nothing of fds here."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from worker import Built

PAUSE = 5.0  # seconds


def measured(job: Any, folder: str, save: Callable[[], Any], load: Callable[[], Any]) -> Built:
    """Seconds until `save` returns, until its files are on the disk, and of `load` with nothing in the page cache; all ranks together."""

    def measure() -> dict[str, Any]:
        _rest()
        returned = _timed(save)
        on_disk = returned + _timed(lambda: _each(folder, os.fsync) if job.rank == 0 else None)
        if job.rank == 0:
            _each(folder, lambda fd: os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED))
        _rest()
        size = sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())
        return {"returned_s": returned, "on_disk_s": on_disk, "loaded_s": _timed(load), "bytes": size}

    return Built(measure=measure)


def _rest() -> None:
    """What others wrote is not this one's time; and a virtual disk that has served a few GB at once serves the next one at a fifth of its rate."""
    os.sync()
    time.sleep(PAUSE)


def _timed(f: Callable[[], Any]) -> float:
    dist.barrier()
    start = time.perf_counter()
    f()
    dist.barrier()
    return time.perf_counter() - start


def _each(folder: str, f: Callable[[int], Any]) -> None:
    for path in Path(folder).rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            try:
                f(fd)
            finally:
                os.close(fd)


def tensors(count: int) -> dict[str, torch.Tensor]:
    """Parameters and two moments of `count` elements, in 25 pieces each."""
    return {f"{k}.{i}": torch.full((count // 25,), float(i)) for k in ("param", "mu", "nu") for i in range(25)}
