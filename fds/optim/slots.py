"""Which tensor of an optimizer's state belongs to which parameter, and what it is called whatever stands around the rule."""

from collections.abc import Iterable, Iterator
from typing import Any

import attrs
import optree
import torch
from torch import Tensor

from fds import tree
from fds.layout import Part
from fds.optim.base import Optimizer


@attrs.frozen(eq=False)
class Slot:
    """One tensor of a state; or a part of one, of a buffer with several."""

    path: tuple[str, ...]  # in the state
    name: str  # the same for all parameters: "moments/mu", "updates", "hyper/b1"; "0/..." in a chain
    part: Part | None  # the parameter that it belongs to
    like: Tensor  # meta: as it is where it is not in a store
    elementwise: bool  # a number for each of the parameter's; else it fits this layout of the parameter alone
    host: bool
    window: Any  # of a store, where it is in one
    packed: bool = False  # the buffer at `path` has this tensor behind those of the slots before
    carried: bool = False  # a rank's own, which begins at zero under another layout


def slots(tx: Optimizer, params: Any, *, path: tuple[str, ...] = (), name: str = "", host: bool = False, window: Any = None) -> Iterator[Slot]:  # fmt: skip
    """The tensors of ``tx.init(params)``, for a tree with a `Part` in place of each parameter.

    >>> from fds import optim
    >>> from fds.layout import whole
    >>> w = torch.empty(2, device="meta")
    >>> [(s.name, s.part and s.part.name) for s in slots(optim.sgd(0.1, momentum=0.9), {"w": Part("w", w, w, whole("w", (2,)))})]
    [('updates', None), ('moments/momentum', 'w'), ('hyper/learning_rate', None), ('hyper/weight_decay', None), ('hyper/momentum', None)]
    """
    if tx.members is None:
        yield from _of_rule(tx, params, path, name, host, window)
        return
    for m in tx.members(params):
        inner = "/".join(filter(None, (name, m.name)))
        where = (*path, *map(str, m.path))
        if m.carried:
            for slot in slots(m.tx, m.params, path=where, name=inner, host=host, window=window):
                yield attrs.evolve(slot, carried=True)
        elif m.window is None:
            yield from slots(m.tx, m.params, path=where, name=inner, host=host or m.host, window=window)
        else:
            found = slots(m.tx, m.params, path=(*where, "1"), name=inner, host=host or m.host, window=m.window)
            yield from _packed(found, (*where, "0"))


def _packed(found: Iterable[Slot], path: tuple[str, ...]) -> Iterator[Slot]:
    """The state of `streamed`: tensors of one dtype, one behind the other, are a buffer below `path`."""
    dtypes: list[torch.dtype] = []
    for slot in found:
        if slot.like.dim() and slot.like.dtype not in dtypes:
            dtypes.append(slot.like.dtype)
        buffer = (*path, str(dtypes.index(slot.like.dtype))) if slot.like.dim() else None
        yield slot if buffer is None else attrs.evolve(slot, path=buffer, packed=True)


def _of_rule(tx: Optimizer, params: Any, path: tuple[str, ...], name: str, host: bool, window: Any) -> Iterator[Slot]:
    parts: list[Part] = optree.tree_leaves(params)
    depths = [len(p) for p in optree.tree_paths(params)]
    # One more level below each parameter, with its number for a key: in the state that key says whose the tensor is.
    number = iter(range(len(parts)))

    def below(part: Part) -> dict[str, Tensor]:
        return {f"\0{next(number)}": torch.empty_like(part.held)}

    numbered = tree.map(below, params)
    found: list[tuple[tuple[str, ...], Part | None, str, Tensor]] = []
    for keys, like in tree.paths(tx.init(numbered)):
        own = keys[-1].startswith("\0") if keys else False
        i = int(keys[-1][1:]) if own else -1
        kept = keys[:-1] if own else keys
        found.append((kept, parts[i] if own else None, "/".join(kept[: len(kept) - depths[i]] if own else kept), like))
    elementwise = all(part is None or like.shape == part.held.shape for _, part, _, like in found)
    home = host or any(p.host or p.window is not None for p in parts)  # of what belongs to several parameters
    for keys, part, what, like in found:
        yield Slot(
            path=(*path, *keys),
            name="/".join(filter(None, (name, what))),
            part=part,
            like=like,
            elementwise=elementwise,
            host=home if part is None else host or part.host,
            window=window if like.dim() else None,
        )
