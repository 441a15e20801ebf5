"""Recompute in backward: `checkpoint`.

An `autograd.Function` with `setup_context` saves the inputs of a call; its backward differentiates the call again, by `torch.func` inside a
`torch.func` transformation and by `torch.autograd` otherwise (third-party Functions without `setup_context` work only there). Nothing hangs
on saved-tensor hooks, which `torch.func` refuses.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import attrs
import torch
import torch.utils._pytree as pytree  # model outputs (transformers) are registered with torch's pytree
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from fds import tree
from fds._torch import inside_functorch
from fds.frame import FRAME, Apply, scoped
from fds.program import Transform, around

Policy = str | Callable[[Any], bool] | None

_MATMULS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention")  # fmt: skip


def checkpoint(policy: Policy = None) -> Transform:
    """Keep only the inputs of every site in forward, and compute the site again in backward.

    Outside of `shard` (later in the chain) it drops the gathered weights as well and gathers them again; inside of it, it keeps them.

    Args:
        policy: what a site keeps besides its inputs: None (nothing), ``"matmul"`` (the results of matrix products and attention), or a
            predicate on operators (``torch.ops.aten.mm.default`` ...) that says which results to keep.

    Law: values and gradients are those of the program without it, bitwise in eager.
    """
    keep = _predicate(policy)
    return around(lambda apply: _recomputed(apply, keep), name="checkpoint", options={} if policy is None else {"policy": policy}, provides=["checkpoint"], conflicts=["checkpoint", "whole"])


def _predicate(policy: Policy) -> Callable[[Any], bool] | None:
    if policy is None or callable(policy):
        return policy
    if policy != "matmul":
        raise ValueError(f"checkpoint: policy {policy!r} is unknown; {tree.suggest(policy, ['matmul'])}, or None, or a predicate on operators")
    return lambda op: getattr(getattr(op, "overloadpacket", op), "__name__", "") in _MATMULS


def _recomputed(apply: Apply, keep: Callable[[Any], bool] | None) -> Apply:
    def run(*args: Any, **kwargs: Any) -> Any:
        flat, spec = pytree.tree_flatten((args, kwargs))
        where = [i for i, x in enumerate(flat) if isinstance(x, Tensor)]
        if not inside_functorch() and not (torch.is_grad_enabled() and any(flat[i].requires_grad for i in where)):
            return apply(*args, **kwargs)
        call = _Call(apply, flat, spec, where, keep, inside_functorch())
        results = iter(_function(call).apply(*[flat[i] for i in where]))
        return pytree.tree_unflatten([next(results) if isinstance(o, Tensor) else o for o in call.outputs], call.out_spec)

    return run


@attrs.define(eq=False)
class _Call:
    """One call of a site: its inputs apart from tensors, and what is needed to run it again."""

    apply: Apply
    flat: list[Any]
    spec: Any
    where: list[int]
    keep: Callable[[Any], bool] | None
    functorch: bool
    frame: Any = attrs.field(factory=lambda: attrs.evolve(FRAME.get(), recomputed=True))
    outputs: list[Any] = attrs.field(factory=list)
    out_spec: Any = None
    contexts: tuple[AbstractContextManager[Any], AbstractContextManager[Any]] | None = None

    def __attrs_post_init__(self) -> None:
        self.flat = [None if isinstance(x, Tensor) else x for x in self.flat]

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        full = list(self.flat)
        for i, t in zip(self.where, tensors, strict=True):
            full[i] = t
        args, kwargs = pytree.tree_unflatten(full, self.spec)
        with scoped(self.frame):
            out, self.out_spec = pytree.tree_flatten(self.apply(*args, **kwargs))
        self.outputs = out
        return tuple(o for o in out if isinstance(o, Tensor))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        if self.keep is None:
            return self(*tensors)
        keep = self.keep
        self.contexts = create_selective_checkpoint_contexts(lambda ctx, op, *args, **kwargs: CheckpointPolicy.MUST_SAVE if keep(op) else CheckpointPolicy.PREFER_RECOMPUTE)
        with self.contexts[0]:
            return self(*tensors)

    def again(self, saved: list[Tensor], places: list[int], leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The same call with `leaves` in the given places of the saved inputs."""
        full = list(saved)
        for i, t in zip(places, leaves, strict=True):
            full[i] = t
        with self.contexts[1] if self.contexts else nullcontext():
            return self(*full)


def _function(call: _Call) -> type[torch.autograd.Function]:
    class Recompute(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
            return call.forward(*tensors)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)
            ctx.mark_non_differentiable(*[o for o in output if not o.is_floating_point()])

        @staticmethod
        def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
            saved = list(ctx.saved_tensors)
            places = [i for i, t in enumerate(saved) if t.is_floating_point() and (call.functorch or ctx.needs_input_grad[i])]
            pull = _pull_functorch if call.functorch else _pull_autograd
            out: list[Tensor | None] = [None] * len(saved)
            for i, g in zip(places, pull(call, saved, places, cotangents), strict=True):
                out[i] = g
            return tuple(out)

        @staticmethod
        def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
            saved = list(ctx.saved_tensors)
            places = [i for i, t in enumerate(tangents) if t is not None]
            primals = tuple(saved[i] for i in places)
            _, out = torch.func.jvp(lambda *leaves: call.again(saved, places, leaves), primals, tuple(tangents[i] for i in places))
            return out

    return Recompute


def _pull_functorch(call: _Call, saved: list[Tensor], places: list[int], cotangents: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    outputs, vjp = torch.func.vjp(lambda *leaves: call.again(saved, places, leaves), *[saved[i] for i in places])
    return vjp(tuple(torch.zeros_like(o) if c is None or not o.is_floating_point() else c for o, c in zip(outputs, cotangents, strict=True)))


def _pull_autograd(call: _Call, saved: list[Tensor], places: list[int], cotangents: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    with torch.enable_grad():
        leaves = tuple(saved[i].detach().requires_grad_() for i in places)
        outputs = call.again(saved, places, leaves)
        pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad and c is not None]
        if not pairs:
            return (None,) * len(leaves)
        return torch.autograd.grad([o for o, _ in pairs], leaves, [c for _, c in pairs], allow_unused=True)
