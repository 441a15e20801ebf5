"""The private and the untyped names of torch that fds uses, in one place, and the operator recipe that stands on them.

A torch without one of the imported names fails here, by name. Run on torch 2.13.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache, partial, wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

try:
    from torch._C import _AutoDispatchBelowAutograd
    from torch._C._functorch import TransformType, peek_interpreter_stack
    from torch._functorch.utils import enable_single_level_autograd_function
    from torch._subclasses.functional_tensor import FunctionalTensorMode
    from torch.autograd import forward_ad
    from torch.autograd.forward_ad import _set_fwd_grad_enabled
    from torch.autograd.function import _SingleLevelFunction
except ImportError as error:
    raise ImportError(
        f"fds needs a private name that torch {torch.__version__} lacks ({error}); fds is tested on torch 2.13"
    ) from error

_LIBRARY = torch.library.Library("fds", "FRAGMENT")
_OPERATORS: dict[str, Callable[..., Any]] = {}


def inside_functorch() -> bool:
    """Whether a `torch.func` transformation is running."""
    return peek_interpreter_stack() is not None


def nonstrict_trace(f: Callable[..., Any]) -> Callable[..., Any]:
    """`f` as one call to Dynamo, which AOTAutograd traces through. Dynamo is imported by this call, not with fds: it takes seconds."""
    return torch._dynamo.nonstrict_trace(f if hasattr(torch.compiler, "_compile_session_context") else _compiling(f))


def _compiling(f: Callable[..., Any]) -> Callable[..., Any]:
    """`f` where `torch.compiler.is_compiling` says so to whom it calls. torch 2.13 does so by itself; in 2.11 only what Dynamo reads is told."""
    from torch._export.utils import _compiling_state_context

    @wraps(f)
    def run(*args: Any, **kwargs: Any) -> Any:
        with _compiling_state_context():
            return f(*args, **kwargs)

    return run


def inductor(graph: Any, examples: list[Any]) -> Callable[..., Any]:
    """A graph of Dynamo's compiled by torch's default backend."""
    return torch._dynamo.lookup_backend("inductor")(graph, examples)


def each_norm(tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """The L2 norm of each tensor, in float32, by one kernel for many of them on CUDA."""
    return torch._foreach_norm(tensors, dtype=torch.float32)


def matrix_norm(x: Tensor) -> Tensor:
    """The Frobenius norm of each matrix: [..., m, n] -> [..., 1, 1]."""
    return torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)


def fused_adam(params: list[Tensor], grads: list[Tensor], mu: list[Tensor], nu: list[Tensor], count: Tensor, ok: Tensor, *, decoupled: bool, **hyper: float) -> None:  # fmt: skip
    """Adam (with decoupled decay AdamW) over the given contiguous tensors by torch's one kernel, unless `ok` (0-D bool) is False; `count` from 1."""
    counts = [count.float()] * len(params)
    flags = {"amsgrad": False, "maximize": False, "grad_scale": None, "found_inf": (~ok).float()}
    fused = torch._fused_adamw_ if decoupled else torch._fused_adam_
    fused(params, grads, mu, nu, [], counts, **hyper, **flags)


def fused_sgd(params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], ok: Tensor, *, nesterov: bool, **hyper: float) -> None:  # fmt: skip
    """SGD over the given contiguous tensors by torch's one kernel, unless `ok` (0-D bool) is False; no buffers without momentum."""
    flags = {
        "dampening": 0.0,
        "maximize": False,
        "is_first_step": False,
        "grad_scale": None,
        "found_inf": (~ok).float(),
    }
    torch._fused_sgd_(params, grads, buffers, nesterov=nesterov, **hyper, **flags)


def named_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``module.named_modules()``, typed."""
    return module.named_modules()


def registries(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Where a module itself keeps its parameters and its buffers."""
    return module._parameters, module._buffers


def writes_statistics(module: nn.Module) -> bool:
    """Whether a forward writes the module's running statistics, by an operator that does not count it as a change."""
    norm = nn.modules.batchnorm._NormBase
    return isinstance(module, norm) and module.training and module.track_running_stats


def relist_weights(rnn: nn.RNNBase) -> None:
    """Point a recurrent layer's second list of its weights at what is in its registry now."""
    rnn._flat_weights = [registries(rnn)[0][n] for n in rnn._flat_weights_names]


def transient_buffers(module: nn.Module) -> set[str]:
    """The names of a module's own buffers that its state dict leaves out."""
    return module._non_persistent_buffers_set


def operator(
    name: str,
    schema: str,
    *,
    primitive: Callable[..., Any],
    fake: Callable[..., Any],
    batch: Callable[..., Any],
    save: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
    backward: Callable[..., Any] | None = None,
    jvp: Callable[..., Any] | None = None,
    composite: Callable[..., Any] | None = None,
    inline: bool = False,
) -> Any:
    """Define operator ``fds::name``, that works under every transformation of torch.

    * `primitive(*args)` runs on real tensors, `fake(*args)` gives shapes and dtypes, ``batch(info, dims, *args)`` is the vmap rule.
    * ``save(ctx, args, out)`` and ``backward(ctx, *cotangents)`` are its derivative; without them it has none.
    * ``jvp(ctx, *tangents)`` is a closed form in forward mode: it cannot call a transformation, since the level that it runs in is busy. In
      its place ``composite(*args)`` takes the operator's place there, made of operators that torch can differentiate.
    * `inline`: a compiler sees what `primitive` does, and fuses it; else it is one opaque call.

    It holds under eager autograd, `torch.func` in any nesting, `make_fx`, and `torch.compile` (strict and non-strict): the rule sits on the
    Autograd key as a single-level Function, which each functorch level and AOTAutograd dispatch to in turn. A plain `autograd.Function` is
    dropped silently by a strict compile of `torch.func.grad` in torch 2.13.
    """
    _LIBRARY.define(f"{name}{schema}")
    op = getattr(torch.ops.fds, name).default
    _LIBRARY.impl(name, primitive, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fds::{name}", fake, lib=_LIBRARY)
    torch.library.register_vmap(f"fds::{name}", batch, lib=_LIBRARY)
    if inline:

        def inlined(mode: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            with mode:
                return primitive(*args, **(kwargs or {}))

        torch.library.register_torch_dispatch(f"fds::{name}", FunctionalTensorMode, inlined, lib=_LIBRARY)
    if save is not None:
        _on_autograd(name, op, save, backward, jvp, composite)
    return op


def _nothing(*args: Any) -> None:
    """The shape of no result."""


def opaque_operator(name: str, schema: str, primitive: Callable[..., Any], fake: Callable[..., Any] = _nothing) -> Any:
    """Define operator ``fds::name`` without derivative or vmap rule, that a compiler calls as it is. Default `fake`: it returns nothing."""
    _LIBRARY.define(f"{name}{schema}")
    _LIBRARY.impl(name, primitive, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fds::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.fds, name).default


def _with_tangents() -> bool:
    """Whether this call runs in forward mode, by `torch.func.jvp` or by dual numbers."""
    level = peek_interpreter_stack()
    return forward_ad._current_level >= 0 if level is None else level.key() == TransformType.Jvp


def _on_autograd(name: str, op: Any, save: Any, backward: Any, jvp: Any, composite: Any) -> None:
    class Rule(_SingleLevelFunction):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            # Without these two switches the gradients of nested transformations are zero.
            with torch.enable_grad(), _set_fwd_grad_enabled(True), _AutoDispatchBelowAutograd():
                out = op(*args)
            save(ctx, args, out)
            return out

    Rule.backward = staticmethod(backward)
    if jvp is not None:
        Rule.jvp = staticmethod(jvp)

    def rule(*args: Any) -> Any:
        if composite is not None and _with_tangents():
            return composite(*args)
        with enable_single_level_autograd_function():
            return Rule.apply(*args)  # pyright: ignore[reportAttributeAccessIssue]

    _LIBRARY.impl(name, rule, "Autograd")


def linear_operator(name: str, schema: str, *, primitive: Callable[..., Tensor], fake: Callable[..., Tensor], transpose: Callable[..., Tensor], batch: Callable[..., Tensor]) -> Callable[..., Tensor]:  # fmt: skip
    """Define operator ``fds::name`` of one tensor, linear in it, by `operator`.

    Its derivative is itself, its transpose is `transpose(cotangent, *constants)`, so that nothing is saved. `batch(x, *constants)` handles
    a leading batch dimension. `schema` names the constants after ``Tensor x``.
    """
    if name in _OPERATORS:
        return _OPERATORS[name]

    def save(ctx: Any, args: tuple[Any, ...], out: Tensor) -> None:
        ctx.constants = args[1:]

    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        return (transpose(g, *ctx.constants), *[None] * len(ctx.constants))

    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        return _OPERATORS[name](tangent, *ctx.constants)

    def on_vmap(info: Any, dims: tuple[int | None, ...], x: Tensor, *constants: Any) -> tuple[Tensor, int]:
        return batch(x.movedim(dims[0] or 0, 0), *constants), 0

    schema = f"({schema}) -> Tensor"
    op = operator(name, schema, primitive=primitive, fake=fake, batch=on_vmap, save=save, backward=backward, jvp=jvp)
    _OPERATORS[name] = op
    return op


# --- process groups ---


def default_store() -> Any:
    """The store by which the ranks of the running default process group met; None under MPI."""
    return dist.distributed_c10d._get_default_store()


def set_timeout(timeout: timedelta, group: Any = None) -> None:
    """Set the timeout of a group's operations; default: the group of all ranks."""
    dist.distributed_c10d._set_pg_timeout(timeout, group)


def get_timeout() -> timedelta | None:
    """The timeout of the group of all ranks; None where the back end has none."""
    group = dist.group.WORLD
    options = getattr(group._get_backend(group._device_types[0]), "options", None) if group is not None else None
    return getattr(options, "_timeout", None)


# --- what a graph costs (`fds.deepspeed.flops`) ---


def product_formulas() -> dict[Any, Callable[..., int]]:
    """torch's own formulas: operator -> floating-point operations of ``(*args, out_val=out)``."""
    from torch.utils.flop_counter import flop_registry

    return flop_registry


def decomposition(op: Any) -> Callable[..., Any] | None:
    """The same operator made of others, where torch has such a form."""
    from torch._decomp import decomposition_table

    return decomposition_table.get(op)


def composite_kernel(op: Any) -> Callable[..., Any]:
    """What an operator of `operator` computes, as a function of tensors of any device, those without memory included."""
    return lambda *args, **kwargs: op._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)


@cache
def is_composite(op: Any) -> bool:
    """Whether an operator is made of others by definition, and has no kernel of its own on any device."""
    if not isinstance(op, torch._ops.OpOverload) or not any("Tensor" in str(r.type) for r in op._schema.returns):
        return False  # a question about a tensor's shape or device: not all of these are in the dispatcher
    has = partial(torch._C._dispatch_has_kernel_for_dispatch_key, op.name())
    return (
        op.namespace != "prim"
        and has("CompositeImplicitAutograd")
        and not any(has(k) for k in ("CPU", "CUDA", "CompositeExplicitAutograd"))
    )


def autograd_node() -> int | None:
    """The number of the node whose backward is running; None outside of a backward pass."""
    node = torch._C._current_autograd_node()
    return None if node is None else node._sequence_nr()


def last_node() -> int:
    """The number of the node that forward made last."""
    return torch.autograd._get_sequence_nr() - 1


def without_modes() -> Any:
    """A context without the dispatch modes that are running."""
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


@contextmanager
def abstracting() -> Iterator[Callable[[Tensor], Tensor]]:
    """A context in which tensors have no values, with the function that makes such a one of a tensor; a parameter stays one."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        yield mode.from_tensor


def reads_values() -> tuple[type[Exception], ...]:
    """The errors of a function that asks an abstract tensor for its values, or for a shape that depends on them."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

    return DataDependentOutputException, DynamicOutputShapeException
