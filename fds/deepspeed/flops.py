"""What an operator of a graph costs: multiply-adds and floating-point operations, from shapes alone.

The convention, for every operator that a program is made of:

* Products (matrices, convolutions, attention): MACs by torch's own formulas (`torch.utils.flop_counter`) and those below; two operations a MAC.
* An elementwise operator: one operation for each element of its result, whatever the function.
* A reduction: one for each element that it reads; a sum into chosen elements (scatter): one for each that is added.
* Fused ones (softmax, normalisations, losses, dropout; fds's kernels): what torch's decomposition, or the kernel's own aten form, is made of.
* Copies, views, indexing, casts, comparisons, random numbers, communication: none.
"""

from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fds._torch import composite_kernel, decomposition, is_composite, product_formulas, without_modes


@attrs.frozen
class Cost:
    """Multiply-adds of products, and all floating-point operations, those two for each MAC included.

    >>> Cost(8, 16) + Cost(0, 4)
    Cost(macs=8, flops=20)
    """

    macs: int = 0
    flops: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.macs + other.macs, self.flops + other.flops)


# Operators on floating tensors that compute nothing.
_MOVES = frozenset([
    "clone", "copy", "copy_", "_to_copy", "fill", "fill_", "zero", "zero_", "zeros", "ones", "full", "empty", "rand", "randn", "normal_", "uniform_",
    "bernoulli", "bernoulli_", "exponential_", "random_", "arange", "linspace", "zeros_like", "ones_like", "full_like", "empty_like", "rand_like",
    "randn_like", "new_empty", "new_zeros", "new_ones", "new_full", "empty_strided", "new_empty_strided", "scalar_tensor", "cat", "stack", "index",
    "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "index_select", "index_copy", "index_copy_", "gather", "scatter", "scatter_",
    "select_scatter", "slice_scatter", "slice_backward", "select_backward", "embedding", "where", "masked_fill", "masked_fill_", "constant_pad_nd",
    "reflection_pad2d", "roll", "repeat", "flip", "tril", "triu", "sort", "topk", "unbind_copy", "_unsafe_view", "_reshape_alias", "lift_fresh",
    "lift_fresh_copy", "detach", "detach_", "resize_", "set_", "unfold_backward", "one_hot", "_local_scalar_dense", "item", "pixel_shuffle", "im2col",
    "col2im", "max_pool2d_with_indices", "max_pool2d_with_indices_backward", "upsample_nearest2d", "upsample_nearest2d_backward", "_assert_async",
    "split_with_sizes_copy", "_pin_memory", "is_pinned", "record_stream", "t_", "transpose_", "squeeze_", "unsqueeze_", "alias_copy", "as_strided_",
    "as_strided_scatter", "diagonal_scatter", "max_unpool2d", "nan_to_num",
])  # fmt: skip


def _attends(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Two products, queries [..., Q, D] by keys [..., K, D] and weights by values [..., K, E]; a mask spares none of them."""
    return query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _attends_backward(cotangent: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Five products: scores are computed again, then one for values and for weights (of E), one for queries and for keys (of D)."""
    return query.shape[:-1].numel() * key.shape[-2] * (3 * query.shape[-1] + 2 * value.shape[-1])


def _convolves(x: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool, *_: Any, out: Tensor, **__: Any) -> int:  # fmt: skip
    """Every element of the result (of what goes in, if transposed) by a filter over its group's channels, weight [., channels of a group, ...]."""
    return (x if transposed else out).numel() * weight.shape[1:].numel()


def _convolves_backward(cotangent: Tensor, x: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool, more: Any, groups: Any, needs: Any) -> int:  # fmt: skip
    """As much as forward for what goes in, and for the weight. (torch's own formula of the latter leaves groups out.)"""
    return (bool(needs[0]) + bool(needs[1])) * (x if transposed else cotangent).numel() * weight.shape[1:].numel()


_KINDS = ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention", "fused_attention_overrideable")  # fmt: skip
# Products for which torch's counter has no formula, or one that refuses grouped heads, or leaves groups out.
_PRODUCTS: dict[str, Callable[..., int]] = {
    "mv": lambda a, x: a.numel(),
    "addmv": lambda b, a, x, **_: a.numel(),
    "dot": lambda a, b: a.numel(),
    "vdot": lambda a, b: a.numel(),
    "addbmm": lambda x, a, b, **_: a.numel() * b.shape[-1],
    "addr": lambda x, a, b, **_: a.numel() * b.numel(),
    "_grouped_mm": lambda a, b, *_, **__: a.shape[-2] * a.shape[-1] * b.shape[-1],
    "convolution_backward": _convolves_backward,
    **{f"_scaled_dot_product_{kind}": _attends for kind in _KINDS},
    **{f"_scaled_dot_product_{kind}_backward": _attends_backward for kind in _KINDS},
}


def _added(name: str, args: Any) -> Tensor | None:
    """What is added into elements of another tensor."""
    name = name.rstrip("_")
    if name in ("scatter_add", "index_add"):
        return args[3]
    accumulates = name in ("index_put", "_unsafe_index_put", "_index_put_impl") and len(args) > 3 and args[3]
    return args[2] if accumulates else None


@attrs.define
class Counter:
    """Costs by operator and shapes: a layer that is repeated is looked at once."""

    known: dict[Any, Cost | None] = attrs.field(factory=dict[Any, Cost | None])

    def cost(self, func: Any, args: Any, kwargs: Any, out: Any) -> Cost | None:
        """The cost of a call, or None for an operator on floating tensors that there is no rule for."""
        key = (func, *(_look(x) for x in tree_leaves((args, kwargs))))
        if key not in self.known:
            self.known[key] = self._cost(func, args, kwargs, out)
        return self.known[key]

    def _cost(self, func: Any, args: Any, kwargs: Any, out: Any) -> Cost | None:
        name = func._overloadpacket.__name__ if hasattr(func, "_overloadpacket") else str(func)
        if name in _PRODUCTS and func.namespace == "aten":
            macs = _PRODUCTS[name](*args, **kwargs)
            return Cost(macs, 2 * macs)
        if name in ("convolution", "_convolution", "convolution_overrideable"):
            macs = _convolves(*args, **kwargs, out=out)
            return Cost(macs, 2 * macs)
        formula = product_formulas().get(getattr(func, "_overloadpacket", None))
        if formula is not None:
            flops = int(formula(*args, **kwargs, out_val=out))
            return Cost(flops // 2, flops)
        added = _added(name, args)
        if added is not None:
            return Cost(0, added.numel() if added.is_floating_point() else 0)
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())]
        if func.is_view or name in _MOVES or not results:
            return Cost()
        if torch.Tag.pointwise in func.tags:
            return Cost(0, results[0].numel())
        if torch.Tag.reduction in func.tags:
            return Cost(0, next(x.numel() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)))
        return self._by_parts(func, args, kwargs)

    def _by_parts(self, func: Any, args: Any, kwargs: Any) -> Cost | None:
        """The cost of the operators that a fused one is the same as, on tensors without memory."""
        if func.namespace == "fds":
            if not _is_kernel(func):
                return Cost()  # collectives, fetches from a store
            parts = composite_kernel(func)
        else:
            parts = decomposition(func)
        if parts is None:
            return None
        args, kwargs = tree_map(_meta, (args, kwargs))
        inner = _Sum(self)
        try:
            with torch.no_grad(), inner:
                parts(*args, **kwargs)
        except (RuntimeError, NotImplementedError, TypeError):
            return None  # a form that reads values, or has no shapes for them: it is reported as not counted
        return None if inner.unknown else inner.total


class _Sum(TorchDispatchMode):
    """Adds up what runs inside of it."""

    def __init__(self, counter: Counter) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.counter, self.total, self.unknown = counter, Cost(), False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        parts = taken_apart(self, func, args, kwargs or {})
        if parts is not NotImplemented:
            return parts
        out = func(*args, **(kwargs or {}))
        with without_modes():
            cost = self.counter.cost(func, args, kwargs or {}, out)
        self.unknown = self.unknown or cost is None
        self.total += cost or Cost()
        return out


def taken_apart(mode: TorchDispatchMode, func: Any, args: Any, kwargs: Any) -> Any:
    """The result of an operator that is made of others by definition (``matmul``), which `mode` then sees; else NotImplemented.

    Autograd takes them apart before a mode sees them, except where it is off: inside of an operator, and in inference mode.
    """
    if not is_composite(func):
        return NotImplemented
    with mode:
        return func.decompose(*args, **kwargs)


def _is_kernel(func: Any) -> bool:
    from fds.kernels import operators

    name = func._overloadpacket.__name__
    return name in operators() or name.removesuffix("_backward") in operators()


def _look(x: Any) -> Any:
    return (tuple(x.shape), x.dtype, x.device.type) if isinstance(x, Tensor) else (type(x), repr(x))


def _meta(x: Any) -> Any:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") if isinstance(x, Tensor) else x


__all__ = ["Cost", "Counter"]
