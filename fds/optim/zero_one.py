"""0/1 Adam: ranks exchange signs from the first step on, and later not in every step."""

from typing import Any

import torch
from torch import Tensor

from fds import tree
from fds.optim import one_bit_wire as wire
from fds.optim.base import Axis, Norm, Optimizer, Step, Update, checked, hyperparams
from fds.optim.base import chosen as guarded
from fds.optim.exchange import Send, averaged, chosen, exchanging, only, squared
from fds.optim.state import Rate, RuleState, beside, counter, home, moment, rate_of, wide


def zero_one_adam(
    learning_rate: Rate, axis: Axis, *, var_freeze_step: int = 100_000, var_update_scaler: int = 16, local_step_scaler: int = 32_678,
    local_step_clipper: int = 16, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0,
) -> Optimizer:  # fmt: skip
    """0/1 Adam over the ranks of `axis` (each with its own rows, and all parameters): a variance that is updated more and more seldom, and later
    steps that each rank takes alone.

    * The first `var_freeze_step` updates: every k-th takes the exact mean of the gradients, for momentum and variance; the others their mean in
      signs (`one_bit_wire`), for the momentum. k is 1, and doubles after every `var_update_scaler` exact ones.
    * Then the variance stays. A rank goes on with its own momentum; every k-th step the ranks exchange what they have moved since the last
      exchange, in signs, and go on from the mean. k is 1, and doubles after every `local_step_scaler` steps, to at most `local_step_clipper`.

    Between exchanges ranks have parameters and momentum of their own; the point that they went from is in the state, so that after an exchange
    they are equal bit for bit (of `fds.train_step`; `update` alone gives a difference that leads there within rounding). It is in float32, so
    parameters of bfloat16 have a master in it. A state that is saved between two exchanges keeps one rank's parameters and momentum, and is
    exact again after the next exchange: save after one.

    Rest as in `onebit_adam`: norms, elements without variance, errors. State: 20 bytes a parameter with the errors.
    Lu et al. 2022, arXiv:2202.06009, algorithm 1, with the policies of section 6 (intervals in place of sets of steps).
    """
    options = {"b1": b1, "b2": b2, "eps": eps, "weight_decay": weight_decay}
    for name, value in {"learning_rate": learning_rate, **options}.items():
        checked(name, value)
    numbers = {"var_freeze_step": var_freeze_step, "var_update_scaler": var_update_scaler, "local_step_scaler": local_step_scaler, "local_step_clipper": local_step_clipper}  # fmt: skip
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"zero_one_adam: {name}={value!r}, required a whole number >= 1")

    def init(params: Any) -> RuleState:
        moments: dict[str, Any] = {k: moment(params) for k in ("mu", "nu", "moved")}
        moments["anchor"] = tree.map(lambda p: p.to(wide(p.dtype), copy=True), params)
        policy = {"var_interval": 1, "var_counter": 0, "local_interval": 1, "local_counter": 0}
        moments |= {k: torch.full((), v, dtype=torch.int64, device=home(params)) for k, v in policy.items()}
        moments["rates"] = torch.zeros((), dtype=torch.float64, device=home(params))
        return RuleState(counter(params), moments, beside(hyperparams(learning_rate=learning_rate, **options), params))

    def rule(grads: Any, state: RuleState, params: Any, send: Send) -> tuple[Any, RuleState]:
        h, rate, count, old = state.hyper, rate_of(learning_rate, state), state.updates + 1, state.moments
        together = state.updates < var_freeze_step
        exact = together & (count % old["var_interval"] == 0)
        meets = ~together & (count % old["local_interval"] == 0)
        seen = tree.map(lambda v: v > 0, old["nu"])
        scale = tree.map(lambda v: (v.sqrt() + h["eps"]).to(v.dtype), old["nu"])

        # What a rank would have moved to by itself, which is what it sends in the second phase.
        alone = only(seen, averaged(old["mu"], grads, h["b1"]))
        rates = torch.where(together, 0.0, old["rates"] + rate)
        moved = tree.map(torch.add, old["moved"], _step(alone, scale, params, rate, h))
        sent = chosen(together, grads, tree.map(torch.mul, moved, scale))
        how = torch.where(exact, wire.EXACT, torch.where(together | meets, wire.SIGNS, wire.NOTHING))
        got = send(sent, valid=seen, how=how, fresh=state.updates == var_freeze_step)

        nu = chosen(exact, squared(old["nu"], got, h["b2"]), old["nu"])
        momentum = averaged(old["mu"], chosen(exact, got, only(seen, got)), h["b1"])
        met = tree.map(lambda y: (-y / rates.clamp(min=1e-300)).to(y.dtype), got)
        mu = chosen(together, momentum, chosen(meets, met, alone))
        root = tree.map(lambda v: (v.sqrt() + h["eps"]).to(v.dtype), nu)
        anchor = tree.map(torch.add, old["anchor"], chosen(together, _step(mu, root, params, rate, h), tree.map(torch.div, got, scale)))  # fmt: skip
        anchor = chosen(together | meets, anchor, old["anchor"])
        moved = chosen(together | meets, tree.map(torch.zeros_like, moved), moved)
        rates = torch.where(meets, 0.0, rates)
        moments = {
            "mu": mu,
            "nu": nu,
            "moved": moved,
            "anchor": anchor,
            **_policy(old, together, exact),
            "rates": rates,
        }
        there = _there(moments, params)
        updates = tree.map(lambda t, p: t.to(wide(t.dtype)) - p.to(wide(p.dtype)), there, params)
        return updates, RuleState(count, moments, h)

    def _policy(old: dict[str, Tensor], together: Tensor, exact: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        limits = {"var": (exact, var_update_scaler, 2**40), "local": (~together, local_step_scaler, local_step_clipper)}
        for k, (counts, scaler, most) in limits.items():
            done = old[f"{k}_counter"] + counts
            full = done == scaler
            interval = old[f"{k}_interval"]
            found[f"{k}_interval"] = torch.where(full, (2 * interval).clamp(max=most), interval)
            found[f"{k}_counter"] = torch.where(full, 0, done)
        return found

    return exchanging(axis, init, rule, step=_exactly)


def _step(mu: Any, root: Any, params: Any, rate: Tensor, h: dict[str, Tensor]) -> Any:
    """Adam's step with decoupled decay."""

    def one(m: Tensor, r: Tensor, p: Tensor) -> Tensor:
        return (-rate * (m / r) - (rate * h["weight_decay"]) * p.to(m.dtype)).to(m.dtype)

    return tree.map(one, mu, root, params)


def _there(moments: dict[str, Any], params: Any) -> Any:
    """Parameters, as the state says."""

    def one(anchor: Tensor, moved: Tensor, p: Tensor) -> Tensor:
        return (anchor + moved).to(p.dtype)

    return tree.map(one, moments["anchor"], moments["moved"], params)


def _exactly(update: Update) -> Step:
    """Parameters as the state says, not as old ones and a difference: those of ranks differ before an exchange, and may not after it."""

    def step(grads: Any, state: Any, params: Any, *, norm: Norm, ok: Tensor, donated: bool) -> tuple[Any, Any]:
        _, new = update(grads, state, params, norm=norm)
        there = _there(new.rule.moments, params)
        return guarded(ok, there, params), guarded(ok, new, state)

    return step
