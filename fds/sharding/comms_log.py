"""What collectives send and how long they take: one mechanism, with two listeners: `record()` counts, a `CommsLogger` also times.

Collectives are opaque calls in a compiled graph as well, so that both see every call at run time, eager and compiled alike. What runs
inside of a CUDA graph's replay is seen once, when it is captured.
"""

import contextlib
import logging
import sys
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.distributed as dist

from fds import _torch, tree

LOG = logging.getLogger("fds.sharding")

# Bus bandwidth over algorithmic bandwidth, by the number of ranks: the share of the whole buffer that crosses each rank's link.
# NVIDIA, nccl-tests, doc/PERFORMANCE.md.
_BUS: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_to_all": lambda n: (n - 1) / n,
    "broadcast": lambda n: 1.0,
    "reduce": lambda n: 1.0,
    "send": lambda n: 1.0,
    "recv": lambda n: 1.0,
    "barrier": lambda n: 1.0,
}
# Our operators, and torch's and DeepSpeed's further names, by their common name.
_OPERATORS = {"gather": "all_gather", "scatter": "reduce_scatter", "total": "all_reduce"}
_ALIASES = {
    "all_gather_into_tensor": "all_gather",
    "all_gather_coalesced": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_reduce_coalesced": "all_reduce",
    "inference_all_reduce": "all_reduce",
    "all_to_all_single": "all_to_all",
    "isend": "send",
    "irecv": "recv",
    "monitored_barrier": "barrier",
}


@attrs.define
class Traffic:
    """What went over the wire inside of a `record()` block: calls and bytes by operator.

    Bytes are those of the whole buffer: a gather of shards of m elements over n ranks counts n*m, a scatter of n*m elements n*m.
    """

    calls: dict[str, int] = attrs.Factory(dict)
    bytes: dict[str, int] = attrs.Factory(dict)
    groups: dict[str, dict[str, int]] = attrs.Factory(dict)  # bytes, by the name of the process group

    def on(self, axis: Any) -> dict[str, int]:
        """Bytes by operator on one axis of a mesh."""
        return self.groups.get(axis.group, {})

    @property
    def total(self) -> int:
        """Bytes over all operators."""
        return sum(self.bytes.values())


# Of the process: autograd runs CUDA's backward in threads of its own.
_RECORDERS: list[Traffic] = []
_LOGGERS: list["CommsLogger"] = []


@contextlib.contextmanager
def record() -> Iterator[Traffic]:
    """Count the collectives that run inside of the block, in eager and in compiled code alike.

    >>> with record() as traffic:
    ...     pass
    >>> traffic.total
    0
    """
    traffic = Traffic()
    _RECORDERS.append(traffic)
    try:
        yield traffic
    finally:
        _RECORDERS[:] = [t for t in _RECORDERS if t is not traffic]


def listened() -> bool:
    """Whether a logger listens."""
    return bool(_LOGGERS)


@contextlib.contextmanager
def observed(name: str, nbytes: int, group: str, ranks: Callable[[], Sequence[int]], device: torch.device) -> Iterator[None]:  # fmt: skip
    """Count the collective `name` of a buffer of `nbytes` that runs inside of the block, and time it if a logger asks for it.

    `group` is the name of its process group; `ranks` gives the ranks of that, and is asked only for a logger.
    """
    for t in _RECORDERS:
        t.calls[name] = t.calls.get(name, 0) + 1
        t.bytes[name] = t.bytes.get(name, 0) + nbytes
        own = t.groups.setdefault(group, {})
        own[name] = own.get(name, 0) + nbytes
    op = _OPERATORS.get(name, name)
    loggers = [log for log in _LOGGERS if log.wants(op)]
    # Events of a capture have no times.
    if not loggers or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        yield
        return
    key = _Key(op, nbytes, tuple(ranks()), _caller() if any(log.debug for log in loggers) else "")
    start = _now(device)
    yield
    end = _now(device)
    for log in loggers:
        log.add(key if log.debug else attrs.evolve(key, caller=""), start, end)


def _now(device: torch.device) -> Any:
    """A point in time: of the clock, or on CUDA's current stream, which nobody waits for."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


# Files between a collective and the code that asked for it.
_BETWEEN = (str(Path(__file__).parent), _torch.__file__, str(Path(torch.__file__).parent), contextlib.__file__)


def _caller() -> str:
    """The function outside of torch and of this package that called the collective."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_BETWEEN):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"


# --- the logger ---


@attrs.frozen
class _Key:
    op: str
    nbytes: int
    ranks: tuple[int, ...]
    caller: str


@attrs.frozen
class CommsRow:
    """All calls of one operation with one message size in one group, as this rank saw them.

    `nbytes`: of the whole buffer, as in `Traffic`. `ranks`: the group's. `caller`: with `debug`, who called. Latencies are in ms, from the
    call to the result: waiting for slower ranks is in them. `straggler_ms`: of the total, what this rank waited beyond the fastest rank
    of the group, call by call (None: not asked for).
    """

    op: str
    nbytes: int
    ranks: tuple[int, ...]
    count: int
    total_ms: float
    straggler_ms: float | None = None
    caller: str = ""

    @property
    def mean_ms(self) -> float:
        """Latency of one call."""
        return self.total_ms / self.count

    @property
    def algbw(self) -> float:
        """Algorithmic bandwidth, Gbit/s: the buffer's size over the latency."""
        return 8e-6 * self.nbytes * self.count / self.total_ms if self.total_ms else 0.0

    @property
    def busbw(self) -> float:
        """Bus bandwidth, Gbit/s: what a rank's link carries, by the size of the group; comparable between operations and numbers of ranks."""
        return self.algbw * _BUS[self.op](len(self.ranks))


@attrs.frozen
class CommsSummary:
    """The rows of a `CommsLogger` on this rank; as a string, a table."""

    rows: tuple[CommsRow, ...]
    rank: int
    world_size: int

    @property
    def operations(self) -> int:
        """Calls over all rows."""
        return sum(r.count for r in self.rows)

    def __str__(self) -> str:
        stragglers = any(r.straggler_ms is not None for r in self.rows)
        callers = any(r.caller for r in self.rows)
        head = ["operation", "message", "ranks", "count", "total ms", "mean ms", "algbw Gbit/s", "busbw Gbit/s"]
        table = [head + ["straggler ms"] * stragglers + ["caller"] * callers]
        for r in self.rows:
            cells = [r.op, _size(r.nbytes), str(len(r.ranks)), str(r.count)]
            cells += [f"{x:.2f}" for x in (r.total_ms, r.mean_ms, r.algbw, r.busbw)]
            cells += [f"{r.straggler_ms or 0.0:.2f}"] * stragglers + [r.caller] * callers
            table.append(cells)
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        left = {0, len(head) + stragglers}
        return "\n".join(
            "  ".join(
                c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in table
        )


def _size(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.4g} TiB"


def _operations(names: Any) -> tuple[str, ...]:
    if isinstance(names, str):
        raise ValueError(f"prof_ops: {names!r}, required a list of operations, as [{names!r}]")
    return tuple(map(_known, names))


def _is_switch(_: Any, field: Any, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{field.name}: {value!r}, required True or False")


def _known(op: str) -> str:
    name = _ALIASES.get(op, op)
    if name not in _BUS:
        raise ValueError(f"prof_ops: {op!r} is no operation; {tree.suggest(op, [*_BUS, *_ALIASES])}")
    return name


@attrs.define(eq=False)
class CommsLogger:
    """Counts and times collectives between `start` and `stop`, or inside of a ``with`` block; DeepSpeed's ``"comms_logger"`` section.

    On a CPU a latency is that of the call. On CUDA it lies between two events on the stream: nothing is synchronised, also not for
    `verbose`, which speaks when a call is over. A latency takes 8 bytes until `reset`.

    Args:
        enabled: False: `start` does nothing. (In DeepSpeed the section's presence switches the logger on.)
        verbose: log every call on rank 0, to the logger "fds.sharding" at level INFO.
        prof_all: log all operations; False: only those of `prof_ops`.
        debug: keep the calls of different callers apart, and name them.
        prof_ops: names of operations, as ``["all_reduce"]``; torch's further names mean the same (``all_gather_into_tensor``).

    Raises:
        ValueError: a name in `prof_ops` is no operation; a switch is neither True nor False.

    >>> with CommsLogger(enabled=True) as log:
    ...     pass
    >>> log.summary().operations
    0
    """

    enabled: bool = attrs.field(default=False, validator=_is_switch)
    verbose: bool = attrs.field(default=False, validator=_is_switch)
    prof_all: bool = attrs.field(default=True, validator=_is_switch)
    debug: bool = attrs.field(default=False, validator=_is_switch)
    prof_ops: tuple[str, ...] = attrs.field(default=(), converter=_operations)
    _latencies: dict[_Key, "array[float]"] = attrs.field(factory=dict, init=False, repr=False)
    _pending: deque[tuple[_Key, Any, Any]] = attrs.field(factory=deque, init=False, repr=False)
    _lock: Any = attrs.field(factory=threading.RLock, init=False, repr=False)

    def start(self) -> None:
        """Listen from now on."""
        if self.enabled and self not in _LOGGERS:
            _LOGGERS.append(self)

    def stop(self) -> None:
        """Listen no longer; what was logged stays."""
        _LOGGERS[:] = [log for log in _LOGGERS if log is not self]

    def __enter__(self) -> "CommsLogger":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def reset(self) -> None:
        """Forget what was logged."""
        with self._lock:
            self._pending.clear()
            self._latencies.clear()

    def wants(self, op: str) -> bool:
        """Whether calls of `op` are logged."""
        return self.prof_all or op in self.prof_ops

    def add(self, key: _Key, start: Any, end: Any) -> None:
        """One call, between two points in time of `observed`."""
        with self._lock:
            if isinstance(end, float):
                self._finished(key, 1e3 * (end - start))
                return
            self._pending.append((key, start, end))
            self._collect(wait=False)

    def _collect(self, *, wait: bool) -> None:
        while self._pending and (wait or self._pending[0][2].query()):
            key, start, end = self._pending.popleft()
            end.synchronize()
            self._finished(key, start.elapsed_time(end))

    def _finished(self, key: _Key, ms: float) -> None:
        self._latencies.setdefault(key, array("d")).append(ms)
        if self.verbose and _rank() == 0:
            row = CommsRow(key.op, key.nbytes, key.ranks, 1, ms, caller=key.caller)
            LOG.info(
                "comm op: %s%s | time (ms): %.2f | msg size: %s | algbw (Gbps): %.2f | busbw (Gbps): %.2f",
                key.op,
                f" | [Caller Func: {key.caller}]" if key.caller else "",
                ms,
                _size(key.nbytes),
                row.algbw,
                row.busbw,
            )

    def summary(self, *, show_straggler: bool = False) -> CommsSummary:
        """What this rank has logged. With `show_straggler` every rank of the job has to call it: latencies are compared between ranks.

        Raises:
            ValueError: with `show_straggler`, ranks of a group have logged different numbers of calls.
        """
        with self._lock:
            self._collect(wait=True)
            mine = dict(sorted(self._latencies.items(), key=lambda item: attrs.astuple(item[0])))
        waits: dict[_Key, float | None] = dict.fromkeys(mine)
        if show_straggler:
            waits |= _stragglers(mine)
        rows = (CommsRow(k.op, k.nbytes, k.ranks, len(ms), sum(ms), waits[k], k.caller) for k, ms in mine.items())
        return CommsSummary(tuple(rows), _rank(), dist.get_world_size() if dist.is_initialized() else 1)

    def log_summary(self, *, show_straggler: bool = False) -> CommsSummary:
        """`summary`, and its table on rank 0, to the logger "fds.sharding" at level INFO."""
        summary = self.summary(show_straggler=show_straggler)
        if summary.rank == 0:
            LOG.info("%s", summary)
        return summary


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _stragglers(mine: dict[_Key, "array[float]"]) -> dict[_Key, float]:
    """Per row, the sum over calls of this rank's latency minus the smallest of its group."""
    everyone: list[Any] = [mine]
    if dist.is_initialized() and dist.get_world_size() > 1:
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
    waits = {}
    for key, latencies in mine.items():
        others = {r: everyone[r].get(key, ()) for r in key.ranks} if len(everyone) > 1 else {0: latencies}
        if len({len(ms) for ms in others.values()}) > 1:
            raise ValueError(
                f"show_straggler: {key.op} of {key.nbytes} bytes{f' by {key.caller}' if key.caller else ''} was logged "
                f"{', '.join(f'{len(ms)} times on rank {r}' for r, ms in others.items())}; start, stop and reset the logger on every rank at the same point"
            )
        waits[key] = sum(latencies) - sum(map(min, zip(*others.values(), strict=True)))
    return waits
