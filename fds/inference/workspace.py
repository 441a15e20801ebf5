"""Memory for generation that stays from call to call, and is given back and taken back when told to."""

from typing import Any

import torch
from torch import Tensor

from fds import tree


class Workspace:
    """Buffers of `generate`: cache, tokens, log-probabilities. Without one, every call has buffers of its own, which go when it ends.

        room = Workspace()
        fds.generate(program, stored, ids, max_new_tokens=64, workspace=room)
        room.release()                    # before a training step
        room.retake()                     # the same sizes again; or leave it to the next call

    It holds the buffers of one shape, those of the last call. Two calls at the same time need two of them.
    """

    def __init__(self) -> None:
        self._held: Any = None
        self._like: Any = None
        self._device: torch.device | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that are held now."""
        return 0 if self._held is None else tree.nbytes(self._held)

    def take(self, x: Any) -> Any:
        """`x`, a tree of tensors, in buffers of this workspace."""
        like, device = tree.map(_like, x), tree.flat(x)[0].device
        if self._held is None or device != self._device or not _same(like, self._like):
            self._held, self._like, self._device = tree.map(lambda t: t.clone(), x), like, device
            return self._held
        for old, new in zip(tree.flat(self._held), tree.flat(x), strict=True):
            old.copy_(new)
        return self._held

    def release(self) -> int:
        """Give the memory back; bytes that were held."""
        nbytes, self._held = self.nbytes, None
        if nbytes and torch.cuda.is_available():
            torch.cuda.empty_cache()
        return nbytes

    def retake(self) -> int:
        """Take as much again as the last call had; bytes that are held. Nothing before the first call."""
        if self._held is None and self._like is not None:
            self._held = tree.map(lambda t: torch.empty_like(t, device=self._device), self._like)
        return self.nbytes


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, device="meta")


def _same(a: Any, b: Any) -> bool:
    x, y = tree.flat(a), tree.flat(b)
    return len(x) == len(y) and all((s.shape, s.dtype) == (t.shape, t.dtype) for s, t in zip(x, y, strict=True))
