"""Hyperparameters that follow the count of updates: `scheduled`."""

from collections.abc import Mapping
from typing import Any

import optree
from torch import Tensor

from fds import tree
from fds.optim.base import Norm, Optimizer, Schedule, guarded_step


def scheduled(tx: Optimizer, **schedules: Schedule) -> Optimizer:
    """A rule whose hyperparameters, beside its learning rate, are schedules: ``scheduled(adamw(rate), b1=cycle)``.

    `tx` is a rule, or a chain of rules; every part that has the name follows it. The state is that of `tx`, with the present values. Raises
    `ValueError` where no part has the name.

    >>> from fds import optim
    >>> import torch
    >>> tx, w = scheduled(optim.sgd(1.0, momentum=0.5), momentum=lambda n: 0.5 * n.double()), {"w": torch.ones(1)}
    >>> state = tx.init(w)
    >>> for _ in range(2):
    ...     updates, state = tx.update(w, state, w)
    >>> updates["w"]  # - (0.5 * 1 + 1)
    tensor([-1.5000])
    """

    def init(params: Any) -> Any:
        state = tx.init(params)
        known = _names(state)
        for name in schedules:
            if name not in known:
                raise ValueError(f"scheduled: no hyperparameter {name!r} in this rule; {tree.suggest(name, known)}")
        return state

    def now(state: Any) -> Any:
        def replaced(x: Any) -> Any:
            if not _is_rule(x):
                return x
            own = {k: f(x.updates).to(x.hyper[k]) for k, f in schedules.items() if k in x.hyper}
            return x._replace(hyper={**x.hyper, **own})

        return optree.tree_map(replaced, state, is_leaf=_is_rule)

    def update(grads: Any, state: Any, params: Any, *, norm: Norm = tree.norm) -> tuple[Any, Any]:
        return tx.update(grads, now(state), params, norm=norm)

    def step(grads: Any, state: Any, params: Any, *, norm: Norm, ok: Tensor, donated: bool) -> tuple[Any, Any]:
        return guarded_step(tx, grads, now(state), params, norm=norm, ok=ok, donated=donated)

    return tx._replace(init=init, update=update, step=step)


def _is_rule(x: Any) -> bool:
    return {"hyper", "updates"} <= set(getattr(x, "_fields", ()))


def _names(state: Any) -> Mapping[str, Any]:
    return {k: v for x in optree.tree_leaves(state, is_leaf=_is_rule) if _is_rule(x) for k, v in x.hyper.items()}
