"""What optimizers that exchange momentum in place of gradients have in common."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import optree
import torch
from torch import Tensor

from fds import tree
from fds.layout import Part
from fds.optim import one_bit_wire as wire
from fds.optim.base import Axis, Member, Norm, Optimizer, Step, Update, by_name, check_like, names, refilled
from fds.optim.state import RuleState, home, wide


class ExchangeState(NamedTuple):
    """The state of the rule, the same on all ranks where they just exchanged, and a rank's own: what signs left out so far."""

    rule: RuleState
    errors: dict[str, Tensor]


class Send(Protocol):
    """``send(tree, valid=tree of bools, how=mode, fresh=True where errors begin anew) -> mean over ranks``; once in an update."""

    def __call__(self, x: Any, *, valid: Any, how: Tensor, fresh: Tensor | None = None) -> Any: ...


Rule = Callable[
    [Any, RuleState, Any, Send], tuple[Any, RuleState]
]  # (gradients, state, parameters, send) -> (updates, state)


def exchanging(axis: Axis, init_rule: Callable[[Any], RuleState], rule: Rule, *, whole: bool = False, step: Callable[[Update], Step] | None = None) -> Optimizer:  # fmt: skip
    """An optimizer that takes each rank's own gradients, of parameters that every rank holds whole, and reduces over `axis` what `rule` sends."""

    def reduce(grads: Any) -> dict[str, Tensor]:
        return dict(by_name(grads))

    def errors(params: Any, device: torch.device) -> dict[str, Tensor]:
        leaves = [p if isinstance(p, Tensor) else p.held for p in optree.tree_leaves(params)]
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in leaves) else torch.float32
        return wire.errors([p.numel() for p in leaves], dtype, device, axis)

    def init(params: Any) -> ExchangeState:
        return ExchangeState(init_rule(params), errors(params, home(params)))

    def norm_over(grads: dict[str, Tensor]) -> Tensor:
        return (axis.sum(tree.square_sum(tree.leaves(grads))) / axis.size).sqrt()

    def update(grads: dict[str, Tensor], state: ExchangeState, params: Any, *, norm: Norm = norm_over) -> tuple[Any, ExchangeState]:  # fmt: skip
        known = names(params)
        if grads.keys() != set(known):
            raise ValueError(f"gradients {sorted(grads)[:3]}, required a rank's own by name; pass tx.reduce(grads)")
        given = refilled(params, grads)
        check_like(given, params)
        wider = tree.map(lambda g: g.to(wide(g.dtype)), given)
        kept = [state.errors]

        def send(x: Any, *, valid: Any, how: Tensor, fresh: Tensor | None = None) -> Any:
            leaves, spec = optree.tree_flatten(x)
            (old,) = kept
            if fresh is not None:
                old = {k: torch.where(fresh, 0.0, e) for k, e in old.items()}
            got, kept[0] = wire.mean(leaves, old, tree.leaves(valid), how, axis)
            return optree.tree_unflatten(spec, got)

        updates, new = rule(wider, state.rule, params, send)
        return updates, ExchangeState(new, kept[0])

    def members(params: Any) -> list[Member]:
        place = f"{axis.rank} of {axis.size}"
        own = {k: Part(k, x, x, (), place) for k, x in errors(params, torch.device("meta")).items()}
        inside = Member(("rule",), "", Optimizer(init_rule, _never), params)
        return (
            [inside, Member(("errors",), "errors", Optimizer(_zeros, _never), own, carried=True)] if own else [inside]
        )

    made = None if step is None else step(update)
    return Optimizer(init, update, reduce, axis, made, members=members, whole=whole, local=True)


def _zeros(params: Any) -> Any:
    return tree.map(torch.zeros_like, params)


def _never(grads: Any, state: Any, params: Any, *, norm: Norm = tree.norm) -> tuple[Any, Any]:
    raise AssertionError("only the place of a state")


def averaged(m: Any, x: Any, b: Tensor) -> Any:
    """``b m + (1 - b) x``, leaf by leaf."""
    return tree.map(lambda m, x: (m + (1 - b) * (x.to(m.dtype) - m)).to(m.dtype), m, x)


def squared(v: Any, x: Any, b: Tensor) -> Any:
    """``b v + (1 - b) x^2``, leaf by leaf."""
    return tree.map(lambda v, x: (b * v + (1 - b) * x.to(v.dtype).square()).to(v.dtype), v, x)


def chosen(condition: Tensor, yes: Any, no: Any) -> Any:
    """One tree or the other."""
    return tree.map(lambda a, b: torch.where(condition.to(a.device), a, b), yes, no)


def only(valid: Any, x: Any) -> Any:
    """Zero where not valid."""
    return tree.map(lambda s, y: torch.where(s, y, 0.0), valid, x)
