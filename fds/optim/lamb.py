"""LAMB: every leaf's step is as long as the leaf."""

from typing import Any

import optree
import torch
from torch import Tensor

from fds import tree
from fds.optim.base import Norm, Optimizer, check_like, checked, hyperparams
from fds.optim.state import Rate, RuleState, beside, counter, mass, moment, rate_of

_CORRECTIONS = ("moments", "rate", "none")


def lamb(
    learning_rate: Rate, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-6, weight_decay: float = 0.0, min_ratio: float | None = None,
    max_ratio: float | None = None, correction: str = "moments", eps_inside: bool = False,
) -> Optimizer:  # fmt: skip
    """LAMB: AdamW's step, scaled for each leaf to the leaf's own length.

        r = m / (sqrt(v) + eps) + weight_decay p;    p' = p - rate |p| / |r| r

    The quotient of a leaf is 1 where one of the norms is 0, so that a bias that begins at zero moves. Looks at leaves as wholes (`Optimizer.whole`).

    Args:
        min_ratio, max_ratio: bounds of ``|p| / |r|``. Default: none.
        correction: what makes up for moments that begin at zero. "moments": m and v are divided by the weight that they hold, as in the paper.
            "rate": the rate is multiplied by ``sqrt(1 - b2^t) / (1 - b1^t)``, so that the ratio is that of the moments as they are (DeepSpeed's
            FusedLamb). "none": nothing.
        eps_inside: ``sqrt(v + eps)`` in place of ``sqrt(v) + eps``.

    You et al. 2019, arXiv:1904.00962, algorithm 2, with phi(z) = z within the bounds.

    >>> tx, p = lamb(0.1), {"w": torch.tensor([3.0, 4.0])}
    >>> tx.update({"w": torch.tensor([1.0, 1.0])}, tx.init(p), p)[0]["w"]  # of length 0.5
    tensor([-0.3536, -0.3536])
    """
    if correction not in _CORRECTIONS:
        raise ValueError(f"lamb: correction={correction!r} is unknown; {tree.suggest(str(correction), _CORRECTIONS)}")
    bounds = {k: v for k, v in {"min_ratio": min_ratio, "max_ratio": max_ratio}.items() if v is not None}
    options = {"b1": b1, "b2": b2, "eps": eps, "weight_decay": weight_decay, **bounds}
    for name, value in {"learning_rate": learning_rate, **options}.items():
        checked(name, value)
    if min_ratio is not None and max_ratio is not None and min_ratio > max_ratio:
        raise ValueError(f"lamb: min_ratio={min_ratio!r}, max_ratio={max_ratio!r}, required min_ratio <= max_ratio")

    def init(params: Any) -> RuleState:
        hyper = hyperparams(learning_rate=learning_rate, **options)
        return RuleState(counter(params), {"mu": moment(params), "nu": moment(params)}, beside(hyper, params))

    def update(grads: Any, state: RuleState, params: Any, *, norm: Norm = tree.norm) -> tuple[Any, RuleState]:
        check_like(grads, params)
        h, rate, count = state.hyper, rate_of(learning_rate, state), state.updates + 1
        first, second = mass(h["b1"], count), mass(h["b2"], count)
        if correction != "moments":
            rate = rate * second.sqrt() / first if correction == "rate" else rate
            first = second = torch.ones_like(first)
        mu, nu = averages(state.moments["mu"], state.moments["nu"], grads, h)

        def direction(m: Tensor, v: Tensor, p: Tensor) -> Tensor:
            v = v / second
            root = (v + h["eps"]).sqrt() if eps_inside else v.sqrt() + h["eps"]
            return ((m / first) / root + h["weight_decay"] * p.to(m.dtype)).to(m.dtype)

        steps = tree.map(direction, mu, nu, params)
        speeds = -rate * ratios(params, steps, h)
        return scaled(steps, speeds), RuleState(count, {"mu": mu, "nu": nu}, h)

    return Optimizer(init, update, whole=True)


def averages(mu: Any, nu: Any, grads: Any, h: dict[str, Tensor]) -> tuple[Any, Any]:
    """The moments after gradients."""
    mu = tree.map(lambda m, g: (m + (1 - h["b1"]) * (g.to(m.dtype) - m)).to(m.dtype), mu, grads)
    nu = tree.map(lambda v, g: (h["b2"] * v + (1 - h["b2"]) * g.to(v.dtype).square()).to(v.dtype), nu, grads)
    return mu, nu


def norms(leaves: list[Tensor]) -> Tensor:
    """The L2 norm of each leaf: [n] float32, or float64 where one of them is."""
    if not leaves:
        return torch.zeros(0)
    if any(x.dtype == torch.float64 for x in leaves):
        return torch.stack([x.double().square().sum() for x in leaves]).sqrt()
    return tree.square_sums(leaves).sqrt()


def ratios(params: Any, steps: Any, h: dict[str, Tensor]) -> Tensor:
    """``|p| / |r|`` of each leaf within the bounds, 1 where one of them is 0: [n]."""
    p, r = norms(tree.leaves(params)), norms(tree.leaves(steps))
    ratio = (p / r).to(p.dtype)
    if "min_ratio" in h:
        ratio = ratio.maximum(h["min_ratio"].to(p.dtype))
    if "max_ratio" in h:
        ratio = ratio.minimum(h["max_ratio"].to(p.dtype))
    return torch.where((p == 0) | (r == 0), torch.ones_like(ratio), ratio)


def scaled(steps: Any, speeds: Tensor) -> Any:
    """Every leaf times its own number."""
    leaves, spec = optree.tree_flatten(steps)
    return optree.tree_unflatten(
        spec, [(s.to(x.device) * x).to(x.dtype) for x, s in zip(leaves, speeds.unbind(), strict=True)]
    )
