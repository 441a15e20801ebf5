"""Which part of a leaf each rank works with: `Cut`, and how many attention heads each rank has: `Heads`."""

from collections.abc import Callable, Sequence
from itertools import chain, product

import attrs
import torch
from torch import Tensor

from fds.layout import Box, Boxes
from fds.sharding import collectives
from fds.sharding.mesh import Axis

Range = tuple[int, int]  # start, length


@attrs.frozen
class Cut:
    """The ranges of a leaf's dimension `dim` that each rank works with.

    Ranks store their own ranges; or, with `whole`, all of the leaf, and the gradients of their parts are summed (key and value heads that
    several ranks need). No ranges: every rank works with all of it, on its part of the activations.
    """

    dim: int = 0
    ranges: tuple[tuple[Range, ...], ...] = ()  # by rank
    whole: bool = False

    def sizes(self) -> list[int]:
        """Elements of `dim` by rank."""
        return [sum(length for _, length in r) for r in self.ranges]

    def take(self, x: Tensor, rank: int) -> Tensor:
        """The part of a rank, a copy."""
        return torch.cat([x.narrow(self.dim, start, length) for start, length in self.ranges[rank]], self.dim)

    def boxes(self, leaf: Boxes, rank: int) -> Boxes:
        """What a rank stores, of a leaf that was stored as it is."""
        if self.whole:
            return leaf
        (box,) = leaf
        found, at = list[Box](), 0
        before, after, ranges = box.sizes[: self.dim], box.sizes[self.dim + 1 :], self.ranges[rank]
        # Several ranges of a dimension that is not the first alternate in memory: a box for each row of each.
        rows = list(product(*map(range, before))) if len(ranges) > 1 else [None]
        for row in rows:
            for start, length in ranges:
                offsets = ((0,) * self.dim if row is None else row, (start,), (0,) * len(after))
                sizes = (before if row is None else (1,) * self.dim, (length,), after)
                found.append(Box(box.leaf, tuple(chain(*offsets)), tuple(chain(*sizes)), at))
                at += found[-1].numel
        return tuple(found)

    def used(self, x: Tensor, axis: Axis) -> Tensor:
        """What this rank works with, of what it stores."""
        if not self.whole:
            return x
        x = collectives.fan_out(x, axis)
        return self.take(x, axis.rank) if self.ranges else x

    def restore(self, x: Tensor, axis: Axis) -> Tensor:
        """The whole leaf, of what this rank stores."""
        if self.whole or axis.size == 1:
            return x
        joined = collectives.join(x.contiguous(), axis, dim=self.dim, sizes=self.sizes())
        places: list[tuple[int, int, int]] = []
        at = 0
        for start, length in (r for ranges in self.ranges for r in ranges):
            places.append((start, at, length))
            at += length
        return torch.cat([joined.narrow(self.dim, at, length) for _, at, length in sorted(places)], self.dim)


SUMMED = Cut(whole=True)


def even(count: int, ranks: int) -> list[Range]:
    """`count` things over ranks, the first ones getting one more where it does not divide.

    >>> even(5, 2)
    [(0, 3), (3, 2)]
    """
    share, more = divmod(count, ranks)
    sizes = [share + (r < more) for r in range(ranks)]
    return [(sum(sizes[:r]), sizes[r]) for r in range(ranks)]


def scaled(ranges: Sequence[Range], unit: int, *, offset: int = 0) -> tuple[tuple[Range, ...], ...]:
    """One range per rank, in units of `unit` elements behind `offset`."""
    return tuple(((offset + start * unit, length * unit),) for start, length in ranges)


def side_by_side(*parts: Sequence[Sequence[Range]]) -> tuple[tuple[Range, ...], ...]:
    """The ranges of several parts of a leaf, by rank."""
    return tuple(tuple(r for part in by_rank for r in part) for by_rank in zip(*parts, strict=True))


@attrs.frozen
class Heads:
    """The query and key-value heads of each rank.

    Where there are as many key-value heads as ranks or more, they are split and the query heads follow. Where there are fewer, query heads
    are split, and each rank takes those key-value heads that its query heads look at; where they look at them unevenly, once per query head.
    """

    queries: tuple[Range, ...]  # by rank
    keys: tuple[tuple[int, ...], ...]  # by rank: which key-value heads
    repeated: bool  # several ranks have the same key-value head

    @staticmethod
    def of(queries: int, keys: int, ranks: int, error: Callable[[str], ValueError]) -> "Heads":
        group = queries // keys
        if keys >= ranks:
            split = even(keys, ranks)
            mine = tuple(tuple(range(start, start + length)) for start, length in split)
            return Heads(tuple((start * group, length * group) for start, length in split), mine, False)
        if queries < ranks:
            raise error(f"{queries} attention heads over {ranks} ranks; sizes that work: 1 to {queries}")
        split = even(queries, ranks)
        return Heads(tuple(split), tuple(_seen(start, length, group) for start, length in split), True)

    def key_ranges(self, unit: int, *, offset: int = 0) -> tuple[tuple[Range, ...], ...]:
        """The key-value heads of each rank as ranges of `unit` elements each."""
        return tuple(tuple((offset + h * unit, unit) for h in heads) for heads in self.keys)


def _seen(start: int, length: int, group: int) -> tuple[int, ...]:
    each = [h // group for h in range(start, start + length)]
    counts = {h: each.count(h) for h in each}
    return tuple(counts) if len(set(counts.values())) == 1 else tuple(each)
