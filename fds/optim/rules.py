"""Update rules: SGD, AdamW, clipping, scaling by a schedule."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from fds import tree
from fds.optim import in_place as kernels
from fds.optim.base import Hyper, Norm, Optimizer, Schedule, check_like, checked, hyperparams, stateless

Rate = float | Tensor | Schedule


class RuleState(NamedTuple):
    """State of a rule: updates so far (0-D int64), its moments by name, its hyperparameters."""

    updates: Tensor
    moments: dict[str, Any]
    hyper: Hyper


def _home(params: Any) -> torch.device:
    """The device of the parameters; the host where they are on several: a number there meets tensors of every device."""
    devices = {x.device for x in tree.leaves(params)}
    return devices.pop() if len(devices) == 1 else torch.device("cpu")


def _count(params: Any) -> Tensor:
    return torch.zeros((), dtype=torch.int64, device=_home(params))


def _moment(params: Any) -> Any:
    """Zeros like `params`, in float32 for low-precision parameters: a second moment below 2^-24 is lost in bfloat16."""
    return tree.map(lambda p: torch.zeros_like(p, dtype=torch.float32 if p.element_size() < 4 else p.dtype), params)


def _rate(rate: Rate, state: RuleState) -> Tensor:
    return rate(state.updates) if callable(rate) and not isinstance(rate, Tensor) else state.hyper["learning_rate"]


def _to(hyper: Hyper, params: Any) -> Hyper:
    """Hyperparameters beside the parameters."""
    return {k: v.to(_home(params)) for k, v in hyper.items()}


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
        moments = {"momentum": _moment(params)} if momentum else {}
        hyper = hyperparams(learning_rate=learning_rate, weight_decay=weight_decay)
        return RuleState(
            _count(params), moments, _to(hyper | (hyperparams(momentum=momentum) if momentum else {}), params)
        )

    def update(grads: Any, state: RuleState, params: Any, *, norm: Norm = tree.norm) -> tuple[Any, RuleState]:
        check_like(grads, params)
        h, rate = state.hyper, _rate(learning_rate, state)
        wide: Any = state.moments.get("momentum", params)  # float32 for parameters of low precision

        def decayed(g: Tensor, p: Tensor, m: Tensor) -> Tensor:
            return (g.to(m.dtype) + h["weight_decay"] * p.to(m.dtype)).to(m.dtype)

        step = grads = tree.map(decayed, grads, params, wide)
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
        rate, decay = _rate(learning_rate, state), h["weight_decay"]
        kernels.sgd(p, g, m, rate, h["momentum"] if momentum else none, decay, nesterov, ok)
        return params, state._replace(updates=state.updates + ok)

    return Optimizer(init, update, step=in_place)


def adamw(
    learning_rate: Rate, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0, rounding_seed: int | None = None,
) -> Optimizer:  # fmt: skip
    """Adam with decoupled weight decay; the numerics of `torch.optim.AdamW`. Moments are float32 for low-precision parameters.

    `rounding_seed`: round bfloat16 parameters up or down at random, so that updates below half of their last bit are not lost and no float32
    master is needed; for parameters of bfloat16 only. The bits depend on the seed, the update, the leaf and the place in it, so that another
    sharding draws others.

    Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2.
    """
    if rounding_seed is not None:
        return _by_operator(
            "adamw", learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, seed=rounding_seed
        )
    checked("learning_rate", learning_rate)
    checked("b1", b1)
    checked("b2", b2)
    checked("eps", eps)
    checked("weight_decay", weight_decay)

    def init(params: Any) -> RuleState:
        hyper = hyperparams(learning_rate=learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
        return RuleState(_count(params), {"mu": _moment(params), "nu": _moment(params)}, _to(hyper, params))

    def update(grads: Any, state: RuleState, params: Any, *, norm: Norm = tree.norm) -> tuple[Any, RuleState]:
        check_like(grads, params)
        h, rate, count = state.hyper, _rate(learning_rate, state), state.updates + 1
        first, second = _mass(h["b1"], count), _mass(h["b2"], count).sqrt()

        # A float64 scalar widens a 0-D leaf, and only that: hence the casts, which are nothing for all others.
        def average(m: Tensor, g: Tensor) -> Tensor:
            return (m + (1 - h["b1"]) * (g.to(m.dtype) - m)).to(m.dtype)

        def square(v: Tensor, g: Tensor) -> Tensor:
            return (h["b2"] * v + (1 - h["b2"]) * g.to(v.dtype).square()).to(v.dtype)

        def step(m: Tensor, v: Tensor, p: Tensor) -> Tensor:
            direction = m / (v.sqrt() / second + h["eps"])
            return (-(rate / first) * direction - (rate * h["weight_decay"]) * p).to(m.dtype)

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
        h, rate = state.hyper, _rate(learning_rate, state)
        kernels.adamw(p, g, mu, nu, rate, h["b1"], h["b2"], h["eps"], h["weight_decay"], state.updates + 1, ok)
        return params, state._replace(updates=state.updates + ok)

    return Optimizer(init, update, step=in_place)


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
    "adamw": lambda params: {"mu": _moment(params), "nu": _moment(params)},
    "lion": lambda params: {"mu": _moment(params)},
    "adamw8bit": _zeros_of_8_bits,
}


def _by_operator(rule: str, learning_rate: Rate, *, seed: int | None, state_seed: int | None = None, **options: float) -> Optimizer:  # fmt: skip
    """The rule as operator ``fds.kernels.<rule>_update``, leaf by leaf. Updates are float32 differences of the new parameter and the old."""
    for name, value in {"learning_rate": learning_rate, **options}.items():
        checked(name, value)
    seeds = {k: v for k, v in (("seed", seed), ("state_seed", state_seed)) if v is not None}

    def init(params: Any) -> RuleState:
        return RuleState(
            _count(params), _MOMENTS[rule](params), _to(hyperparams(learning_rate=learning_rate, **options), params)
        )

    def update(grads: Any, state: RuleState, params: Any, *, norm: Norm = tree.norm) -> tuple[Any, RuleState]:
        from fds import kernels  # takes a while, and most optimizers do without

        check_like(grads, params)
        step, count, h = getattr(kernels, f"{rule}_update"), state.updates + 1, state.hyper
        settings = {"rate": _rate(learning_rate, state), "count": count, **seeds} | {k: h[k] for k in options}
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


def _mass(b: Tensor, count: Tensor) -> Tensor:
    """``1 - b**count``, as an expm1: Inductor computes that once, where it would put a power into the inner loop of every leaf."""
    return -torch.expm1(count * b.log())


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
        return ClipState(_to(hyperparams(max_norm=max_norm), params))

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
        return RuleState(_count(params), {}, {})

    def update(grads: Any, state: RuleState, params: Any, *, norm: Norm = tree.norm) -> tuple[Any, RuleState]:
        factor = schedule(state.updates)
        return tree.map(lambda g: (factor.to(g.device) * g).to(g.dtype), grads), state._replace(
            updates=state.updates + 1
        )

    return Optimizer(init, update)
