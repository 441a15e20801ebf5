"""Lowering: a whole step as one graph.

Every compile of fds goes through `torch._dynamo.nonstrict_trace`: Dynamo calls the step, AOTAutograd traces through it, recompute and
custom gradients included. A strict compile of `torch.func.grad` in torch 2.13 drops the backward of an `autograd.Function` without a word.
"""

from collections.abc import Callable
from contextvars import ContextVar
from functools import partial, wraps
from types import FunctionType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fds import tree
from fds._torch import inductor, nonstrict_trace
from fds.lowering import by_products, lowered
from fds.memory import keep_freed
from fds.program import Program
from fds.transform import Transform, whole


def traced(f: Callable[..., Any]) -> Callable[..., Any]:
    """`f` itself in eager; one traced region, not inlined by Dynamo, inside anybody's `torch.compile`."""
    nonstrict = nonstrict_trace(by_products(lowered(f)))

    def run(*args: Any, **kwargs: Any) -> Any:
        return nonstrict(*args, **kwargs) if torch.compiler.is_compiling() else f(*args, **kwargs)

    # Dynamo does not guard on which nonstrict function it saw: with one code object for all closures the graph compiled for the first
    # would answer for every other, silently (torch 2.13). A code object of its own is guarded on.
    own = FunctionType(run.__code__.replace(), run.__globals__, run.__name__, None, run.__closure__)
    return wraps(f)(own)


_CALLS: ContextVar[list[Callable[[], Any]] | None] = ContextVar("calls", default=None)


def _noting_calls(graph: Any, examples: list[Any]) -> Callable[..., Any]:
    """The default backend, whose graphs note what they are called with while somebody listens (`again`)."""
    compiled = inductor(graph, examples)

    def call(*inputs: Any) -> Any:
        if (calls := _CALLS.get()) is not None:
            calls.append(partial(compiled, *inputs))
        return compiled(*inputs)

    return call


def again(call: Callable[[], Any]) -> Callable[[], Any]:
    """Make a call of a `ByShape`, and give what makes it again: the graph itself with the same tensors, whose values may have changed.

    That is without Dynamo, which takes the arguments apart and looks at every one of them before each call: 0.3 to 0.5 ms of the 7 to 9 that a token takes with
    100M parameters. What calls no graph, or several, is called as it is.
    """
    calls: list[Callable[[], Any]] = []
    token = _CALLS.set(calls)
    try:
        call()
    finally:
        _CALLS.reset(token)
    return calls[0] if len(calls) == 1 else call


class ByShape:
    """A function compiled whole, a graph for each set of shapes of its arguments after the first (which has to keep its shapes).

    Dynamo gives up at the eighth shape of a code object (`recompile_limit`), which with ``fullgraph=True`` is an error: each has one of its own.
    """

    def __init__(self, f: Callable[..., Any]) -> None:
        self._f: Any = f
        self._graphs: dict[Any, Callable[..., Any]] = {}

    def of(self, *args: Any) -> Callable[..., Any]:
        """The compiled function for arguments like these behind the first: for who calls it many times with the same ones."""
        key = tuple((x.shape, x.dtype) if isinstance(x, Tensor) else x for x in tree_leaves(args))
        if key not in self._graphs:
            f = self._f
            own = FunctionType(f.__code__.replace(), f.__globals__, f.__name__, None, f.__closure__)
            self._graphs[key] = torch.compile(own, fullgraph=True, dynamic=False, backend=_noting_calls)  # pyright: ignore[reportUnknownMemberType]
        return self._graphs[key]

    def __call__(self, first: Any, *args: Any) -> Any:
        return self.of(*args)(first, *args)


class Recorded:
    """A step that writes to tensors that stay where they are, as a CUDA graph: the first call runs it, the second records it, that one and all later ones play it.

    Without the host's part of a step, which is most of it for few rows. Nothing of it has run on a GPU so far.
    """

    def __init__(self, step: Callable[[], Any]) -> None:
        self._step = step
        self._graph: Any = None
        self._warm = False

    def __call__(self) -> None:
        if not self._warm:
            self._step()  # compiles, and makes what libraries make at their first call
            self._warm = True
            return
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):  # recording runs nothing
                self._step()
        self._graph.replay()


def compile(
    f: Any = None,
    *,
    donate: bool = True,
    keep_memory: bool = True,
    prefetch: bool | None = None,
    overlap: bool | None = None,
    **options: Any,
) -> Any:
    """Compile a train step, a program or a function of tensors as one graph (``fullgraph=True``).

    * ``compile(step)`` for a `train_step`: forward, backward, collectives and optimizer in one graph. With `donate` the state that goes
      in is overwritten in place and comes back as a new state; the old one is emptied, and using it raises. With `keep_memory` a step on a
      CPU has the C library keep freed memory for the next one, in the whole process (glibc; see `fds.memory`).
    * ``compile(program)``, or ``compile()`` last in a chain: the program with its call compiled.

    With several ranks, `prefetch` begins the gather of a site while the one before it computes (for the memory of one site more), and `overlap`
    lets a reduction run behind the computing of the next site (`fds/sharding/schedule.py`). Default: both, where Inductor takes options: its
    `mode` is not given, nor a ``post_grad_custom_post_pass`` of your own. No bit of a value depends on them.

    `options` go to `torch.compile`. Works inside the user's own ``torch.compile(fullgraph=True)`` too, where it steps aside.

    Law: values are those of the eager program, to the rounding of fused arithmetic.

    Raises `ValueError` for `prefetch` or `overlap` where Inductor cannot be told.
    """
    from fds.train import TrainStep  # the front of a cycle: a step compiles itself by this function

    shown, options = options, _scheduled(options, prefetch, overlap)
    if f is None or isinstance(f, Program):
        t: Transform = whole(
            lambda p: _compiled_program(p, options),
            name="compile",
            options=shown,
            provides=["whole"],
            conflicts=["whole"],
        )
        return t if f is None else t(f)
    if isinstance(f, TrainStep):
        return CompiledStep(f, donate, keep_memory, options)
    if not callable(f):
        raise ValueError(
            f"compile: got {type(f).__name__}, required a train step, a program or a function; or leave it out to get a transformation"
        )
    return _one_graph(traced(f), options)


def _one_graph(f: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    """Compile `f` whole. A step holds its backward, so Inductor takes it for inference and would move every operator to just before its first
    use: weight gradients to the end, which keeps all recomputed activations alive until then. It computes in the order of the trace instead.
    """
    if options.get("backend", "inductor") == "inductor" and options.get("mode") is None:
        options = {**options, "options": {"reorder_for_locality": False, **(options.get("options") or {})}}
    return torch.compile(f, fullgraph=True, **options)  # pyright: ignore[reportUnknownMemberType]


def _scheduled(options: dict[str, Any], prefetch: bool | None, overlap: bool | None) -> dict[str, Any]:
    """`options` with the pass that moves collectives, where there is somebody to talk to."""
    given: dict[str, Any] = options.get("options") or {}
    key = "post_grad_custom_post_pass"
    able = options.get("backend", "inductor") == "inductor" and options.get("mode") is None and key not in given
    if not able and (prefetch or overlap):
        raise ValueError(
            f"compile: prefetch={prefetch}, overlap={overlap} are a pass of Inductor's, as options={{{key!r}: ...}}; leave out backend=, mode= and a pass of your own, or them"
        )
    on = {"prefetch": able and prefetch is not False, "overlap": able and overlap is not False}
    if not any(on.values()) or not dist.is_initialized() or dist.get_world_size() == 1:
        return options
    from fds.sharding.schedule import scheduler  # where ranks are, this is imported

    return {**options, "options": {key: scheduler(**on), **given}}


def _compiled_program(program: Program, options: dict[str, Any]) -> Program:
    import attrs

    return attrs.evolve(program, apply=_one_graph(traced(program.apply), options))


class CompiledStep:
    """A train step as one graph. Called like the step itself; `init` and the other attributes are the step's."""

    def __init__(self, step: Any, donate: bool, keep_memory: bool, options: dict[str, Any]) -> None:
        self.step, self.donate = step, donate
        away = any(p.handles for p in step.program.sites.values())  # then memory is what is short, not time
        if keep_memory and not away and not torch.cuda.is_available():
            keep_freed()

        def body(leaves: list[Tensor], batch: Any) -> Any:
            return ([], step.over(leaves, batch)) if donate else step.region(leaves, batch)

        self._compiled = _one_graph(body, options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.step, name)

    def __call__(self, state: Any, batch: dict[str, Tensor]) -> tuple[Any, dict[str, Any]]:
        if torch.compiler.is_compiling():
            return self.step(state, batch)
        leaves: list[Tensor] = self.step.check(state, batch)
        new, metrics = self._compiled(leaves, batch)
        if self.donate:
            new = [t.detach() for t in leaves]
        state = self.step.report(
            tree.rebuild(self.step.spec, iter(new)), metrics
        )  # may raise: the old state still lives
        for t in leaves if self.donate else []:
            t.set_()  # pyright: ignore[reportCallIssue]  # empties this handle; the storage lives on in the new state
        return state
