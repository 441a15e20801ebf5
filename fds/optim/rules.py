"""Update rules of single elements: SGD, Adam, AdamW, Adagrad, Lion; clipping, scaling by a schedule."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from fds import tree
from fds.optim import in_place as kernels
from fds.optim.base import Hyper, Norm, Optimizer, Schedule, check_like, checked, hyperparams, stateless
from fds.optim.state import Rate, RuleState, beside, counter, decayed, mass, moment, rate_of


def sgd(learning_rate: Rate, *, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0) -> Optimizer:
    """Stochastic gradient descent; the numerics of `torch.optim.SGD` (weight decay added to the gradient, first momentum = gradient).

    With ``momentum=0`` there is no buffer, and then no hyperparameter ``momentum`` that could be set later.

    >>> updates, _ = sgd(0.1).update({"w": torch.ones(1)}, sgd(0.1).init({"w": torch.ones(1)}), {"w": torch.ones(1)})
    >>> updates["w"]
    tensor([-0.1000])
    """
    checked("learning_rate", learning_rate)
    checked("momentum", momentum)
    checked("weight_decay", weight_decay)
    if nesterov and not momentum:
        raise ValueError("sgd: nesterov=True with momentum=0.0; required momentum > 0")

    def init(params: Any) -> RuleState:
        moments = {"momentum": moment(params)} if momentum else {}
        hyper = hyperparams(learning_rate=learning_rate, weight_decay=weight_decay)
        return RuleState(
            counter(params), moments, beside(hyper | (hyperparams(momentum=momentum) if momentum else {}), params)
        )

    def update(grads: Any, state: RuleState, params: Any, *, norm: Norm = tree.norm) -> tuple[Any, RuleState]:
        check_like(grads, params)
        h, rate = state.hyper, rate_of(learning_rate, state)
        wide: Any = state.moments.get("momentum", params)  # float32 for parameters of low precision

        step = grads = decayed(grads, params, wide, h["weight_decay"])
        moments: dict[str, Any] = {}
        if momentum:
            moments["momentum"] = step = tree.map(
                lambda m, g: (h["momentum"] * m + g).to(m.dtype), state.moments["momentum"], grads
            )
            step = tree.map(lambda g, m: (g + h["momentum"] * m).to(m.dtype), grads, step) if nesterov else step
        return tree.map(lambda s: (-rate * s).to(s.dtype), step), RuleState(state.updates + 1, moments, h)

    def in_place(
        grads: Any, state: RuleState, params: Any, *, norm: Norm, ok: Tensor, donated: bool
    ) -> tuple[Any, RuleState] | None:
        check_like(grads, params)
        p, g, m = tree.leaves(params), tree.leaves(grads), tree.leaves(state.moments)
        if not donated or not kernels.fits(p, g, *([m] if momentum else [])):
            return None
        h, none = state.hyper, torch.zeros((), dtype=torch.float64)
        rate, decay = rate_of(learning_rate, state), h["weight_decay"]
        kernels.sgd(p, g, m, rate, h["momentum"] if momentum else none, decay, nesterov, ok)
        return params, state._replace(updates=state.updates + ok)

    return Optimizer(init, update, step=in_place)


def adamw(
    learning_rate: Rate, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0, bias_correction: bool = True,
    rounding_seed: int | None = None,
) -> Optimizer:  # fmt: skip
    """Adam with decoupled weight decay; the numerics of `torch.optim.AdamW`. Moments are float32 for low-precision parameters.

    `bias_correction`: divide the moments by the weight that they hold so far, so that the first steps are as long as later ones.

    `rounding_seed`: round bfloat16 parameters up or down at random, so that updates below half of their last bit are not lost and no float32
    master is needed; for parameters of bfloat16 only. The bits depend on the seed, the update, the leaf and the place in it, so that another
    sharding draws others.

    Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2.
    """
    if rounding_seed is not None:
        if not bias_correction:
            raise ValueError("adamw: bias_correction=False together with rounding_seed; leave one of them out")
        return _by_operator(
            "adamw", learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, seed=rounding_seed
        )
    return _adam(learning_rate, bias_correction, True, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)


def adam(
    learning_rate: Rate, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0, bias_correction: bool = True,
) -> Optimizer:  # fmt: skip
    """Adam with the decay of L2 regularisation, ``weight_decay * param`` added to the gradient; the numerics of `torch.optim.Adam`.

    Without decay it is `adamw`. Kingma & Ba 2015, arXiv:1412.6980, algorithm 1.

    >>> tx, p = adam(0.1, weight_decay=1.0), {"w": torch.ones(1)}
    >>> tx.update({"w": torch.zeros(1)}, tx.init(p), p)[0]["w"]
    tensor([-0.1000])
    """
    return _adam(learning_rate, bias_correction, False, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)


def _adam(learning_rate: Rate, bias_correction: bool, decoupled: bool, **options: float) -> Optimizer:
    for name, value in {"learning_rate": learning_rate, **options}.items():
        checked(name, value)

    def init(params: Any) -> RuleState:
        hyper = hyperparams(learning_rate=learning_rate, **options)
        return RuleState(counter(params), {"mu": moment(params), "nu": moment(params)}, beside(hyper, params))

    def update(grads: Any, state: RuleState, params: Any, *, norm: Norm = tree.norm) -> tuple[Any, RuleState]:
        check_like(grads, params)
        h, rate, count = state.hyper, rate_of(learning_rate, state), state.updates + 1
        one = torch.ones_like(rate)
        first, second = (mass(h["b1"], count), mass(h["b2"], count).sqrt()) if bias_correction else (one, one)

        # A float64 scalar widens a 0-D leaf, and only that: hence the casts, which are nothing for all others.
        def average(m: Tensor, g: Tensor) -> Tensor:
            return (m + (1 - h["b1"]) * (g.to(m.dtype) - m)).to(m.dtype)

        def square(v: Tensor, g: Tensor) -> Tensor:
            return (h["b2"] * v + (1 - h["b2"]) * g.to(v.dtype).square()).to(v.dtype)

        def step(m: Tensor, v: Tensor, p: Tensor) -> Tensor:
            change = -(rate / first) * (m / (v.sqrt() / second + h["eps"]))
            return (change - (rate * h["weight_decay"]) * p if decoupled else change).to(m.dtype)

        if not decoupled:
            grads = decayed(grads, params, state.moments["mu"], h["weight_decay"])
        mu, nu = tree.map(average, state.moments["mu"], grads), tree.map(square, state.moments["nu"], grads)

        return tree.map(step, mu, nu, params), RuleState(count, {"mu": mu, "nu": nu}, h)

    def in_place(
        grads: Any, state: RuleState, params: Any, *, norm: Norm, ok: Tensor, donated: bool
    ) -> tuple[Any, RuleState] | None:
        check_like(grads, params)
        mu, nu = (tree.leaves(state.moments[k]) for k in ("mu", "nu"))
        p, g = tree.leaves(params), tree.leaves(grads)
        if not donated or not kernels.fits(p, g, mu, nu):
            return None
        h, rate = state.hyper, rate_of(learning_rate, state)
        # After so many updates there is nothing to correct: 1 - b**count is 1.
        count = state.updates + 1 if bias_correction else torch.full_like(state.updates, 2**40)
        kernels.adam(p, g, mu, nu, rate, h["b1"], h["b2"], h["eps"], h["weight_decay"], count, ok, decoupled)
        return params, state._replace(updates=state.updates + ok)

    return Optimizer(init, update, step=in_place)


def adagrad(
    learning_rate: Rate, *, eps: float = 1e-10, weight_decay: float = 0.0, rate_decay: float = 0.0, initial: float = 0.0
) -> Optimizer:
    """Steps over the root of the sum of all squared gradients; the numerics of `torch.optim.Adagrad` (decay added to the gradient).

    `rate_decay`: the rate of the t-th update, from 0, is ``learning_rate / (1 + t * rate_decay)``. `initial`: what the sums begin with.

    Duchi et al. 2011, JMLR 12, section 1.3 (the diagonal form).

    >>> tx, p = adagrad(0.1), {"w": torch.ones(2)}
    >>> tx.update({"w": torch.tensor([3.0, -0.5])}, tx.init(p), p)[0]["w"]
    tensor([-0.1000,  0.1000])
    """
    options = {"eps": eps, "weight_decay": weight_decay, "rate_decay": rate_decay}
    for name, value in {"learning_rate": learning_rate, **options, "initial": initial}.items():
        checked(name, value)

    def init(params: Any) -> RuleState:
        hyper = hyperparams(learning_rate=learning_rate, **options)
        sums = tree.map(lambda m: m + initial, moment(params))
        return RuleState(counter(params), {"sum": sums}, beside(hyper, params))

    def update(grads: Any, state: RuleState, params: Any, *, norm: Norm = tree.norm) -> tuple[Any, RuleState]:
        check_like(grads, params)
        h, old = state.hyper, state.moments["sum"]
        rate = rate_of(learning_rate, state) / (1 + state.updates * h["rate_decay"])
        grads = decayed(grads, params, old, h["weight_decay"])
        sums = tree.map(lambda s, g: s + g.square(), old, grads)
        updates = tree.map(lambda s, g: (-rate * (g / (s.sqrt() + h["eps"]))).to(s.dtype), sums, grads)
        return updates, RuleState(state.updates + 1, {"sum": sums}, h)

    return Optimizer(init, update)


def lion(learning_rate: Rate, *, b1: float = 0.9, b2: float = 0.99, weight_decay: float = 0.0, rounding_seed: int | None = None) -> Optimizer:  # fmt: skip
    """Lion: steps of the sign of an average, one moment. Its learning rate is some tenth of AdamW's. `rounding_seed` as there.

    Chen et al. 2023, arXiv:2302.06675, algorithm 2.

    >>> tx, p = lion(0.1), {"w": torch.ones(2)}
    >>> tx.update({"w": torch.tensor([3.0, -0.5])}, tx.init(p), p)[0]["w"]
    tensor([-0.1000,  0.1000])
    """
    return _by_operator("lion", learning_rate, b1=b1, b2=b2, weight_decay=weight_decay, seed=rounding_seed)


def adamw8bit(
    learning_rate: Rate, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0, state_seed: int = 0, rounding_seed: int | None = None,
) -> Optimizer:  # fmt: skip
    """AdamW with 2 bytes of state a parameter instead of 8: codes of 8 bits, a scale for each 256 (`fds.kernels.adamw8bit_update`).

    The second moment is rounded at random, by `state_seed`. `rounding_seed` as in `adamw`. Dettmers et al. 2022, arXiv:2110.02861.
    """
    return _by_operator("adamw8bit", learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, seed=rounding_seed, state_seed=state_seed)  # fmt: skip


def _zeros_of_8_bits(params: Any) -> dict[str, Any]:
    def scale(p: Tensor) -> Tensor:
        return torch.zeros(-(-p.numel() // 256), device=p.device)

    codes = {k: tree.map(lambda p, d=d: torch.zeros_like(p, dtype=d), params) for k, d in (("mu", torch.int8), ("nu", torch.uint8))}  # fmt: skip
    return codes | {k: tree.map(scale, params) for k in ("mu_scale", "nu_scale")}


_MOMENTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "adamw": lambda params: {"mu": moment(params), "nu": moment(params)},
    "lion": lambda params: {"mu": moment(params)},
    "adamw8bit": _zeros_of_8_bits,
}


def _by_operator(rule: str, learning_rate: Rate, *, seed: int | None, state_seed: int | None = None, **options: float) -> Optimizer:  # fmt: skip
    """The rule as operator ``fds.kernels.<rule>_update``, leaf by leaf. Updates are float32 differences of the new parameter and the old."""
    for name, value in {"learning_rate": learning_rate, **options}.items():
        checked(name, value)
    seeds = {k: v for k, v in (("seed", seed), ("state_seed", state_seed)) if v is not None}

    def init(params: Any) -> RuleState:
        return RuleState(
            counter(params), _MOMENTS[rule](params), beside(hyperparams(learning_rate=learning_rate, **options), params)
        )

    def update(grads: Any, state: RuleState, params: Any, *, norm: Norm = tree.norm) -> tuple[Any, RuleState]:
        from fds import kernels  # takes a while, and most optimizers do without

        check_like(grads, params)
        step, count, h = getattr(kernels, f"{rule}_update"), state.updates + 1, state.hyper
        settings = {"rate": rate_of(learning_rate, state), "count": count, **seeds} | {k: h[k] for k in options}
        changes: list[Tensor] = []
        moments: list[list[Tensor]] = []
        leaves, spec = optree.tree_flatten(params)
        columns = [tree.leaves(x) for x in state.moments.values()]
        for i, (p, g, *m) in enumerate(zip(leaves, tree.leaves(grads), *columns, strict=True)):
            new, *m = step(
                p, g, *m, leaf=i, **{k: v.to(p.device) if isinstance(v, Tensor) else v for k, v in settings.items()}
            )
            changes.append(new.to(m[0].dtype) - p if m[0].is_floating_point() else new.float() - p)
            moments.append(m)
        kept = {k: optree.tree_unflatten(spec, [m[j] for m in moments]) for j, k in enumerate(state.moments)}
        return optree.tree_unflatten(spec, changes), RuleState(count, kept, h)

    return Optimizer(init, update)


class ClipState(NamedTuple):
    """State of clipping: the bound."""

    hyper: Hyper


def clip_by_global_norm(max_norm: float) -> Optimizer:
    """Scale gradients down so that their global L2 norm is at most `max_norm` (as `torch.nn.utils.clip_grad_norm_`).

    The norm is the one the caller passes to `update`: over all shards, in a train step.
    Pascanu et al. 2013, arXiv:1211.5063.
    """
    checked("max_norm", max_norm)
    if not max_norm > 0:
        raise ValueError(f"clip_by_global_norm: max_norm={max_norm!r}, required > 0")

    def init(params: Any) -> ClipState:
        return ClipState(beside(hyperparams(max_norm=max_norm), params))

    def update(grads: Any, state: ClipState, params: Any, *, norm: Norm = tree.norm) -> tuple[Any, ClipState]:
        factor = (state.hyper["max_norm"] / (norm(grads) + 1e-6)).clamp(max=1.0)
        return tree.map(lambda g: (g * factor.to(g.device)).to(g.dtype), grads), state

    return Optimizer(init, update)


def scale(factor: float) -> Optimizer:
    """Multiply updates by a finite number."""
    checked("factor", abs(factor))
    return stateless(lambda grads, params: tree.map(lambda g: factor * g, grads))


def scale_by_schedule(schedule: Schedule) -> Optimizer:
    """Multiply updates by ``schedule(count)``, count = updates so far; after ``adamw(1.0)`` it is the learning rate."""

    def init(params: Any) -> RuleState:
        return RuleState(counter(params), {}, {})

    def update(grads: Any, state: RuleState, params: Any, *, norm: Norm = tree.norm) -> tuple[Any, RuleState]:
        factor = schedule(state.updates)
        return tree.map(lambda g: (factor.to(g.device) * g).to(g.dtype), grads), state._replace(
            updates=state.updates + 1
        )

    return Optimizer(init, update)
