"""Asynchronous file I/O: tensors to and from files in parallel blocks, past the page cache.

A read or write is cut into blocks. Every submitter passes blocks on to threads of its own, each of which waits in one system call
(`preadv`, `pwritev`) with the GIL released, so nothing has to be compiled. On the disks where this was measured that is faster than one
thread that queues requests for the kernel (libaio, io_uring): pinning pages and completing requests is work too, and here all cores do it.

Where direct I/O needs alignment and a request has none, its aligned middle still goes past the page cache and its ragged ends, less than a
page each, go through it: the kernel keeps two writers of the same page apart there, which no read-modify-write of our own could. Direct
I/O on either side of the end is in other pages, and the kernel writes the end's page back before a direct read of it: both see one file.

Data has reached the file when a future resolves, not the platter: `os.fsync` is the caller's, once for many writes.
"""

import atexit
import contextlib
import itertools
import mmap
import os
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from queue import SimpleQueue
from types import TracebackType
from typing import Any, cast

import attrs
import torch
from torch import Tensor

from fds import tree
from fds.offload.blocks import ALIGN, Notes, Path, Request, Span

__all__ = ["Engine", "Settings", "empty"]

MOST_THREADS = 1024
HUGE = 2 * 2**20  # bytes of a huge page: with them, writes and reads measured 10 to 20% faster (fewer pages to pin)

_COUNTS, _SWITCHES = ("block_size", "queue_depth", "thread_count"), ("single_submit", "overlap_events", "use_gds")


@attrs.frozen(kw_only=True)
class Settings:
    """How an `Engine` works; names and defaults are DeepSpeed's. What cannot be done is refused with `ValueError`, nothing is ignored.

    block_size: bytes of one system call, a multiple of 4,096 (of the page size where that is larger).
    queue_depth: blocks in flight for each submitter; so many threads wait for the disk.
    thread_count: submitters. The blocks of a request are dealt out to all of them. DeepSpeed's code calls it `intra_op_parallelism`.
    single_submit: a submitter passes on one block at a time, instead of as many at once as there is room for.
    overlap_events: a block that finishes makes room for another at once. If false, a submitter's next batch (of `queue_depth` blocks at
    most) starts when its last has finished.
    use_gds: refused: everything passes through host memory.

    >>> Settings.of({"block_size": 4194304, "intra_op_parallelism": 2}).thread_count
    2
    """

    block_size: int = 2**20
    queue_depth: int = 8
    thread_count: int = 1
    single_submit: bool = False
    overlap_events: bool = True
    use_gds: bool = False

    def __attrs_post_init__(self) -> None:
        for name in _COUNTS:
            value: Any = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}: given {value!r}, allowed a whole number of at least 1")
        for name in _SWITCHES:
            value = getattr(self, name)
            if type(value) is not bool:
                raise ValueError(f"{name}: given {value!r}, allowed True or False")
        if self.block_size % ALIGN:
            near = -(-self.block_size // ALIGN) * ALIGN
            raise ValueError(
                f"block_size: given {self.block_size}, allowed multiples of {ALIGN}, since direct I/O moves whole blocks; use {near}"
            )
        if (threads := self.queue_depth * self.thread_count) > MOST_THREADS:
            raise ValueError(
                f"queue_depth x thread_count: given {self.queue_depth} x {self.thread_count} = {threads}, allowed {MOST_THREADS}, since "
                "each block in flight has a thread; use less of one (8 to 32 in all keep a disk busy; `python -m fds.offload.tune PATH`)"
            )
        if self.use_gds:
            raise ValueError(
                "use_gds: given True, allowed False: files are read and written by way of host memory, and cuFile (GPUDirect Storage) is "
                "not used; leave it out, and take buffers from `empty`, which are page-locked where there is CUDA"
            )

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "Settings":
        """Settings from DeepSpeed's `"aio"` dictionary. `ValueError` for a key that is not one of them, with the nearest name."""
        options = dict(options)
        allowed = [*_COUNTS, *_SWITCHES, "intra_op_parallelism"]
        for key in options:
            if key not in allowed:
                raise ValueError(f"aio: {key!r} is unknown; {tree.suggest(str(key), allowed)}")
        if "intra_op_parallelism" in options:
            count = options.pop("intra_op_parallelism")
            if options.setdefault("thread_count", count) != count:
                raise ValueError(
                    f"aio: intra_op_parallelism is {count!r} and thread_count {options['thread_count']!r}, two names of one setting; "
                    "give one of them"
                )
        return cls(**options)

    def aio(self) -> dict[str, Any]:
        """These settings as DeepSpeed's `"aio"` dictionary, with the name that its code reads: `intra_op_parallelism`."""
        return {("intra_op_parallelism" if k == "thread_count" else k): v for k, v in attrs.asdict(self).items()}


_DEFAULT = Settings()


def empty(n_bytes: int) -> Tensor:
    """A uint8 buffer [n_bytes] that direct I/O takes as it is: it begins at a page; page-locked where there is CUDA.

    Elsewhere it is made of huge pages where the system grants them.

    >>> empty(10).data_ptr() % 4096
    0
    """
    if n_bytes < 0:
        raise ValueError(f"empty: given {n_bytes} bytes, allowed 0 or more")
    if not n_bytes:
        return torch.empty(0, dtype=torch.uint8)
    if torch.cuda.is_available():
        whole = torch.empty(n_bytes + ALIGN, dtype=torch.uint8, pin_memory=True)
        return whole[(start := -whole.data_ptr() % ALIGN) : start + n_bytes]
    slack = HUGE if n_bytes >= HUGE else 0
    memory = mmap.mmap(-1, n_bytes + slack, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if slack and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % slack if slack else 0
    return torch.frombuffer(memory, dtype=torch.uint8, count=n_bytes, offset=start)  # keeps `memory` alive


class _Submitter:
    """Blocks that wait, and threads for those in flight."""

    def __init__(self, settings: Settings, name: str) -> None:
        self.settings = settings
        self.lock = threading.Lock()
        self.waiting: deque[tuple[Request, Iterator[Span]]] = deque()
        self.in_flight, self.closing = 0, False
        self.ready: SimpleQueue[tuple[Request, Span] | None] = SimpleQueue()
        self.threads = [
            threading.Thread(target=self.work, name=f"{name}.{i}", daemon=True) for i in range(settings.queue_depth)
        ]
        for thread in self.threads:
            thread.start()

    def add(self, request: Request, spans: Iterator[Span]) -> None:
        with self.lock:
            self.waiting.append((request, spans))
            self.advance()

    def advance(self) -> None:
        """Pass on what there is room for; the lock is held."""
        if self.in_flight and not self.settings.overlap_events:
            return
        room = self.settings.queue_depth - self.in_flight
        batch = list(itertools.islice(self.blocks(), room))
        if self.settings.single_submit:
            for block in batch:
                self.submit([block])
        elif batch:
            self.submit(batch)
        if self.closing and not self.in_flight:
            self.ready.put(None)

    def blocks(self) -> Iterator[tuple[Request, Span]]:
        while self.waiting:
            request, spans = self.waiting[0]
            span = next(spans, None)
            if span is None:
                self.waiting.popleft()
            else:
                yield request, span

    def submit(self, batch: list[tuple[Request, Span]]) -> None:
        """One submission."""
        self.in_flight += len(batch)
        for block in batch:
            self.ready.put(block)

    def work(self) -> None:
        between: list[Tensor] = []

        def spare() -> Tensor:
            if not between:
                between.append(empty(self.settings.block_size))
            return between[0]

        while (block := self.ready.get()) is not None:
            request, span = block
            try:
                if request.error is None:
                    request.transfer(span, spare)
            except BaseException as error:
                request.fail(error)
            with self.lock:
                self.in_flight -= 1
                self.advance()
            if request.done_with_one():
                request.finish()
            del block, request  # while this thread sleeps it shall not keep a tensor alive
        self.ready.put(None)  # for the next thread

    def stop(self) -> None:
        """Let the threads end when nothing waits."""
        with self.lock:
            self.closing = True
            if not self.in_flight:
                self.ready.put(None)


class _Pool:
    """All that works for one engine. It does not know the engine, so that one which nobody has any more can go."""

    def __init__(self, settings: Settings, say: bool) -> None:
        self.settings, self.process = settings, os.getpid()
        self.notes = Notes(say)
        self.turn = 0
        self.requests: SimpleQueue[Request | None] = SimpleQueue()
        self.submitters = [_Submitter(settings, f"fds-aio-{i}") for i in range(settings.thread_count)]
        # Opening a file and making room in it can take long (a network, a file that is being written): not in the caller's thread.
        self.opener = threading.Thread(target=self.open, name="fds-aio-open", daemon=True)
        self.opener.start()

    def open(self) -> None:
        while (request := self.requests.get()) is not None:
            try:
                request.open(self.settings.block_size)
            except BaseException as error:
                request.fail(error)
                request.left = 0
            if request.left:
                self.deal(request)
            else:
                request.finish()
            del request
        for submitter in self.submitters:
            submitter.stop()

    def deal(self, request: Request) -> None:
        """Blocks to all submitters in turn; the next request begins where this one ends, so that small ones are spread too."""
        n, block, count = (
            len(self.submitters),
            self.settings.block_size,
            request.left,
        )  # which falls from the first block on
        for i in range(min(n, count)):
            self.submitters[(self.turn + i) % n].add(request, itertools.islice(request.spans(block), i, None, n))
        self.turn = (self.turn + count) % n

    def threads(self) -> list[threading.Thread]:
        return [self.opener, *(t for s in self.submitters for t in s.threads)]

    def forgotten(self) -> Iterator[BaseException]:
        """Errors of writes that nobody was told of."""
        while self.notes.failed:
            future = self.notes.failed.popleft()
            if not future.asked and (error := future.exception()) is not None:
                yield error

    def stop(self) -> None:
        self.requests.put(None)

    def drain(self) -> None:
        """Wait for everything, end the threads, raise what nobody was told of: the first, with the others as causes."""
        if self.process != os.getpid():
            return  # forked: the threads are the parent's
        self.stop()
        for thread in self.threads():
            thread.join()
        errors = list(self.forgotten())
        for error, cause in itertools.pairwise(errors):
            error.__cause__ = cause
        if errors:
            raise errors[0]


class Engine:
    """Reads and writes in the background. A context manager; `close` waits for all of them, and a closed one raises `ValueError`.

    Futures resolve in any order, and requests that overlap in a file are not ordered: wait for a write before reading it. A callback of a
    future runs in a thread of the engine and must not wait for another. An error of a write is raised by its future; if nobody asked
    the future by then, by the next call and by `close`. After an error the bytes of that request are undefined.

    say: warn, once for each file system, where direct I/O is refused.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, Engine() as engine:
    ...     engine.write(f"{folder}/x", torch.arange(3)).result()
    ...     engine.read(f"{folder}/x", torch.zeros(2, dtype=torch.int64), offset=8).result()
    24
    tensor([1, 2])
    """

    def __init__(self, settings: Settings = _DEFAULT, *, say: bool = True) -> None:
        self.settings = settings
        self._pool = _Pool(settings, say)
        self._lock = threading.Lock()
        self._closed = False
        atexit.register(self._pool.drain)  # a write that was accepted is carried out, even if nobody waits
        weakref.finalize(self, self._pool.stop).atexit = False

    def read(self, path: Path, out: Tensor, *, offset: int = 0) -> Future[Tensor]:
        """Fill `out` (CPU, contiguous, any dtype) from byte `offset` of the file on; the future has `out`, which is not to be used before.

        The future has `OSError` with errno, path, offset, bytes expected and found where the file has less (ENODATA) or cannot be read.
        """
        _check("read", out, offset)
        if not out.is_inference():
            torch.autograd.graph.increment_version(out)  # whoever saved it for a backward is told that it has changed
        return self._submit(path, out, offset, write=False)

    def write(self, path: Path, x: Tensor, *, offset: int = 0) -> Future[int]:
        """Write the bytes of `x` (CPU, contiguous, any dtype) at byte `offset`; the future has their number. `x` must not change before.

        A file that is not there is made, for its owner only (0600); one that is there keeps its other bytes. The future has `OSError`
        with errno, path and offset (ENOSPC, EFBIG, EIO, ...).
        """
        _check("write", x, offset)
        return self._submit(path, x, offset, write=True)

    def _submit(self, path: Path, x: Tensor, offset: int, *, write: bool) -> Future[Any]:
        if self._pool.process != os.getpid():
            raise ValueError("Engine: made before a fork, whose threads this process has not; make one here")
        with self._lock:
            if self._closed:
                raise ValueError("Engine: closed; make another, or close it later")
            for error in self._pool.forgotten():
                raise error
            request = Request(path, x, offset, write=write, notes=self._pool.notes)
            self._pool.requests.put(request)
        return request.future

    def close(self) -> None:
        """Wait for all requests and end the threads; raises the error of a write whose future nobody asked. Closing twice is fine."""
        if threading.current_thread() in self._pool.threads():
            raise ValueError("Engine: close() in a callback would wait for itself; close it in the thread that made it")
        with self._lock:
            closed, self._closed = self._closed, True
        if not closed:
            try:
                self._pool.drain()
            finally:
                if not any(t.is_alive() for t in self._pool.threads()):  # else interrupted: the exit waits for the rest
                    atexit.unregister(self._pool.drain)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception as error:
            if value is None:
                raise
            warnings.warn(f"while another error was on its way, a write had failed too: {error}", stacklevel=2)


def _check(act: str, x: Tensor, offset: int) -> None:
    if x.device.type != "cpu" or x.layout != torch.strided:
        raise ValueError(
            f"{act}: given a {x.layout} tensor on {x.device}, allowed a dense one on the CPU; use x.to('cpu')"
        )
    if not x.is_contiguous():
        raise ValueError(
            f"{act}: given strides {tuple(x.stride())} of shape {tuple(x.shape)}, allowed a contiguous tensor; use x.contiguous()"
        )
    if x.is_conj() or x.is_neg():
        raise ValueError(
            f"{act}: given a lazy conjugate or negative, whose memory has other values; use x.resolve_conj().resolve_neg()"
        )
    if type(cast(Any, offset)) is not int or offset < 0:
        raise ValueError(f"{act}: given offset {offset!r}, allowed a whole number of bytes, 0 or more")
