"""Differentiation of pure functions of stored parameters: `value_and_grad`."""

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fds import tree
from fds.compiling import traced
from fds.frame import scoped
from fds.program import Program

NO_HOOKS = "the module checkpoints inside itself (saved-tensor hooks), which recomputes with the wrong weights in a pure function; turn that off and use fds.checkpoint()"


def value_and_grad(
    f: Callable[..., Any], *, has_aux: bool = False, wrt: Program | None = None
) -> Callable[..., tuple[Any, Any]]:
    """``value_and_grad(f)(stored, *args, **kwargs) -> (value, grads)`` for a scalar function `f` of stored parameters.

    Pure outside; inside, `torch.autograd.grad` on detached leaves, which works for every module, in eager and under the user's own
    ``torch.compile(fullgraph=True)``. `grads` has the structure of `stored`; leaves that take no gradient (integers, and the frozen leaves of `wrt`
    or of `f` itself if it is a program) hold zeros that take no memory.

    Args:
        f: returns a 0-D tensor, or ``(scalar, aux)`` with `has_aux`; then the value is ``(scalar, aux)`` too.
        wrt: the program whose trainable leaves to differentiate by. Default: `f` if it is a program, else every floating leaf.

    >>> import torch
    >>> value, grads = value_and_grad(lambda p: (p["w"] ** 2).sum())({"w": torch.tensor([1.0, 2.0])})
    >>> value, grads["w"]
    (tensor(5.), tensor([2., 4.]))
    """
    program = f if isinstance(f, Program) and wrt is None else wrt

    def run(stored: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        flat, spec = pytree.tree_flatten(stored)
        wanted = _wanted(flat, None if program is None else tree.flat(_in_order(program.spec, stored)))
        leaves = [t.detach().requires_grad_() if w else t for t, w in zip(flat, wanted, strict=True)]
        # Nobody but the caller of `f` reduces these gradients: a caller further out has deferred its own (`Frame.deferred`).
        with scoped(deferred=()), torch.enable_grad(), torch.autograd.graph.disable_saved_tensors_hooks(NO_HOOKS):
            out = f(pytree.tree_unflatten(leaves, spec), *args, **kwargs)
            value = out[0] if has_aux else out
            _check_scalar(value)
            diff = [t for t, w in zip(leaves, wanted, strict=True) if w]
            # A value that depends on no leaf has zero gradients, not an error.
            found = iter(
                torch.autograd.grad(value, diff, allow_unused=True, materialize_grads=True)
                if value.requires_grad
                else [torch.zeros_like(t) for t in diff]
            )
        grads = [
            next(found) if w else torch.zeros((), dtype=t.dtype, device=t.device).expand(t.shape)
            for t, w in zip(flat, wanted, strict=True)
        ]
        return pytree.tree_map(tree.detached, out), pytree.tree_unflatten(grads, spec)

    return traced(run)


def _wanted(flat: list[Tensor], spec: list[Tensor] | None) -> list[bool]:
    return [t.is_floating_point() for t in flat] if spec is None else [s.requires_grad for s in spec]


def _in_order(spec: Any, stored: Any) -> Any:
    """`spec` with its keys in the order of `stored`: leaves go by their names."""
    if isinstance(spec, Tensor):
        return spec
    if not tree.is_mapping(stored) or stored.keys() != spec.keys():
        raise ValueError(
            f"value_and_grad: stored has {len(tree.leaves(stored))} leaves, the program {len(tree.leaves(spec))}; was it made for another program?"
        )
    return {k: _in_order(spec[k], v) for k, v in stored.items()}


def _check_scalar(value: Any) -> None:
    if not isinstance(value, Tensor) or value.dim() or not value.is_floating_point():
        got = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"value_and_grad: f returned {got}, required a 0-D floating tensor (reduce it, as with .mean()); for (scalar, aux) pass has_aux=True"
        )
