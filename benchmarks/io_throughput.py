"""Files written and read, GB/s: fds against DeepSpeed's aio_handle, fio, and a plain loop: `python benchmarks/io_throughput.py`.

Two cases: 1 GiB in one file, and 64 tensors of 16 MiB in a file each, all of them asked for before the first is waited for. Three acts:
`create` makes the files, `write` writes over them, `read` reads them back. Everybody uses direct I/O, so the page cache flatters nobody,
and nobody syncs. Every contender is a process of its own with the buffer that its library recommends; round after round all settings of
all contenders take turns, so that a slow minute hits all of them. What was read is compared with what was written, in the first round, which warms up and does not count.
The best settings of a contender are those with the best median, for each case and act.
"""

import argparse
import datetime
import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from common import machine, versions

HERE = Path(__file__).resolve().parent
PIECE = 16 * 2**20
PIECES = 64
CASES = {"one": 1, "many": PIECES}  # files
ACTS = ("create", "write", "read")
MIB = 2**20
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "fds": [
        {"block_size": MIB, "queue_depth": 8, "thread_count": 1},
        {"block_size": MIB, "queue_depth": 16, "thread_count": 1},
        {"block_size": MIB, "queue_depth": 4, "thread_count": 4},
        {"block_size": 4 * MIB, "queue_depth": 8, "thread_count": 1},
    ],
    "deepspeed": [
        {"block_size": MIB, "queue_depth": 8, "intra_op_parallelism": 1, "overlap_events": True},
        {"block_size": MIB, "queue_depth": 32, "intra_op_parallelism": 1, "overlap_events": True},
        {"block_size": MIB, "queue_depth": 8, "intra_op_parallelism": 4, "overlap_events": True},
        {"block_size": MIB, "queue_depth": 32, "intra_op_parallelism": 8, "overlap_events": True},
        {"block_size": 8 * MIB, "queue_depth": 16, "intra_op_parallelism": 2, "overlap_events": True},
        {"block_size": MIB, "queue_depth": 128, "intra_op_parallelism": 1, "overlap_events": False},
    ],
    "fio": [
        {"ioengine": "io_uring", "bs": MIB, "iodepth": 8, "numjobs": 1},
        {"ioengine": "io_uring", "bs": 8 * MIB, "iodepth": 16, "numjobs": 1},
        {"ioengine": "libaio", "bs": MIB, "iodepth": 16, "numjobs": 1},
        {"ioengine": "psync", "bs": MIB, "iodepth": 1, "numjobs": 8},
    ],
    "plain": [{"block_size": MIB}],
}
Act = Callable[[str, dict[str, Any], list[str]], float]


# --- contenders: each makes a buffer, and a function (act, settings, files) -> seconds ---


def fds() -> tuple[Any, Act]:
    from fds.offload.aio import Engine, Settings, empty

    whole = empty(PIECE * PIECES)
    engines: dict[str, Engine] = {}

    def act(what: str, settings: dict[str, Any], files: list[str]) -> float:
        key = str(settings)
        if key not in engines:
            engines[key] = Engine(Settings.of(settings))
        engine = engines[key]
        call = engine.read if what == "read" else engine.write
        parts = whole.chunk(len(files))
        start = time.perf_counter()
        for future in [call(f, x) for f, x in zip(files, parts, strict=True)]:
            future.result()
        return time.perf_counter() - start

    return whole, act


def deepspeed() -> tuple[Any, Act]:
    import torch
    from deepspeed.ops.op_builder import AsyncIOBuilder

    library = AsyncIOBuilder().load()
    handles: dict[str, Any] = {}

    def handle(settings: dict[str, Any]) -> Any:
        names = ("block_size", "queue_depth", "single_submit", "overlap_events", "intra_op_parallelism")
        given = {"single_submit": False} | settings
        if str(settings) not in handles:
            handles[str(settings)] = library.aio_handle(*(given[k] for k in names))
        return handles[str(settings)]

    whole = handle(SETTINGS["deepspeed"][0]).new_cpu_locked_tensor(PIECE * PIECES, torch.empty(0, dtype=torch.uint8))
    owner = handle(SETTINGS["deepspeed"][0])
    if not owner.is_pinned(whole):
        raise ValueError("deepspeed: its own buffer is not page-locked; it would be copied first")

    def act(what: str, settings: dict[str, Any], files: list[str]) -> float:
        h = handle(settings)
        call = h.async_pread if what == "read" else h.async_pwrite
        parts = whole.chunk(len(files))
        start = time.perf_counter()
        started = [call(x, f, 0) for f, x in zip(files, parts, strict=True)]
        finished = h.wait()
        took = time.perf_counter() - start
        if any(started) or finished != len(files):
            raise ValueError(f"deepspeed: {started} started, {finished} finished of {len(files)}")
        return took

    return whole, act


def plain() -> tuple[Any, Act]:
    """One thread, one block at a time."""
    import torch

    memory = mmap.mmap(-1, PIECE * PIECES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = torch.frombuffer(memory, dtype=torch.uint8)

    def act(what: str, settings: dict[str, Any], files: list[str]) -> float:
        view, size, block = memoryview(memory), len(memory) // len(files), settings["block_size"]
        call, flags = (os.preadv, os.O_RDONLY) if what == "read" else (os.pwritev, os.O_WRONLY | os.O_CREAT)
        start = time.perf_counter()
        for i, file in enumerate(files):
            descriptor = os.open(file, flags | os.O_DIRECT, 0o600)
            for at in range(0, size, block):
                n = min(block, size - at)
                if call(descriptor, [view[i * size + at : i * size + at + n]], at) != n:
                    raise ValueError(f"plain: less than {n} bytes at {at} of {file}")
            os.close(descriptor)
        return time.perf_counter() - start

    return whole, act


def work(name: str) -> None:
    """A contender's process: one line of JSON in, one out."""
    import torch

    torch.set_num_threads(1)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    whole, act = {"fds": fds, "deepspeed": deepspeed, "plain": plain}[name]()
    piece = torch.randint(0, 256, (PIECE,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))

    def fill() -> None:
        for i, x in enumerate(whole.chunk(PIECES)):
            x.copy_(piece)
            x[:8].fill_(i)  # no piece can stand for another

    def check() -> None:
        for i, x in enumerate(whole.chunk(PIECES)):
            if not (torch.equal(x[8:], piece[8:]) and bool((x[:8] == i).all())):
                raise ValueError(f"{name}: piece {i} was read with other bytes than were written")

    fill()  # and `check` finds it filled again after every read
    packages = versions("torch", "deepspeed") if name != "plain" else versions("torch")
    print(json.dumps({"ready": name, "versions": packages}), file=out, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        if job["check"] and job["act"] == "read":
            whole.zero_()
        if job["act"] == "create":
            for file in job["files"]:
                Path(file).unlink(missing_ok=True)
        took = act(job["act"], job["settings"], job["files"])
        if job["check"] and job["act"] == "read":
            check()
        print(json.dumps({"seconds": took}), file=out, flush=True)


# --- the driver ---


class Worker:
    """A contender's process."""

    def __init__(self, name: str, python: str, scratch: Path) -> None:
        self.name = name
        env = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}",  # ninja, for DeepSpeed
        }
        if name == "deepspeed":
            env |= {"DS_ACCELERATOR": "cpu"}
        else:
            env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
        self.log = (scratch / f"{name}.log").open("w+")
        self.process = subprocess.Popen(
            [python, str(HERE / "io_throughput.py"), "--work", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=env,
        )
        self.versions = self.answer()["versions"]

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.log.seek(0)
            raise RuntimeError(f"{self.name} ended: {self.log.read()[-2000:]}")
        return json.loads(line)

    def __call__(self, act: str, settings: dict[str, Any], files: list[str], *, check: bool = False) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"act": act, "settings": settings, "files": files, "check": check}) + "\n")
        self.process.stdin.flush()
        return self.answer()["seconds"]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()


class Fio:
    """fio as a contender; seconds are its own, of the I/O alone. It lays files out itself, so it has no `create`; nor does it `check`."""

    def __init__(self, program: str) -> None:
        self.program = program
        said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
        self.versions = {"fio": said.stdout.strip()}

    def __call__(self, act: str, settings: dict[str, Any], files: list[str], *, check: bool = False) -> float:
        size = PIECE * PIECES
        jobs = settings["numjobs"]
        options: dict[str, Any] = {k: v for k, v in settings.items() if k != "numjobs"}
        options |= {"rw": act, "direct": 1, "overwrite": 1, "thread": 1, "group_reporting": 1}
        if len(files) == 1:  # jobs share the file, each has a part of it
            each = [
                {"name": f"j{i}", "filename": files[0], "offset": i * size // jobs, "size": size // jobs}
                for i in range(jobs)
            ]
        else:
            each = [
                {
                    "name": f"j{i}",
                    "filename": ":".join(files[i::jobs]),
                    "size": size // jobs,
                    "file_service_type": "sequential",
                }
                for i in range(jobs)
            ]
        command = [self.program, "--output-format=json"]
        for part in each:
            command += [f"--{k}={v}" for k, v in ({"name": part["name"]} | options | part).items()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if done.returncode:
            raise RuntimeError(f"fio: {done.stderr or done.stdout}")
        report = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
        moved = report[act]
        if report["error"] or moved["io_bytes"] != size:
            raise RuntimeError(f"fio: error {report['error']}, {moved['io_bytes']} bytes of {size}")
        return moved["io_bytes"] / moved["bw_bytes"]

    def close(self) -> None:
        pass


def files_of(folder: Path, case: str) -> list[str]:
    return [str(folder / f"{case}.{i}") for i in range(CASES[case])]


def run(contenders: dict[str, Any], folder: Path, rounds: int) -> list[dict[str, Any]]:
    """All settings of all contenders, round after round; the first round warms up and is not counted."""
    records = [
        {
            "contender": name,
            "settings": s,
            "case": case,
            "gb_s": {a: [] for a in ACTS if name != "fio" or a != "create"},
        }
        for case in CASES
        for i in range(max(map(len, SETTINGS.values())))  # neighbours in time are of different contenders
        for name in contenders
        for s in SETTINGS[name][i : i + 1]
    ]
    for round_ in range(rounds + 1):
        for r in records:
            files = files_of(folder, r["case"])
            for act, rates in r["gb_s"].items():
                took = contenders[r["contender"]](act, r["settings"], files, check=not round_)
                if round_:
                    rates.append(1e-9 * PIECE * PIECES / took)
        print(f"round {round_} of {rounds}{'' if round_ else ' (warm-up)'}", file=sys.stderr, flush=True)
    return records


def best(records: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """`case act` to contender to the median of its best settings, and those."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for r in records:
        for act, rates in r["gb_s"].items():
            row = found.setdefault(f"{r['case']} {act}", {})
            if r["contender"] not in row or median(rates) > row[r["contender"]]["gb_s"]:
                row[r["contender"]] = {"gb_s": median(rates), "settings": r["settings"]}
    return found


def show(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    names = list(SETTINGS)
    lines = [
        "GB/s, each contender's best settings (median)",
        f"{'':14}" + "".join(f"{n:>12}" for n in names) + f"{'fds/aio':>10}{'fds/fio':>10}",
    ]
    for key, row in found.items():
        cells = "".join(f"{row[n]['gb_s']:12.2f}" if n in row else f"{'-':>12}" for n in names)
        ratios = "".join(
            f"{row['fds']['gb_s'] / row[n]['gb_s']:9.2f}x" if n in row else f"{'-':>10}" for n in ("deepspeed", "fio")
        )
        lines.append(f"{key:14}{cells}{ratios}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default=".", help="a directory on the disk to measure (default: here)")
    parser.add_argument(
        "--peer-python",
        type=os.path.abspath,
        default=os.environ.get("PEER_PYTHON"),
        help="the interpreter of DeepSpeed's environment",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", default=str(HERE / "results" / "io_throughput.json"))
    parser.add_argument("--work", choices=["fds", "deepspeed", "plain"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work)
        return
    missing: dict[str, str] = {}
    contenders: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="bench-io-", dir=options.path) as folder:
        try:
            contenders["fds"] = Worker("fds", sys.executable, Path(folder))
            if options.peer_python:
                contenders["deepspeed"] = Worker("deepspeed", options.peer_python, Path(folder))
            else:
                missing["deepspeed"] = "no --peer-python"
            if program := shutil.which("fio"):
                contenders["fio"] = Fio(program)
            else:
                missing["fio"] = "not installed here (Debian: apt-get install fio)"
            contenders["plain"] = Worker("plain", sys.executable, Path(folder))
            records = run(contenders, Path(folder), options.rounds)
        finally:
            for c in contenders.values():
                c.close()
    found = best(records)
    report = {
        "benchmark": "io_throughput",
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "kernel": os.uname().release,
        "bytes": PIECE * PIECES,
        "rounds": options.rounds,
        "versions": {name: c.versions for name, c in contenders.items()},
        "missing": missing,
        "best": found,
        "records": records,
    }
    Path(options.json).parent.mkdir(parents=True, exist_ok=True)
    Path(options.json).write_text(json.dumps(report, indent=1))
    print(show(found))
    for name, why in missing.items():
        print(f"{name}: not measured: {why}")


if __name__ == "__main__":
    main()
