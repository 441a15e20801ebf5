"""One read or write of `fds.offload.aio`: its descriptors, its blocks, and how each of them gets to the disk."""

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, TimeoutError
from typing import Any, TypeVar

from torch import Tensor

__all__ = ["ALIGN", "Notes", "Outcome", "Path", "Request", "Span", "memory_of"]

T = TypeVar("T")
Path = str | os.PathLike[str]
Span = tuple[int, int]  # file positions: first byte, and the one behind the last

# Of file positions. A page, because the page cache is kept in pages and a page must not be written both ways at once; 4,096 at least,
# because that is the logical block of some disks.
ALIGN = max(4096, mmap.PAGESIZE)


def memory_of(x: Tensor) -> memoryview:
    """The memory of `x`, whatever its dtype; `x` has to outlive it."""
    return memoryview((ctypes.c_char * x.nbytes).from_address(x.data_ptr())).cast("B")


class Outcome(Future[T]):
    """A future that knows whether somebody has been told of its error."""

    asked = False

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self.asked = True  # before it is known: whoever waits here will be told, and another thread's call shall not be
        try:
            return super().exception(timeout)
        except TimeoutError:
            self.asked = False
            raise

    def result(self, timeout: float | None = None) -> T:
        self.exception(timeout)
        return super().result()


class Notes:
    """What an engine remembers of requests that are over."""

    def __init__(self, say: bool) -> None:
        self.say = say
        self.failed: deque[Outcome[Any]] = deque()  # writes
        self.buffered: set[int] = set()  # file systems that refuse direct I/O, and of which that was said


_AS_IT_IS, _BOUNCE, _BUFFERED = range(3)  # ways to move a block, each tried when the one before is refused


class Request:
    """A read or a write: its descriptors, how many of its blocks are left, and its first error."""

    def __init__(self, path: Path, x: Tensor, offset: int, *, write: bool, notes: Notes) -> None:
        self.path, self.offset, self.size, self.write, self.notes = os.fspath(path), offset, x.nbytes, write, notes
        self.tensor: Tensor | None = x
        self.view, self.address = memory_of(x), x.data_ptr()
        self.future: Outcome[Any] = Outcome()
        self.future.set_running_or_notify_cancel()  # the kernel may have the buffer from now on: too late for cancel()
        self.lock = threading.Lock()
        self.way, self.left, self.device = _AS_IT_IS, 0, -1
        self.main, self.other = -1, -1  # descriptors: direct where possible; and a buffered one, when one is needed
        self.middle: Span = offset, offset + self.size  # what is cut into blocks; the ragged ends are outside of it
        self.error: BaseException | None = None

    def open(self, block: int) -> None:
        """Open the file, make room in it, and count the blocks."""
        flags = os.O_WRONLY | os.O_CREAT if self.write else os.O_RDONLY
        try:
            self.main = os.open(self.path, flags, 0o600)
        except OSError as error:
            raise self.failure(error, self.offset) from None
        # Not by opening it once more without: what waits to be opened (a fifo) would wait twice.
        with contextlib.suppress(OSError):
            fcntl.fcntl(self.main, fcntl.F_SETFL, getattr(os, "O_DIRECT", 0))
        status = os.fstat(self.main)
        self.device = status.st_dev
        if not _is_direct(self.main):
            self.do_with(_BUFFERED)
        elif self.write and self.size > block and self.offset + self.size > status.st_size:
            self.allocate()
        # Decided here and kept: the submitters cut the request by themselves, and `way` can change while they do.
        first, last = -(-self.offset // ALIGN) * ALIGN, (self.offset + self.size) // ALIGN * ALIGN
        if self.way != _BUFFERED and first < last:
            self.middle = first, last
        self.left = sum(1 for _ in self.spans(block))

    def allocate(self) -> None:
        """Blocks and length for the whole write at once.

        A direct write that makes a file longer locks everybody else out of it, one that fills it in does not: 2.1 against 2.6 GB/s on
        ext4. And a disk that is too full says so before anything is written. Python's posix_fallocate would do, but where a file
        system cannot do it glibc imitates it by writing zeros, over what others write there at the same time.
        """
        number = _fallocate(self.main, self.offset, self.size)
        if number in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO):
            raise self.failure(OSError(number, os.strerror(number)), self.offset)

    def spans(self, block: int) -> Iterator[Span]:
        """The blocks: aligned ones, with a ragged one before and behind them."""
        start, stop = self.offset, self.offset + self.size
        first, last = self.middle
        if start < first:
            yield start, first
        for at in range(first, last, block):
            yield at, min(at + block, last)
        if last < stop:
            yield last, stop

    def transfer(self, span: Span, spare: Callable[[], Tensor]) -> None:
        """Move one block, in as many calls as it takes."""
        at, stop = span
        least = _AS_IT_IS
        while at < stop:
            # What is left of a block after a call that did less than asked goes by the page cache: unaligned, and it brings the reason.
            way = _BUFFERED if at % ALIGN or stop % ALIGN else max(self.way, least)
            try:
                moved = self.move(at, stop, way, spare)
            except OSError as error:
                if error.errno != errno.EINVAL or way == _BUFFERED:
                    raise self.failure(error, at) from None
                # A bounce block is aligned where the tensor is not. If that is not the cause, it is the file system.
                least = _BOUNCE if way == _AS_IT_IS and (self.address - self.offset) % ALIGN else _BUFFERED
                continue
            if not moved:
                raise self.short(at)
            if least > self.way and moved == stop - at:
                self.do_with(least)  # not if it moved less: then a limit was met, and the way was none of the reasons
            at += moved

    def move(self, at: int, stop: int, way: int, spare: Callable[[], Tensor]) -> int:
        """One system call; bytes moved."""
        call = os.pwritev if self.write else os.preadv
        begin, end = at - self.offset, stop - self.offset
        if way != _BOUNCE:
            return call(self.buffered() if way == _BUFFERED else self.main, [self.view[begin:end]], at)
        between = spare()
        view = memory_of(between)[: end - begin]
        if self.write:
            # Assigning to a slice of a memoryview would keep the GIL, this does not.
            ctypes.memmove(between.data_ptr(), self.address + begin, end - begin)
        moved = call(self.main, [view], at)
        if not self.write:
            ctypes.memmove(self.address + begin, between.data_ptr(), moved)
        return moved

    def buffered(self) -> int:
        """A descriptor of the same file, whatever its path leads to by now, that goes through the page cache."""
        with self.lock:
            if not _is_direct(self.main):
                return self.main
            if self.other < 0:
                self.other = os.open(f"/proc/self/fd/{self.main}", os.O_WRONLY if self.write else os.O_RDONLY)
                os.posix_fadvise(self.other, 0, 0, os.POSIX_FADV_RANDOM)  # no readahead around a ragged end
            return self.other

    def do_with(self, way: int) -> None:
        """Do the blocks to come in this way too, and say so once if direct I/O is given up."""
        with self.lock:
            self.way = max(self.way, way)
            said = way != _BUFFERED or self.device in self.notes.buffered or not self.notes.say
            self.notes.buffered |= {self.device} if way == _BUFFERED else set()
        if not said:
            warnings.warn(
                f"{self.path}: this file system refuses direct I/O (tmpfs does): reads and writes go through the page cache, and what the "
                "engine measures is memory; choose a path on a disk if that is not meant. Said once for each file system.",
                stacklevel=2,
            )

    def failure(self, error: OSError, at: int) -> OSError:
        """`error` with what was asked and how far it came."""
        number, act = error.errno or errno.EIO, "write" if self.write else "read"
        fix = _FIXES.get(number, "")
        return OSError(
            number,
            f"{os.strerror(number)}: {act} of {self.size} bytes at offset {self.offset}, stopped at offset {at}"
            f"{'; ' + fix if fix else ''}",
            self.path,
        )

    def short(self, at: int) -> OSError:
        if self.write:
            return self.failure(OSError(errno.EIO, ""), at)
        length = os.fstat(self.main).st_size
        return OSError(
            errno.ENODATA,
            f"short read: expected {self.size} bytes at offset {self.offset}, found {max(0, min(length, at) - self.offset)}: the file has "
            f"{length} bytes; it was cut, or the tensor to fill is larger than the one written",
            self.path,
        )

    def fail(self, error: BaseException) -> None:
        with self.lock:
            self.error = self.error or error

    def done_with_one(self) -> bool:
        """Count a block; whether it was the last."""
        with self.lock:
            self.left -= 1
            return self.left <= 0

    def finish(self) -> None:
        """Close the descriptors and tell the future."""
        for descriptor in (self.main, self.other):
            try:
                if descriptor >= 0:
                    os.close(descriptor)
            except OSError as error:  # network file systems report a failed write here
                self.fail(self.failure(error, self.offset + self.size))
        # An error's traceback has this object: it shall not keep the buffer too.
        result, self.tensor, self.view = self.size if self.write else self.tensor, None, memoryview(b"")
        if self.error is None:
            self.future.set_result(result)
        else:
            if self.write:
                self.notes.failed.append(self.future)
            self.future.set_exception(self.error)


_FIXES = {
    errno.ENOSPC: "free space there, or choose another path",
    errno.EDQUOT: "free space there, or have the quota raised",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f), or write smaller files",
    errno.ENOENT: "make the directory first, or look whether somebody removed it",
}


def _is_direct(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0))


def _fallocate(descriptor: int, offset: int, n_bytes: int) -> int:
    """Error number, 0 for success; ENOSYS where there is no such call."""
    libc = ctypes.CDLL(None, use_errno=True)
    function = getattr(libc, "fallocate64", None) or getattr(libc, "fallocate", None)
    if function is None:
        return errno.ENOSYS
    function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return ctypes.get_errno() if function(descriptor, 0, offset, n_bytes) else 0
