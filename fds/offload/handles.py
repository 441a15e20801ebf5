"""Handles: three numbers that stand for a tensor in a store.

A stored tree holds handles where the tensors are away: ``[ticket, -ticket, MAGIC]`` in float64. They are data like any leaf, so that programs,
gradients and states stay trees of tensors, and a new generation is no new graph.

`fetch` is the operator from a handle to its tensor. Its derivative writes the gradient away and gives back a handle of it; what autograd or
microbatches add up, ``[sum of tickets, -sum, n MAGIC]``, stands for the sum of the gradients. A handle whose tensor was written again is
spent, as a donated state is: using it raises.
"""

import itertools
import math
import random
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor

from fds import tree
from fds._torch import opaque_operator, operator
from fds.memory import give_back_freed
from fds.offload.store import FileStore, HostStore, Reference

MAGIC = 7349.0
SHAPE = (3,)
_TICKETS = random.SystemRandom()
LOCK = threading.RLock()
_HELD: "weakref.WeakValueDictionary[int, Held]" = (
    weakref.WeakValueDictionary()
)  # by ticket; a window keeps its own alive
_GRADIENTS = 64  # of one tensor that nobody has taken yet


@attrs.define(eq=False)
class Held:
    """A tensor in a store: a parameter or a moment, with the gradients by it that wait to be taken."""

    window: "Window"
    key: str
    reference: Future[Reference]
    shape: tuple[int, ...]
    dtype: torch.dtype
    ticket: int = 0
    number: int = 0  # in the order in which tensors were put into the window's store
    gradients: "dict[int, tuple[Held, Tensor]]" = attrs.field(factory=dict[int, Any])  # with their squared norms
    factor: Tensor | None = None  # of a gradient: what it is to be multiplied by when it is read, in float32


@attrs.frozen(eq=False)
class Home:
    """Where the tensor of a handle is, and what it is, as far as a program knows that without having one."""

    window: "Window"
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@attrs.frozen
class Event:
    """Something that took time, in seconds of `time.perf_counter`: a "read" or a "write" of the store, or a "wait" of the caller for one."""

    kind: str
    key: str
    start: float
    stop: float
    nbytes: int


_RECORDS: list[list[Event]] = []  # the innermost last


@contextmanager
def record() -> Generator[list[Event]]:
    """Collect what stores do in the block: reads and writes that begin in it, and what the caller waits for.

    >>> with record() as events:
    ...     pass
    >>> events
    []
    """
    _RECORDS.append([])
    try:
        yield _RECORDS[-1]
    finally:
        _RECORDS.pop()


def _noted(kind: str, key: str, nbytes: int, future: Future[Any]) -> None:
    """Note the time that a future takes from now on."""
    start = time.perf_counter()
    if _RECORDS:
        events = _RECORDS[-1]
        future.add_done_callback(lambda _: events.append(Event(kind, key, start, time.perf_counter(), nbytes)))


def waited(key: str, future: Future[Any]) -> Any:
    """The result of a future, and a note of how long it took to come."""
    start = time.perf_counter()
    result = future.result()
    if _RECORDS:
        _RECORDS[-1].append(Event("wait", key, start, time.perf_counter(), 0))
    return result


def _pass_on(source: Future[Any], target: Future[Any]) -> None:
    error = source.exception()
    if error is None:
        target.set_result(source.result())
    else:
        target.set_exception(error)


class Window:
    """A store, with reading ahead and writing behind: at most `ahead` tensors are on their way in, and as many on their way out.

    What is read next is learned: the tensor that followed the last two when they were read in this order before. Forward, backward and update
    each have their order, and a guess that fails costs a read, never a value.
    """

    def __init__(self, store: Any, ahead: int) -> None:
        self.store, self.ahead = store, ahead
        if isinstance(store, FileStore):
            give_back_freed()
        self.names = itertools.count()
        self._after: dict[tuple[str | None, str | None], str | None] = {}
        self._last: tuple[str | None, str | None] = (None, None)
        self._coming: OrderedDict[str, tuple[Future[Reference], Future[Tensor]]] = OrderedDict()
        self._going: deque[Future[Reference]] = deque()
        self._lock = threading.Lock()
        self._current: dict[str, Held] = {}

    def put(self, key: str, x: Tensor) -> Future[Reference]:
        """Begin to write `x`, which nobody changes from now on."""
        self.settle(self.ahead)
        future: Future[Reference] = self.store.put(key, x)
        _noted("write", key, x.nbytes, future)
        self._going.append(future)
        return future

    def begin(self, key: str, reference: Future[Reference]) -> Future[Tensor]:
        """Begin to read a generation: at once, or as soon as it is written."""
        coming: Future[Tensor] = Future()
        box = [coming]  # emptied: a future keeps its callbacks, and this one would keep the tensor

        def read(known: Future[Reference]) -> None:
            coming = box.pop()
            try:
                future: Future[Tensor] = self.store.get(known.result())
            except BaseException as error:  # it was not written, or is spent: who asks for it is told
                coming.set_exception(error)
            else:
                _noted("read", key, known.result().nbytes, future)
                future.add_done_callback(lambda f: _pass_on(f, coming))

        reference.add_done_callback(read)
        return coming

    def settle(self, left: int = 0) -> None:
        """Wait until at most `left` tensors are on their way out."""
        while True:
            with self._lock:
                oldest = self._going.popleft() if len(self._going) > left else None
            if oldest is None:
                return
            waited("", oldest)

    def get(self, held: Held) -> Tensor:
        """The tensor, in host memory and the caller's own; those that came after it last time are begun."""
        with LOCK:
            known = self._coming.pop(held.key, None)
            if known is None or known[0] is not held.reference:
                known = held.reference, self.begin(held.key, held.reference)
            self._learn(held.key)
            self._read_ahead()
        return waited(held.key, known[1])

    def boundary(self) -> None:
        """Tensors are written from here on: what would be read next is not what is there now."""
        with LOCK:
            self._learn(None)
            self._coming.clear()

    def _learn(self, key: str | None) -> None:
        self._after[self._last] = key
        self._last = (self._last[1], key)

    def _read_ahead(self) -> None:
        last = self._last
        for _ in range(self.ahead):
            key = self._after.get(last)
            held = None if key is None else self._current.get(key)
            if key is None or held is None:
                return
            last = (last[1], key)
            if key not in self._coming:
                while len(self._coming) >= self.ahead:
                    self._coming.popitem(last=False)
                self._coming[key] = held.reference, self.begin(key, held.reference)

    def track(self, held: Held) -> None:
        self._current[held.key] = held

    def drop(self, held: Held) -> None:
        self._current.pop(held.key, None)
        self._coming.pop(held.key, None)


# --- from tensors to handles and back ---


def hold(window: Window, name: str, x: Tensor) -> Tensor:
    """A handle of `x`, which is written to the store under a key of its own."""
    number = next(window.names)
    key, x = f"{number}:{name}", x.detach().to("cpu")
    held = Held(window, key, window.put(key, owned(window, x)), tuple(x.shape), x.dtype, number=number)
    window.track(held)
    return _issue(held)


def owned(window: Window, x: Tensor) -> Tensor:
    """What a store may read while the caller goes on: a copy, but for stores that make one themselves."""
    return x if isinstance(window.store, HostStore) else x.clone(memory_format=torch.contiguous_format)


def promise(handle: Tensor) -> Future[Reference]:
    """Spend a handle: the numbers of a generation that is still to come are written over its own. `fulfil` says what it is."""
    with LOCK:
        held = find(handle)
        _HELD.pop(held.ticket, None)
        held.reference = Future()
        handle.detach().copy_(_issue(held))
        return held.reference


def fulfil(held: Held, promised: Future[Reference], x: Tensor) -> None:
    """Begin to write `x`, the caller's own and given up by it, as the generation that was promised."""
    held.window.put(held.key, x).add_done_callback(lambda f: _pass_on(f, promised))


def renew(held: Held, x: Tensor) -> Tensor:
    """A handle of `x`, the caller's own and given up by it, under the key of `held`. The handle before it is spent."""
    with LOCK:
        _HELD.pop(held.ticket, None)
        held.shape, held.dtype = tuple(x.shape), x.dtype
        held.reference = held.window.put(held.key, x)
        held.window.track(held)
        return _issue(held)


def _issue(held: Held) -> Tensor:
    with LOCK:
        held.ticket = _ticket()
        _HELD[held.ticket] = held
    return _handle(held.ticket)


def _ticket() -> int:
    while True:
        ticket = _TICKETS.randrange(1, 2**40)
        if ticket not in _HELD:
            return ticket


def _handle(ticket: int) -> Tensor:
    return torch.tensor([float(ticket), -float(ticket), MAGIC], dtype=torch.float64)


def is_handle(x: Tensor) -> bool:
    """Whether this is a handle, or a sum of them, by its numbers. Meta tensors are none."""
    if x.is_meta or not may_be_handle(x):
        return False
    ticket, negative, magic = (float(v) for v in x.detach().cpu())
    return magic >= MAGIC and magic % MAGIC == 0 and ticket == -negative and ticket > 0


def may_be_handle(x: Tensor) -> bool:
    """By its shape alone, so that abstract trees say the same."""
    return x.dtype == torch.float64 and tuple(x.shape) == SHAPE


def find(handle: Tensor) -> Held:
    """What a handle stands for. `ValueError` for a spent one, and for numbers that are no handle."""
    if not is_handle(handle):
        raise ValueError(
            f"offload: {[float(v) for v in handle]} is no handle of an offloaded tensor; was the stored tree cast, or changed by hand?"
        )
    held = _HELD.get(int(handle[0]))
    if held is None:
        raise ValueError(
            "offload: this state is spent: its parameters were written again by a later step, or it is of another process; use the state that the step returned"
        )
    return held


def read(handle: Tensor) -> Tensor:
    """The tensor of a handle, in host memory."""
    held = find(handle)
    return held.window.get(held)


def forget(stored: Any) -> None:
    """Delete the tensors in stores behind the handles of a tree, with the gradients that wait; the handles are spent. Other leaves stay.

    A store cannot see that a tree is thrown away: its tensors stay until the store is closed.
    """
    for leaf in tree.leaves(stored):
        if is_handle(leaf):
            held = find(leaf)
            for gradient, _ in held.gradients.values():
                delete(gradient)
            held.window.drop(held)
            delete(held)


def delete(held: Held) -> None:
    """Delete a tensor; its handle is spent."""
    held.window.store.delete(held.reference.result().key)
    _HELD.pop(held.ticket, None)


# --- gradients ---


def _deposit(gradient: Tensor, handle: Tensor) -> Tensor:
    held = find(handle)
    x = gradient.detach().to("cpu")
    flat, ticket = x.reshape(-1).float(), _ticket()
    key = f"{held.key}/gradient/{ticket}"
    reference = held.window.put(key, owned(held.window, x))
    new = Held(held.window, key, reference, tuple(x.shape), x.dtype, ticket)
    with LOCK:
        _HELD[ticket] = new
        held.gradients[ticket] = new, torch.dot(flat, flat)
        while len(held.gradients) > _GRADIENTS:
            delete(held.gradients.pop(next(iter(held.gradients)))[0])
    return _handle(ticket)


def _parts(handle: Tensor, gradient: Tensor) -> list[int]:
    """The tickets that a sum of gradient handles is made of: neighbours, in the order of their arrival."""
    held, total = find(handle), int(gradient[0])
    count = round(float(gradient[2]) / MAGIC)
    tickets = list(held.gradients)
    if is_handle(gradient):
        for i in range(len(tickets) - count + 1):
            if sum(tickets[i : i + count]) == total:
                return tickets[i : i + count]
    raise ValueError(
        f"offload: the gradient of {held.key!r} is not one that waits: it was scaled, taken already, or is older than the last {_GRADIENTS}; apply optimizers to the gradients as they come, through optim.streamed"
    )


def claim_gradient(handle: Tensor, gradient: Tensor) -> list[Held]:
    """The parts of a gradient, which are the caller's from now on: to be read by `sum_of`, and deleted. What else waits is deleted here."""
    held = find(handle)
    with LOCK:
        mine = [held.gradients.pop(t)[0] for t in _parts(handle, gradient)]
        for other, _ in held.gradients.values():
            delete(other)
        held.gradients.clear()
    return mine


def sum_of(parts: Sequence[Held]) -> Callable[[], Tensor]:
    """Begin to read tensors; the function waits for them and adds them up in their order."""
    coming = [p.window.begin(p.key, p.reference) for p in parts]

    def result() -> Tensor:
        total: Tensor = waited(parts[0].key, coming[0])
        for p, more in zip(parts[1:], coming[1:], strict=True):
            total = total.add_(waited(p.key, more))
        factor = parts[0].factor
        return total if factor is None else (total.float() if total.element_size() < 4 else total).mul_(factor)

    return result


def read_gradient(handle: Tensor, gradient: Tensor) -> Tensor:
    """The gradient behind `gradient`, of the parameter behind `handle`: a leaf of `value_and_grad`'s result and the same leaf of the stored tree."""
    held = find(handle)
    return sum_of([held.gradients[t][0] for t in _parts(handle, gradient)])()


def drop_gradient(handle: Tensor, gradient: Tensor) -> None:
    """Forget a gradient that nobody will take."""
    held = find(handle)
    for t in _parts(handle, gradient):
        delete(held.gradients.pop(t)[0])


def _square(handle: Tensor, gradient: Tensor) -> Tensor:
    held, tickets = find(handle), _parts(handle, gradient)
    if len(tickets) == 1:
        part, square = held.gradients[tickets[0]]
        return (square if part.factor is None else square * part.factor.square()).reshape(1)
    flat = read_gradient(handle, gradient).reshape(-1).float()
    return torch.dot(flat, flat).reshape(1)


def _no_batch(info: Any, dims: Any, *args: Any) -> Any:
    raise ValueError(
        "offload: vmap over an offloaded parameter or its gradient; use program.without('offload') for per-sample gradients"
    )


def _keep_handle(ctx: Any, args: tuple[Any, ...], out: Any) -> None:
    ctx.save_for_backward(args[0])


def _none(ctx: Any, args: tuple[Any, ...], out: Any) -> None:
    """Nothing is saved."""


def _second(ctx: Any, *cotangents: Any) -> Any:
    raise ValueError("offload: no second derivative by an offloaded parameter; use program.without('offload')")


def _deposit_shape(gradient: Tensor, handle: Tensor) -> Tensor:
    return torch.empty_like(handle)


_DEPOSIT = operator(
    "offload_deposit",
    "(Tensor gradient, Tensor handle) -> Tensor",
    primitive=_deposit,
    fake=_deposit_shape,
    batch=_no_batch,
    save=_none,
    backward=_second,
)


def _fetch(handle: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    held = find(handle)
    if held.shape != tuple(shape) or held.dtype != dtype:
        raise ValueError(
            f"offload: {held.key!r} is {held.shape} {held.dtype}, the program asks for {tuple(shape)} {dtype}"
        )
    return held.window.get(held).to(device, non_blocking=True)


def _fetch_shape(handle: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=torch.device("meta") if handle.is_meta else device)


def _fetch_backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    return _DEPOSIT(g, ctx.saved_tensors[0]), None, None, None


FETCH = operator(
    "offload_fetch",
    "(Tensor handle, int[] shape, ScalarType dtype, Device device) -> Tensor",
    primitive=_fetch,
    fake=_fetch_shape,
    batch=_no_batch,
    save=_keep_handle,
    backward=_fetch_backward,
)


def _scale(handle: Tensor, gradient: Tensor, factor: Tensor) -> Tensor:
    held = find(handle)
    for t in _parts(handle, gradient):
        held.gradients[t][0].factor = factor.to("cpu", copy=True)
    return gradient.clone()


def _scale_shape(handle: Tensor, gradient: Tensor, factor: Tensor) -> Tensor:
    return torch.empty_like(gradient)


# The gradient behind a handle times a 0-D factor, once, when it is read.
SCALED = opaque_operator(
    "offload_scaled",
    "(Tensor handle, Tensor gradient, Tensor factor) -> Tensor",
    _scale,
    _scale_shape,
)


def _square_shape(handle: Tensor, gradient: Tensor) -> Tensor:
    return handle.new_empty(1, dtype=torch.float32)


SQUARE = opaque_operator(
    "offload_square",
    "(Tensor handle, Tensor gradient) -> Tensor",
    _square,
    _square_shape,
)
