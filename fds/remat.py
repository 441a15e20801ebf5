"""Recompute in backward: `checkpoint`.

An `autograd.Function` with `setup_context` saves the inputs of a call; its backward differentiates the call again, by `torch.func` inside a
`torch.func` transformation and by `torch.autograd` otherwise (third-party Functions without `setup_context` work only there). Nothing hangs
on saved-tensor hooks, which `torch.func` refuses.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ClassVar

import attrs
import torch
import torch.utils._pytree as pytree  # model outputs (transformers) are registered with torch's pytree
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fds import tree
from fds._torch import inside_functorch
from fds.frame import FRAME, Apply, Draws, Frame, scoped
from fds.offload.stash import BRING_BACK, PUT_AWAY, Stash
from fds.transform import Transform, around, direct

Policy = str | Callable[[Any], bool] | None

_MATMULS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention")  # fmt: skip


@direct
def checkpoint(policy: Policy = None, *, store: Any = None, window: int = 1, min_bytes: int = 2**16) -> Transform:
    """Keep only the inputs of every site in forward, and compute the site again in backward.

    Outside of `shard` (later in the chain) it drops the gathered weights as well and gathers them again; inside of it, it keeps them.

    Args:
        policy: what a site keeps besides its inputs: None (nothing), ``"matmul"`` (the results of matrix products and attention), or a
            predicate on operators (``torch.ops.aten.mm.default`` ...) that says which results to keep.
        store: a `FileStore` or `HostStore`: inputs of `min_bytes` and more that take gradients (a block's hidden states, not its parameters) are
            kept there, and read `window` sites ahead in backward. Not under `torch.func` transformations, where nothing tells inputs that
            take gradients from others.

    Law: values and gradients are those of the program without it, bitwise in eager.
    """
    keep = _predicate(policy)
    stash = None if store is None else Stash(store, window)
    options = {} if policy is None else {"policy": policy}
    return around(
        lambda apply: recomputed(apply, keep, stash, min_bytes),
        name="checkpoint",
        options=options | ({} if store is None else {"store": store, "window": window, "min_bytes": min_bytes}),
        provides=["checkpoint"],
        conflicts=["checkpoint", "whole"],
    )


def _predicate(policy: Policy) -> Callable[[Any], bool] | None:
    if policy is None or callable(policy):
        return policy
    if policy != "matmul":
        raise ValueError(
            f"checkpoint: policy {policy!r} is unknown; {tree.suggest(policy, ['matmul'])}, or None, or a predicate on operators"
        )
    return lambda op: getattr(getattr(op, "overloadpacket", op), "__name__", "") in _MATMULS


def recomputed(apply: Apply, keep: Callable[[Any], bool] | None = None, stash: Stash | None = None, min_bytes: int = 0) -> Apply:  # fmt: skip
    """The call of a site that keeps its tensor arguments only, the first of which holds its leaves. It may close over nothing that takes a gradient."""

    def run(*args: Any, **kwargs: Any) -> Any:
        flat, spec = pytree.tree_flatten((args, kwargs))
        parameters = len(pytree.tree_leaves(args[:1]))
        where = [i for i, x in enumerate(flat) if isinstance(x, Tensor)]
        if not inside_functorch() and not (torch.is_grad_enabled() and any(flat[i].requires_grad for i in where)):
            return apply(*args, **kwargs)
        if stash is not None and inside_functorch():
            raise ValueError(
                "checkpoint: store= under a torch.func transformation; use fds.value_and_grad, or leave the store out"
            )
        away = (
            [i >= parameters and flat[i].requires_grad and flat[i].nbytes >= min_bytes for i in where] if stash else []
        )
        call = _Call(apply, flat, spec, where, keep, inside_functorch(), stash=stash, away=away)
        results = iter(_Recompute.apply(call, *[flat[i] for i in where]))
        return pytree.tree_unflatten([next(results) if o is _TENSOR else o for o in call.outputs], call.out_spec)

    return run


_TENSOR = object()


@attrs.define(eq=False)
class _Call:
    """One call of a site: its inputs apart from tensors, and what is needed to run it again."""

    apply: Apply
    flat: list[Any]
    spec: Any
    where: list[int]
    keep: Callable[[Any], bool] | None
    functorch: bool
    # Without what a call of the program collects in its frame: results of this very call, which would hold themselves for good.
    frame: Frame = attrs.field(factory=lambda: attrs.evolve(FRAME.get(), recomputed=True, heads=None))
    drawn: Draws = attrs.field(
        factory=lambda: attrs.evolve(FRAME.get().draws)
    )  # before the call: every run of it begins there
    outputs: list[Any] = attrs.field(factory=list[Any])
    out_spec: Any = None
    stash: Stash | None = None
    away: list[bool] = attrs.field(factory=list[bool])  # which tensors go to the stash
    kept: list[Any] = attrs.field(factory=list[Any])  # results that the policy keeps, in the order of their operators

    def __attrs_post_init__(self) -> None:
        self.flat = [None if isinstance(x, Tensor) else x for x in self.flat]

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        full = list(self.flat)
        for i, t in zip(self.where, tensors, strict=True):
            full[i] = t
        args, kwargs = pytree.tree_unflatten(full, self.spec)
        with scoped(self.frame, draws=attrs.evolve(self.drawn)) as frame:
            out, self.out_spec = pytree.tree_flatten(self.apply(*args, **kwargs))
        self.frame.draws.count, self.frame.draws.part = (
            frame.draws.count,
            frame.draws.part,
        )  # what comes after it in the site goes on from here
        self.outputs = [_TENSOR if isinstance(o, Tensor) else o for o in out]  # tensors here would outlive the call
        return tuple(o for o in out if isinstance(o, Tensor))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        self.kept = []
        before = {s: dict(updates) for s, updates in self.frame.pending.items()}
        with _Keep(self.keep, self.kept) if self.keep else nullcontext():
            out = self(*tensors)
        self.frame = attrs.evolve(self.frame, pending=before, updates=None)
        # An input that comes out as it is (T5 hands its position bias on) has to be another tensor for autograd.
        return tuple(o.view_as(o) if any(o is t for t in tensors) else o for o in out)

    def again(self, saved: list[Tensor], places: list[int], leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The same call with `leaves` in the given places of the saved inputs."""
        full = list(saved)
        for i, t in zip(places, leaves, strict=True):
            full[i] = t
        with _Replay(self.keep, self.kept) if self.keep else nullcontext():
            return self(*full)


class _Keep(TorchDispatchMode):
    """Runs operators and remembers the results of those that the policy keeps.

    torch's own selective-checkpoint contexts put tags on graph nodes that AOTAutograd cannot order in a whole-step graph (torch 2.13).
    """

    def __init__(self, keep: Callable[[Any], bool], kept: list[Any]) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.keep, self.kept = keep, kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.keep(func):
            self.kept.append((func, out, _versions(out)))
        return out


class _Replay(_Keep):
    """Runs operators again, except those whose results were kept; the same call draws the same operators in the same order."""

    def __init__(self, keep: Callable[[Any], bool], kept: list[Any]) -> None:
        super().__init__(keep, kept)
        self.left = iter(kept)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.keep(func):
            return func(*args, **(kwargs or {}))
        op, out, versions = next(self.left, (None, None, None))
        if op is not func:
            raise ValueError(
                f"checkpoint: recompute ran {func} where forward ran {op}, so what the policy kept does not fit (attention takes another kernel when its mask needs a gradient); use checkpoint() without a policy"
            )
        if _versions(out) != versions:  # the module wrote into it (``scores += bias``), and will do so again
            return func(*args, **(kwargs or {}))
        return pytree.tree_map(tree.detached, out)


def _versions(out: Any) -> list[int]:
    return [x._version for x in pytree.tree_leaves(out) if isinstance(x, Tensor)]


class _Recompute(torch.autograd.Function):
    generate_vmap_rule = True
    apply: ClassVar[Callable[..., tuple[Tensor, ...]]]  # torch's own has no type

    @staticmethod
    def forward(call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        return call.forward(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call = ctx.call = inputs[0]
        tensors = list(inputs[1:])
        if call.stash is not None:
            ctx.shapes = [(t.shape, t.dtype, t.device) for t in tensors]
            for i, away in enumerate(call.away):
                tensors[i] = PUT_AWAY(tensors[i].detach(), call.stash.number) if away else tensors[i]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.mark_non_differentiable(*[o for o in output if not o.is_floating_point()])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        call, saved = ctx.call, list(ctx.saved_tensors)
        for i, away in enumerate(call.away):
            saved[i] = BRING_BACK(saved[i], *ctx.shapes[i], call.stash.number) if away else saved[i]
        needs = ctx.needs_input_grad[1:]
        places = [i for i, t in enumerate(saved) if t.is_floating_point() and (call.functorch or needs[i])]
        pull = _pull_functorch if call.functorch else _pull_autograd
        out: list[Tensor | None] = [None] * len(saved)
        for i, g in zip(places, pull(call, saved, places, cotangents), strict=True):
            out[i] = g
        return None, *out

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:  # the first is that of `call`
        call, saved = ctx.call, list(ctx.saved_tensors)
        tangents = tangents[1:]
        places = [i for i, t in enumerate(tangents) if t is not None]
        primals = tuple(saved[i] for i in places)
        return torch.func.jvp(lambda *x: call.again(saved, places, x), primals, tuple(tangents[i] for i in places))[1]


def _pull_functorch(
    call: _Call, saved: list[Tensor], places: list[int], cotangents: tuple[Tensor | None, ...]
) -> tuple[Tensor, ...]:
    pulled = torch.func.vjp(lambda *x: call.again(saved, places, x), *[saved[i] for i in places])
    outputs, vjp = pulled[0], pulled[1]
    return vjp(
        tuple(
            torch.zeros_like(o) if c is None or not o.is_floating_point() else c
            for o, c in zip(outputs, cotangents, strict=True)
        )
    )


def _pull_autograd(
    call: _Call, saved: list[Tensor], places: list[int], cotangents: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise ValueError(
            "checkpoint: create_graph=True would lose the second derivative of recomputed sites; use torch.func.grad of torch.func.grad (or jvp of grad), or a program without checkpoint()"
        )
    with torch.enable_grad():
        leaves = tuple(saved[i].detach().requires_grad_() for i in places)
        outputs = call.again(saved, places, leaves)
        pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad and c is not None]
        if not pairs:
            return (None,) * len(leaves)
        return torch.autograd.grad([o for o, _ in pairs], leaves, [c for _, c in pairs], allow_unused=True)
