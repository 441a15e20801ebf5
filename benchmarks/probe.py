"""What the machine gives: matrix products a second while the other rank computes too, and what gloo moves between two ranks."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from common import DTYPES, LENGTH, ROWS, SIZES, Job, llama
from torch import Tensor
from worker import Built

GATHERED = 8 * 2**20  # bytes of the whole all-gathered buffer


def build(job: Job) -> Built:
    """GFLOP/s by dtype, and the all-gather's GB/s when there are several ranks."""
    if job.world > 1:
        dist.init_process_group("gloo")
    shapes = [(2048, 2048, 2048), (ROWS * LENGTH, SIZES[job.size].hidden, SIZES[job.size].intermediate)]

    def measure() -> dict[str, Any]:
        rates = {name: max(_rate(*s, dtype) for s in shapes) for name, dtype in DTYPES.items()}
        rates["bf16 by way of fp32"] = max(_rate(*s, torch.bfloat16, _through_float) for s in shapes)
        return {"gflops": rates, **({"all_gather_gb_s": _all_gather(job.world)} if job.world > 1 else {})}

    return Built(measure=measure)


def _through_float(a: Tensor, b: Tensor) -> Tensor:
    return (a.float() @ b.float()).to(a.dtype)


def _rate(m: int, k: int, n: int, dtype: torch.dtype, product: Callable[..., Tensor] = torch.matmul) -> float:
    a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    return 2e-9 * m * k * n / _seconds(lambda: product(a, b))


def _all_gather(world: int) -> float:
    """GB/s: the bytes of the whole float32 buffer over the time of a call."""
    part = torch.ones(GATHERED // 4 // world)
    whole = torch.empty(GATHERED // 4)
    return 1e-9 * GATHERED / _seconds(lambda: dist.all_gather_into_tensor(whole, part), 20)


def _seconds(f: Callable[[], Any], calls: int = 4) -> float:
    """Median time of a call, after one that is not counted."""
    times = []
    for _ in range(calls + 1):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return median(times[1:])


def apply(job: Job) -> Built:
    """Eager `program.apply` against the module itself, alternating in one process: forward alone, and forward with backward."""
    import fds

    module = llama(job)
    program, params = fds.functionalize(module)
    stored = {
        site: {k: t.detach().requires_grad_(program.spec[site][k].requires_grad) for k, t in part.items()}
        for site, part in program.place(params).items()
    }
    ids = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) % SIZES[job.size].vocabulary

    def plain() -> Tensor:
        return module(input_ids=ids, use_cache=False).logits

    def applied() -> Tensor:
        return program.apply(stored, input_ids=ids, use_cache=False).logits

    def measure() -> dict[str, Any]:
        with torch.no_grad():
            forward = _ratio(applied, plain)
        both = _ratio(lambda: applied().sum().backward(), lambda: plain().sum().backward())
        return {"forward": forward, "forward_backward": both}

    return Built(measure=measure)


def _ratio(f: Callable[[], Any], reference: Callable[[], Any], calls: int = 15) -> dict[str, float]:
    """Median seconds of both, and the median of the ratios of neighbours in time."""
    pairs = [(_seconds(f, 1), _seconds(reference, 1)) for _ in range(calls)]
    return {
        "seconds": median(a for a, _ in pairs),
        "reference_seconds": median(b for _, b in pairs),
        "ratio": median(a / b for a, b in pairs),
    }
