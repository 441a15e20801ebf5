"""Master weights: parameters of low precision with a float32 copy in the optimizer's state."""

from typing import Any

import attrs
import optree
import torch
from torch import Tensor

from fds import tree
from fds.optim.base import Member, Norm, Optimizer, apply_updates, check_like, guarded_step


def with_master(tx: Optimizer, dtype: torch.dtype = torch.float32) -> Optimizer:
    """Let `tx` update a copy of the parameters in `dtype`; the parameters are that copy, rounded.

    For parameters that are stored in bfloat16: updates below half of their last bit add up in the copy. Together with `sharded`, a rank has
    2 bytes of a parameter and 1/n of the other 12 (copy and Adam's moments), and gradients and parameters cross the wire in bfloat16; under
    ``cast("bfloat16")``, which stores float32, it is 4 bytes and 1/n of 8, and float32 on the wire. Gradients of microbatches are added in
    the parameters' dtype.

        step = fds.train_step(program, optim.sharded(optim.with_master(optim.adamw(1e-3)), mesh["dp"]))

    State: ``(copy, the state of tx)``. Every parameter has a copy, one of float32 too.

    Law: parameters are the copy's rounding, bit for bit (`update` alone, without `train_step`, gives a difference that leads there within
    float32's rounding). Micikevicius et al. 2018, arXiv:1710.03740, section 3.1.

    Raises `ValueError` for a `tx` that is sharded (it goes outside), and for a `dtype` that is no float32 or float64.

    >>> from fds import optim
    >>> tx, w = with_master(optim.sgd(1e-3)), {"w": torch.ones(1, dtype=torch.bfloat16)}
    >>> state = tx.init(w)
    >>> for _ in range(3):
    ...     updates, state = tx.update({"w": torch.ones(1, dtype=torch.bfloat16)}, state, w)
    ...     w = optim.apply_updates(w, updates)
    >>> w["w"], state[0]["w"]
    (tensor([0.9961], dtype=torch.bfloat16), tensor([0.9970]))
    """
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"with_master: dtype {dtype}, required torch.float32 or torch.float64")
    if tx.axis is not None:
        raise ValueError(
            "with_master: an optimizer inside that reduces gradients itself; store float32, under cast('bfloat16')"
            if tx.local
            else "with_master: a sharded optimizer inside; turn it round: sharded(with_master(tx), axis)"
        )

    def copies(params: Any) -> Any:
        return tree.map(lambda p: p.to(dtype, copy=True), params)

    def init(params: Any) -> tuple[Any, Any]:
        master = copies(params)
        return master, tx.init(master)

    def update(grads: Any, state: tuple[Any, Any], params: Any, *, norm: Norm = tree.norm) -> tuple[Any, tuple[Any, Any]]:  # fmt: skip
        check_like(grads, params)
        master, inner = state
        updates, inner = tx.update(grads, inner, master, norm=norm)
        master = apply_updates(master, updates)
        return tree.map(lambda m, p: _rounded(m, p).to(dtype) - p.to(dtype), master, params), (master, inner)

    def step(grads: Any, state: tuple[Any, Any], params: Any, *, norm: Norm, ok: Tensor, donated: bool) -> tuple[Any, tuple[Any, Any]]:  # fmt: skip
        check_like(grads, params)
        master, inner = guarded_step(tx, grads, state[1], state[0], norm=norm, ok=ok, donated=donated)
        return tree.map(_rounded, master, params), (master, inner)

    def members(params: Any) -> list[Member]:
        parts, spec = optree.tree_flatten(params)
        wide = optree.tree_unflatten(spec, [attrs.evolve(p, held=p.held.to(dtype)) for p in parts])
        return [Member((0,), "master", Optimizer(copies, _never), params), Member((1,), "", tx, wide)]

    return Optimizer(init, update, step=step, members=members, whole=tx.whole, named=tx.named)


def _rounded(master: Tensor, param: Tensor) -> Tensor:
    return master.to(param.dtype, copy=True)


def _never(grads: Any, state: Any, params: Any, *, norm: Norm = tree.norm) -> tuple[Any, Any]:
    raise AssertionError("only the place of a state")
