"""Which rank is gone: after a failed collective, every rank tries every other one.

Each rank holds a listening socket, whose address the others learn at the start. Nothing is sent while all goes well, and no thread runs.
When a collective fails, a rank connects to all the others: an ended process refuses at once, a running one is accepted by its kernel
whatever it is doing. What a rank finds out it tells the others by the same connections, before it raises: a rank that hears of it
later, because it was waiting for one of the survivors, then still names the first that went.
"""

import contextlib
import errno
import json
import os
import socket
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import attrs
import torch.distributed as dist

_PATIENCE = 2.0  # seconds: an ending process closes its sockets one after the other, and reports need a moment
_CONNECTING = 32  # connections being made at a time
# gloo raises plain `RuntimeError`s: with its source file, or this after a timeout.
_GLOO = ("gloo/transport", "Application timeout caused pair closure")


class RankError(RuntimeError):
    """A collective failed because of other ranks.

    `gone`: ranks whose processes have ended, or whose hosts do not answer. `silent`: where none is gone, ranks that run but have not failed
    in a collective themselves: they are busy with something else, or still wait. Both are ranks of the whole job.
    """

    def __init__(self, text: str, *, gone: tuple[int, ...] = (), silent: tuple[int, ...] = ()) -> None:
        super().__init__(text)
        self.gone, self.silent = gone, silent

    def __reduce__(self) -> Any:
        return _rebuilt, (str(self), self.gone, self.silent)


def _rebuilt(text: str, gone: tuple[int, ...], silent: tuple[int, ...]) -> RankError:
    return RankError(text, gone=gone, silent=silent)


@attrs.define
class _Watch:
    group: "weakref.ref[Any]"  # the job's process group
    rank: int
    addresses: list[tuple[str, int] | None]
    heard: dict[int, set[int]] = attrs.Factory(dict)  # who failed, and which ranks it found gone


# Of the process, as its ranks' connections are: the socket lives as long as the process, also over several process groups.
_LISTENER: list[socket.socket] = []
_WATCH: list[_Watch] = []


def watch(store: Any, rank: int, world_size: int, master: str | None = None) -> None:
    """Exchange addresses over the job's `store`; every rank has to call it. From then on `explained` can name ranks.

    `master` is a host that all ranks can reach; the way to it is the way to this process. Default: this machine's own name.
    """
    store.set(f"fds/rank/{rank}", json.dumps(_listen(master or socket.gethostname(), world_size)))
    keys = [f"fds/rank/{r}" for r in range(world_size)]
    values = store.multi_get(keys) if store.has_extended_api() else [store.get(k) for k in keys]
    _WATCH[:] = [
        _Watch(
            weakref.ref(dist.group.WORLD),
            rank,
            [tuple(address) if address else None for address in map(json.loads, values)],
        )
    ]


def watched() -> bool:
    """Whether this process knows how to reach the ranks of the group that is running."""
    return bool(_WATCH) and _WATCH[0].group() is dist.group.WORLD


def _listen(name: str, world_size: int) -> tuple[str, int] | None:
    """(host, port) of this process's listening socket, as the other ranks know it; None where `name` means nothing to this machine."""
    try:
        family, _, _, _, there = socket.getaddrinfo(name, 1, type=socket.SOCK_DGRAM)[0]
    except socket.gaierror:
        return None
    with socket.socket(family, socket.SOCK_DGRAM) as s:
        s.connect(there)  # sends nothing: it asks for the route
        here = s.getsockname()[0]
    # Debian maps a machine's own name to a loopback address, which others cannot use; the name they can.
    loopback = here.startswith("127.") or here == "::1"
    only_here = loopback and name in (here, "localhost")
    if not _LISTENER:
        # Room for several failures' connections of every rank, which nobody accepts until this rank fails too.
        bind = here if only_here or not loopback else ""
        _LISTENER.append(socket.create_server((bind, 0), family=family, backlog=4 * world_size + 8))
        _LISTENER[0].setblocking(False)
        os.register_at_fork(after_in_child=_LISTENER[0].close)  # a data loader's worker must not answer for its rank
    return name if loopback else here, _LISTENER[0].getsockname()[1]


class _Inquiry:
    """A connection to every other rank, held while this one looks for the cause, and what they have sent over theirs."""

    def __init__(self, w: _Watch) -> None:
        self.watch = w
        self.inbox: dict[socket.socket, bytes] = {}
        others = {r: a for r, a in enumerate(w.addresses) if r != w.rank and a is not None}
        with ThreadPoolExecutor(_CONNECTING) as pool:
            lines = dict(zip(others, pool.map(_line, others.values()), strict=True))
        self.lines = {r: line for r, line in lines.items() if line is not None}
        self.ended = {r for r in lines if r not in self.lines}
        self.tell(set())

    def tell(self, gone: set[int]) -> None:
        """Let the others know, when they fail too, that this rank has, and which ranks it found gone."""
        message = json.dumps({"rank": self.watch.rank, "gone": sorted(gone)}).encode() + b"\n"
        for line in self.lines.values():
            with contextlib.suppress(OSError):  # ended meanwhile: `look` sees it
                line.sendall(message)

    def look(self) -> set[int]:
        """The ranks that went first, as far as can be seen now."""
        for rank, line in list(self.lines.items()):
            try:
                line.recv(1)  # nobody writes on it: an end of it, or an error, is the process's end
            except BlockingIOError:
                continue
            except OSError:
                pass
            self.ended.add(rank)
            self.lines.pop(rank).close()
        self._hear()
        heard = self.watch.heard
        # A rank that told before it went has only followed.
        return (self.ended - heard.keys()).union(*heard.values()) - {self.watch.rank}

    def _hear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                connection, _ = _LISTENER[0].accept()
                connection.setblocking(False)
                self.inbox[connection] = b""
        for connection in self.inbox:
            with contextlib.suppress(OSError):
                while received := connection.recv(4096):
                    self.inbox[connection] += received
            *whole, self.inbox[connection] = self.inbox[connection].split(b"\n")
            for message in whole:
                with contextlib.suppress(ValueError, LookupError, TypeError):  # a stranger's
                    said = json.loads(message)
                    rank, *gone = (range(len(self.watch.addresses))[r] for r in (said["rank"], *said["gone"]))
                    self.watch.heard.setdefault(rank, set()).update(gone)

    def close(self) -> None:
        for connection in (*self.lines.values(), *self.inbox):
            connection.close()


def _line(address: tuple[str, int]) -> socket.socket | None:
    """A connection to the process that listens at `address`; None if there is none."""
    try:
        line = socket.create_connection(address, timeout=_PATIENCE)
    except (ConnectionError, TimeoutError):
        return None
    except OSError as error:
        if error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN):
            return None
        raise
    line.setblocking(False)
    return line


def _search(w: _Watch) -> set[int]:
    """The ranks that went first, or none when the time is over. The others are told."""
    inquiry = _Inquiry(w)
    try:
        until = time.monotonic() + _PATIENCE
        while not (gone := inquiry.look()) and time.monotonic() < until:
            time.sleep(0.05)
        if gone:
            time.sleep(_PATIENCE / 10)  # a survivor that has just left: what it told is on its way
            gone = inquiry.look()
            inquiry.tell(gone)
        return gone
    finally:
        inquiry.close()


def _is_of_the_network(error: RuntimeError) -> bool:
    """Whether a peer may be the cause."""
    kinds = [getattr(dist, name) for name in ("DistBackendError", "DistNetworkError") if hasattr(dist, name)]
    return isinstance(error, tuple(kinds)) or any(mark in str(error) for mark in _GLOO)


@contextlib.contextmanager
def explained(operation: str) -> Iterator[None]:
    """Turn the failure of a collective inside of the block into a `RankError` that names the ranks that are gone.

    Possible: on back ends that raise in the call (gloo; mpi; nccl with TORCH_NCCL_BLOCKING_WAIT=1), when a peer's process has ended (at
    once on the ranks that were exchanging data with it, on the others when these leave, and within the group's timeout in any case), or when
    its host does not answer any more (after the timeout: nothing closes the connection). A rank that runs but does not join is reported as
    `silent`, after the timeout. Not possible: on nccl as it comes, where a collective returns before it runs, and torch's watchdog thread
    ends the process after the timeout; under a launcher that stops all ranks as soon as one fails, whose report then names it; before
    all ranks have met (torch says how many of them have come); and in a group of which `init_distributed` or `mesh` never heard.
    """
    try:
        yield
    except RankError:
        raise
    except RuntimeError as error:
        if not _is_of_the_network(error) or not dist.is_initialized() or not watched():
            raise
        w = _WATCH[0]
        gone = _search(w)
        if gone:
            text = f"{_ranks(gone)} of {len(w.addresses)} {'is' if len(gone) == 1 else 'are'} gone (process ended, or host does not answer)"
            raise RankError(
                f"{operation} on rank {w.rank}: {text}; see the log of {_ranks(gone)} for the cause: {error}",
                gone=tuple(sorted(gone)),
            ) from error
        silent = set(range(len(w.addresses))) - w.heard.keys() - {w.rank}
        who = f"{_ranks(silent)} did not fail: busy elsewhere, or still waiting" if silent else "all have failed"
        raise RankError(
            f"{operation} on rank {w.rank}: the processes of all {len(w.addresses)} ranks run, {who}. Does every rank call the same "
            f"collectives in the same order, and within the timeout?: {error}",
            silent=tuple(sorted(silent)),
        ) from error


def _ranks(ranks: set[int]) -> str:
    return f"rank{'s'[: len(ranks) > 1]} {', '.join(map(str, sorted(ranks)))}"
