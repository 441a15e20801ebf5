"""Where a program's work is: MACs, floating-point operations, parameters and latency of every module, from the operators of its graph.

A call is traced on tensors without values, forward and backward, and each operator is counted (`flops.py`) for the module that it belongs to. That is
the module whose forward is running; in backward, the one whose forward made the node, which autograd numbers. So the numbers of a backward pass
and of recompute are each module's own.

`torch.utils.flop_counter.FlopCounterMode` was measured beside it (torch 2.13, CPU, a Llama of two blocks with grouped heads): it leaves out
attention on a CPU and every operator of fds's, and gives one projection's backward to another (the key's, half as large as the query's, got more than
it), since its hooks on outputs and inputs say where a module's backward begins and ends, and siblings overlap.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from fds import tree
from fds._torch import abstracting, autograd_node, last_node, named_modules, reads_values, without_modes
from fds.accelerator import get_accelerator
from fds.deepspeed.flops import Cost, Counter, taken_apart
from fds.deepspeed.profiles import PHASES, ModuleProfile, Profile, lines, number, write
from fds.program import Program


def profile(
    f: Callable[..., Any], *args: Any, of: Program | nn.Module | None = None, abstract: bool = True, **kwargs: Any
) -> Profile:
    """Count what ``f(*args, **kwargs)`` computes, by module.

    Args:
        f: a program, a module, or any function of tensors that calls one: a loss, `value_and_grad` of it, a train step (not a compiled one).
        of: whose modules. Default: `f` itself.
        abstract: count on tensors without values; nothing is computed or sent, so that one rank may do it alone. False: compute, for a function
            that reads values (Mixture-of-Experts layers that ask how many tokens an expert gets).

    Raises:
        ValueError: no modules to tell apart; with `abstract`, a function that reads values.

    >>> import fds
    >>> program, params = fds.functionalize(torch.nn.Linear(8, 4))
    >>> grads = fds.value_and_grad(lambda p, x: program(p, x).sum(), wrt=program)
    >>> found = profile(grads, program.place(params), torch.ones(2, 8), of=program).total
    >>> found.costs["forward"].macs, found.costs["backward"].macs
    (64, 64)
    """
    owner = f if of is None else of
    if not isinstance(owner, Program | nn.Module) or (isinstance(owner, Program) and owner.core is None):
        raise ValueError(
            f"profile: {type(owner).__name__} has no modules; say whose they are by of=, a program or a module"
        )
    if not abstract:
        return _counted(f, args, kwargs, owner)
    if isinstance(f, nn.Module):
        f, args = _as_function(f), ({**dict(f.named_parameters()), **dict(f.named_buffers())}, *args)
    with abstracting() as copy:
        args, kwargs = tree_map(lambda x: copy(x) if isinstance(x, Tensor) else x, (args, kwargs))
        try:
            return _counted(f, args, kwargs, owner)
        except reads_values() as error:
            raise ValueError(
                f"profile: the function reads a tensor's value ({error}), which an abstract one has not; use abstract=False"
            ) from error


def _as_function(module: nn.Module) -> Callable[..., Any]:
    return lambda tensors, *args, **kwargs: torch.func.functional_call(module, tensors, args, kwargs)


# --- counting ---


def _modules(owner: Program | nn.Module) -> dict[str, nn.Module]:
    """Modules by path, as they are called."""
    if isinstance(owner, nn.Module):
        return dict(named_modules(owner))
    core = owner.core
    assert core is not None
    return {path: core.part(path) for path, _ in named_modules(core.module)}


@attrs.define
class _Watch:
    """Which modules' forwards are running; how often each ran, and how long."""

    paths: dict[int, str]  # of a module, by its identity
    synchronize: Callable[[], None] | None = None  # where times are wanted
    running: list[str] = attrs.field(factory=list[str])
    began: list[float] = attrs.field(factory=list[float])
    calls: dict[str, int] = attrs.field(factory=dict[str, int])
    seconds: dict[str, float] = attrs.field(factory=dict[str, float])

    def now(self) -> float:
        if self.synchronize is None:
            return 0.0
        self.synchronize()
        return time.perf_counter()

    def enter(self, module: nn.Module, _: Any) -> None:
        path = self.paths.get(id(module))
        if path is not None:
            self.running.append(path)
            self.began.append(self.now())

    def leave(self, module: nn.Module, _: Any, __: Any) -> None:
        path = self.paths.get(id(module))
        if path is not None and self.running and self.running[-1] == path:
            self.running.pop()
            self.seconds[path] = self.seconds.get(path, 0.0) + self.now() - self.began.pop()
            self.calls[path] = self.calls.get(path, 0) + 1

    @contextmanager
    def __call__(self) -> Iterator[None]:
        hooks = [
            nn.modules.module.register_module_forward_pre_hook(self.enter),
            nn.modules.module.register_module_forward_hook(self.leave, always_call=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class _Count(TorchDispatchMode):
    """Counts every operator for the module that it belongs to."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.watch, self.counter = watch, Counter()
        self.costs: dict[tuple[str, str], Cost] = {}  # (path, phase) -> cost, children not included
        self.operators: dict[str, Cost] = {}
        self.uncounted: dict[str, int] = {}
        self.owners: dict[int, str] = {}  # number of an autograd node -> path of the module whose forward made it
        self.opaque: set[int] = set()  # of these, the nodes of autograd Functions, which may be as large as a block

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        parts = taken_apart(self, func, args, kwargs or {})
        if parts is not NotImplemented:
            return parts
        out = func(*args, **(kwargs or {}))
        if isinstance(func, torch._ops.OpOverload) and func.namespace != "prim":
            where = self.place(func)
            with without_modes():
                cost = self.counter.cost(func, args, kwargs or {}, out)
            name = f"{func.namespace}.{func._overloadpacket.__name__}"
            if cost is None:
                self.uncounted[name] = self.uncounted.get(name, 0) + 1
            elif cost.flops:
                self.costs[where] = self.costs.get(where, Cost()) + cost
                self.operators[name] = self.operators.get(name, Cost()) + cost
        return out

    def place(self, func: Any) -> tuple[str, str]:
        """The module and the phase of the operator that has just run."""
        node, running = autograd_node(), self.watch.running
        # Recompute runs with gradients on; so do the backward operators of fds, which can be differentiated again.
        derivative = func.namespace == "fds" and func._overloadpacket.__name__.endswith("_backward")
        if node is not None and (derivative or not torch.is_grad_enabled()):
            return self.owners.get(node, ""), "backward"
        # Recompute calls a block's children, but not the block itself.
        path = running[-1] if running else self.owners.get(node, "") if node is not None else ""
        self.made(last_node(), path)
        return path, "forward" if node is None else "recompute"

    def made(self, node: int, path: str) -> None:
        """Note whose the last node is. Where gradients are off and nobody has it yet, an autograd Function is running: its node belongs to
        what all its operators have in common."""
        if node not in self.owners:
            self.owners[node] = path
            if not torch.is_grad_enabled():
                self.opaque.add(node)
        elif node in self.opaque and not torch.is_grad_enabled():
            self.owners[node] = _common(self.owners[node], path)


def _common(a: str, b: str) -> str:
    parts: list[str] = []
    for x, y in zip(a.split("."), b.split("."), strict=False):
        if x != y:
            break
        parts.append(x)
    return ".".join(parts)


def _counted(f: Callable[..., Any], args: Any, kwargs: Any, owner: Program | nn.Module) -> Profile:
    modules = _modules(owner)
    watch = _Watch({id(m): path for path, m in modules.items()})
    count = _Count(watch)
    with watch(), count:
        f(*args, **kwargs)
    rows: dict[str, ModuleProfile] = {}
    for path, m in modules.items():
        costs = {phase: _inside(count.costs, path, phase) for phase in PHASES}
        rows[path] = ModuleProfile(
            path, type(m).__name__, sum(p.numel() for p in m.parameters()), costs, watch.calls.get(path, 0)
        )
    operators = dict(sorted(count.operators.items(), key=lambda x: -x[1].flops))
    return Profile(rows, operators, count.uncounted)


def _inside(costs: Mapping[tuple[str, str], Cost], path: str, phase: str) -> Cost:
    mine = [c for (p, ph), c in costs.items() if ph == phase and (not path or p == path or p.startswith(path + "."))]
    return sum(mine, Cost())


def timed(found: Profile, f: Callable[..., Any], *args: Any, of: Program | nn.Module | None = None, warm_up: int = 1, **kwargs: Any) -> Profile:  # fmt: skip
    """`found` with the latency of each module's forward in ``f(*args, **kwargs)``, after `warm_up` calls that are not timed.

    The device is waited for wherever a module begins and ends, so that the sum is more than an undisturbed call takes.
    """
    owner = f if of is None else of
    if not isinstance(owner, Program | nn.Module):
        raise ValueError(f"timed: {type(owner).__name__} has no modules; say whose they are by of=")
    for _ in range(warm_up):
        f(*args, **kwargs)
    watch = _Watch({id(m): path for path, m in _modules(owner).items()}, get_accelerator().synchronize)
    began = watch.now()
    with watch():
        f(*args, **kwargs)
    seconds = {**watch.seconds, "": watch.now() - began}
    return attrs.evolve(found, modules={p: attrs.evolve(m, seconds=seconds.get(p)) for p, m in found.modules.items()})


# --- DeepSpeed's function ---


def get_model_profile(
    model: nn.Module,
    input_shape: tuple[int, ...] | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    print_profile: bool = True,
    detailed: bool = True,
    module_depth: int = -1,
    top_modules: int = 1,
    warm_up: int = 1,
    as_string: bool = True,
    output_file: str | Path | None = None,
    ignore_modules: Sequence[type[nn.Module]] | None = None,
    mode: str = "forward",
) -> tuple[Any, Any, Any]:
    """Operations, MACs and parameters of a model's forward in evaluation mode: ``(flops, macs, params)``.

    A model on the meta device is counted without being computed, and has no latency. The model is left in the mode in which it was.

    Args:
        input_shape: of one floating tensor, all that `model` is called with; or give `args` and `kwargs`.
        print_profile: print the profile (`lines`), to `output_file` if one is given.
        detailed, module_depth, top_modules, ignore_modules: see `lines`.
        warm_up: calls before the one that is timed.
        as_string: ``("1.2 G", "600 MMACs", "3.4 M")`` instead of numbers.
        mode: "forward", or "generate" for ``model.generate(*args, **kwargs)``.

    Raises `ValueError` for a model that is none, an unknown mode, and inputs that are missing or given twice.

    >>> get_model_profile(torch.nn.Linear(8, 4), (2, 8), print_profile=False, as_string=False)
    (128, 64, 36)
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"get_model_profile: model is {type(model).__name__}, required a torch.nn.Module")
    if mode not in ("forward", "generate"):
        raise ValueError(f"get_model_profile: mode={mode!r}; {tree.suggest(mode, ['forward', 'generate'])}")
    inputs, named = _inputs(model, input_shape, args, kwargs)
    modes = {m: m.training for m in model.modules()}
    try:
        model.eval()
        call: Callable[..., Any] = model if mode == "forward" else model.generate  # pyright: ignore[reportAssignmentType]
        found = _of_model(model, call, inputs, named)
        if not any(p.is_meta for p in model.parameters()):
            found = timed(found, call, *inputs, of=model, warm_up=warm_up, **named)
    finally:
        for m, training in modes.items():
            m.training = training
    if print_profile:
        shown = lines(found, module_depth=module_depth, top_modules=top_modules, detailed=detailed, ignore=ignore_modules)  # fmt: skip
        write(shown, output_file)
    total = found.total
    if as_string:
        return number(total.flops), f"{number(total.macs)}MACs", number(total.parameters)
    return total.flops, total.macs, total.parameters


def _inputs(model: nn.Module, shape: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> tuple[Sequence[Any], dict[str, Any]]:  # fmt: skip
    named = dict(kwargs or {})
    if shape is None:
        if not args and not named:
            raise ValueError("get_model_profile: no inputs; give input_shape=, args= or kwargs=")
        return args, named
    if args or named:
        raise ValueError("get_model_profile: input_shape= and args= or kwargs= were given; one tensor is all of them")
    if not isinstance(shape, tuple) or not shape or not all(isinstance(n, int) and n > 0 for n in shape):  # pyright: ignore[reportUnknownVariableType]
        raise ValueError(f"get_model_profile: input_shape={shape!r}, required a tuple of sizes, as (8, 3, 224, 224)")
    like = next(model.parameters(), torch.empty(0))
    return [torch.zeros(shape, dtype=like.dtype, device=like.device)], {}


def _of_model(model: nn.Module, call: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Profile:
    """Without computing, unless the model reads values: generation does, and some mixtures of experts do."""
    if call is model:
        try:
            return profile(model, *args, **kwargs)
        except ValueError as error:
            if not isinstance(error.__cause__, reads_values()):
                raise
    return profile(call, *args, of=model, abstract=False, **kwargs)


__all__ = ["ModuleProfile", "Profile", "get_model_profile", "lines", "profile", "timed", "write"]
