"""Several optimizers, each for some of the leaves."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from fds import tree
from fds.optim.base import Member, Norm, Optimizer, by_name, check_like, guarded_step, refilled

Labels = Callable[[str, Tensor], str]


def partition(optimizers: Mapping[str, Optimizer], labels: Labels) -> Optimizer:
    """Each leaf by the optimizer that its label names; ``labels(name, leaf)`` gives the label.

    Names are those of the leaves in the tree of parameters, ``model.layers.0.mlp.up_proj.weight``; a leaf's shape may be asked, not its values.
    The norm that the optimizers are given is that of all gradients, so that clipping inside of one is global.

        hidden = lambda name, leaf: "muon" if leaf.dim() >= 2 and "embed" not in name else "rest"
        tx = partition({"muon": muon(0.02), "rest": adamw(3e-4)}, hidden)

    State: ``{label: the state of its optimizer}``. Since it needs the names and whole leaves, it goes outside of `offloaded` and `streamed`
    (``partition({"muon": offloaded(muon(0.02)), ...})``), inside of `sharded`, and not with parameters in flat buffers (`fds.shard`).

    Raises:
        ValueError: a label that no optimizer has; a sharded optimizer inside.

    >>> import torch
    >>> from fds import optim
    >>> tx = partition({"all": optim.sgd(1.0), "none": optim.scale(0.0)}, lambda name, leaf: "none" if "norm" in name else "all")
    >>> p = {"norm": torch.ones(1), "w": torch.ones(1)}
    >>> tx.update(p, tx.init(p), p)[0]
    {'norm': tensor([0.]), 'w': tensor([-1.])}
    """
    for label, tx in optimizers.items():
        if tx.axis is not None:
            raise ValueError(
                f"partition: {label!r} {'reduces the gradients of all leaves itself; use it alone' if tx.local else 'is a sharded optimizer; turn it round: sharded(partition({...}, labels), axis)'}"
            )

    def split(params: Any) -> dict[str, list[str]]:
        """The names of each optimizer's leaves."""
        found: dict[str, list[str]] = {label: [] for label in optimizers}
        for name, leaf in by_name(params):
            label = labels(name, leaf)
            if label not in found:
                raise ValueError(f"partition: {name} has label {label!r}; {tree.suggest(str(label), optimizers)}")
            found[label].append(name)
        return found

    def init(params: Any) -> dict[str, Any]:
        return {label: optimizers[label].init(_only(params, own)) for label, own in split(params).items()}

    def update(grads: Any, state: dict[str, Any], params: Any, *, norm: Norm = tree.norm) -> tuple[Any, dict[str, Any]]:
        check_like(grads, params)
        known = _once(norm, grads)
        results: dict[str, tuple[Any, Any]] = {}
        for label, own in split(params).items():
            tx = optimizers[label]
            results[label] = tx.update(_only(grads, own), state[label], _only(params, own), norm=known)
        return _joined(params, results), {label: s for label, (_, s) in results.items()}

    def step(grads: Any, state: dict[str, Any], params: Any, *, norm: Norm, ok: Tensor, donated: bool) -> tuple[Any, dict[str, Any]]:  # fmt: skip
        check_like(grads, params)
        known = _once(norm, grads)
        results: dict[str, tuple[Any, Any]] = {}
        for label, own in split(params).items():
            each = (optimizers[label], _only(grads, own), state[label], _only(params, own))
            results[label] = guarded_step(*each, norm=known, ok=ok, donated=donated)
        return _joined(params, results), {label: s for label, (_, s) in results.items()}

    def members(params: Any) -> list[Member]:
        held = refilled(params, {name: part.held for name, part in by_name(params)})
        return [Member((label,), label, optimizers[label], _only(params, own)) for label, own in split(held).items()]

    return Optimizer(init, update, step=step, members=members, whole=True, named=True)


def _once(norm: Norm, grads: Any) -> Norm:
    known = norm(grads)
    return lambda _: known


def _only(x: Any, own: list[str]) -> Any:
    """The tree with nothing, ``()``, in place of the leaves that are not among `own`."""
    kept = set(own)
    return refilled(x, {name: leaf for name, leaf in by_name(x) if name in kept})


def _joined(params: Any, results: dict[str, tuple[Any, Any]]) -> Any:
    """One tree of the leaves of all results."""
    return refilled(params, {name: leaf for new, _ in results.values() for name, leaf in by_name(new)})
