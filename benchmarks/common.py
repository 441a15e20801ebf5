"""What every contender shares: the model, its weights, the data, the count of operations, and how memory and machine are read.

Peers run in an environment of their own, so nothing here imports fds.
"""

import gc
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

LEARNING_RATE = 1e-3
ROWS, LENGTH = 4, 256  # of a rank's batch: 1,024 tokens
SEED = 0


@dataclass(frozen=True)
class Size:
    """A Llama: its dimensions, and the number of parameters that they have to give."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    parameters: int


SIZES = {
    "33.7M": Size(8192, 512, 1376, 8, 8, 33_694_208),
    "83.4M": Size(8192, 768, 2048, 10, 12, 83_377_920),
    "60M": Size(8192, 640, 1728, 10, 8, 60_060_800),
    "6.5M": Size(4096, 256, 608, 6, 4, 6_475_008),
    "tiny": Size(256, 32, 64, 2, 2, 37_024),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Job:
    """What a worker is asked to build."""

    size: str
    dtype: str
    rank: int
    world: int
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def low(self) -> bool:
        """Whether to compute in bfloat16."""
        return self.dtype == "bf16"


def llama(job: Job) -> nn.Module:
    """The Llama of `job`, float32, the same weights everywhere; rounded to bfloat16 if that is what will be computed in.

    A library that keeps float32 masters and one that makes them from bfloat16 weights then start from the same point.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    s = SIZES[job.size]
    config = LlamaConfig(
        vocab_size=s.vocabulary,
        hidden_size=s.hidden,
        intermediate_size=s.intermediate,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        num_key_value_heads=s.heads,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(config)
    count = sum(p.numel() for p in model.parameters())
    if count != s.parameters:
        raise ValueError(f"{job.size}: the model has {count:,} parameters, the table says {s.parameters:,}")
    if job.low:
        for p in model.parameters():
            p.data = p.data.bfloat16().float()
    return model.train()


ADAM_PARAMETERS = 100_000_000


def adam_leaves(job: Job) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters and gradients of an optimizer's benchmark: 100M in 25 leaves; float32, gradients in the dtype of the option `grads`."""
    draw = torch.Generator().manual_seed(SEED)
    params = {f"{i:02}": torch.randn(ADAM_PARAMETERS // 25, generator=draw) for i in range(25)}
    dtype = DTYPES[job.options.get("grads", "fp32")]
    return params, {k: (p * 1e-2).to(dtype) for k, p in params.items()}


def updates(update: Callable[[], None], params: dict[str, Tensor]) -> dict[str, Any]:
    """Median seconds of three updates, and the sum of some parameters after them: everybody's has to be the same."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        update()
        times.append(time.perf_counter() - start)
    return {"seconds": median(times), "sum": sum(float(p[:1000].double().sum()) for p in params.values())}


def batch(job: Job, step: int) -> Tensor:
    """Token numbers [ROWS, LENGTH] of this rank in `step`: skewed draws that continue each other, so that the loss falls visibly."""
    vocabulary = SIZES[job.size].vocabulary
    draw = torch.Generator().manual_seed(1_000_003 * step + 17)
    jumps = torch.rand(job.world * ROWS, LENGTH, generator=draw, dtype=torch.float64).pow(4)
    ids = (jumps * 64).long().cumsum(1).add(7 * step) % vocabulary
    return ids[job.rank * ROWS : (job.rank + 1) * ROWS]


def operations(size: str) -> float:
    """Floating-point operations of one rank's step: 6 per matmul weight and token, and causal attention.

    The input embedding is a lookup and norms are not matmuls: neither is counted. Recomputation is not counted either.
    """
    s = SIZES[size]
    per_layer = 4 * s.hidden**2 + 3 * s.hidden * s.intermediate
    weights = s.layers * per_layer + s.vocabulary * s.hidden
    attention = 12 * s.layers * s.hidden * LENGTH / 2
    return ROWS * LENGTH * (6 * weights + attention)


def peak_rss() -> int:
    """Bytes: the largest resident set of this process since it started, or since `reset_peak`."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise ValueError("/proc/self/status has no VmHWM: peak memory is read on Linux only")
    return int(found[1]) * 1024


def reset_peak() -> None:
    """Let `peak_rss` start again from what is resident now."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def versions(*names: str) -> dict[str, str]:
    """Versions of Python and of those of `names` that are installed."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Processor, cores and memory; nothing that says whose machine it is."""
    cpu, memory = Path("/proc/cpuinfo").read_text(), Path("/proc/meminfo").read_text()
    name, flags = re.search(r"model name\s*:\s*(.+)", cpu), re.search(r"flags\s*:\s*(.+)", cpu)
    total = re.search(r"MemTotal:\s+(\d+)", memory)
    known = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_tile")
    return {
        "cpu": name[1] if name else platform.machine(),
        "instructions": [f for f in known if flags and f in flags[1].split()],
        "cores": os.cpu_count(),
        "memory_gib": round(int(total[1]) / 2**20, 1) if total else None,
    }


def commit() -> str:
    """The commit that is measured, with "-dirty" where its code was changed (results may be); "unknown" outside of a clone."""
    git = ["git", "-C", str(Path(__file__).resolve().parent.parent)]
    name = subprocess.run([*git, "describe", "--always"], capture_output=True, text=True, check=False).stdout.strip()
    if not name:
        return "unknown"
    same = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "fds", ":(glob)benchmarks/**/*.py"], check=False)
    return name if same.returncode == 0 else f"{name}-dirty"
