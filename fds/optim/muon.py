"""Muon: momentum whose matrices are made orthogonal."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fds import tree
from fds._torch import matrix_norm
from fds.optim.base import Norm, Optimizer, by_name, check_like, checked, hyperparams
from fds.optim.state import Rate, RuleState, beside, counter, moment, rate_of

COEFFICIENTS = (3.4445, -4.775, 2.0315)  # of Jordan's quintic: the steepest at zero that stays within (0.7, 1.2)
_RESTART = 2  # steps after which the Gram form begins anew from the matrix, so that low precision does not add up


def muon(
    learning_rate: Rate, *, momentum: float = 0.95, nesterov: bool = True, weight_decay: float = 0.0, steps: int = 5,
    coefficients: Sequence[float] = COEFFICIENTS, eps: float = 1e-7, adjust: str = "rows", method: str = "standard", dtype: torch.dtype = torch.bfloat16,
) -> Optimizer:  # fmt: skip
    """Muon: the momentum of a matrix, with all its singular values moved near 1 by Newton-Schulz steps. For matrices in the inside of a network;
    embeddings, output layers, norms and biases go to another rule (`partition`).

        b' = momentum b + (1 - momentum) g;   u = (1 - momentum) g + momentum b' with nesterov, else b'
        x = u / |u|;   `steps` times x = a x + (b x xT + c (x xT)^2) x;   p' = p - rate adjust x - rate weight_decay p

    A leaf of three dimensions is a batch of matrices (experts); one of more is a matrix of its first dimension by all others (convolutions).
    Looks at leaves as wholes (`Optimizer.whole`). The numerics of `torch.optim.Muon`, which takes matrices alone.

    Args:
        adjust: what the step of a matrix of m rows and n columns is multiplied by. "rows": ``sqrt(max(1, m / n))`` (Jordan). "rms":
            ``0.2 sqrt(max(m, n))``, as long as a step of AdamW, for its rates and decay (Liu et al. 2025, arXiv:2502.16982). "none": 1.
        method: "standard", or "gram": the steps on the small ``x xT``, fewer operations where m and n differ, and the same but for rounding.
        dtype: what the steps are computed in.

    Jordan 2024, kellerjordan.github.io/posts/muon.

    Raises `ValueError` for a leaf of fewer than two dimensions.

    >>> tx, p = muon(0.1, dtype=torch.float32, steps=12, coefficients=(2.0, -1.5, 0.5)), {"w": torch.zeros(2, 2)}
    >>> tx.update({"w": torch.tensor([[3.0, 0.0], [0.0, 0.1]])}, tx.init(p), p)[0]["w"]
    tensor([[-0.1000, -0.0000],
            [-0.0000, -0.1000]])
    """
    for name, value in {"learning_rate": learning_rate, "momentum": momentum, "weight_decay": weight_decay}.items():
        checked(name, value)
    if steps < 1 or len(coefficients) != 3:
        raise ValueError(f"muon: steps={steps!r}, coefficients={coefficients!r}, required steps >= 1 and three numbers")
    for given, known, name in ((adjust, _ADJUST, "adjust"), (method, _METHODS, "method")):
        if given not in known:
            raise ValueError(f"muon: {name}={given!r} is unknown; {tree.suggest(str(given), known)}")

    def check(params: Any) -> None:
        for name, p in by_name(params):
            if p.dim() < 2:
                raise ValueError(
                    f"muon: {name} has shape {tuple(p.shape)}, required two dimensions or more; give it to another rule, as in partition({{'muon': muon(...), 'rest': adamw(...)}}, labels)"
                )

    def init(params: Any) -> RuleState:
        check(params)
        hyper = hyperparams(learning_rate=learning_rate, momentum=momentum, weight_decay=weight_decay)
        return RuleState(counter(params), {"momentum": moment(params)}, beside(hyper, params))

    def update(grads: Any, state: RuleState, params: Any, *, norm: Norm = tree.norm) -> tuple[Any, RuleState]:
        check_like(grads, params)
        h, rate = state.hyper, rate_of(learning_rate, state)
        keep = h["momentum"]
        wide = tree.map(lambda g, m: g.to(m.dtype), grads, state.moments["momentum"])
        new = tree.map(lambda m, g: m + (1 - keep) * (g - m), state.moments["momentum"], wide)
        ahead = tree.map(lambda g, m: g + keep * (m - g), wide, new) if nesterov else new

        def change(u: Tensor, p: Tensor) -> Tensor:
            x = _matrices(u)
            x = orthogonal(x.to(dtype), steps=steps, coefficients=coefficients, eps=eps, method=method)
            length = _ADJUST[adjust](*x.shape[-2:])
            return (-(rate * length) * x.to(u.dtype).view(u.shape) - (rate * h["weight_decay"]) * p.to(u.dtype)).to(
                u.dtype
            )

        return tree.map(change, ahead, params), RuleState(state.updates + 1, {"momentum": new}, h)

    return Optimizer(init, update, whole=True)


def _matrices(x: Tensor) -> Tensor:
    return x if x.dim() < 4 else x.flatten(1)


def orthogonal(x: Tensor, *, steps: int = 5, coefficients: Sequence[float] = COEFFICIENTS, eps: float = 1e-7, method: str = "standard") -> Tensor:  # fmt: skip
    """Matrices [..., m, n] with the singular vectors that they had, and singular values near 1: steps of an odd polynomial.

    With `COEFFICIENTS` the values come to (0.7, 1.2), after five steps those above 0.002 of the norm. Jordan 2024; the Gram form: with
    ``r = x xT``, a step is ``x -> p x`` and ``r -> p r p`` for ``p = a + b r + c r^2``, so that only small matrices are multiplied until the end.
    """
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / matrix_norm(x).clamp(min=eps)
    square = x.shape[-2] == x.shape[-1]
    x = _METHODS["standard" if square else method](x, steps, coefficients)
    return x.mT if tall else x


def _standard(x: Tensor, steps: int, coefficients: Sequence[float]) -> Tensor:
    a, b, c = coefficients
    for _ in range(steps):
        r = x @ x.mT
        x = _added(x, a, _added(r, b, r, r, c), x)
    return x


def _gram(x: Tensor, steps: int, coefficients: Sequence[float]) -> Tensor:
    a, b, c = coefficients
    r, q = x @ x.mT, None
    one = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
    for i in range(steps):
        if i == _RESTART and q is not None:
            x = q @ x
            r, q = x @ x.mT, None
        p = _added(r, b, r, r, c) + a * one
        q = p if q is None else p @ q
        if i + 1 < steps and i + 1 != _RESTART:
            r = p @ r @ p
    return x if q is None else q @ x


def _added(x: Tensor, beta: float, y: Tensor, z: Tensor, alpha: float = 1.0) -> Tensor:
    """``beta x + alpha y z``, rounded once."""
    return (torch.addmm if x.dim() == 2 else torch.baddbmm)(x, y, z, beta=beta, alpha=alpha)


_METHODS: dict[str, Callable[[Tensor, int, Sequence[float]], Tensor]] = {"standard": _standard, "gram": _gram}
_ADJUST: dict[str, Callable[[int, int], float]] = {
    "rows": lambda m, n: math.sqrt(max(1.0, m / max(n, 1))),
    "rms": lambda m, n: 0.2 * math.sqrt(max(m, n)),
    "none": lambda m, n: 1.0,
}
