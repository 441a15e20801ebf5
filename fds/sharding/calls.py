"""The calls of layers whose work is split over ranks: wrappers ``wrap(..., apply) -> apply`` that `tensor_parallel` puts around modules."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fds.frame import FRAME, Apply, Head
from fds.program import Core
from fds.sharding import collectives
from fds.sharding.cuts import Heads, Range
from fds.sharding.mesh import Axis
from fds.tree import Params

# The input that the running block's last column layer took, and what its `fan_out` made of it.
_FULL: ContextVar[list[tuple[Tensor, Tensor]] | None] = ContextVar("fds_fan_out", default=None)


def shared(apply: Apply) -> Apply:
    """Layers of one block that take the same input take it through one `fan_out`: one all-reduce in backward for query, key and value."""

    def run(*args: Any, **kwargs: Any) -> Any:
        token = _FULL.set([])
        try:
            return apply(*args, **kwargs)
        finally:
            _FULL.reset(token)

    return run


def _fan_out(x: Tensor, axis: Axis) -> Tensor:
    last = _FULL.get()
    if last is None:
        return collectives.fan_out(x, axis)
    if not last or last[0][0] is not x:
        last[:] = [(x, collectives.fan_out(x, axis))]
    return last[0][1]


def _part(axis: Axis | None) -> None:
    """From here on the block's activations are this rank's part (of `axis`), or whole: dropout draws accordingly."""
    FRAME.get().draws.part = 0 if axis is None or axis.size == 1 else axis.rank + 1


def _check_features(path: str, x: Tensor, features: int, ranks: int, fix: str) -> None:
    if x.shape[-1] != features:
        raise ValueError(f"tensor_parallel: {path}: its input has {x.shape[-1]} features, required {features} (the plan over {ranks} ranks); {fix}")  # fmt: skip


def whole(axis: Axis, path: str, features: int, apply: Apply) -> Apply:
    """A linear layer that every rank computes alike."""

    def run(leaves: Params, x: Tensor) -> Tensor:
        _check_features(path, x, features, axis.size, "what comes before is split: name this layer 'row' in the plan, or the one before 'column_gather'")  # fmt: skip
        return apply(leaves, x)

    return run


def column(axis: Axis, path: str, features: int, apply: Apply) -> Apply:
    def run(leaves: Params, x: Tensor) -> Tensor:
        _check_features(path, x, features, axis.size, "what comes before is split already: name one of the two 'row' in the plan")  # fmt: skip
        _part(None)
        y = apply(leaves, _fan_out(x, axis))
        _part(axis)
        return y

    return run


def gathered(core: Core, axis: Axis, path: str, sizes: list[int], apply: Apply) -> Apply:
    """A column layer with its output joined. The output layer hands its arguments over to a loss that asks for them."""
    weight, bias = (core.first_name(f"{path}.{k}") for k in ("weight", "bias"))

    def run(leaves: Params, x: Tensor) -> Tensor:
        x, frame = collectives.fan_out(x, axis), FRAME.get()
        if path == core.head and frame.heads is not None and len(frame.wraps[path]) == 1:
            logits = x.new_zeros(()).expand(*x.shape[:-1], sum(sizes))
            first = sum(sizes[: axis.rank])
            frame.heads.append(Head(x, leaves[weight], leaves.get(bias), logits, axis, first))
            return logits
        return collectives.join(apply(leaves, x), axis, dim=-1, sizes=sizes)

    return run


def row(core: Core, axis: Axis, sequence: bool, path: str, features: int, apply: Apply) -> Apply:
    """The sum of the ranks' products of so many input features, and the bias once."""
    name = core.first_name(f"{path}.bias")
    takes_none = isinstance(core.part(path), nn.Linear)  # Conv1D adds its bias, whatever it is
    total = partial(_summed, axis, sequence)

    def run(leaves: Params, x: Tensor) -> Tensor:
        _check_features(path, x, features, axis.size, "split what comes before by 'column' in the plan; if that is whole, the style is 'row_split'")  # fmt: skip
        bias = leaves.get(name)
        if bias is None:
            return total(apply(leaves, x))
        nothing: Any = None if takes_none else torch.zeros_like(bias)
        return total(apply({**leaves, name: nothing}, x)) + bias

    return run


def _summed(axis: Axis, sequence: bool, y: Tensor) -> Tensor:
    if sequence:
        return collectives.scatter_along(y, axis, y.dim() - 2)
    _part(None)
    return collectives.fan_in(y, axis)


def embedding(core: Core, axis: Axis, path: str, words: Range, total: int, apply: Apply) -> Apply:
    """A lookup in this rank's `words`, zero for the other ranks' words, summed. What is in no vocabulary fails as in the module."""
    first, count = words
    padding = getattr(core.part(path), "padding_idx", None)
    mine = None if padding is None or not first <= padding < first + count else padding - first

    def run(leaves: Params, ids: Tensor) -> Tensor:
        here = ((ids < 0) | (ids >= first)) & ((ids < first + count) | (ids >= total))
        with _changed(core.part(path), {} if padding is None else {"padding_idx": mine}):
            found = apply(leaves, (ids - first).where(here, 0))
        return collectives.fan_in(found.where(here[..., None], 0.0), axis)

    return run


def experts(axis: Axis, apply: Apply) -> Apply:
    def run(leaves: Params, *args: Any, **kwargs: Any) -> Tensor:
        whole = [_out(x, axis) for x in args]
        return collectives.fan_in(apply(leaves, *whole, **{k: _out(x, axis) for k, x in kwargs.items()}), axis)

    return run


def _out(x: Any, axis: Axis) -> Any:
    return collectives.fan_out(x, axis) if isinstance(x, Tensor) and x.is_floating_point() else x


# --- attention ---


@contextmanager
def _changed(module: nn.Module, values: Mapping[str, Any]) -> Generator[None]:
    """`module` with other attributes for the time of a call."""
    held = {k: getattr(module, k) for k in values}
    try:
        for k, v in values.items():
            setattr(module, k, v)
        yield
    finally:
        for k, v in held.items():
            setattr(module, k, v)


def with_values(core: Core, path: str, values: Mapping[str, Any], apply: Apply) -> Apply:
    """The module's attributes are these for the time of a call."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with _changed(core.part(path), values):
            return apply(*args, **kwargs)

    return run


def with_heads(core: Core, axis: Axis, path: str, heads: Heads, apply: Apply) -> Apply:
    """The attention's own numbers of heads are this rank's for the time of a call, and ALiBi's slopes are those of its heads."""
    module: Any = core.part(path)
    start, count = heads.queries[axis.rank]
    total, keys = sum(n for _, n in heads.queries), len(heads.keys[axis.rank])
    values: dict[str, int] = {}
    for name in ("num_heads", "n_heads", "n_head", "num_attention_heads"):
        values |= {name: count} if getattr(module, name, None) == total else {}
    values |= {n: keys for n in ("num_kv_heads", "num_key_value_heads") if hasattr(module, n)}
    values |= {"num_key_value_groups": count // keys} if hasattr(module, "num_key_value_groups") else {}
    for name in ("split_size", "all_head_size", "inner_dim"):
        size = getattr(module, name, None)
        values |= {name: size // total * count} if size else {}

    apply = with_values(core, path, values, apply)

    def run(*args: Any, **kwargs: Any) -> Any:
        if (alibi := kwargs.get("alibi")) is not None:  # [rows * heads, ...]
            kwargs["alibi"] = alibi.unflatten(0, (-1, total)).narrow(1, start, count).flatten(0, 1)
        return apply(*args, **kwargs)

    return run


# --- sequence parallelism ---

_INPUTS = ("hidden_states", "x", "input", "inputs")


def gathered_input(axis: Axis, apply: Apply) -> Apply:
    """The module's input, split along the sequence (the last dimension but one), whole."""

    def run(leaves: Params, *args: Any, **kwargs: Any) -> Any:
        if args:
            return apply(leaves, collectives.gather_along(args[0], axis, args[0].dim() - 2), *args[1:], **kwargs)
        name = next((n for n in _INPUTS if n in kwargs), None)
        if name is None:
            raise ValueError(
                f"tensor_parallel(sequence=True): a module is called with {sorted(kwargs)}, none of {', '.join(_INPUTS)}; use sequence=False"
            )
        return apply(leaves, **{**kwargs, name: collectives.gather_along(kwargs[name], axis, kwargs[name].dim() - 2)})

    return run


def along_sequence(
    axis: Axis, first: bool, last: bool, apply: Apply, leaves: Params, x: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """A block's call on [rows, length / n, width]."""
    if first and x.shape[1] % axis.size:
        raise ValueError(
            f"tensor_parallel(sequence=True): a sequence of {x.shape[1]} does not divide by {axis.size} ranks; pad it, or use sequence=False"
        )
    x = collectives.split(x, axis, dim=1) if first else x
    _part(axis)
    out = apply(leaves, x, *args, **kwargs)
    y = out[0] if isinstance(out, tuple) else out
    if y.shape != x.shape:
        raise ValueError(
            f"tensor_parallel(sequence=True): a block makes {tuple(y.shape)} of {tuple(x.shape)}; it works on the whole sequence outside of its split layers; use sequence=False"
        )
    y = collectives.join(y, axis, dim=1) if last else y
    return (y, *out[1:]) if isinstance(out, tuple) else y


def without_hidden_states(apply: Apply) -> Apply:
    def run(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("output_hidden_states"):
            raise ValueError(
                "tensor_parallel(sequence=True): output_hidden_states would give parts of the sequence; use sequence=False"
            )
        return apply(*args, **kwargs)

    return run
