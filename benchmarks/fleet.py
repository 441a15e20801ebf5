"""The driver's side: start the ranks of a contender, tell them all the same thing, collect their answers."""

import json
import os
import re
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PATIENCE = 1800.0  # seconds: the longest that a compile on a shared core took, and then some
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")


class ContenderError(RuntimeError):
    """A contender that could not do what it was asked; the message is the error of the rank that failed first."""


class Team:
    """The ranks of one contender. `ask` is answered by all ranks or raises `ContenderError`."""

    def __init__(
        self, contender: str, *, job: dict[str, Any], world: int, threads: int, python: str, env: dict[str, str]
    ) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="bench-")
        scratch = Path(self.folder.name)
        common = _environment(threads) | (rendezvous(world) if world > 1 else {}) | env
        self.logs = [(scratch / f"rank{r}.log").open("w+") for r in range(world)]
        self.ranks = [
            subprocess.Popen(
                [python, str(HERE / "worker.py"), contender, json.dumps(job)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=scratch,
                env=common | {"RANK": str(r), "LOCAL_RANK": str(r)} if world > 1 else common,
            )
            for r, log in enumerate(self.logs)
        ]

    def hello(self) -> list[dict[str, Any]]:
        """The first answers, once every rank has built its contender."""
        return self._collect()

    def ask(self, do: str, **arguments: Any) -> list[dict[str, Any]]:
        for rank in self.ranks:
            assert rank.stdin is not None
            try:
                rank.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
                rank.stdin.flush()
            except BrokenPipeError:
                raise ContenderError(f"a rank is gone before '{do}': {self._last_words()}") from None
        return self._collect()

    def close(self) -> None:
        """End the ranks, by themselves if they listen; remove what they left."""
        for rank in self.ranks:
            if rank.stdin is not None and rank.poll() is None:
                try:
                    rank.stdin.write('{"do": "stop"}\n')
                    rank.stdin.close()
                except BrokenPipeError:
                    continue
        deadline = time.monotonic() + 10
        for rank in self.ranks:
            try:
                rank.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                rank.kill()
                rank.wait()
        for log in self.logs:
            log.close()
        self.folder.cleanup()

    def _collect(self) -> list[dict[str, Any]]:
        """One line of each rank, in whatever order they come; the first error ends the wait, since the others then hang."""
        replies: dict[int, dict[str, Any]] = {}
        deadline = time.monotonic() + PATIENCE
        with selectors.DefaultSelector() as selector:
            for i, rank in enumerate(self.ranks):
                assert rank.stdout is not None
                selector.register(rank.stdout, selectors.EVENT_READ, i)
            while len(replies) < len(self.ranks):
                ready = selector.select(deadline - time.monotonic())
                if not ready:
                    raise ContenderError(f"no answer in {PATIENCE:.0f} s: {self._last_words()}")
                for key, _ in ready:
                    replies[key.data] = self._read(key.data)
                    selector.unregister(key.fileobj)
        return [replies[i] for i in range(len(self.ranks))]

    def _read(self, i: int) -> dict[str, Any]:
        stdout = self.ranks[i].stdout
        assert stdout is not None
        line = stdout.readline()
        reply = json.loads(line) if line else {"error": f"rank {i} ended: {self._last_words()}"}
        if "error" in reply:
            sys.stderr.write("".join(self._log(i).splitlines(keepends=True)[-25:]))
            raise ContenderError(scrubbed(reply["error"]))
        return reply

    def _log(self, i: int) -> str:
        self.logs[i].seek(0)
        return self.logs[i].read()

    def _last_words(self) -> str:
        lines = [line for i in range(len(self.logs)) for line in self._log(i).splitlines()[-1:]]
        return scrubbed(" | ".join(lines)) or "no output"


def _environment(threads: int) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if k not in LAUNCHER}
    env |= {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # no pool of compiler processes that outlives the compile
        "TOKENIZERS_PARALLELISM": "false",
    }
    return env


def rendezvous(world: int) -> dict[str, str]:
    """Where the ranks of this machine meet."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    return {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def caches(folder: Path, built: Path) -> dict[str, str]:
    """Where torch keeps what it compiled (empty at a contender's first start), and DeepSpeed the operators that it builds (empty at a run's)."""
    return {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TORCH_EXTENSIONS_DIR": str(built)}


def scrubbed(text: str) -> str:
    """An error message in at most 400 characters, without this machine's folders: they say nothing to a reader elsewhere."""
    text = re.sub(r"(?<![\w.])/(?:[\w.+@~-]+/)+([\w.+@~-]*)", r"\1", text)
    return " ".join(text.split())[:400]


def busy() -> tuple[float, float]:
    """Seconds of processor time used by anybody on this machine, and seconds that were there to use, since it started."""
    fields = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    tick = os.sysconf("SC_CLK_TCK")
    return (sum(fields) - fields[3] - fields[4]) / tick, sum(fields) / tick
