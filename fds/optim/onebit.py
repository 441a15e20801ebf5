"""1-bit Adam and 1-bit LAMB: after a warm-up the variance stays as it is, and ranks exchange momentum in signs."""

from typing import Any

import optree
import torch
from torch import Tensor

from fds import tree
from fds.optim import one_bit_wire as wire
from fds.optim.base import Axis, Optimizer, checked, hyperparams
from fds.optim.exchange import Send, averaged, chosen, exchanging, only, squared
from fds.optim.lamb import norms, ratios, scaled
from fds.optim.state import Rate, RuleState, beside, counter, home, mass, moment, rate_of


def onebit_adam(
    learning_rate: Rate, axis: Axis, *, freeze_step: int = 100_000, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8,
    weight_decay: float = 0.0, bias_correction: bool = False,
) -> Optimizer:  # fmt: skip
    """Adam over the ranks of `axis` (each with its own rows, and all parameters), which exchange one bit an element once its variance is known.

    * The first `freeze_step` updates are Adam's with decoupled decay, of exact means of the gradients.
    * From then on the variance stays; each rank updates the momentum with its own gradient, and the ranks exchange it in signs
      (`one_bit_wire`): 2 (1 + 1/32) bits an element in place of 64. What signs leave out is kept in the state, and sent later.
    * Elements whose variance is zero then, as rows of an embedding that no data has used, are not trained any more: a sign has no zero.

    No `optim.sharded` around it. The step reports the root mean square of the ranks' gradient norms, and `clip_by_global_norm` before it in a
    chain uses that: the mean's own norm is not known. Errors are saved, and go on under the same number of ranks; under another they begin at
    zero. Which way the exchange goes is read at run time: a compiled step has both, and does not recompile.

    Law: until `freeze_step`, n ranks follow one process on the global batch. Tang et al. 2021, arXiv:2102.02888, algorithm 1, with a scale
    for each 1024 elements.

    >>> import fds
    >>> tx, p = onebit_adam(0.1, fds.sharding.mesh(dp=1)["dp"], freeze_step=2), {"w": torch.ones(1)}
    >>> tx.update(tx.reduce({"w": torch.ones(1)}), tx.init(p), p)[0]["w"]  # 0.1 / sqrt(0.001) of the rate
    tensor([-0.3162])
    """
    options = {"b1": b1, "b2": b2, "eps": eps, "weight_decay": weight_decay}
    _check("onebit_adam", learning_rate, options, freeze_step)

    def init(params: Any) -> RuleState:
        hyper = hyperparams(learning_rate=learning_rate, **options)
        return RuleState(counter(params), {"mu": moment(params), "nu": moment(params)}, beside(hyper, params))

    def rule(grads: Any, state: RuleState, params: Any, send: Send) -> tuple[Any, RuleState]:
        h, rate, count = state.hyper, rate_of(learning_rate, state), state.updates + 1
        warm = state.updates < freeze_step
        mu, nu, _ = _exchanged(grads, state, h, warm, send)
        one = torch.ones_like(rate)
        first = mass(h["b1"], count) if bias_correction else one
        second = mass(h["b2"], count.clamp(max=freeze_step)).sqrt() if bias_correction else one

        def step(m: Tensor, v: Tensor, p: Tensor) -> Tensor:
            change = (rate / first) * (m / (v.sqrt() / second + h["eps"]))
            return (-change - (rate * h["weight_decay"]) * p).to(m.dtype)

        return tree.map(step, mu, nu, params), RuleState(count, {"mu": mu, "nu": nu}, h)

    return exchanging(axis, init, rule)


def onebit_lamb(
    learning_rate: Rate, axis: Axis, *, freeze_step: int = 100_000, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8,
    weight_decay: float = 0.0, min_ratio: float = 0.01, max_ratio: float = 10.0, coeff_beta: float = 0.9, factor_min: float = 0.5,
    factor_max: float = 4.0, factor_threshold: float = 0.1,
) -> Optimizer:  # fmt: skip
    """LAMB over the ranks of `axis`, which exchange one bit an element once its variance is known; see `onebit_adam` for how.

    * The first `freeze_step` updates are those of `lamb` without bias correction, of exact means; the average of a leaf's ratio is kept.
    * Then a leaf's ratio is that average times a factor, which follows how the variance would have changed: the gradients that the exchanged
      momentum stands for give a fresh variance, and the factor is the largest of ``(sqrt(v) + eps) / (sqrt(fresh) + eps)``.

    Args:
        min_ratio, max_ratio: bounds of a leaf's ratio in the warm-up.
        coeff_beta: of the average of the ratios; ``1 / (1 - coeff_beta)`` should be below `freeze_step`.
        factor_min, factor_max, factor_threshold: bounds of the factor, and of its relative change from one update to the next.

    Li et al. 2021, arXiv:2104.06069, algorithm 1; scales for each 1024 elements take the place of its scales for each leaf.
    """
    options = {
        "b1": b1,
        "b2": b2,
        "eps": eps,
        "weight_decay": weight_decay,
        "min_ratio": min_ratio,
        "max_ratio": max_ratio,
    }
    options |= {"coeff_beta": coeff_beta, "factor_min": factor_min, "factor_max": factor_max, "factor_threshold": factor_threshold}  # fmt: skip
    _check("onebit_lamb", learning_rate, options, freeze_step)
    for low, high in (("min_ratio", "max_ratio"), ("factor_min", "factor_max")):
        if options[low] > options[high]:
            raise ValueError(f"onebit_lamb: {low}={options[low]!r}, {high}={options[high]!r}, required {low} <= {high}")

    def init(params: Any) -> RuleState:
        leaves = len(tree.leaves(params))
        numbers = {k: torch.full((leaves,), v, device=home(params)) for k, v in (("coeff", 0.0), ("factor", 1.0))}
        moments = {k: moment(params) for k in ("mu", "nu", "fresh")}
        return RuleState(counter(params), moments | numbers, beside(hyperparams(learning_rate=learning_rate, **options), params))  # fmt: skip

    def rule(grads: Any, state: RuleState, params: Any, send: Send) -> tuple[Any, RuleState]:
        h, rate = state.hyper, rate_of(learning_rate, state)
        warm, old = state.updates < freeze_step, state.moments
        mu, nu, seen = _exchanged(grads, state, h, warm, send)
        implied = tree.map(lambda m, o: ((m - h["b1"] * o) / (1 - h["b1"])).to(m.dtype), mu, old["mu"])
        fresh = chosen(warm, nu, squared(old["fresh"], implied, h["b2"]))
        plain = tree.map(lambda m, v: (m / (v.sqrt() + h["eps"])).to(m.dtype), mu, nu)
        steps = tree.map(lambda d, p: (d + h["weight_decay"] * p.to(d.dtype)).to(d.dtype), plain, params)
        ratio = ratios(params, steps, h).to(old["coeff"].dtype)
        kept = torch.where(ratio == 1.0, old["coeff"], h["coeff_beta"] * old["coeff"] + (1 - h["coeff_beta"]) * ratio)
        factor = _factor(plain, steps, nu, fresh, seen, old["factor"], h)
        coeff, factor = torch.where(warm, kept, old["coeff"]), torch.where(warm, old["factor"], factor)
        speeds = -rate * torch.where(warm, ratio, coeff * factor)
        moments = {"mu": mu, "nu": nu, "fresh": fresh, "coeff": coeff.to(ratio.dtype), "factor": factor.to(ratio.dtype)}
        return scaled(steps, speeds), RuleState(state.updates + 1, moments, h)

    return exchanging(axis, init, rule, whole=True)


def _check(what: str, learning_rate: Rate, options: dict[str, float], freeze_step: int) -> None:
    for name, value in {"learning_rate": learning_rate, **options}.items():
        checked(name, value)
    if freeze_step < 1:
        raise ValueError(f"{what}: freeze_step={freeze_step!r}, required a number of updates >= 1, which the variance is averaged over")  # fmt: skip


def _exchanged(grads: Any, state: RuleState, h: dict[str, Tensor], warm: Tensor, send: Send) -> tuple[Any, Any, Any]:
    """The new moments, and where the old variance was not zero."""
    mu, nu = state.moments["mu"], state.moments["nu"]
    seen = tree.map(lambda v: v > 0, nu)
    sent = chosen(warm, grads, averaged(mu, grads, h["b1"]))
    got = send(sent, valid=seen, how=torch.where(warm, wire.EXACT, wire.SIGNS))
    return chosen(warm, averaged(mu, got, h["b1"]), only(seen, got)), chosen(warm, squared(nu, got, h["b2"]), nu), seen


def _factor(plain: Any, steps: Any, nu: Any, fresh: Any, seen: Any, last: Tensor, h: dict[str, Tensor]) -> Tensor:
    """What a leaf's frozen ratio is multiplied by: [leaves]."""
    largest: list[Tensor] = []
    for v, f, s in zip(*map(optree.tree_leaves, (nu, fresh, seen)), strict=True):
        quotient = torch.where(s, (v.sqrt() + h["eps"]) / (f.sqrt() + h["eps"]), 0.0)
        largest.append(torch.cat([quotient.reshape(-1), quotient.new_zeros(1)]).max().to(last.device, last.dtype))
    if not largest:
        return last
    factor = torch.stack(largest)
    share = (norms(tree.leaves(plain)) / norms(tree.leaves(steps))).nan_to_num(nan=1.0).clamp(max=1.0)
    factor = torch.where(h["weight_decay"] > 0, factor * share + (1 - share), factor)
    factor = factor.clamp(min=h["factor_min"], max=h["factor_max"])
    reach = h["factor_threshold"]
    return factor.minimum(last * (1 + reach)).maximum(last * (1 - reach)).to(last.dtype)
