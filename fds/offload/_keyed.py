"""What stores have in common: keys, generations, futures, errors, and that no failure is lost."""

import contextlib
import errno
import itertools
import logging
import math
import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Generic, TypeVar

import attrs
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fds import tree
from fds.offload.blocks import Outcome

__all__ = ["LOG", "Reference", "Store", "StoreError", "Value"]

T = TypeVar("T")
P = TypeVar("P")
S = TypeVar("S", bound="Store[Any]")

LOG = logging.getLogger("fds.offload")


class StoreError(OSError):
    """What a store cannot do: `errno`, the text, the file if there is one, the key, and what was expected and found.

    An `OSError`, so that one ``except OSError`` around offloaded values sees a full disk, a truncated file, an altered one and a stale
    reference alike, and `errno` tells them apart: ``ENOSPC``, ``EDQUOT``, ``EFBIG``, ``EIO`` and so on come from the system, ``EBADMSG`` is a
    value that was altered, ``ESTALE`` a stale reference, ``ENOENT`` a key or a file that is gone. Arguments that no store would take
    (a key that is no string, an `out` of another shape, a closed store) are `ValueError`, as everywhere in fds.
    """

    def __init__(
        self,
        number: int,
        text: str,
        path: str | None = None,
        *,
        key: str | None = None,
        offset: int | None = None,
        expected: int | None = None,
        found: int | None = None,
    ) -> None:
        super().__init__(number, text, *([] if path is None else [path]))
        self.key, self.offset, self.expected, self.found = key, offset, expected, found


@attrs.frozen
class Reference:
    """One generation of a key: what `put` resolves to and `get` takes. `store` names the store, so that another one refuses it."""

    key: str
    generation: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    store: str = ""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@attrs.define(eq=False)
class Value(Generic[P]):
    """A generation that is held, until it is replaced and the last who reads it has left."""

    reference: Reference
    place: P | None  # None for a value without bytes
    sums: tuple[int, ...] = ()
    readers: int = 0
    replaced: bool = False


class Store(Generic[P]):
    """What the stores have in common: keys, generations, futures, and that no failure is lost.

    `_write`, `_read` and `_free` are the store's own; they run in `window` threads, and what is beyond waits in their queue.
    """

    def __init__(self, name: str, window: int) -> None:
        if type(window) is not int or window < 1:
            raise ValueError(
                f"{type(self).__name__}: window is {window!r}, required an int of at least 1; the default is 4"
            )
        self._name, self._pid, self._closed = name, os.getpid(), False
        self._lock, self._closing = threading.Lock(), threading.Lock()
        self._held: dict[str, Value[P]] = {}
        self._bytes = 0
        self._generations = itertools.count(1)  # of the store, not of the key: a key deleted and put again has another
        self._putting = Counter[str]()
        self._deleted: dict[str, int] = {}  # generations at which keys were deleted while puts of them were under way
        self._failed: list[Outcome[Any]] = []  # changed in place: the finalizer has it too
        self._coming: dict[str, dict[int, int]] = {}  # bytes of values on their way, by key and generation
        self._workers = ThreadPoolExecutor(window, thread_name_prefix="fds-store")
        weakref.finalize(self, _last_words, self._failed, self._pid)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._name}>"

    # --- what a store does with bytes ---

    def _write(self, reference: Reference, x: Tensor) -> Value[P]:
        raise NotImplementedError

    def _read(self, value: Value[P], out: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _free(self, value: Value[P]) -> None:
        raise NotImplementedError

    def _end(self) -> None:
        """Give up everything; nothing is under way any more."""

    # --- what callers see ---

    def put(self, key: str, x: Tensor) -> Future[Reference]:
        """Begin to write `x` under `key`; resolves to the reference of the new generation.

        Until then the generation before it stays, and after a failure too. `x` may be changed once the future is resolved, not before.
        Of several puts of a key the last begun wins; the references of the others are stale from the start. A tensor on an accelerator is
        read after what its current stream holds now.

        Raises:
            ValueError: a key that is no string; `x` without dense memory; a closed store.
            StoreError: an earlier put failed and nobody has asked its future so far. This call has then done nothing.
            From the future: a full disk, an I/O error, a budget that is used up.
        """
        self._enter()
        _check_put(key, x)
        with self._lock:
            reference = Reference(key, next(self._generations), tuple(x.shape), x.dtype, self._name)
            self._putting[key] += 1
        task = partial(self._put, reference, x.detach(), _moment(x))
        return self._submit(task, partial(self._end_put, reference), keeps=True)

    def get(self, reference: Reference, out: Tensor | None = None) -> Future[Tensor]:
        """Begin to read a generation, into `out` or a fresh tensor in host memory; resolves to it.

        A generation that was current when `get` was called is read whole, also if it is replaced meanwhile. After an error `out` holds
        anything.

        Raises:
            ValueError: `out` of another shape or dtype; a closed store.
            StoreError: a stale or foreign reference, a deleted key; an earlier put failed and nobody asked its future.
            From the future: an I/O error, a truncated file, an altered one with ``verify=True``.
        """
        self._enter()
        if not isinstance(reference, Reference):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(
                f"get: {reference!r} is a {type(reference).__name__}, required the Reference that put resolved to"
            )
        _check_out(reference, out)
        with self._lock:
            value = self._find(reference)
            value.readers += 1
        task = partial(self._get, value, out, None if out is None else _moment(out))
        return self._submit(task, partial(self._leave, value), keeps=False)

    def delete(self, key: str) -> None:
        """Forget a key, and puts of it that are under way. Reads that have begun come to their end.

        Raises:
            StoreError: there is no such key.
        """
        self._enter()
        with self._lock:
            value = self._held.pop(key, None)
            if value is None and not self._putting[key]:
                raise StoreError(
                    errno.ENOENT, f"delete: no key {key!r}; {tree.suggest(str(key), self._held)}", key=str(key)
                )
            if self._putting[key]:
                self._deleted[key] = next(self._generations)
            free = value is not None and self._replace(value)
        if free and value is not None:
            self._free(value)

    def keys(self) -> list[str]:
        """The keys that have a value, sorted."""
        self._enter()
        with self._lock:
            return sorted(self._held)

    @property
    def nbytes(self) -> int:
        """Bytes of the current values."""
        return self._bytes

    def close(self) -> None:
        """Wait for what is under way and give everything back. A second call does nothing.

        Raises:
            StoreError: a put failed and nobody asked its future.
        """
        with self._closing:
            if self._pid != os.getpid() or (self._closed and not self._failed):
                return
            self._closed = True
            self._workers.shutdown(wait=True)
            self._held, self._bytes = {}, 0
            self._end()
        self._tell("the store is closed now")

    def __enter__(self: S) -> S:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            self.close()
        except StoreError as lost:
            if kind is None:
                raise
            LOG.error("%s", lost)  # another error is on its way already

    # --- how ---

    def _enter(self) -> None:
        if self._pid != os.getpid():
            raise ValueError(
                f"{self._name}: made in process {self._pid}, used in its fork {os.getpid()}; make a store in each process"
            )
        if self._closed:
            raise ValueError(f"{self._name}: is closed; make another one")
        self._tell("this call did nothing")

    def _tell(self, then: str) -> None:
        """Raise what failed and nobody asked for."""
        if not self._failed:
            return
        with self._lock:
            lost = [f for f in self._failed if not f.asked]
            self._failed.clear()
        if lost:
            first, more = lost[0].exception(), len(lost) - 1
            raise StoreError(
                getattr(first, "errno", None) or errno.EIO,
                f"{self._name}: a put failed earlier and nobody asked its future{f' ({more} more did)' if more else ''}: {first}; {then}",
                key=getattr(first, "key", None),
            ) from first

    def _submit(self, task: Callable[[], T], done: Callable[[], None], *, keeps: bool) -> Outcome[T]:
        future = Outcome[T]()
        try:
            self._workers.submit(self._work, future, task, done, keeps)
        except RuntimeError:  # closed between the check and here
            done()
            raise ValueError(f"{self._name}: is closed; make another one") from None
        return future

    def _work(self, future: Outcome[T], task: Callable[[], T], done: Callable[[], None], keeps: bool) -> None:
        if not future.set_running_or_notify_cancel():
            return done()
        try:
            try:
                result = task()
            finally:
                done()  # before the future is resolved: who waits for it sees the store at rest
        except BaseException as error:
            if keeps:
                with self._lock:
                    self._failed[:] = [f for f in self._failed if not f.asked] + [future]
            future.set_exception(error)
        else:
            future.set_result(result)

    def _put(self, reference: Reference, x: Tensor, moment: Any) -> Reference:
        with _after(moment):
            value = self._write(reference, x)
        with self._lock:
            old = self._held.get(reference.key)
            self._arrived(reference)  # from here on it counts as held, or is gone
            late = old is not None and old.reference.generation > reference.generation
            if late or self._deleted.get(reference.key, 0) > reference.generation:
                old = value  # replaced before it was written
            else:
                self._held[reference.key] = value
                self._bytes += reference.nbytes
            free = old is not None and self._replace(old, counted=old is not value)
        if free and old is not None:
            self._free(old)
        return reference

    def _end_put(self, reference: Reference) -> None:
        key = reference.key
        with self._lock:
            self._arrived(reference)
            self._putting[key] -= 1
            if not self._putting[key]:
                del self._putting[key]
                self._deleted.pop(key, None)

    def _arrived(self, reference: Reference) -> None:
        sizes = self._coming.get(reference.key, {})
        sizes.pop(reference.generation, None)
        if not sizes:
            self._coming.pop(reference.key, None)

    def _get(self, value: Value[P], out: Tensor | None, moment: Any) -> Tensor:
        with _after(moment):
            return self._read(value, out)

    def _leave(self, value: Value[P]) -> None:
        with self._lock:
            value.readers -= 1
            free = value.replaced and not value.readers
        if free:
            self._free(value)

    def _replace(self, value: Value[P], *, counted: bool = True) -> bool:
        """Whether its place is free at once."""
        value.replaced = True
        self._bytes -= value.reference.nbytes if counted else 0
        return not value.readers

    def _find(self, reference: Reference) -> Value[P]:
        key, value = reference.key, self._held.get(reference.key)
        if reference.store != self._name:
            raise StoreError(
                errno.ESTALE,
                f"{key!r}: the reference is of {reference.store!r}, this is {self._name!r}; ask that store",
                key=key,
            )
        if value is None:
            hint = tree.suggest(key, self._held)
            raise StoreError(errno.ENOENT, f"{self._name}: no key {key!r}, it was deleted; {hint}", key=key)
        if value.reference.generation != reference.generation:
            raise StoreError(
                errno.ESTALE,
                f"{key!r}: the reference is of generation {reference.generation}, the current one is {value.reference.generation}; use the reference that the last put resolved to",
                key=key,
                expected=value.reference.generation,
                found=reference.generation,
            )
        if value.reference != reference:
            raise StoreError(errno.ESTALE, f"{key!r}: held as {value.reference}, asked for as {reference}", key=key)
        return value


# --- what callers give ---


def _last_words(failed: list[Outcome[Any]], pid: int) -> None:
    """Of a store that nobody closed."""
    for f in failed if os.getpid() == pid else []:
        if not f.asked:
            LOG.error("a put failed, nobody asked its future, and its store was not closed: %s", f.exception())


def _check_put(key: Any, x: Any) -> None:
    if not isinstance(key, str):
        raise ValueError(f"put: key {key!r} is a {type(key).__name__}, required a string")
    if not isinstance(x, Tensor):
        raise ValueError(f"put: {key!r} is a {type(x).__name__}, required a tensor")
    if x.layout != torch.strided or x.device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"put: {key!r} is {x.layout} on {x.device}, required dense memory on cpu or cuda; use .to_dense() or .cpu()"
        )
    if is_traceable_wrapper_subclass(x):
        raise ValueError(f"put: {key!r} is a {type(x).__name__}, which has no memory of its own; put its parts")


def _check_out(reference: Reference, out: Any) -> None:
    if out is None:
        return
    found = (tuple(out.shape), out.dtype) if isinstance(out, Tensor) else type(out).__name__
    if found != (reference.shape, reference.dtype):
        raise ValueError(
            f"get: {reference.key!r} is {reference.shape} of {reference.dtype}, out is {found}; give out=torch.empty_like(what was put), or none"
        )


def _moment(x: Tensor) -> Any:
    """What the accelerator has to finish before `x` may be read or written by another thread."""
    return torch.cuda.current_stream(x.device).record_event() if x.is_cuda else None


@contextlib.contextmanager
def _after(moment: Any) -> Generator[None, None, None]:
    """Copies beside the computation, on a stream of their own, done when this ends."""
    if moment is None:
        yield
        return
    stream = torch.cuda.Stream(moment.device)
    stream.wait_event(moment)
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()
