"""Activations in a store: `Stash`, and the operators that write one away and bring it back."""

import itertools
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from fds._torch import opaque_operator
from fds.offload import handles
from fds.offload.handles import SHAPE, Held, Window

_STASHES: "weakref.WeakValueDictionary[int, Stash]" = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


class Stash:
    """Activations in a store: written in forward, read once in backward, in the reverse order."""

    def __init__(self, store: Any, ahead: int) -> None:
        self.window = Window(store, ahead)
        self.places: list[Held] = []
        self.free: list[bool] = []
        self.writing = True
        self.number = next(_NUMBERS)
        _STASHES[self.number] = self

    def put(self, x: Tensor) -> Tensor:
        """A handle of an activation, under the first key that is free: the same one in every step, so that reading ahead can learn the order."""
        with handles.LOCK:
            if not self.writing:
                self.window.boundary()
            self.writing = True
            i = self.free.index(True) if True in self.free else len(self.free)
            if i == len(self.free):
                self.places.append(Held(self.window, f"activation/{i}", Future(), (), x.dtype))
                self.free.append(False)
            held = self.places[i]
            self.free[i] = False
            return handles.renew(held, handles.owned(self.window, x.detach().to("cpu")))

    def get(self, handle: Tensor) -> Tensor:
        held = handles.find(handle)
        with handles.LOCK:
            self.writing = False
            self.free[self.places.index(held)] = True
        return self.window.get(held)


def _put_away(x: Tensor, number: int) -> Tensor:
    return _STASHES[number].put(x)


def _bring_back(handle: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device, number: int) -> Tensor:
    return _STASHES[number].get(handle).to(device, non_blocking=True)


def _put_away_shape(x: Tensor, number: int) -> Tensor:
    return x.new_empty(SHAPE, dtype=torch.float64, device="cpu")


def _bring_back_shape(handle: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device, number: int) -> Tensor:  # fmt: skip
    return torch.empty(shape, dtype=dtype, device=device)


PUT_AWAY = opaque_operator(
    "offload_put_away",
    "(Tensor x, int number) -> Tensor",
    _put_away,
    _put_away_shape,
)

BRING_BACK = opaque_operator(
    "offload_bring_back",
    "(Tensor handle, SymInt[] shape, ScalarType dtype, Device device, int number) -> Tensor",
    _bring_back,
    _bring_back_shape,
)
