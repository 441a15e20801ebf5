"""Which elements of which leaves a stored tensor holds, on this rank.

`shard` stores a run of a flat buffer, `offload` several leaves in one tensor. Neither changes a value, and a file of a run's state has to say
leaf by leaf what is where, so that another mesh can read it. Such a lens declares its layout (`Lens.layout`); layouts of lenses that follow
each other compose, and what they are told in is boxes: rows and columns of the leaves before the first of them.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import attrs
import torch
from torch import Tensor


class Box(NamedTuple):
    """A box of a leaf. Its elements lie one behind the other, last dimension fastest, from element `at` of the stored tensor on."""

    leaf: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    at: int = 0

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.sizes)


Boxes = tuple[Box, ...]
Held = Mapping[str, Boxes]  # stored tensor -> what it holds


def whole(leaf: str, shape: Iterable[int]) -> Boxes:
    """All of a leaf, as a stored tensor that is the leaf itself."""
    sizes = tuple(shape)
    return (Box(leaf, (0,) * len(sizes), sizes),)


def cut(box: Box, start: int, stop: int, at: int = 0) -> Iterator[Box]:
    """Elements start to stop of a box as boxes: at most 2d - 1 for d dimensions. They lie from `at` on.

    >>> for b in cut(Box("w", (0, 0), (4, 3)), 1, 10):
    ...     print(b.offsets, b.sizes, b.at)
    (0, 1) (1, 2) 0
    (1, 0) (2, 3) 2
    (3, 0) (1, 1) 8
    """
    if start >= stop:
        return
    if not box.sizes:
        yield box._replace(at=at)
        return
    (first, *offsets), sizes = box.offsets, box.sizes[1:]
    row = math.prod(sizes)
    a = min(stop, -(-start // row) * row)  # the whole rows: from a to b
    b = max(a, stop // row * row)
    for x, y in ((start, a), (a, b), (b, stop)):
        i = x // row
        if (x, y) == (a, b) and x < y:
            yield Box(box.leaf, (first + i, *offsets), ((y - x) // row, *sizes), at + x - start)
        else:
            part = Box(box.leaf, tuple(offsets), sizes)
            for p in cut(part, x - i * row, y - i * row, at + x - start):
                yield Box(box.leaf, (first + i, *p.offsets), (1, *p.sizes), p.at)


def joined(tensors: Iterable[tuple[int, Boxes]], start: int, stop: int) -> Boxes:
    """What elements start to stop of a concatenation hold, given the length of each tensor and what it holds. Padding holds nothing."""
    out, base = list[Box](), 0
    for length, boxes in tensors:
        for b in boxes:
            first = base + b.at
            low, high = max(start, first), min(stop, first + b.numel)
            out += cut(b, low - first, high - first, low - start)
        base += length
    return tuple(out)


@attrs.frozen(eq=False)
class Layout:
    """What the stored parameters of a site hold."""

    spec: Mapping[str, Tensor]  # the leaves before the first lens that changes the layout alone: meta tensors
    boxes: (
        Held | None
    )  # of them; None: not known, as a lens that says nothing of it splits leaves, or follows one that moves them
    host: frozenset[str] = frozenset()  # stored leaves that are kept in host memory

    @staticmethod
    def plain(spec: Mapping[str, Tensor]) -> "Layout":
        """Every leaf is stored as it is."""
        return Layout(spec, {k: whole(k, v.shape) for k, v in spec.items()})

    def after(
        self, f: Callable[[Held], Held] | None, spec: Mapping[str, Tensor], *, host: frozenset[str], split: bool
    ) -> "Layout":
        """The layout behind one more lens, which leaves `spec`; `f` is the lens's own layout, `split` says that ranks hold parts of its leaves."""
        if f is not None:
            host = host | (self.host & spec.keys())
            return Layout(self.spec, None if self.boxes is None else f(self.boxes), host)
        if not split and self.boxes == Layout.plain(self.spec).boxes:
            return Layout.plain(spec)
        return Layout(spec, None)


@attrs.frozen(eq=False)
class Part:
    """One stored tensor, for those who have to know what is in it: files, and optimizers that describe their state (`Optimizer.members`)."""

    name: str  # unique
    stored: Tensor  # meta: as it is in the tree, maybe a handle
    held: Tensor  # meta: as it is behind the handle
    boxes: Boxes  # leaves under their unique names
    shard: str = ""  # which part of how many, of leaves that ranks hold parts of
    host: bool = False
    window: Any = None  # of a handle: where the tensor is

    @property
    def dtype(self) -> torch.dtype:
        return self.held.dtype

    @property
    def nbytes(self) -> int:
        return self.held.nbytes
