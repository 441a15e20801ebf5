"""What a configuration means: the chain of transformations, the optimizer and the train step, as a program that prints.

print(recipe(config, model).source())          # runnable Python
step = recipe(config, model).build(model=model)["step"]
"""

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import nn

from fds.deepspeed import meaning
from fds.deepspeed.client import Group, groups_of
from fds.deepspeed.errors import DeepSpeedConfigError
from fds.deepspeed.methods import is_one_bit, rule
from fds.deepspeed.modules import checkpoints_itself
from fds.deepspeed.recipe import Call, Line, Name, Recipe, Reference, value

_DP = Name("mesh", ("dp",))


def recipe(
    config: Any, model: nn.Module, *, groups: Sequence[Group] | None = None, frozen: Sequence[str] = ()
) -> Recipe:
    """The program that a resolved configuration stands for.

    Args:
        config: a `DeepSpeedConfig`, its batch triangle resolved.
        model: asked for its leaves' names and sizes; may be on the meta device.
        groups: the optimizer's, in place of the configuration's (`client.groups_of`).
        frozen: leaves that take gradients in the model, and are in no group.

    Raises `DeepSpeedConfigError` where two keys want what cannot be had together.
    """
    return _Plan(config, model, groups, tuple(frozen)).recipe()


@attrs.define
class _Plan:
    config: Any
    model: nn.Module
    own: Sequence[Group] | None
    frozen: tuple[str, ...]
    stores: dict[str, Line] = attrs.field(factory=dict[str, Line])
    policies: dict[str, Line] = attrs.field(factory=dict[str, Line])  # by group

    def written(self, key: str) -> bool:
        """Whether a key was in the configuration, by its path."""
        return key in self.config.given

    @property
    def zero(self) -> Any:
        return self.config.zero_optimization

    @property
    def stage(self) -> int:
        return int(self.zero.stage)

    @property
    def low(self) -> str | None:
        """The dtype that is computed in, if it is not that of the parameters."""
        return meaning.low(self.config)

    def recipe(self) -> Recipe:
        groups = list(groups_of(self.config, self.model) if self.own is None else self.own)
        chain, tx = self.chain(groups), self.optimizer(groups)
        lines = [Line(("mesh",), Call("fds.sharding.mesh", **self.mesh()))]
        lines += self.stores.values()
        if len(groups) > 1:
            lines.append(Line(("groups",), {g.name: g.patterns for g in groups}, "parameters by the optimizer's groups, the first that names a leaf has it"))  # fmt: skip
        if checkpoints_itself(self.model):
            lines.append(Line(("model",), Call("modules.without_checkpointing", Name("model")), "fds.checkpoint() recomputes in its place"))  # fmt: skip
        lines.append(Line(("program", "params"), Call("fds.functionalize", Name("model"))))
        lines.append(Line(("transform",), Call("fds.chain", *chain), "first = innermost"))
        lines.append(Line(("program",), Call("transform", Name("program"))))
        if tx is not None:
            lines += self.policies.values()
            lines.append(Line(("tx",), tx))
            lines.append(Line(("step",), Call("fds.train_step", Name("program"), Name("tx"), **self.step())))
            if self.config.compile.deepcompile:
                lines.append(Line(("step",), Call("fds.compile", Name("step")), "one graph"))
        hybrid = self.config.hybrid_engine
        if hybrid.enabled:
            names = ("max_out_tokens", "inference_tp_size", "release_inference_cache", "pin_parameters", "tp_gather_partition_size")  # fmt: skip
            lines.append(Line(("serving",), Call("fds.inference.hybrid", Name("program"), **{k: getattr(hybrid, k) for k in names})))  # fmt: skip
        return Recipe(tuple(lines))

    # --- parameters ---

    def mesh(self) -> dict[str, int]:
        if self.local > 1:
            return {"node": -1, "local": self.local}
        tp = self.tp
        return {"dp": -1, "tp": tp} if tp > 1 else {"dp": -1}

    @property
    def tp(self) -> int:
        return meaning.tensor(self.config)

    @property
    def local(self) -> int:
        """Ranks of a node, where ZeRO-3 has two levels."""
        return max(int(self.zero.zero_hpz_partition_size), int(self.zero.mics_shard_size), 1) if self.stage == 3 else 1

    @property
    def secondary(self) -> bool:
        """Whether a node keeps a copy of its own (hpZ)."""
        return self.stage == 3 and int(self.zero.zero_hpz_partition_size) > 1

    def chain(self, groups: Sequence[Group]) -> list[Call]:
        found = [Call("fds.at", name, Call("fds.freeze")) for name in self.frozen]
        if self.tp > 1:
            found.append(Call("fds.tensor_parallel", Name("mesh", ("tp",))))
        alone = any(is_one_bit(g.type) for g in groups)  # it talks to the other ranks itself
        if alone and len(groups) > 1:
            raise _error("optimizer.type", groups[0].type, f"it exchanges all parameters together, and there are {len(groups)} groups; give model_parameters as one, or another optimizer")  # fmt: skip
        found += self.layout({"groups": Name("groups")} if len(groups) > 1 else {}, alone)
        if (dtype := _autocast(self.config)) is not None:
            found.append(Call("fds.autocast", dtype))
        param = self.zero.offload_param
        if param.device != "none":
            own = {"groups": Name("groups")} if len(groups) > 1 else {}
            own |= (
                {"window": int(param.buffer_count)}
                if self.written("zero_optimization.offload_param.buffer_count")
                else {}
            )
            found.append(Call("fds.offload", self.store(param, "zero_optimization.offload_param"), **own))
        return found if self.secondary else found + self.recompute()

    def layout(self, groups: Mapping[str, Any], alone: bool) -> list[Call]:
        """How parameters are stored, and the dtype that is computed in: outside of `shard`, the wire carries it."""
        if self.stage in (1, 2) and not meaning.in_shards(self.config):
            stored = {"stored": True} if meaning.masters(self.config) else {}
            return [Call("fds.cast", self.low, **stored)] if self.low else []
        cast = [Call("fds.cast", self.low)] if self.low else []
        reduce = {"reduce": "sum"} if self.config.gradient_allreduce_op == "sum" else {}
        if alone:
            return cast
        if self.stage == 0:
            move = [Call("fds.replicate", _DP, **reduce)]
            wide = meaning.wire(self.config) != self.low or not self.low
            return [*cast, *move] if wide else [*move, *cast]  # the first: once a step, in float32
        options: dict[str, Any] = {**reduce, **groups}
        if self.written("zero_optimization.stage3_param_persistence_threshold"):
            options["threshold"] = int(self.zero.stage3_param_persistence_threshold)
        frozen = [Call("fds.quantize_frozen", "int8")] if self.zero.zero_quantized_nontrainable_weights else []
        shards = self.shards(options)
        wide = self.low is not None and meaning.wire(self.config) == "float32"
        return [*cast, *frozen, *shards] if wide else [*frozen, *shards, *cast]

    def shards(self, options: dict[str, Any]) -> list[Call]:
        quantized: dict[str, Any] = {}
        quantized |= {"weights": "int8"} if self.zero.zero_quantized_weights else {}
        quantized |= {"gradients": "int4"} if self.zero.zero_quantized_gradients else {}
        loco = self.zero.zeropp_loco_param
        if loco is not None:
            feedback = {"beta": loco.get("err_beta", 0.8), "reset": loco.get("reset_T", 1024)}
            quantized["feedback"] = Call("fds.sharding.ErrorFeedback", **feedback)
        wire = [Call("fds.quantized", **quantized)] if quantized else []
        if self.local == 1:
            return [Call("fds.shard", _DP, **options), *wire]
        inner = Call("fds.shard", Name("mesh", ("local",)), **options)
        if int(self.zero.mics_shard_size) > 1:
            reduce = {k: v for k, v in options.items() if k == "reduce"}
            return [inner, *wire, Call("fds.replicate", Name("mesh", ("node",)), **reduce)]
        # What is gathered over the nodes is kept for backward, which gathers it again inside of the node alone.
        outer = {k: v for k, v in options.items() if k != "threshold"}
        again = self.recompute() or [Call("fds.checkpoint", "matmul")]
        return [inner, *again, Call("fds.shard", Name("mesh", ("node",)), **outer), *wire]

    def recompute(self) -> list[Call]:
        section = self.config.activation_checkpointing
        if section.cpu_checkpointing:
            return [Call("fds.checkpoint", store=self.keep("activations", Call("fds.HostStore")))]
        if checkpoints_itself(self.model) or self.written("activation_checkpointing"):
            return [Call("fds.checkpoint")]
        if self.stage == 3:
            elements = sum(p.numel() for p in self.model.parameters())
            if elements > min(int(self.zero.stage3_max_live_parameters), int(self.zero.stage3_max_reuse_distance)):
                return [Call("fds.checkpoint", "matmul")]  # gathered weights would all stay until backward
        return []

    # --- the optimizer ---

    def optimizer(self, groups: Sequence[Group]) -> Call | None:
        if not groups:
            return None
        if len(groups) == 1:
            return self.placed(groups[0])
        return Call("fds.optim.grouped", {g.name: self.placed(g) for g in groups}, Name("groups"))

    def placed(self, group: Group) -> Call:
        policy = (
            None
            if group.schedule is None
            else self.policies.setdefault(group.name, Line((self.named("schedule"),), group.schedule))
        )
        made = None if group.schedule is None else value(group.schedule, {})
        moved = {} if made is None else {"momentum": made.momentum is not None, "b2": made.b2}
        tx = rule(group.type, group.params, None if policy is None else Name(policy.names[0]), _DP, **moved)
        clip = float(self.config.gradient_clipping)
        if clip > 0:
            tx = Call("fds.optim.chain", Call("fds.optim.clip_by_global_norm", clip), tx)
        if meaning.masters(self.config):
            tx = Call("fds.optim.with_master", tx)
        away = self.zero.offload_optimizer
        if away.device != "none":
            tx = Call("fds.optim.streamed", tx, self.store(away, "zero_optimization.offload_optimizer"))
        elif self.zero.offload_param.device != "none":
            # Handles of parameters are only known to a streamed optimizer; its state stays in host memory.
            tx = Call("fds.optim.streamed", tx, self.keep("host", Call("fds.HostStore")))
        if self.stage == 0 or meaning.in_shards(self.config):
            return tx
        summed = {"sum_dtype": torch.float32} if meaning.masters(self.config) and meaning.wire(self.config) == "float32" else {}  # fmt: skip
        return Call("fds.optim.sharded", tx, _DP, **summed)

    def named(self, what: str) -> str:
        return f"{what}{len(self.policies) or ''}"

    def store(self, section: Any, key: str) -> Name:
        if section.device == "cpu":
            return self.keep("host", Call("fds.HostStore"))
        options: dict[str, Any] = {}
        if self.written("aio"):
            aio = self.config.aio
            names = ("block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events")
            options["settings"] = Call("aio.Settings.of", {k: getattr(aio, k) for k in names})
        if key.endswith("offload_param") and self.written(f"{key}.max_in_cpu"):
            options["budget"] = int(section.max_in_cpu) * max(p.element_size() for p in self.model.parameters())
        known = "parameters" if options.get("budget") else "files"
        return self.keep(known, Call("fds.FileStore", section.nvme_path, **options))

    def keep(self, name: str, made: Call) -> Name:
        """A line of its own for a store; two with the same arguments are one, but for activations."""
        for line in self.stores.values():
            if name != "activations" and line.names[0] != "activations" and line.expression == made:
                return Name(line.names[0])
        while name in self.stores:
            name += "_too"
        self.stores[name] = Line((name,), made)
        return Name(name)

    # --- the step ---

    def step(self) -> dict[str, Any]:
        options: dict[str, Any] = {"loss": Reference("batches.model_loss")}
        micro = int(self.config.gradient_accumulation_steps)
        if micro > 1:
            options["microbatches"] = micro
        fp16 = self.config.fp16
        if fp16.enabled:
            options["loss_scale"] = float(fp16.loss_scale) if fp16.loss_scale else Call(
                "fds.DynamicLossScale", initial_power=fp16.initial_scale_power, window=fp16.loss_scale_window, hysteresis=fp16.hysteresis,
                consecutive_hysteresis=fp16.consecutive_hysteresis, minimum=float(fp16.min_loss_scale),
            )  # fmt: skip
        elif _autocast(self.config) == "float16":
            options["loss_scale"] = Call("fds.DynamicLossScale", window=2000, hysteresis=1)  # as torch.amp.GradScaler
        return options


def _autocast(config: Any) -> str | None:
    """The dtype of autocast, by torch's name, if it is on."""
    return (config.torch_autocast.dtype or "bfloat16") if config.torch_autocast.enabled else None


def _error(key: str, value: Any, why: str) -> DeepSpeedConfigError:
    return DeepSpeedConfigError(f"{key}={value!r}: {why}", [key])
