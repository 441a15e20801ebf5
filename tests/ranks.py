"""Several ranks inside a test: worker processes over gloo on loopback that live for the whole session and run functions by name.

    results = ranks.run(2, some_module_level_function, *args)       # one result per rank

Interpreter start-up and `import torch` are paid once per number of ranks. A worker that fails, dies or hangs fails that call, with its
traceback, and the pool starts anew for the next.
"""

import atexit
import contextlib
import os
import pickle
import random
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path

_POOLS: dict[int, "Pool"] = {}
_READY = b"ready"
_ROOT = Path(__file__).resolve().parents[1]


def run(n, function, *args, timeout=300):
    """``function(*args)`` on n ranks, at the same time; the list of their results."""
    if n not in _POOLS:
        _POOLS[n] = Pool(n)
    try:
        return _POOLS[n].run(function, args, timeout)
    except BaseException:
        _POOLS.pop(n).close()
        raise


def free_port():
    """A port where nobody listens, below those that the kernel gives to whoever asks for any: it is still free when a job comes to it."""
    ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.SystemRandom().randrange(10_000, ephemeral)
        with contextlib.suppress(OSError), socket.socket() as s:
            s.bind(("127.0.0.1", port))
            return port


class Pool:
    def __init__(self, n):
        self.folder = tempfile.TemporaryDirectory(prefix="fds-ranks-")
        store = os.path.join(self.folder.name, "store")
        self.workers = [self._start(n, rank, store) for rank in range(n)]
        self.ready, self.late = False, False

    def _start(self, n, rank, store):
        env = os.environ | {
            "WORLD_SIZE": str(n),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "OMP_NUM_THREADS": "1",
            "FDS_STORE": store,
            "GLOO_SOCKET_IFNAME": "lo",
        }
        env["PYTHONPATH"] = os.pathsep.join([str(_ROOT), str(_ROOT / "tests"), env.get("PYTHONPATH", "")])
        return subprocess.Popen([sys.executable, __file__], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(self, function, args, timeout):
        job = pickle.dumps((function.__module__, function.__qualname__, args))
        if not self.ready:
            self._wait(300)
        watchdog = self._watchdog(timeout)
        try:
            for w in self.workers:
                w.stdin.write(len(job).to_bytes(8, "big") + job)
                w.stdin.flush()
            answers = [self._answer(w, rank, timeout) for rank, w in enumerate(self.workers)]
        finally:
            watchdog.cancel()
        failed = [(rank, text) for rank, (ok, text) in enumerate(answers) if not ok]
        if failed:
            raise RuntimeError(f"rank {failed[0][0]} of {len(answers)}:\n{failed[0][1]}")
        return [value for _, value in answers]

    def _wait(self, timeout):
        """Until all workers run. Start-up (imports, the process group) has a limit of its own: on a busy machine it takes minutes."""
        watchdog = self._watchdog(timeout)
        try:
            self.ready = all(w.stdout.read(len(_READY)) == _READY for w in self.workers)
        finally:
            watchdog.cancel()
        if not self.ready:
            self.kill()
            raise RuntimeError(
                f"workers ended before they were ready (exit {[w.wait() for w in self.workers]}); {self._how(timeout)}"
            )

    def _how(self, timeout):
        return (
            f"killed here, after {timeout} s"
            if self.late
            else "not killed by this pool: one crashed, or the system killed it"
        )

    def _answer(self, worker, rank, timeout):
        size = worker.stdout.read(8)
        if len(size) < 8:
            self.kill()  # the others may wait for it in a collective
            return False, f"the process ended (exit {worker.wait()}) before it answered; {self._how(timeout)}"
        return pickle.loads(worker.stdout.read(int.from_bytes(size, "big")))

    def _watchdog(self, seconds):
        def late():
            self.late = True
            self.kill()

        watchdog = threading.Timer(seconds, late)
        watchdog.start()
        return watchdog

    def kill(self):
        for w in self.workers:
            w.kill()

    def close(self):
        self.kill()
        for w in self.workers:
            w.wait()
            w.stdin.close()
            w.stdout.close()
        self.folder.cleanup()


@atexit.register
def _close_all():
    for pool in _POOLS.values():
        pool.close()
    _POOLS.clear()


def _work():
    import importlib
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the function prints must not mix with answers
    torch.set_num_threads(1)
    n, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    dist.init_process_group(
        "gloo", init_method=f"file://{os.environ['FDS_STORE']}", world_size=n, rank=rank, timeout=timedelta(minutes=5)
    )
    answers.write(_READY)
    answers.flush()
    while len(size := sys.stdin.buffer.read(8)) == 8:
        module, name, args = pickle.loads(sys.stdin.buffer.read(int.from_bytes(size, "big")))
        try:
            answer = True, getattr(importlib.import_module(module), name)(*args)
        except BaseException:
            answer = False, traceback.format_exc()
        data = pickle.dumps(answer)
        answers.write(len(data).to_bytes(8, "big") + data)
        answers.flush()


if __name__ == "__main__":
    _work()
