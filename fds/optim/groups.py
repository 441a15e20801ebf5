"""Groups of parameters, each with an optimizer of its own: `grouped`."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from fds import tree
from fds.optim.base import Axis, Member, Norm, Optimizer, guarded_step
from fds.tree import Stored


def grouped(optimizers: Mapping[str, Optimizer], groups: Mapping[str, str | Iterable[str]]) -> Optimizer:
    """Each group of parameters its own optimizer, as another weight decay for biases and norms, or another learning rate for a head.

    Goes outside of everything but `fds.train_step`: a placement (`sharded`, `offloaded`, `streamed`) goes into every member. All of them are sharded
    over one axis, or none. Each is given the norm of all gradients, so that ``chain(clip_by_global_norm(1.0), ...)`` clips in every member by the same.

    Args:
        optimizers: by the names of their groups. The state is a tuple, in this order.
        groups: patterns of leaves, by the same names; the first group that names a leaf has it (`tree.group_of`). A flat buffer holds the leaves of
            one group: ``shard(axis, groups=groups)``, ``offload(store, groups=groups)``.

    Law: a group's parameters go the way of its optimizer, whatever the others do, but for the norm. Raises `ValueError` for names that differ, for a
    leaf that no group names, a group without leaves, and members sharded over different axes.

    >>> from fds import optim
    >>> import torch
    >>> tx = grouped({"none": optim.sgd(0.0), "all": optim.sgd(1.0)}, {"none": "*.bias", "all": "*"})
    >>> p = {"": {"h.bias": torch.ones(1), "h.weight": torch.ones(1)}}
    >>> tx.update(p, tx.init(p), p)[0][""]
    {'h.bias': tensor([-0.]), 'h.weight': tensor([-1.])}
    """
    if optimizers.keys() != groups.keys():
        name = min(optimizers.keys() ^ groups.keys())
        raise ValueError(
            f"grouped: group {name!r} has {'no patterns' if name in optimizers else 'no optimizer'}; {tree.suggest(name, groups if name in optimizers else optimizers)}"
        )
    for name, tx in optimizers.items():
        if tx.local:
            raise ValueError(f"grouped: {name!r} reduces gradients itself (onebit_adam and its like), which has no groups; give all parameters to one")  # fmt: skip
    axes = list(dict.fromkeys(tx.axis for tx in optimizers.values()))
    if len(axes) != 1:
        raise ValueError(
            f"grouped: members over {axes}; shard all of them over one axis, or none: grouped({{k: sharded(tx, axis) for ...}}, groups)"
        )
    patterns = {k: (p,) if isinstance(p, str) else tuple(p) for k, p in groups.items()}
    return _Grouped(dict(optimizers), patterns, axes[0]).optimizer()


class _Grouped:
    def __init__(self, members: dict[str, Optimizer], patterns: Mapping[str, Sequence[str]], axis: Axis | None) -> None:
        self.each, self.patterns, self.axis = members, patterns, axis

    def optimizer(self) -> Optimizer:
        stream = next((tx.stream for tx in self.each.values() if tx.stream is not None), None)
        whole = any(tx.whole for tx in self.each.values())
        return Optimizer(self.init, self.update, self.reduce, self.axis, self.step, stream, self.members, whole=whole)

    def split(self, stored: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """The part of a stored tree that each group has; sites without leaves of it are left out."""
        parts: dict[str, Any] = {label: {} for label in self.each}
        for s, part in stored.items():
            for k, v in part.items():
                label = tree.group_of(k, self.patterns)
                if label is None:
                    raise ValueError(
                        f"grouped: no group names {tree.qualified(s, k)!r}; add a pattern, as '*', or, for a flat buffer, give shard and offload the same groups="
                    )
                parts[label].setdefault(s, {})[k] = v
        for label, found in parts.items():
            if not found:
                raise ValueError(f"grouped: group {label!r} ({', '.join(self.patterns[label])}) has no trainable leaf")
        return parts

    def joined(self, like: Stored, parts: Mapping[str, Stored]) -> Stored:
        found = {s: {k: v for part in parts.values() for k, v in part.get(s, {}).items()} for s in like}
        return {s: {k: found[s][k] for k in leaves} for s, leaves in like.items()}

    def init(self, params: Any) -> tuple[Any, ...]:
        parts = self.split(params)
        return tuple(tx.init(parts[label]) for label, tx in self.each.items())

    def reduce(self, grads: Any) -> Any:
        if self.axis is None:
            return grads
        parts = self.split(grads)
        return {f"{label}.{k}": v for label, tx in self.each.items() for k, v in tx.reduce(parts[label]).items()}

    def grads(self, grads: Any) -> dict[str, Any]:
        """Gradients as the members take them, from what `reduce` made."""
        if self.axis is None:
            return self.split(grads)
        return {label: {k[len(label) + 1 :]: v for k, v in grads.items() if k.startswith(label + ".")} for label in self.each}  # fmt: skip

    def update(self, grads: Any, state: tuple[Any, ...], params: Any, *, norm: Norm = tree.norm) -> tuple[Any, Any]:
        known, own, parts = norm(grads), self.grads(grads), self.split(params)
        found: dict[str, Any] = {}
        states: list[Any] = []
        for (label, tx), s in zip(self.each.items(), state, strict=True):
            found[label], s = tx.update(own[label], s, parts[label], norm=lambda _: known)
            states.append(s)
        return self.joined(params, found), tuple(states)

    def step(self, grads: Any, state: tuple[Any, ...], params: Any, *, norm: Norm, ok: Tensor, donated: bool) -> tuple[Any, Any]:  # fmt: skip
        known, own, parts = norm(grads), self.grads(grads), self.split(params)
        found: dict[str, Any] = {}
        states: list[Any] = []
        for (label, tx), s in zip(self.each.items(), state, strict=True):
            found[label], s = guarded_step(tx, own[label], s, parts[label], norm=lambda _: known, ok=ok, donated=donated)  # fmt: skip
            states.append(s)
        return self.joined(params, found), tuple(states)

    def members(self, params: Any) -> list[Member]:
        parts = self.split(params)
        return [Member((i,), label, tx, parts[label]) for i, (label, tx) in enumerate(self.each.items())]
