"""What a configuration costs and where it surprises, before it runs: bytes of memory on a rank, bytes on the wire, drifts of DeepSpeed's defaults."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import attrs
from torch import nn

from fds import tree
from fds.deepspeed import meaning
from fds.deepspeed.chain import recipe
from fds.deepspeed.config import DeepSpeedConfig
from fds.optim.one_bit_wire import BLOCK, row_count
from fds.sharding.mesh import Axis
from fds.train import TrainStep
from fds.transform import parameters


@attrs.frozen
class Memory:
    """Bytes on one rank: what a step holds always, the weights in use while it computes (at most), and where parameters and state are. No activations."""

    parameters: int
    gradients: int
    optimizer: int
    in_use: int
    where_parameters: str  # "device", "host memory" or "files"
    where_optimizer: str

    @property
    def device(self) -> int:
        """Of it, bytes on the device."""
        kept = self.parameters + self.gradients if self.where_parameters == "device" else 0
        return kept + self.in_use + (self.optimizer if self.where_optimizer == "device" else 0)


@attrs.frozen
class Message:
    """What one kind of collective moves in a step, over one axis: whole buffers, as `sharding.record` counts them."""

    operation: str
    axis: str
    nbytes: int
    exact: bool = True


def abstract(config: DeepSpeedConfig, model: nn.Module) -> TrainStep:
    """The train step of a configuration without its stores, over a mesh that is only numbers: shapes as rank 0 of `config.world_size` has them.

    `model`: its leaves may be on the meta device. Nothing is computed, and no process is asked.
    """
    raw = config.to_dict()
    zero = {k: v for k, v in raw.get("zero_optimization", {}).items() if not k.startswith("offload_")}
    kept = {k: v for k, v in raw.items() if k not in ("compile", "activation_checkpointing", "hybrid_engine")}
    if "activation_checkpointing" in raw:
        kept["activation_checkpointing"] = {}
    plain = DeepSpeedConfig.load({**kept, "zero_optimization": zero}, world_size=config.world_size)
    made = recipe(plain, model)
    axes: dict[str, int] = dict(made["mesh"].kwargs)
    fixed = 1
    for n in axes.values():
        fixed *= n if n > 0 else 1
    sizes = {k: n if n > 0 else config.world_size // fixed for k, n in axes.items()}
    mesh, stride = dict[str, Axis](), 1
    for name in reversed(sizes):
        mesh[name] = Axis(name, sizes[name], 0, stride=stride)
        stride *= sizes[name]
    return made.replaced("mesh", mesh).build(model=model)["step"]


def memory(config: DeepSpeedConfig, step: TrainStep) -> Memory:
    """Bytes on a rank, of an `abstract` step."""
    program, zero = step.program, config.zero_optimization
    names = [t.name for t in program.history]
    whole = [sum(x.numel() for x in parameters(p.origin).values()) * _width(step) for p in program.sites.values()]
    moved = "shard" in names or ("cast" in names and not _stored(step))
    used = 0 if not moved else 2 * max(whole) if "checkpoint" in names else sum(whole)
    places = {"none": "device", "cpu": "host memory", "nvme": "files"}
    away = places[zero.offload_param.device]
    state = places[zero.offload_optimizer.device]
    return Memory(
        tree.nbytes(step.spec.params),
        tree.nbytes(program.trainable(step.spec.params)),
        tree.nbytes(step.spec.optimizer),
        used,
        away,
        "host memory" if state == "device" and away != "device" else state,
    )


def traffic(config: DeepSpeedConfig, step: TrainStep) -> list[Message]:
    """What a step moves between ranks, by the closed forms of docs/sharding.md. Activations of tensor parallelism are not in it.

    Of the 1-bit optimizers: what an exact exchange moves, before signs take its place.
    """
    history: list[Any] = list(step.program.history)  # whose axes are a mesh's, with names
    own: Any = step.tx.axis
    sizes = [a.size for t in history for a in t.axes] + ([own.size] if own is not None else [])
    if all(n == 1 for n in sizes):
        return []
    if own is not None:
        n, width = _elements(step).trained, _stored_width(step)
        if step.tx.local:
            sizes = [x.numel() for x in tree.leaves(step.program.trainable(step.spec.params))]
            return [Message("all-reduce", own.name, 4 * BLOCK * row_count(sizes, own.size), exact=False)]
        summed = 4 if meaning.wire(config) == "float32" else width
        return [Message("reduce-scatter", own.name, n * summed), Message("gather", own.name, n * width)]
    names = [t.name for t in history]
    cast = names.index("cast") if "cast" in names else -1
    if "shard" not in names:
        at = names.index("replicate")
        times = 1 if history[at] in step.reductions else step.microbatches
        width = _width(step) if cast > at else _stored_width(step)
        return [Message("all-reduce", history[at].axes[0].name, _elements(step).trained * times * width)]
    return _of_shards(step, history, names, _width(step) if cast > names.index("shard") else _stored_width(step))


def _of_shards(step: TrainStep, history: list[Any], names: list[str], width: int) -> list[Message]:
    n, exact = _elements(step), "quantized" not in names
    found, part = list[Message](), 1  # `part`: how many ranks what comes next is split over already
    for i, t in enumerate(history):
        if t.name == "shard":
            size, name = t.axes[0].size, t.axes[0].name
            again = (
                n.blocks if "checkpoint" in names[i:] else 0
            )  # what comes outside of it gathers it again in backward
            found.append(Message("gather", name, step.microbatches * (n.everything + again) * width // part, exact))
            found.append(Message("reduce-scatter", name, step.microbatches * n.trained * width // part, exact))
            part *= size
        elif t.name == "replicate":
            found.append(Message("all-reduce", t.axes[0].name, n.trained * _stored_width(step) // part, exact))
    return found


class _Elements(NamedTuple):
    everything: int
    blocks: int
    trained: int


def _elements(step: TrainStep) -> _Elements:
    """Of the model: all, those in blocks, those that take gradients."""
    logical = {s: list(parameters(p.origin).values()) for s, p in step.program.sites.items()}
    everything = sum(x.numel() for part in logical.values() for x in part)
    trained = sum(x.numel() for part in logical.values() for x in part if x.requires_grad)
    return _Elements(everything, everything - sum(x.numel() for x in logical.get("", [])), trained)


def drifts(config: DeepSpeedConfig) -> Iterator[str]:
    """Where DeepSpeed's documentation, older versions or the section's look say something else than what this configuration gets, here and there."""
    zero, given = config.zero_optimization, config.given

    def left(path: str) -> bool:
        return path not in given

    if left("gradient_clipping"):
        yield "gradient_clipping is not given: 1.0 (before 2026 DeepSpeed did not clip); give 0 for none"
    if left("steps_per_print"):
        yield "steps_per_print is not given: nothing is printed (documented: every 10 steps)"
    if config.bf16.enabled and left("bf16.check_grad_overflow"):
        yield "bf16: a step that is not finite is skipped, and counted (DeepSpeed: since check_grad_overflow is true by default, without a word)"
    if zero.stage == 3:
        values = {"stage3_prefetch_bucket_size": ("5e7", "5e8"), "stage3_param_persistence_threshold": ("1e5", "1e6"), "sub_group_size": ("1e9", "1e12")}  # fmt: skip
        for name, (code, documented) in values.items():
            if left(f"zero_optimization.{name}"):
                yield f"zero_optimization.{name} is not given: {code} in DeepSpeed's code ({documented} in its documentation or examples); see docs/deepspeed.md for what fds does"
        if left("zero_optimization.overlap_comm"):
            yield "zero_optimization.overlap_comm is not given: true at stage 3 (documented: false)"
    for name in ("offload_param", "offload_optimizer"):
        path = f"zero_optimization.{name}"
        if path in given and left(f"{path}.device"):
            yield f'{path}.device is not given: "none", so nothing is offloaded (documented: "cpu")'
        elif path in given and left(f"{path}.pin_memory"):
            yield f"{path}.pin_memory is not given: true (it was false; page-locked memory cannot be swapped out)"
    if "comms_logger" in given and not config.comms_logger.enabled:
        yield "comms_logger.enabled is false: off (in DeepSpeed the section's presence switches it on)"
    if (config.optimizer.type or "").lower() == "adam" and "adam_w_mode" not in config.optimizer.params:
        yield 'optimizer.type "Adam" has decoupled decay, as AdamW: adam_w_mode is true by default'
    if "activation_checkpointing" in given:
        yield "activation_checkpointing: every block is recomputed (in DeepSpeed the section only sets up checkpoints that the model itself calls)"


def _stored(step: TrainStep) -> bool:
    """Whether parameters are stored in the dtype that is computed in."""
    return any(t.name == "cast" and dict(t.options).get("stored") for t in step.program.history)


def _stored_width(step: TrainStep) -> int:
    return next(x.element_size() for x in tree.named(step.program.spec).values() if x.requires_grad)


def _width(step: TrainStep) -> int:
    """Bytes of an element as it is computed with."""
    return 2 if any(t.name == "cast" for t in step.program.history) else _stored_width(step)


__all__ = ["Memory", "Message", "abstract", "drifts", "memory", "traffic"]
