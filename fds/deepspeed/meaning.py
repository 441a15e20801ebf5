"""What a configuration says about where parameters are, and in which dtypes: pure functions of its sections, for the checks and for the chain."""

from fds.deepspeed.schema.methods import ONE_BIT
from fds.deepspeed.schema.top import Top

SHORT = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
WHOLE = ("Lamb", "FusedLamb", "OneBitLamb", "Muon")  # rules that look at leaves as wholes


def low(c: Top) -> str | None:
    """The dtype that is computed in, if it is not that of the parameters."""
    return "float16" if c.fp16.enabled else "bfloat16" if c.bf16.enabled else None


def tensor(c: Top) -> int:
    """Ranks of tensor parallelism; 1: none."""
    return max(c.tensor_parallel.autotp_size, 1)


def in_shards(c: Top) -> bool:
    """Whether parameters are stored in shards: stage 3; and stages 1 and 2 beside tensor parallelism, whose ranks have other leaves each."""
    stage = c.zero_optimization.stage
    return stage == 3 or (stage > 0 and tensor(c) > 1)


def masters(c: Top) -> bool:
    """Whether parameters are stored in the dtype that is computed in, with float32 copies in the optimizer's shards."""
    by_optimizer = c.zero_optimization.stage > 0 and not in_shards(c)
    return by_optimizer and low(c) == "bfloat16" and c.data_types.grad_accum_dtype != "fp32"


def wires(c: Top) -> tuple[str, ...]:
    """The dtypes in which gradients can cross the wire."""
    once = c.optimizer.type in ONE_BIT or (c.zero_optimization.stage > 0 and not in_shards(c) and not masters(c))
    dtype = low(c)
    return ("float32",) if once or dtype is None else ("float32", dtype)


def wire(c: Top) -> str | None:
    """The dtype of gradients between ranks, if it was said."""
    name = c.communication_data_type
    return None if name is None else SHORT[name.lower()]


__all__ = ["SHORT", "WHOLE", "in_shards", "low", "masters", "tensor", "wire", "wires"]
