"""What the tensors of a run's state hold: for each the leaves it is made of, under names that no layout changes."""

import math
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from fds import tree
from fds.layout import Box, Boxes, Layout, Part, whole
from fds.optim.slots import Slot, slots
from fds.program import Program
from fds.train import TrainStep
from fds.transform import parameters

_CPU = torch.device("cpu")
CARRIED = "carried/"  # names of what a lens keeps from step to step; it is a rank's own, and begins at zero under another layout
Shapes = Mapping[str, tuple[int, ...]]


@attrs.frozen(eq=False)
class Entry:
    """One tensor of a state on this rank, and what it holds of which leaves."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: Boxes  # of leaves under their names in the files
    leaves: Shapes
    device: torch.device
    window: Any = None  # of a store, where the tensor is in one
    path: str = ""  # in the state

    def behind(self, buffer: "Entry | None") -> "Entry":
        """A buffer of what it was and this entry."""
        at, boxes, leaves = (0, (), {}) if buffer is None else (buffer.shape[0], buffer.boxes, buffer.leaves)
        own = tuple(b._replace(at=at + b.at) for b in self.boxes)
        shape = (at + math.prod(self.shape),)
        return attrs.evolve(self, shape=shape, boxes=(*boxes, *own), leaves={**leaves, **self.leaves})

    def view(self, x: Tensor, box: Box) -> Tensor:
        """The elements of a box, of the tensor."""
        return x.reshape(-1)[box.at : box.at + box.numel].view(box.sizes)


def entries(step: TrainStep, home: torch.device) -> list[Entry]:
    """The tensors of a state, in its order. `home`: where those are that no transformation puts elsewhere."""
    sites = step.program.sites
    parts = {s: {k: _part(s, p, k) for k in p.spec} for s, p in sites.items()}
    shapes = {k: tuple(x.shape) for s, p in sites.items() for k, x in _leaves(s, p).items()}
    trainable = {s: {k: parts[s][k] for k in p} for s, p in step.program.trainable(step.program.spec).items()}
    known = {
        **{
            ("params", s, k): _carried(x, home) if k in sites[s].carries else _of_part(x, shapes, home)
            for s, each in parts.items()
            for k, x in each.items()
        },
        **{(k,): _single(k, x, _CPU) for k, x in step.spec._asdict().items() if isinstance(x, Tensor)},
        **{
            ("loss_scale", *k): _single("/".join(("loss_scale", *k)), x, _CPU)
            for k, x in tree.paths(step.spec.loss_scale)
        },
    }
    for slot in slots(step.tx, trainable):
        path, entry = ("optimizer", *slot.path), _of_slot(slot, shapes, home)
        known[path] = entry.behind(known.get(path)) if slot.packed else entry
    paths = [path for path, _ in tree.paths(step.spec)]
    for path in known.keys() ^ set(paths):
        raise ValueError(
            f"{'/'.join(path)}: a tensor of the optimizer's state that {'its init made' if path in known else 'no part of it accounts for'}; give the Optimizer its members (fds.optim.base)"
        )
    return [attrs.evolve(known[path], path="/".join(path)) for path in paths]


def _leaves(site: str, p: Program) -> dict[str, Tensor]:
    """Buffers, and parameters as they were before the first layout, under unique names."""
    spec = (p.layout.spec if p.layout is not None else p.spec).items()
    return {tree.qualified(site, k): x for k, x in [*p.spec.items(), *spec]}


def _part(site: str, p: Program, name: str) -> Part:
    """What a stored leaf holds."""
    leaf, home = p.spec[name], p.handles.get(name)
    layout = p.layout or Layout.plain(parameters(p))
    if layout.boxes is None:
        raise ValueError(
            f"{tree.qualified(site, name)}: {list(p.stack)} cannot be saved for any layout: a transformation without Lens.layout splits leaves over ranks, or follows one that moves them; put it before, or give it a layout"
        )
    held = leaf if home is None else torch.empty(home.shape, dtype=home.dtype, device="meta")
    boxes = layout.boxes[name] if name in layout.boxes else whole(name, leaf.shape)  # a buffer: no lens sees it
    return Part(
        name=tree.qualified(site, name),
        stored=leaf.detach(),
        held=held.detach(),
        boxes=tuple(b._replace(leaf=tree.qualified(site, b.leaf)) for b in boxes),
        shard=", ".join(f"{a.rank} of {a.size}" for a in p.axes.get(name, ())),
        host=name in layout.host,
        window=None if home is None else home.window,
    )


def _of_part(part: Part, shapes: Shapes, home: torch.device) -> Entry:
    return _entry("params/", part.boxes, part.held, shapes, _CPU if part.host else home, part.window)


def _carried(part: Part, home: torch.device) -> Entry:
    return _single(f"{CARRIED}{part.name} ({part.shard})", part.held, home)


def _of_slot(slot: Slot, shapes: Shapes, home: torch.device) -> Entry:
    kind, part, device = f"optimizer/{slot.name}", slot.part, _CPU if slot.host else home
    if slot.carried and part is not None:
        return _single(f"{CARRIED}{kind}/{part.name} ({part.shard})", slot.like, device, slot.window)
    if part is None:
        return _single(kind, slot.like, device, slot.window)
    if slot.elementwise:
        return _entry(f"{kind}/", part.boxes, slot.like, shapes, device, slot.window)
    first = part.boxes[0] if part.boxes else None
    alone = first is not None and first.sizes == shapes[first.leaf] == tuple(part.held.shape)
    name = first.leaf if first is not None and alone else f"{part.name} ({part.shard or 'whole'})"
    return _single(f"{kind}/{name}", slot.like, device, slot.window)


def _single(name: str, like: Any, device: torch.device, window: Any = None) -> Entry:
    """A tensor that is a leaf by itself."""
    return _entry("", whole(name, like.shape), like, {name: tuple(like.shape)}, device, window)


def _entry(kind: str, boxes: Boxes, like: Tensor, shapes: Shapes, device: torch.device, window: Any) -> Entry:
    held = [b for b in boxes if b.numel]
    named = tuple(b._replace(leaf=kind + b.leaf) for b in held)
    return Entry(tuple(like.shape), like.dtype, named, {kind + b.leaf: shapes[b.leaf] for b in held}, device, window)
