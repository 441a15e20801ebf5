"""Keys that contradict each other. Each check is a function from the values to problems, as (keys, text)."""

from collections.abc import Iterator
from typing import Any

from fds.deepspeed.meaning import WHOLE, in_shards, tensor, wire, wires
from fds.deepspeed.schema.methods import ONE_BIT
from fds.deepspeed.schema.top import Top

Problem = tuple[tuple[str, ...], str]
_ZERO = "zero_optimization"
_STAGE = f"{_ZERO}.stage"


def precision(c: Top) -> Iterator[Problem]:
    """One of fp16, bf16 and torch_autocast."""
    on = [f"{name}.enabled" for name in ("fp16", "bf16", "torch_autocast") if getattr(c, name).enabled]
    if len(on) > 1:
        yield tuple(on), "all are true; one of them at most"
    accumulate = c.data_types.grad_accum_dtype
    narrow = c.bf16.enabled and c.zero_optimization.stage in (1, 2) and not in_shards(c)
    if accumulate not in (None, "fp32") and not (accumulate == "bf16" and narrow):
        yield ("data_types.grad_accum_dtype",), f"given {accumulate!r}, allowed null or 'fp32'" + (" or 'bf16'" if narrow else ", in which gradients are here ('bf16': with bf16 at stages 1 and 2)")  # fmt: skip
    sent = wire(c)
    if sent is not None and sent not in wires(c):
        yield ("communication_data_type",), f"given {c.communication_data_type!r}; gradients cross the wire in {' or '.join(wires(c))} here: give one of them, or leave it out"  # fmt: skip


def loss_scale(c: Top) -> Iterator[Problem]:
    """A scale that can be, and that an error of gradients can follow."""
    if not c.fp16.enabled:
        return
    if c.fp16.loss_scale:
        if not 2.0**-126 <= c.fp16.loss_scale <= 2.0**126:
            yield (
                ("fp16.loss_scale",),
                f"given {c.fp16.loss_scale!r}, allowed 2^-126 to 2^126, or 0 for a dynamic scale",
            )
        return
    power, least = c.fp16.initial_scale_power, c.fp16.min_loss_scale
    if power > 126:
        yield (
            ("fp16.initial_scale_power",),
            f"given {power}, allowed 0 to 126: the scale is 2 to this power, in float32",
        )
    elif least > 2.0**power:
        yield ("fp16.min_loss_scale", "fp16.initial_scale_power"), f"{least:g} is above the first scale, 2^{power} = {2.0**power:g}; lower the first, or raise the second"  # fmt: skip
    if c.zero_optimization.zeropp_loco_param is not None:
        yield (f"{_ZERO}.zeropp_loco_param", "fp16.loss_scale"), "an error of gradients has the scale of its step, and a dynamic scale changes; give a fixed fp16.loss_scale, or bf16"  # fmt: skip


def offload(c: Top) -> Iterator[Problem]:
    """Devices with the stage that has them, and a path for files."""
    z = c.zero_optimization
    for name, part, stages in (("offload_param", z.offload_param, (3,)), ("offload_optimizer", z.offload_optimizer, (1, 2, 3))):  # fmt: skip
        where = f"{_ZERO}.{name}.device"
        allowed = (3,) if part.device == "nvme" else stages
        if part.device != "none" and z.stage not in allowed:
            yield (where, _STAGE), f"{part.device!r} with stage {z.stage}, required stage {' or '.join(map(str, allowed))}"  # fmt: skip
        if part.device == "nvme" and not part.nvme_path:
            yield (f"{_ZERO}.{name}.nvme_path",), "not given, required by device 'nvme': a directory on a local disk"


def stage3(c: Top) -> Iterator[Problem]:
    """Keys of stage 3 that change what is computed or sent."""
    z = c.zero_optimization
    wants: dict[str, Any] = {
        "zero_hpz_partition_size": z.zero_hpz_partition_size > 1, "zero_quantized_weights": z.zero_quantized_weights, "zero_quantized_gradients": z.zero_quantized_gradients,
        "zero_quantized_nontrainable_weights": z.zero_quantized_nontrainable_weights, "mics_shard_size": z.mics_shard_size > 0,
    }  # fmt: skip
    for name, asked in wants.items():
        if asked and z.stage != 3:
            yield (f"{_ZERO}.{name}", _STAGE), f"{getattr(z, name)!r} with stage {z.stage}, required stage 3"
    if z.zeropp_loco_param is not None:
        if not z.zero_quantized_gradients:
            yield (f"{_ZERO}.zeropp_loco_param", f"{_ZERO}.zero_quantized_gradients"), "error feedback of gradients that are not quantised; zero_quantized_gradients has to be true"  # fmt: skip
        if unknown := z.zeropp_loco_param.keys() - {"err_beta", "reset_T"}:
            yield (f"{_ZERO}.zeropp_loco_param.{min(unknown, key=str)}",), "unknown key; allowed: err_beta, reset_T"
    if z.mics_shard_size > 0 and z.zero_hpz_partition_size > 1:
        yield (f"{_ZERO}.mics_shard_size", f"{_ZERO}.zero_hpz_partition_size"), "two ways to divide the ranks; one of them"  # fmt: skip
    levels = [f"{_ZERO}.{k}" for k in ("mics_shard_size", "zero_hpz_partition_size") if getattr(z, k) > 1]
    if levels and tensor(c) > 1:
        yield ("tensor_parallel.autotp_size", *levels), "a mesh of nodes and of tensor parallelism is not there; leave one of them out"  # fmt: skip


def ranks(c: Top, world: int, data: int) -> Iterator[Problem]:
    """Sizes of groups divide the ranks that there are."""
    z = c.zero_optimization
    tp = tensor(c)
    if world % tp:
        yield ("tensor_parallel.autotp_size",), f"{tp} does not divide {world} rank{'s' * (world > 1)}; allowed {_divisors(world)}"  # fmt: skip
    if c.tensor_parallel.tp.tp_size not in (1, tp):
        yield ("tensor_parallel.tp.tp_size", "tensor_parallel.autotp_size"), f"{c.tensor_parallel.tp.tp_size} and {tp}; give autotp_size alone"  # fmt: skip
    for name, size in (("zero_hpz_partition_size", z.zero_hpz_partition_size), ("mics_shard_size", z.mics_shard_size)):
        if size > 1 and data % size:
            yield (f"{_ZERO}.{name}",), f"{size} does not divide {data} data-parallel rank{'s' * (data > 1)}; allowed {_divisors(data)}"  # fmt: skip
    if c.hybrid_engine.enabled and world % c.hybrid_engine.inference_tp_size:
        yield ("hybrid_engine.inference_tp_size",), f"{c.hybrid_engine.inference_tp_size} does not divide {world} rank{'s' * (world > 1)}; allowed {_divisors(world)}"  # fmt: skip
    given: Any = c.data_parallel_size
    if given is not None and given != data:
        yield ("data_parallel_size",), f"{given}, and {world} rank{'s' * (world > 1)} in tensor-parallel groups of {tp} are {data}; leave it out"  # fmt: skip


def methods(c: Top) -> Iterator[Problem]:
    """Optimizers that have a communication of their own, beside ZeRO's and in its place."""
    z = c.zero_optimization
    if c.optimizer.type in ONE_BIT:
        if z.stage:
            yield ("optimizer.type", _STAGE), f"{c.optimizer.type} sends compressed momenta in place of gradients, stage {z.stage} sends gradients; required stage 0"  # fmt: skip
        if c.gradient_allreduce_op == "sum":
            yield ("optimizer.type", "gradient_allreduce_op"), f"{c.optimizer.type} sends means; required 'mean'"
        if tensor(c) > 1:
            yield ("optimizer.type", "tensor_parallel.autotp_size"), f"{c.optimizer.type} exchanges whole leaves over all ranks; leave one of them out"  # fmt: skip
    elif c.optimizer.type in WHOLE:
        cut = [(in_shards(c), _STAGE), (tensor(c) > 1, "tensor_parallel.autotp_size")]
        cut += [(c.optimizer.type == "Muon" and z.offload_optimizer.device != "none", f"{_ZERO}.offload_optimizer.device")]  # fmt: skip
        if found := tuple(key for wrong, key in cut if wrong):
            yield ("optimizer.type", *found), f"{c.optimizer.type} looks at leaves as wholes (their norms or rows), and these cut or move them; its state can be split: stage 1 or 2, without tensor parallelism{' or offload' if c.optimizer.type == 'Muon' else ''}"  # fmt: skip
    if c.gradient_allreduce_op == "sum" and z.stage in (1, 2):
        yield ("gradient_allreduce_op", _STAGE), f"'sum' with stage {z.stage}; required stage 0 or 3, or 'mean'"


def curriculum(c: Top) -> Iterator[Problem]:
    """What a schedule of difficulties needs."""
    section = c.curriculum_learning
    if not section.enabled:
        return
    for name in ("min_difficulty", "max_difficulty", "schedule_type"):
        if getattr(section, name) is None:
            yield (f"curriculum_learning.{name}",), "not given, required"
    low, high = section.min_difficulty, section.max_difficulty
    if low is not None and high is not None and low > high:
        yield ("curriculum_learning.min_difficulty", "curriculum_learning.max_difficulty"), f"{low} > {high}"
    s, path = section.schedule_config, "curriculum_learning.schedule_config"
    linear = ("total_curriculum_step", "difficulty_step")
    needs = {"fixed_linear": linear, "fixed_root": (*linear, "root_degree"), "fixed_discrete": ("difficulty", "max_step")}  # fmt: skip
    for name in needs.get(section.schedule_type or "", ()):
        if getattr(s, name) is None:
            yield (f"{path}.{name}",), f"not given, required by {section.schedule_type}"
    if section.schedule_type == "fixed_discrete" and s.difficulty is not None and s.max_step is not None and len(s.difficulty) != len(s.max_step) + 1:  # fmt: skip
        yield (f"{path}.difficulty", f"{path}.max_step"), f"{len(s.difficulty)} and {len(s.max_step)} values; max_step has one less"  # fmt: skip


def _divisors(n: int) -> str:
    return ", ".join(str(i) for i in range(1, n + 1) if n % i == 0)


def every(c: Top, world: int, data: int) -> list[Problem]:
    """What all checks find."""
    plain = [precision, loss_scale, offload, stage3, methods, curriculum]
    return [*(p for check in plain for p in check(c)), *ranks(c, world, data)]
