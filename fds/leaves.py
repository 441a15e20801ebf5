"""Logical parameters that are made when they are asked for: read from a file, or initialised. `Program.place` asks site by site.

So a program's stored tree is made of parameters that never exist all at once: of a site its leaves, and of the rest what is stored of it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

MAKE = "fds_make"  # attribute of a tensor on the meta device whose values can be had: ``make(name, tensor)`` gives them


def made(name: str, x: Tensor) -> Tensor:
    """A leaf, detached: itself, or what its own `MAKE` makes of it."""
    make = getattr(x, MAKE, None)
    return x.detach() if make is None or not x.is_meta else make(name, x)


class Leaves(Mapping[str, Tensor]):
    """Parameters by name; `make(name)` makes one, every time that it is asked for. Two that are asked for twice are equal, not the same."""

    def __init__(self, names: Sequence[str], make: Callable[[str], Tensor], what: str) -> None:
        self._names, self._make, self._what = dict.fromkeys(names), make, what

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return f"Leaves({len(self)} of {self._what})"


class Handed(Mapping[str, Tensor]):
    """`params`, and which memory was handed out."""

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        self._params, self._storages = params, set[int]()

    def __getitem__(self, name: str) -> Tensor:
        x = self._params[name]
        if not x.is_meta:
            self._storages.add(x.untyped_storage().data_ptr())
        return x

    def __contains__(self, name: object) -> bool:
        return name in self._params

    def __iter__(self) -> Iterator[str]:
        return iter(self._params)

    def __len__(self) -> int:
        return len(self._params)

    def shares(self, x: Tensor) -> bool:
        """Whether `x` is in memory that was handed out. Also where that was given back, and taken again for `x`."""
        return x.untyped_storage().data_ptr() in self._storages
