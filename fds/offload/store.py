"""Tensors by key outside the accelerator: `HostStore` in host memory, `FileStore` in files.

Both keep the same laws. A key is written whole or not at all: the new value goes to a place of its own, and one assignment under a lock
makes it the current one. Places of replaced values are taken again by later ones of their size, so that the steady state makes no file and
no buffer. Where a value is, and its checksum, is known only to the store that wrote it: a file by itself claims nothing, and an old file in
the place of a new one is found (`verify=True`).
"""

import contextlib
import ctypes
import errno
import itertools
import os
import threading
import uuid
import weakref
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Generator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from fds.offload import aio
from fds.offload._keyed import Reference, Store, StoreError, Value
from fds.offload._run_directory import claim, give_up

__all__ = ["FileStore", "HostStore", "Reference", "StoreError"]

P = TypeVar("P")
T = TypeVar("T")

_PART = 8 << 20  # bytes under one checksum: says where a value was altered; one part is checked while the next is read
_SECTOR = 4096  # sizes of places are rounded up to it, so that values of nearly one size share places


class HostStore(Store[Tensor]):
    """Values in host memory, page-locked where there is a CUDA device, at most `budget` bytes of them (None: no limit).

    While a key is written again its value before that is still there, and at most `window` buffers of replaced values wait for the next:
    both beyond the budget, none larger than the largest key.

    Law: `get` gives bitwise what was put.

    >>> with HostStore(1 << 20) as store:
    ...     reference = store.put("w", torch.ones(3)).result()
    ...     store.get(reference).result()
    tensor([1., 1., 1.])
    """

    def __init__(self, budget: int | None = None, *, window: int = 4) -> None:
        super().__init__(f"HostStore-{uuid.uuid4().hex[:8]}", window)
        self._budget = None if budget is None else _checked_budget("HostStore", budget)
        self._places = _Places[Tensor](aio.empty, lambda _: None, spare=window, each=False)

    def _write(self, reference: Reference, x: Tensor) -> Value[Tensor]:
        n = reference.nbytes
        self._reserve(reference)
        if not n:
            return Value(reference, None)
        place = self._places.take(n)
        try:
            _typed(place, reference).copy_(x)
        except BaseException:
            self._places.give(n, place)
            raise
        return Value(reference, place)

    def _reserve(self, reference: Reference) -> None:
        """Room for the value in the budget, or the error."""
        with self._lock:
            before = self._promised()
            self._coming.setdefault(reference.key, {})[reference.generation] = reference.nbytes
            after = self._promised()
            if self._budget is not None and after > max(before, self._budget):
                self._arrived(reference)
                raise StoreError(
                    errno.ENOSPC,
                    f"{self._name}: {reference.key!r} needs {after - before} bytes more, {self._bytes} are held and {before - self._bytes} on their way, the budget is {self._budget}; raise it, delete keys, or use a FileStore",
                    key=reference.key,
                    expected=after - before,
                    found=self._budget - before,
                )

    def _promised(self) -> int:
        """Bytes that may come to be held: of each key the largest of what it has and what is on its way."""
        held = {k: self._held[k].reference.nbytes if k in self._held else 0 for k in self._coming}
        return self._bytes + sum(max(0, max(sizes.values()) - held[k]) for k, sizes in self._coming.items())

    def _read(self, value: Value[Tensor], out: Tensor | None) -> Tensor:
        reference = value.reference
        out = _typed(aio.empty(reference.nbytes), reference) if out is None else out
        if value.place is not None:
            out.detach().copy_(_typed(value.place, reference))
        return out

    def _free(self, value: Value[Tensor]) -> None:
        if value.place is not None:
            self._places.give(value.reference.nbytes, value.place)

    def _end(self) -> None:
        self._places.trim()


class FileStore(Store[str]):
    """Values in files below `path`, one each, in a directory of this run; the last `budget` bytes that were used also in host memory.

    `window` puts and gets are under way at a time, the others wait; at most as many buffers are held, for tensors that are not contiguous
    host memory, and none is larger than the largest key. With `verify` every part of 8 MiB has a checksum, which is not in the file.
    Without it a value that was altered in its file, not shortened, is returned as it is.

    The directory belongs to the owner alone (0700, files 0600), and its lock to this process. Two stores never share one. It is removed at
    `close` and at the end of the process; what a killed one left, the next store on the path removes, and logs how many bytes.

    Nothing is flushed: the files serve the run that wrote them and outlive no crash. `fds.save_state` is for that.

    Law: `get` gives bitwise what was put.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as path, FileStore(path, verify=True) as store:
    ...     reference = store.put("w", torch.ones(3)).result()
    ...     store.get(reference).result()
    tensor([1., 1., 1.])

    Raises:
        ValueError: `path` is a file; a window, budget or settings that are none.
        OSError: the directory cannot be made.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        window: int = 4,
        budget: int = 0,
        verify: bool = False,
        settings: aio.Settings | None = None,
    ) -> None:
        self._cache = _Cache(_checked_budget("FileStore", budget))
        self._verify, self._serial = verify, itertools.count(1)
        super().__init__("FileStore", window)
        self.path, lock = claim(Path(path))
        self._name = str(self.path)
        self._remove = weakref.finalize(self, give_up, self.path, lock, os.getpid())
        self._engine = aio.Engine(aio.Settings() if settings is None else settings)
        self._places = _Places[str](self._make, _unlink, spare=window, each=True)
        self._buffers, self._submitting = _Buffers(), threading.Lock()

    @property
    def budget(self) -> int:
        """Bytes of values that may be in host memory besides."""
        return self._cache.budget

    @property
    def cached_nbytes(self) -> int:
        """Bytes of values in host memory, at most the budget."""
        return self._cache.used

    def _make(self, size: int) -> str:
        # Numbered, since a file serves one key after the other: no key is ever part of a path.
        path = self.path / f"{next(self._serial):08d}"
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        os.close(descriptor)
        return str(path)

    def _write(self, reference: Reference, x: Tensor) -> Value[str]:
        n = reference.nbytes
        if not n:
            return Value(reference, None)
        buffer = contextlib.nullcontext() if _plain(x) else self._buffers.of(n)
        with buffer as room:
            flat = _flat(x) if room is None else _flat(_typed(room, reference).copy_(x))
            value = self._save(reference, flat)
            try:
                self._cache.keep(reference.generation, flat)
            except BaseException:  # no memory
                self._free(value)
                raise
        return value

    def _save(self, reference: Reference, flat: Tensor) -> Value[str]:
        while True:
            try:
                return self._save_once(reference, flat)
            except OSError as error:
                # A full disk: files that only wait for values of their size are given up first.
                if error.errno in (errno.ENOSPC, errno.EDQUOT) and self._places.trim():
                    continue
                with self._lock:
                    old = self._held.get(reference.key)
                kept = f"generation {old.reference.generation} is kept" if old else "it has no value"
                raise _failure(f"put of {reference.key!r}, {flat.numel()} bytes", error, reference, kept) from error

    def _save_once(self, reference: Reference, flat: Tensor) -> Value[str]:
        n, place = flat.numel(), self._places.take(flat.numel())
        try:
            writing = self._asked(partial(self._engine.write, place, flat))
            try:
                sums = tuple(_sum(part) for part in _parts(flat)) if self._verify else ()
            finally:
                written = writing.result()  # `flat` is in use until then
            if written != n:
                raise StoreError(errno.EIO, f"{written} bytes of {n} were written", place, expected=n, found=written)
        except BaseException:
            self._places.give(n, place, broken=True)
            raise
        return Value(reference, place, sums)

    def _read(self, value: Value[str], out: Tensor | None) -> Tensor:
        reference = value.reference
        n, out = reference.nbytes, _typed(aio.empty(reference.nbytes), reference) if out is None else out
        if value.place is None:
            return out
        hot = self._cache.find(reference.generation)
        if hot is not None:
            out.detach().copy_(_typed(hot, reference))
            return out
        with contextlib.nullcontext() if _plain(out) else self._buffers.of(n) as room:
            flat = _flat(out) if room is None else room
            self._load(value, value.place, flat)
            self._cache.keep(reference.generation, flat)
            if room is not None:
                out.detach().copy_(_typed(room, reference))
        return out

    def _asked(self, submit: Callable[[], Future[T]]) -> Future[T]:
        """Pass on to the engine. It tells its next caller of a failure that nobody has asked for yet, who may be a put of another key;
        here every future is asked for, and no call may come between a future and the word that it is."""
        with self._submitting:
            future: Any = submit()
            future.asked = True
        return future

    def _load(self, value: Value[str], place: str, flat: Tensor) -> None:
        parts = _parts(flat) if value.sums else [flat]
        reads = [self._asked(partial(self._engine.read, place, part, offset=i * _PART)) for i, part in enumerate(parts)]
        what = f"get of {value.reference.key!r}, generation {value.reference.generation}, {flat.numel()} bytes"
        try:
            for i, (read, part) in enumerate(zip(reads, parts, strict=True)):
                read.result()
                if value.sums and _sum(part) != value.sums[i]:
                    raise StoreError(
                        errno.EBADMSG,
                        f"the {part.numel()} bytes from {i * _PART} have the checksum {_sum(part):#010x}, written were {value.sums[i]:#010x}: the file was altered, or the disk is failing",
                        place,
                        offset=i * _PART,
                        expected=value.sums[i],
                        found=_sum(part),
                    )
        except OSError as error:
            raise _failure(what, _cut(error, place, flat.numel()), value.reference, "put it again") from error
        finally:
            for read in reads:  # `flat` is in use until then
                read.exception()

    def _free(self, value: Value[str]) -> None:
        self._cache.forget(value.reference.generation)
        if value.place is not None:
            self._places.give(value.reference.nbytes, value.place)

    def _end(self) -> None:
        self._engine.close()
        self._cache.clear()
        self._remove()


# --- places ---


class _Places(Generic[P]):
    """Places of values by size. Those given back are taken again, at most `spare` of them wait (for each size in use, if `each`)."""

    def __init__(self, make: Callable[[int], P], destroy: Callable[[P], None], *, spare: int, each: bool) -> None:
        self._make, self._destroy, self._spare, self._each = make, destroy, spare, each
        self._lock, self._free, self._used = threading.Lock(), list[tuple[int, P]](), Counter[int]()

    def take(self, n: int) -> P:
        size = -(-n // _SECTOR) * _SECTOR
        with self._lock:
            self._used[size] += 1
            for i, (s, place) in enumerate(self._free):
                if s == size:
                    del self._free[i]
                    return place
        try:
            return self._make(size)
        except BaseException:
            self._unuse(size)
            raise

    def give(self, n: int, place: P, *, broken: bool = False) -> None:
        size = -(-n // _SECTOR) * _SECTOR
        self._unuse(size)
        with self._lock:
            if not broken:
                self._free.append((size, place))
            keep = self._spare * len(self._used) if self._each else self._spare
            first = max(len(self._free) - keep, 0)
            gone, self._free = [p for _, p in self._free[:first]], self._free[first:]
        for p in [*gone, *([place] if broken else [])]:
            self._destroy(p)

    def _unuse(self, size: int) -> None:
        with self._lock:
            self._used[size] -= 1
            if not self._used[size]:
                del self._used[size]

    def trim(self) -> bool:
        """Destroy what waits; whether there was any."""
        with self._lock:
            gone, self._free = self._free, []
        for _, place in gone:
            self._destroy(place)
        return bool(gone)


class _Cache:
    """Copies of the values used last, by generation, never more than `budget` bytes."""

    def __init__(self, budget: int) -> None:
        self.budget, self.used, self._lock = budget, 0, threading.Lock()
        self._copies: OrderedDict[int, Tensor] = OrderedDict()

    def find(self, generation: int) -> Tensor | None:
        with self._lock:
            if generation in self._copies:
                self._copies.move_to_end(generation)
            return self._copies.get(generation)

    def keep(self, generation: int, flat: Tensor) -> None:
        n = flat.numel()
        if n > self.budget:
            return
        with self._lock:
            if generation in self._copies:
                return
            while self.used + n > self.budget and self._copies:
                self.used -= self._copies.popitem(last=False)[1].numel()
            if self.used + n > self.budget:  # others are copying
                return
            self.used += n
        copy = None
        try:
            copy = aio.empty(n).copy_(flat)
        finally:
            with self._lock:
                if copy is None or generation in self._copies:
                    self.used -= n
                else:
                    self._copies[generation] = copy

    def forget(self, generation: int) -> None:
        with self._lock:
            copy = self._copies.pop(generation, None)
            self.used -= 0 if copy is None else copy.numel()

    def clear(self) -> None:
        with self._lock:
            self._copies.clear()
            self.used = 0


class _Buffers:
    """Buffers that are used again. There are as many as ever were in use at a time, each as large as the largest value it served."""

    def __init__(self) -> None:
        self._free, self._lock = list[Tensor](), threading.Lock()

    @contextlib.contextmanager
    def of(self, n: int) -> Generator[Tensor, None, None]:
        with self._lock:
            fit = [i for i, b in enumerate(self._free) if b.numel() >= n]
            buffer = self._free.pop(fit[0] if fit else -1) if self._free else None
        if buffer is None or buffer.numel() < n:
            buffer = None  # freed before the larger one is made
            buffer = aio.empty(n)
        try:
            yield buffer[:n]
        finally:
            with self._lock:
                self._free.append(buffer)


# --- bytes of tensors ---


def _plain(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.is_contiguous() and not x.is_conj() and not x.is_neg()


def _flat(x: Tensor) -> Tensor:
    return x.detach().view(-1).view(torch.uint8)


def _typed(flat: Tensor, reference: Reference) -> Tensor:
    return flat[: reference.nbytes].view(reference.dtype).view(reference.shape)


def _parts(flat: Tensor) -> list[Tensor]:
    return [flat[i : i + _PART] for i in range(0, flat.numel(), _PART)]


def _sum(part: Tensor) -> int:
    # CRC-32: 2 GB/s here, as fast as the disk, with the GIL released; blake2b, md5 and the SHA are four times slower.
    n = part.numel()
    return zlib.crc32((ctypes.c_ubyte * n).from_address(part.data_ptr()))


# --- what callers give ---


def _checked_budget(what: str, budget: Any) -> int:
    if type(budget) is not int or budget < 0:
        raise ValueError(f"{what}: budget is {budget!r}, required a number of bytes; 8 << 30 is 8 GiB")
    return budget


def _failure(what: str, error: OSError, reference: Reference, then: str) -> StoreError:
    return StoreError(
        error.errno or errno.EIO,
        f"{what}: {error.strerror or error}; {then}",
        error.filename,
        key=reference.key,
        **{k: getattr(error, k, None) for k in ("offset", "expected", "found")},
    )


def _cut(error: OSError, place: str, n: int) -> OSError:
    """The error of a file that is too short in terms of the whole value, not of the part that was read."""
    if error.errno != errno.ENODATA:
        return error
    size = os.stat(place).st_size if os.path.exists(place) else 0
    text = f"its file has {size} bytes, it was cut after it was written"
    return StoreError(errno.ENODATA, text, place, offset=size, expected=n, found=size)


def _unlink(path: str) -> None:
    with contextlib.suppress(OSError):  # somebody removed it already; the rest goes with the directory
        os.unlink(path)
