"""A directory for one run: its owner's alone, locked while the process lives, reclaimed when it was killed."""

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Generator
from pathlib import Path

from fds.offload._keyed import LOG, StoreError

__all__ = ["claim", "give_up"]

_RUN = "fds-offload"  # begins the names of the runs' directories
_PATIENCE = (
    30.0  # seconds that a start waits for others that start on the same path; each holds the lock for some system calls
)


def claim(root: Path) -> tuple[Path, int]:
    """A new directory below `root` and the descriptor that locks it; what dead runs of this user left there is removed.

    The locks are those of the directories themselves, not of files in them: a lock file is old and never written again, so that whatever
    cleans a temporary directory removes it first, and the living run would then look dead.
    """
    if root.exists() and not root.is_dir():
        raise ValueError(f"{root}: is a file, required a directory")
    root.mkdir(parents=True, exist_ok=True)
    mine = f"{_RUN}-{os.geteuid()}-"
    with _alone(root):  # or a run that has its directory and not yet its lock would look dead
        dead = [(f, lock) for f in sorted(root.glob(f"{mine}*")) if (lock := _dead(f)) is not None]
        folder = Path(tempfile.mkdtemp(prefix=f"{mine}{os.getpid()}-", dir=root.absolute()))  # 0700
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    freed = [_reclaim(*found) for found in dead]
    if freed:
        LOG.warning("%s: removed what %d killed runs left, %d bytes", root, len(freed), sum(freed))
    return folder, lock


@contextlib.contextmanager
def _alone(root: Path) -> Generator[None, None, None]:
    """The lock of `root`."""
    descriptor, until = os.open(root, os.O_RDONLY | os.O_DIRECTORY), time.monotonic() + _PATIENCE
    try:
        while not _locked(descriptor, root):
            if time.monotonic() > until:
                text = f"another process has locked this directory for {_PATIENCE:.0f} s; end it, or give another path"
                raise StoreError(errno.EAGAIN, text, str(root))
            time.sleep(0.01)
        yield
    finally:
        os.close(descriptor)


def _locked(descriptor: int, folder: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # NFS, for one
        text = f"its file system locks no directories ({error.strerror}); give a path on a local disk"
        raise StoreError(error.errno or errno.ENOLCK, text, str(folder)) from error
    return True


def _dead(folder: Path) -> int | None:
    """The lock of a run that lives no more, taken; None where it lives, is gone already, or is not ours to remove."""
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    if os.fstat(lock).st_uid == os.geteuid() and _locked(lock, folder):
        return lock
    os.close(lock)
    return None


def _reclaim(folder: Path, lock: int) -> int:
    size = 0
    with contextlib.suppress(OSError):
        size = sum(f.lstat().st_blocks * 512 for f in folder.iterdir())
    give_up(folder, lock, os.getpid())
    return size


def give_up(folder: Path, lock: int, pid: int) -> None:
    """Remove the directory, unless this is a fork of the process `pid`: it is its parent's."""
    if os.getpid() == pid:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)
