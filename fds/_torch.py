"""The private and the untyped names of torch that fds uses, in one place, and the operator recipe that stands on them.

A torch without one of the imported names fails here, by name. Run on torch 2.13.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

try:
    from torch._C import _AutoDispatchBelowAutograd
    from torch._C._functorch import peek_interpreter_stack
    from torch._functorch.utils import enable_single_level_autograd_function
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
    return torch._dynamo.nonstrict_trace(f)


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


def linear_operator(name: str, schema: str, *, primitive: Callable[..., Tensor], fake: Callable[..., Tensor], transpose: Callable[..., Tensor], batch: Callable[..., Tensor]) -> Callable[..., Tensor]:  # fmt: skip
    """Define operator ``fds::name`` of one tensor, linear in it, that works under every transformation of torch.

    Its derivative is itself, its transpose is `transpose(cotangent, *constants)`, so that nothing is saved. `primitive` runs on real
    tensors, `fake` gives the shape, `batch(x, *constants)` handles a leading batch dimension. `schema` names the constants after ``Tensor x``.

    It holds under eager autograd, `torch.func` in any nesting, `make_fx`, and `torch.compile` (strict and non-strict): the rule sits on the
    Autograd key as a single-level Function, which each functorch level and AOTAutograd dispatch to in turn. A plain `autograd.Function` is
    dropped silently by a strict compile of `torch.func.grad` in torch 2.13.
    """
    if name in _OPERATORS:
        return _OPERATORS[name]
    _LIBRARY.define(f"{name}({schema}) -> Tensor")
    op = getattr(torch.ops.fds, name).default
    _LIBRARY.impl(name, primitive, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fds::{name}", fake, lib=_LIBRARY)

    class Rule(_SingleLevelFunction):
        @staticmethod
        def forward(ctx: Any, x: Tensor, *constants: Any) -> Tensor:
            # Without these two switches the gradients of nested transformations are zero.
            with torch.enable_grad(), _set_fwd_grad_enabled(True), _AutoDispatchBelowAutograd():
                out = op(x, *constants)
            ctx.constants = constants
            return out

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
            return (transpose(g, *ctx.constants), *[None] * len(ctx.constants))

        @staticmethod
        def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return op(tangent, *ctx.constants)

    def on_autograd(x: Tensor, *constants: Any) -> Tensor:
        with enable_single_level_autograd_function():
            return Rule.apply(x, *constants)  # pyright: ignore[reportAttributeAccessIssue]

    def on_vmap(info: Any, dims: tuple[int | None, ...], x: Tensor, *constants: Any) -> tuple[Tensor, int]:
        return batch(x.movedim(dims[0] or 0, 0), *constants), 0

    _LIBRARY.impl(name, on_autograd, "Autograd")
    torch.library.register_vmap(f"fds::{name}", on_vmap, lib=_LIBRARY)
    _OPERATORS[name] = op
    return op
