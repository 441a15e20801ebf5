"""Batches as people have them, and as a train step takes them: ``{name: tensor}``; and the loss in what a model returns."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fds.program import Program

_POSITION = "argument "  # the name of a positional argument: its number follows


def arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How a model is called with a batch: a mapping by keywords, a tuple or list by position, anything else as the one argument.

    >>> arguments({"x": 1}), arguments((1, 2)), arguments(3)
    (((), {'x': 1}), ((1, 2), {}), ((3,), {}))
    """
    if isinstance(batch, Mapping):
        named = {str(k): v for k, v in batch.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        at = sorted((k for k in named if k.startswith(_POSITION)), key=lambda k: int(k[len(_POSITION) :]))
        return tuple(named[k] for k in at), {k: v for k, v in named.items() if k not in at}
    if isinstance(batch, tuple | list):
        return tuple(batch), {}  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    return (batch,), {}


def named(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call as one mapping; the inverse of `arguments`.

    >>> named((1,), {"x": 2})
    {'argument 0': 1, 'x': 2}
    """
    return {f"{_POSITION}{i}": x for i, x in enumerate(args)} | dict(kwargs)


def joined(batches: Sequence[Any]) -> dict[str, Tensor]:
    """Microbatches as one batch of a train step, their rows one behind the other.

    Raises `ValueError` for what is no tensor, and for microbatches that differ in names, or in shape.

    >>> joined([(torch.zeros(2, 3),), (torch.zeros(2, 3),)])["argument 0"].shape
    torch.Size([4, 3])
    """
    parts = [named(*arguments(batch)) for batch in batches]
    for part in parts:
        for k, x in part.items():
            if not isinstance(x, Tensor) or x.dim() == 0:
                raise ValueError(
                    f"train_batch: {k} is {type(x).__name__}{' of no dimension' if isinstance(x, Tensor) else ''}, and a compiled step takes tensors whose first dimension is the rows; leave it out of the batch, or switch compile.deepcompile off"
                )
        if part.keys() != parts[0].keys() or any(x.shape != parts[0][k].shape for k, x in part.items()):
            raise ValueError(
                f"train_batch: microbatches of {_shapes(parts[0])} and of {_shapes(part)}; a compiled step takes equal ones: pad them, or switch compile.deepcompile off"
            )
    return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}


def _shapes(part: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {k: tuple(x.shape) for k, x in part.items()}


def loss_in(out: Any) -> Tensor:
    """The loss in what a model returned: its `loss` (or item "loss"), the first of a tuple, or the output itself, a 0-D tensor.

    Raises `ValueError` where there is none.
    """
    found = out
    if isinstance(out, Mapping):
        found = out.get("loss")  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
    elif isinstance(out, tuple | list) and out:
        found = out[0]  # pyright: ignore[reportUnknownVariableType]
    elif not isinstance(out, Tensor):
        found = getattr(out, "loss", None)
    if not isinstance(found, Tensor) or found.dim():
        got = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(out).__name__  # pyright: ignore[reportUnknownArgumentType]
        raise ValueError(
            f"train_batch: the model returned {got}, and no loss (its `loss`, the first of a tuple, or a 0-D tensor); give the batch its labels, or call engine(batch), engine.backward(loss), engine.step()"
        )
    return found


def model_loss(program: Program, stored: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The loss that the model itself computes, for `train_step`: microbatches and ranks count alike, as they do in DeepSpeed.

    See `loss_in`, and `joined` for positional arguments. (`losses.causal_lm` weighs microbatches by their tokens.)
    """
    args, kwargs = arguments(batch)
    return loss_in(program(stored, *args, **kwargs))


def count(batches: Any, n: int, what: str) -> list[Any]:
    """The next `n` of an iterator. `ValueError` where it ends before."""
    found: list[Any] = []
    for _ in range(n):
        try:
            found.append(next(batches))
        except StopIteration:
            raise ValueError(
                f"{what}: the iterator ended after {len(found)} of {n} microbatches; give one that goes on, as fds.deepspeed.data.RepeatingLoader(loader)"
            ) from None
    return found


__all__ = ["arguments", "count", "joined", "loss_in", "model_loss", "named"]
