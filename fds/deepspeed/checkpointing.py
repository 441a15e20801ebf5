"""`checkpoint(function, *args)` and `configure(...)`: recompute as DeepSpeed's users write it, inside of a module's forward or anywhere else.

In a program of fds the transformation `fds.checkpoint()` does this from outside, at every block, and needs no call in the model. For models that call
`checkpoint` themselves this one works too: outside of programs under `loss.backward()` or `torch.autograd.grad`, and inside of them under
`fds.value_and_grad`, `fds.train_step` and `fds.compile`.

A function reaches parameters that are no arguments of it (``checkpoint(self.layer, x)``). They are found while it runs forward: whatever takes a gradient and
goes into an operator is an input of the recompute, and its gradient goes back where the tensor came from. A program's leaves are in the module
for the time of a call only; they are set again for the recompute.

Differences from DeepSpeed: nothing reenters `backward`, so `torch.autograd.grad` works and gradients are not added up behind its back; randomness in a
program is a function of its seed, so no tracker of generators is needed; autocast is the forward's.

`configure` sets what every later call in this process does: its signature leaves no other way. That one record, `_ACTIVE`, is this module's only state, and
is read where `checkpoint` is called, not in backward.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import get_device_states, set_device_states

from fds import tree
from fds._torch import inside_functorch
from fds.frame import FRAME, Frame, scoped
from fds.offload import HostStore
from fds.offload.stash import BRING_BACK, PUT_AWAY, Stash
from fds.randomness import randomness
from fds.remat import recomputed
from fds.sharding import collectives
from fds.sharding.mesh import Axis
from fds.sharding.zero import shard_of
from fds.tree import Params

_LOG = logging.getLogger("fds.deepspeed")
_KEYS = {
    "partition_activations": "partition_activations",
    "contiguous_checkpointing": "contiguous_memory_optimization",
    "num_checkpoints": "number_checkpoints",
    "checkpoint_in_cpu": "cpu_checkpointing",
    "synchronize": "synchronize_checkpoint_boundary",
    "profile": "profile",
}  # argument of `configure` -> key of "activation_checkpointing"


@attrs.frozen
class Settings:
    """What `configure` has set."""

    axis: Axis | None = None  # over whose ranks saved activations are split
    stash: Stash | None = None  # where they are kept
    synchronize: bool = False
    profile: bool = False


_ACTIVE: Settings | None = None


def configure(
    mpu_: Any = None,
    deepspeed_config: Any = None,
    partition_activations: bool | None = None,
    contiguous_checkpointing: bool | None = None,
    num_checkpoints: int | None = None,
    checkpoint_in_cpu: bool | None = None,
    synchronize: bool | None = None,
    profile: bool | None = None,
) -> None:
    """Set what `checkpoint` does from now on, in this process. What is None comes from the configuration, else is off.

    Args:
        mpu_: says which ranks compute the same activations: ``get_model_parallel_rank()``, ``.._world_size()`` and ``.._group()``, or the same with
            ``tensor_model_parallel``.
        deepspeed_config: a mapping or the path of a JSON file; its section "activation_checkpointing" is read.
        partition_activations: each rank of `mpu_` keeps 1/n of what is saved, and gathers it in backward.
        contiguous_checkpointing: not there: an error. Nothing is fragmented, since saved tensors are the caller's own.
        num_checkpoints: the number of buffers for `contiguous_checkpointing`; nothing without it.
        checkpoint_in_cpu: keep what is saved in host memory (an `fds.HostStore`), and read one call ahead in backward.
        synchronize: wait for the accelerator before and after each call and its backward; without an accelerator there is nothing to wait for.
        profile: log each call's time, forward and backward, to the logger "fds.deepspeed".

    Raises `ValueError` for what is not there, an unknown key of the section, or `partition_activations` without `mpu_`.
    """
    global _ACTIVE
    given = {"partition_activations": partition_activations, "contiguous_checkpointing": contiguous_checkpointing, "num_checkpoints": num_checkpoints,
             "checkpoint_in_cpu": checkpoint_in_cpu, "synchronize": synchronize, "profile": profile}  # fmt: skip
    section = _section(deepspeed_config)
    chosen = {k: section.get(_KEYS[k]) if v is None else v for k, v in given.items()}
    if chosen["contiguous_checkpointing"]:
        raise ValueError(
            "configure: contiguous_checkpointing (contiguous_memory_optimization) is not there, as saved tensors are not copied into buffers of their own; leave it out"
        )
    if chosen["partition_activations"] and mpu_ is None:
        raise ValueError(
            "configure: partition_activations needs mpu_, to say over which ranks activations are the same; give it, or leave partition_activations out"
        )
    axis = _axis(mpu_) if chosen["partition_activations"] else None
    stash = Stash(HostStore(), 1) if chosen["checkpoint_in_cpu"] else None
    _ACTIVE = Settings(axis, stash, bool(chosen["synchronize"]), bool(chosen["profile"]))


def is_configured() -> bool:
    """Whether `configure` was called in this process."""
    return _ACTIVE is not None


def reset() -> None:
    """Let go of what calls have saved in host memory, as far as no graph is left that could ask for it; the settings stay."""
    global _ACTIVE
    if _ACTIVE is not None and _ACTIVE.stash is not None:
        _ACTIVE = attrs.evolve(_ACTIVE, stash=Stash(HostStore(), 1))


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``function(*args, **kwargs)``, of which only the arguments are kept for backward; the rest is computed again there.

    Arguments and results are trees of tensors and other things. Dropout draws the same masks again: in a program from its seed, elsewhere
    from torch's generators, which are put back to where they were before the call.

    Law: values are those of the plain call, bitwise in eager, and so are gradients, those of tensors that `function` closes over included.

    Raises `ValueError` under a `torch.func` transformation for a function that closes over what takes a gradient, and for second derivatives
    (``create_graph=True``).

    >>> layer = nn.Linear(2, 2)
    >>> checkpoint(layer, torch.ones(1, 2)).sum().backward()
    >>> layer.bias.grad
    tensor([1., 1.])
    """
    settings = _ACTIVE or Settings()
    if inside_functorch():
        return recomputed(_alone(function))({}, *args, **kwargs)
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    if (settings.synchronize or settings.profile) and torch.compiler.is_compiling():
        raise ValueError("checkpoint: synchronize and profile are for eager calls; configure() without them to compile")
    call = _Call(function, *pytree.tree_flatten((args, kwargs)), settings)
    with _measured(settings, function, "forward"):
        found = call.forward()
    if not any(t.requires_grad for t in (*call.tensors, *found)):
        return call.result(call.outputs)
    return call.result(_Recompute.apply(call, *call.tensors, *found))


@attrs.define(eq=False)
class _Call:
    """One call: what it was called with apart from tensors, and the surroundings that a second run of it needs."""

    function: Callable[..., Any]
    flat: list[Any]
    spec: Any
    settings: Settings
    frame: Frame = attrs.field(init=False)  # before the call, without results of it, which would hold themselves
    leaves: Params | None = None  # of the module of a program that is running
    places: list[int] = attrs.field(init=False)
    tensors: list[Tensor] = attrs.field(init=False)
    outputs: tuple[Tensor, ...] = ()  # until they are handed over
    shape: list[Any] = attrs.field(factory=list[Any])  # of the result: what is no tensor
    out_spec: Any = None
    generators: tuple[Any, ...] = ()
    autocast: list[Any] = attrs.field(factory=list[Any])

    def __attrs_post_init__(self) -> None:
        self.places = [i for i, x in enumerate(self.flat) if isinstance(x, Tensor)]
        self.tensors = [self.flat[i] for i in self.places]
        self.flat = [None if isinstance(x, Tensor) else x for x in self.flat]
        self.frame = attrs.evolve(FRAME.get(), heads=None, updates=None, **_counters(FRAME.get()))
        self.autocast = [_autocast(kind) for kind in _kinds()]
        if self.frame.running is not None:
            core, path = self.frame.running
            self.leaves = core.present(path)
        else:
            self.generators = torch.get_rng_state(), *get_device_states(*self.tensors)

    def forward(self) -> list[Tensor]:
        """Run, and keep the outputs. Gives what the function closed over that takes a gradient."""
        seen = _Seen(self.tensors)
        with torch.no_grad(), self._inside(), self._random(), seen:
            out, self.out_spec = pytree.tree_flatten(self._run(self.tensors))
        self.shape = [_TENSOR if isinstance(o, Tensor) else o for o in out]
        self.outputs = tuple(o for o in out if isinstance(o, Tensor))
        return list(seen.found.values())

    def again(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Run again, with the surroundings of the first time, in a graph of its own."""
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            for cast in self.autocast:
                stack.enter_context(torch.autocast(**cast))
            stack.enter_context(scoped(self.frame, **_counters(self.frame)))
            stack.enter_context(self._inside())
            if self.leaves is not None:
                core, path = self.frame.running
                stack.enter_context(core.swapped(path, self.leaves))
            else:
                cpu, devices, states = self.generators
                stack.enter_context(torch.random.fork_rng(devices))
                torch.set_rng_state(cpu)
                set_device_states(devices, states)
            stack.enter_context(self._random())
            return [o for o in pytree.tree_leaves(self._run(tensors)) if isinstance(o, Tensor)]

    def result(self, outputs: Sequence[Tensor]) -> Any:
        """The function's result, with these tensors in it."""
        self.outputs = ()  # they hold the graph, which holds this
        left = iter(outputs)
        return pytree.tree_unflatten([next(left) if o is _TENSOR else o for o in self.shape], self.out_spec)

    def _run(self, tensors: Sequence[Tensor]) -> Any:
        full = list(self.flat)
        for i, t in zip(self.places, tensors, strict=True):
            full[i] = t
        args, kwargs = pytree.tree_unflatten(full, self.spec)
        return self.function(*args, **kwargs)

    def _inside(self) -> Any:
        """Randomness without a seed in a program is an error, as under `fds.checkpoint`: a compiled step has no generator to put back. And an output
        layer inside of the function gives logits, not its arguments."""
        return scoped(recomputed=FRAME.get().recomputed or self.leaves is not None, heads=None)

    def _random(self) -> Any:
        return randomness(self.frame.training) if self.leaves is not None else nullcontext()


_TENSOR = object()


def _counters(frame: Frame) -> dict[str, Any]:
    """Copies of what a call counts and collects in its frame."""
    pending = {s: dict(x) for s, x in frame.pending.items()}
    return {"calls": dict(frame.calls), "draws": attrs.evolve(frame.draws), "pending": pending}


class _Seen(TorchFunctionMode):
    """What takes a gradient, goes into a function of torch's, and is none of `known`; each once, in order."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.known, self.found = {id(t) for t in known}, dict[int, Tensor]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in pytree.tree_leaves((args, kwargs)):
            if isinstance(x, Tensor) and id(x) not in self.known and id(x) not in self.found:
                with torch._C.DisableTorchFunction():
                    takes = x.requires_grad
                if takes:
                    self.found[id(x)] = x
        return func(*args, **(kwargs or {}))


class _Recompute(torch.autograd.Function):
    """Hands over the outputs of a call that has run already. Inputs: those of the call, then what it closed over."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.call, ctx.explicit = call, len(call.tensors)
        ctx.kept = [_keep(t, call.settings) for t in tensors[: ctx.explicit]]
        ctx.save_for_backward(*[k.held for k in ctx.kept], *tensors[ctx.explicit :])
        for k in ctx.kept:
            k.held = None
        # An input that comes out as it is has to be another tensor for autograd.
        out = tuple(o.view_as(o) if any(o is t for t in tensors) else o for o in call.outputs)
        call.tensors, call.outputs = [], ()
        ctx.mark_non_differentiable(*[o for o in out if not o.is_floating_point()])
        return out

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise ValueError("checkpoint: create_graph=True would lose second derivatives; call the function without checkpoint")  # fmt: skip
        call, n, needs = ctx.call, ctx.explicit, ctx.needs_input_grad[1:]
        saved = list(ctx.saved_tensors)
        with _measured(call.settings, call.function, "backward"):
            explicit = [k.back(x).detach() for k, x in zip(ctx.kept, saved[:n], strict=True)]
            explicit = [x.requires_grad_() if needed else x for x, needed in zip(explicit, needs, strict=False)]
            outputs = call.again(explicit)
            wanted = [x for x, needed in zip([*explicit, *saved[n:]], needs, strict=True) if needed]
            pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad and c is not None]
            grads = iter(_grads(pairs, wanted))
        return None, *[next(grads) if needed else None for needed in needs]


def _grads(pairs: list[tuple[Tensor, Tensor]], wanted: list[Tensor]) -> Sequence[Tensor | None]:
    if not pairs or not wanted:
        return [None] * len(wanted)
    return torch.autograd.grad([o for o, _ in pairs], wanted, [c for _, c in pairs], allow_unused=True)


@attrs.define
class _Kept:
    """How one input is kept: `held` is saved; `back` makes the input of it."""

    held: Tensor | None
    back: Callable[[Tensor], Tensor]


def _keep(x: Tensor, settings: Settings) -> _Kept:
    if isinstance(x, nn.Parameter) or not x.is_floating_point() or (settings.axis is None and settings.stash is None):
        return _Kept(x, lambda t: t)
    axis, stash, shape = settings.axis, settings.stash, x.shape
    held = x.detach() if axis is None else shard_of([x.detach()], axis)
    size, dtype, device = held.shape, held.dtype, held.device
    if stash is not None:
        held = PUT_AWAY(held, stash.number)

    def back(t: Tensor) -> Tensor:
        if stash is not None:
            t = BRING_BACK(t, size, dtype, device, stash.number)
        return t if axis is None else collectives.gather(t, axis)[: shape.numel()].view(shape)

    return _Kept(held, back)


def _alone(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` for a `torch.func` transformation, where every tensor that takes a gradient has to be an argument."""

    unchecked = [True]  # in the first run nothing else takes a gradient: arguments have none of their own there

    def run(_: Params, *args: Any, **kwargs: Any) -> Any:
        seen = _Seen([t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)])
        with seen if unchecked else nullcontext():
            out = function(*args, **kwargs)
        unchecked.clear()
        if seen.found:
            x = next(iter(seen.found.values()))
            raise ValueError(
                f"checkpoint: under a torch.func transformation the function uses {len(seen.found)} tensors that take a gradient and are not its arguments, the first {tuple(x.shape)} {x.dtype}; pass them as arguments, or use fds.checkpoint() on the program"
            )
        return out

    return run


@contextmanager
def _measured(settings: Settings, function: Any, what: str) -> Iterator[None]:
    _wait(settings)
    begin = time.perf_counter()
    yield
    _wait(settings)
    if settings.profile:
        name = getattr(function, "__name__", type(function).__name__)
        _LOG.info("checkpoint %s: %s %.3f ms", name, what, 1e3 * (time.perf_counter() - begin))


def _wait(settings: Settings) -> None:
    if settings.synchronize and torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _kinds() -> list[str]:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return ["cpu", *([] if accelerator is None else [accelerator.type])]


def _autocast(kind: str) -> dict[str, Any]:
    on, dtype, cached = (
        torch.is_autocast_enabled(kind),
        torch.get_autocast_dtype(kind),
        torch.is_autocast_cache_enabled(),
    )
    return {"device_type": kind, "enabled": on, "dtype": dtype, "cache_enabled": cached}


def _section(config: Any) -> Mapping[str, Any]:
    """The section "activation_checkpointing" of a configuration."""
    if config is None:
        return {}
    if isinstance(config, str | Path):
        config = json.loads(Path(config).read_bytes())
    if not tree.is_mapping(config):
        raise ValueError(f"configure: deepspeed_config is {type(config).__name__}, required a mapping or the path of a JSON file")  # fmt: skip
    section: Any = config.get("activation_checkpointing", {})
    if not tree.is_mapping(section):
        raise ValueError(f"activation_checkpointing: got {section!r}, required a mapping")
    for key in section:
        if key not in _KEYS.values():
            raise ValueError(f"activation_checkpointing.{key}: unknown key; {tree.suggest(key, _KEYS.values())}")
    return section


def _axis(mpu: Any) -> Axis:
    kind = "tensor_model_parallel" if hasattr(mpu, "get_tensor_model_parallel_rank") else "model_parallel"
    rank, size, group = (getattr(mpu, f"get_{kind}_{what}", None) for what in ("rank", "world_size", "group"))
    if rank is None or size is None or group is None:
        raise ValueError(f"configure: mpu_ is {type(mpu).__name__}, required get_{kind}_rank, get_{kind}_world_size and get_{kind}_group")  # fmt: skip
    return Axis("model_parallel", size(), rank(), group().group_name if size() > 1 else "")
