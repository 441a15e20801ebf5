"""Which settings of `fds.offload.aio` suit a disk: ``python -m fds.offload.tune PATH``.

Writes a file of its own under PATH and reads it back, with one combination of block size, depth and submitters after the other; then again
with the better half of them, and so on until the time is up. Rates are medians, in GB/s (10^9 bytes a second), past the page cache.
"""

import argparse
import errno
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from statistics import median

import attrs
from torch import Tensor

from fds.offload.aio import Engine, Settings, empty

__all__ = ["Measured", "main", "table", "tune"]

BLOCKS = (2**20, 2**22, 2**18, 2**23)  # the likeliest first: if time is short, those have been measured
IN_FLIGHT = (8, 16, 4, 32)
SUBMITTERS = (1, 2, 4)
SIZE = 256 * 2**20
ROUNDS = 5  # nobody is measured more often, however much time there is


@attrs.frozen
class Measured:
    """Settings, and GB/s of each time that they were measured."""

    settings: Settings
    write: tuple[float, ...]
    read: tuple[float, ...]

    @property
    def score(self) -> float:
        """GB/s of writing something once and reading it once: the slower direction counts for more."""
        return 2 / (1 / median(self.write) + 1 / median(self.read))


def candidates() -> list[Settings]:
    """A grid of blocks, blocks in flight, and submitters that share them; the defaults come first."""
    return [
        Settings(block_size=block, queue_depth=flight // count, thread_count=count)
        for flight in IN_FLIGHT
        for block in BLOCKS
        for count in SUBMITTERS
    ]


def tune(
    path: str | os.PathLike[str],
    *,
    seconds: float = 30.0,
    size: int = SIZE,
    settings: Sequence[Settings] | None = None,
) -> list[Measured]:
    """Measure `settings` (default: `candidates`) for `seconds` with a file of `size` bytes in the directory `path`; the best come first.

    A measurement that is under way is finished, and the first settings are measured in any case. The file is removed, also after an
    error. `OSError` where the directory is missing, cannot be written or has no room; `ValueError` for no time or no bytes.
    """
    if seconds <= 0 or size <= 0:
        raise ValueError(f"tune: given {seconds} seconds and {size} bytes, allowed more than 0 of both")
    if not os.path.isdir(path):
        raise NotADirectoryError(
            errno.ENOTDIR, "not a directory; give one on the disk that is to be measured", os.fspath(path)
        )
    if (free := shutil.disk_usage(path).free) < 2 * size:
        raise OSError(
            errno.ENOSPC,
            f"{free} bytes are free, {2 * size} are asked for; free space, or give a smaller size",
            os.fspath(path),
        )
    field = list(candidates() if settings is None else settings)
    until = time.monotonic() + seconds
    samples: dict[Settings, list[tuple[float, float]]] = {s: [] for s in field}
    beaten: list[Settings] = []
    with tempfile.TemporaryDirectory(prefix=".fds-tune-", dir=path) as folder:
        file = os.path.join(folder, "file")
        x = empty(size).random_()  # some disks compress
        with Engine() as engine:
            engine.write(file, x).result()  # the file's blocks are allocated here, and timed nowhere
        for _ in range(ROUNDS):
            for s in field:
                if time.monotonic() >= until and any(samples.values()):
                    break
                samples[s].append(_measure(s, file, x))
            else:
                field = _best(field, samples)
                half = max(1, len(field) // 2)
                field, beaten = field[:half], field[half:] + beaten
                continue
            break
    # Who got further stands higher: one lucky measurement does not beat the median of several.
    order = _best(field, samples) + beaten
    return [Measured(s, *zip(*samples[s], strict=True)) for s in order if samples[s]]


def _best(field: Sequence[Settings], samples: dict[Settings, list[tuple[float, float]]]) -> list[Settings]:
    def score(s: Settings) -> float:
        return Measured(s, *zip(*samples[s], strict=True)).score if samples[s] else 0.0

    return sorted(field, key=score, reverse=True)


def _measure(settings: Settings, file: str, x: Tensor) -> tuple[float, float]:
    """GB/s of a write over the file as it is, and of a read."""
    with Engine(settings) as engine:
        start = time.perf_counter()
        engine.write(file, x).result()
        middle = time.perf_counter()
        engine.read(file, x).result()
        end = time.perf_counter()
    return 1e-9 * x.nbytes / (middle - start), 1e-9 * x.nbytes / (end - middle)


def table(found: Sequence[Measured]) -> str:
    """One line for each, in columns."""
    rows = [("block_size", "queue_depth", "thread_count", "write GB/s", "read GB/s", "measured")]
    rows += [
        (
            str(m.settings.block_size),
            str(m.settings.queue_depth),
            str(m.settings.thread_count),
            f"{median(m.write):.2f}",
            f"{median(m.read):.2f}",
            f"{len(m.write)}x",
        )
        for m in found
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0, or 1 with the reason on standard error."""
    parser = argparse.ArgumentParser(
        prog="python -m fds.offload.tune", description="Find the fastest I/O settings for a disk."
    )
    parser.add_argument("path", help="a directory on the disk; a file is made there and removed again")
    parser.add_argument("--seconds", type=float, default=30.0, help="time limit (default: 30)")
    parser.add_argument(
        "--size", type=float, default=SIZE / 2**20, metavar="MIB", help="of the file, in MiB (default: 256)"
    )
    options = parser.parse_args(arguments)
    try:
        found = tune(options.path, seconds=options.seconds, size=int(options.size * 2**20))
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    best, written = found[0].settings, (1 + sum(len(m.write) for m in found)) * int(options.size * 2**20)
    print(table(found))
    print(f"\n{len(found)} of {len(candidates())} combinations measured, {written / 1e9:.1f} GB written. The best:\n")
    print(
        f"Settings(block_size={best.block_size}, queue_depth={best.queue_depth}, thread_count={best.thread_count})"
        f"  # from fds.offload.aio\n\n{json.dumps({'aio': best.aio()}, indent=2)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
