"""Train steps of fds and its peers, alternating in one run: `python benchmarks/train.py`; `benchmarks/report.py` then writes the tables.

Every contender has processes of its own, all alive at once; round after round each does a few steps while the others sleep, so that a
slow minute of the machine hits all of them. Same weights, same data, same optimizer: the losses have to agree, and the table says if not.
"""

import argparse
import datetime
import json
import os
import re
import signal
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import common
from common import LENGTH, ROWS, SIZES, machine, operations, versions
from fleet import HERE, ContenderError, Team, busy, caches, rendezvous, scrubbed

OWN = tempfile.TemporaryDirectory(prefix="bench-operators-")
BUILT = Path(
    os.environ.get("TORCH_EXTENSIONS_DIR", OWN.name)
)  # DeepSpeed's operators, built by its first contender: minutes
RESERVE = (
    5 * 2**30
)  # bytes that must be free before another contender starts: the largest, two ranks, while it compiles


@dataclass(frozen=True)
class Entry:
    """A contender: its name for --only, its name in the table, `module:function`, options, whether it runs in the peers' environment."""

    name: str
    label: str
    build: str
    options: dict[str, Any] = field(default_factory=dict)
    peer: bool = False


@dataclass(frozen=True)
class Group:
    """Contenders that are compared with each other."""

    name: str
    size: str
    dtype: str
    world: int
    threads: int
    entries: tuple[Entry, ...]
    measures: tuple[Entry, ...] = ()
    page: str = "train"  # the result file that it goes to


PROBE = Entry("probe", "machine", "probe:build")
SHARDED = (
    Entry("fds-keep", "fds ZeRO-3, keep", "fds_zero:build"),
    Entry("fds-regather", "fds ZeRO-3, re-gather and recompute", "fds_zero:build", {"regather": True}),
    Entry("deepspeed3", "DeepSpeed ZeRO-3", "peers.deepspeed_zero:build", {"stage": 3}, peer=True),
    Entry("fsdp2", "torch FSDP2, eager", "peers.fsdp2:build"),
    Entry("fsdp2-compiled", "torch FSDP2, torch.compile", "peers.fsdp2:build", {"compile": "model"}),
)
LOWER = (
    Entry("fds-zero2", "fds ZeRO-1 and 2", "fds_zero:build", {"stage": 2}),
    Entry(
        "fds-zero2-lean", "fds ZeRO-1 and 2, keep_memory=False", "fds_zero:build", {"stage": 2, "keep_memory": False}
    ),
    Entry("deepspeed2", "DeepSpeed ZeRO-2", "peers.deepspeed_zero:build", {"stage": 2}, peer=True),
    Entry("deepspeed1", "DeepSpeed ZeRO-1", "peers.deepspeed_zero:build", {"stage": 1}, peer=True),
)
SINGLE = (
    Entry("fds", "fds, compiled step", "fds_zero:build"),
    Entry("compiled", "torch.compile(module) + fused AdamW", "peers.plain:build", {"compile": True}),
    Entry("eager", "module + fused AdamW", "peers.plain:build"),
)
APPLY = Entry("apply", "program.apply against the module, eager", "probe:apply")
NVME = {"device": "nvme", "nvme_path": ".", "pin_memory": False}
STATE = {"offload_optimizer": NVME | {"pipeline_read": True, "pipeline_write": True}}
PARAMS = STATE | {"offload_param": NVME}
OFFLOAD = (
    Entry("fds-memory", "fds, in memory", "offload_work:step"),
    Entry("fds-state", "fds, optimizer state in files", "offload_work:step", {"state": True}),
    Entry("fds-memory-recompute", "fds, in memory, recomputing", "offload_work:step", {"recompute": True}),
    Entry("fds-params", "fds, parameters and state in files, recomputing", "offload_work:step", {"params": True, "recompute": True}),
    Entry("deepspeed3", "DeepSpeed ZeRO-3, in memory", "peers.deepspeed_zero:build", {"stage": 3}, peer=True),
    Entry("deepspeed-state", "DeepSpeed ZeRO-3, nvme optimizer", "peers.deepspeed_zero:build", {"stage": 3, "zero": STATE}, peer=True),
    Entry("deepspeed3-recompute", "DeepSpeed ZeRO-3, in memory, recomputing", "peers.deepspeed_zero:build", {"stage": 3, "recompute": True}, peer=True),
    Entry("deepspeed-params", "DeepSpeed ZeRO-3, nvme optimizer and parameters, recomputing", "peers.deepspeed_zero:build", {"stage": 3, "zero": PARAMS, "recompute": True}, peer=True),
)  # fmt: skip
ADAM = (
    Entry("copy", "copy of 1 GiB", "offload_work:copy"),
    Entry("fds", "fds.optim.adamw", "offload_work:adamw"),
    Entry("torch", "torch.optim.AdamW(fused=True)", "peers.adam:torch_fused"),
    Entry("deepspeed", "DeepSpeedCPUAdam", "peers.adam:deepspeed", peer=True),
    Entry("fds-bf16", "fds.optim.adamw, bf16 gradients", "offload_work:adamw", {"grads": "bf16"}),
)
STATES = (
    Entry("fds", "fds.save_state, load_state", "state_work:fds_states"),
    Entry("torch", "torch.save, torch.load, a file for each rank", "state_work:torch_states"),
    Entry("deepspeed", "DeepSpeed ZeRO-3, save_checkpoint, load_checkpoint", "peers.deepspeed_zero:states", {"stage": 3}, peer=True),
)  # fmt: skip
BEHIND = Entry("fds-asynchronous", "fds, a save in the background", "state_work:fds_asynchronous")
GROUPS = (
    Group("fp32", "33.7M", "fp32", 2, 1, SHARDED, (PROBE,)),
    Group("bf16", "33.7M", "bf16", 2, 1, SHARDED, (PROBE,)),
    Group("zero-fp32", "33.7M", "fp32", 2, 1, LOWER, (PROBE,), "zero"),
    Group("zero-bf16", "33.7M", "bf16", 2, 1, LOWER, (PROBE,), "zero"),
    Group("single", "6.5M", "fp32", 1, 2, SINGLE, (PROBE, APPLY)),
    Group("offload", "60M", "fp32", 1, 2, OFFLOAD, (PROBE, Entry("disk", "disk", "offload_work:disk")), "offload"),
    Group("adamw", "60M", "fp32", 1, 2, (), ADAM, "offload"),
    Group("states", "83.4M", "fp32", 2, 1, (), (*STATES, BEHIND), "states"),
)


class Contender:
    """A running entry and what it has reported so far. After an error it keeps the error and does nothing more."""

    def __init__(self, entry: Entry, group: Group, peer_python: str | None) -> None:
        self.entry, self.group, self.error = entry, group, ""
        self.record: dict[str, Any] = {}
        self.rounds: list[list[float]] = []
        self.losses: list[float] = []
        self.others: list[float] = []
        self.measured: list[dict[str, Any]] = []
        self.team: Team | None = None
        if entry.peer and not peer_python:
            self.error = "no environment for this peer: give --peer-python or PEER_PYTHON"
            return
        self.python = str(peer_python) if entry.peer else sys.executable
        self.caches = tempfile.TemporaryDirectory(prefix="bench-caches-")

    def attempt(self, method: str, *args: Any) -> None:
        """Call a method; a failure ends this contender, not the run."""
        if self.error:
            return
        try:
            getattr(self, method)(*args)
        except ContenderError as error:
            self.error = str(error)
            _say(f"  {self.entry.name}: {self.error}")
            self.close()

    def start(self, warm_up: int) -> None:
        """Start from nothing, and on the pages "train" and "zero" again with what the first start compiled and cached. The last one stays and is timed."""
        if self.entry in self.group.measures:
            self._build()
            return
        for kind in ("from_nothing", "again") if self.group.page in ("train", "zero") else ("from_nothing",):
            if self.team is not None:
                self.team.close()
            self.losses, self.others = [], []
            self.record[kind] = found = self._first_steps(warm_up)
            _say(f"  {self.entry.name}: built and stepped once in {found['setup_s'] + found['first_step_s']:.1f} s")
        assert self.team is not None
        self.team.ask("settle")

    def _build(self) -> float:
        """New processes; seconds until they have built the contender."""
        job = {"size": self.group.size, "dtype": self.group.dtype, "options": self.entry.options}
        env = caches(Path(self.caches.name), BUILT)
        if self.entry.peer:
            env |= {"DS_ACCELERATOR": "cpu", "PATH": f"{Path(self.python).parent}{os.pathsep}{os.environ['PATH']}"}
            env |= rendezvous(1) | {"RANK": "0", "LOCAL_RANK": "0"} if self.group.world == 1 else {}
        g = self.group
        self.team = Team(self.entry.build, job=job, world=g.world, threads=g.threads, python=self.python, env=env)
        return max(h["setup_s"] for h in self.team.hello())

    def _first_steps(self, more: int) -> dict[str, Any]:
        setup, first = self._build(), self._steps(1)[0]
        self._steps(more)
        assert self.team is not None
        memory = self.team.ask("memory")
        return {"setup_s": setup, "first_step_s": first, "peak_rss": [m["life"] for m in memory]}

    def turn(self, steps: int) -> None:
        """This contender's part of a round."""
        assert self.team is not None
        if self.entry in self.group.measures:
            self.measured += self.team.ask("measure")
            return
        self.rounds.append(self._steps(steps))
        _say(f"  {self.entry.name}: {median(self.rounds[-1]):.3f} s/step")

    def finish(self) -> None:
        assert self.team is not None
        if self.entry not in self.group.measures:
            memory = self.team.ask("memory")
            self.record["peak_rss"] = {k: [m[k] for m in memory] for k in ("life", "steady")}
            self.record["facts"] = memory[0]["facts"]
        self.close()

    def close(self) -> None:
        if self.team is not None:
            self.team.close()
            self.team = None
            self.caches.cleanup()

    def _steps(self, n: int) -> list[float]:
        """Seconds of `n` steps, of the slower rank each; notes the losses and what others took of the machine meanwhile."""
        assert self.team is not None
        used, there = busy()
        replies = self.team.ask("steps", n=n)
        used, there = busy()[0] - used, busy()[1] - there
        self.others.append(max(0.0, used - sum(r["cpu_s"] for r in replies)) / max(there, 1e-9))
        self.losses += [sum(column) / len(column) for column in zip(*(r["losses"] for r in replies), strict=True)]
        return [max(column) for column in zip(*(r["times"] for r in replies), strict=True)]

    def result(self) -> dict[str, Any]:
        """What goes into the file."""
        known = {"name": self.entry.name, "label": self.entry.label, "options": self.entry.options}
        if self.error:
            return known | {"error": self.error}
        if self.entry in self.group.measures:
            return known | {"measured": self.measured}
        times = [t for r in self.rounds for t in r]
        low, middle, high = quantiles(times, n=4) if len(times) > 1 else times * 3
        tokens = ROWS * LENGTH * self.group.world
        speed = {
            "step_s": median(times),
            "step_s_quartiles": [low, middle, high],
            "step_s_rounds": self.rounds,
            "tokens_per_s": tokens / median(times),
        }
        return known | self.record | speed | {"losses": self.losses, "others_share": median(self.others)}


def run_group(group: Group, *, rounds: int, steps: int, warm_up: int, peer_python: str | None) -> dict[str, Any]:
    """All contenders of a group, alternating; in several heats if memory does not hold them all at once."""
    pending, results, heat = list(group.entries), list[dict[str, Any]](), 0
    measured: dict[str, Any] = {}
    while pending or not heat:
        _say(f"{group.name}, heat {heat + 1}")
        running: list[Contender] = []
        try:
            for entry in group.measures:
                running.append(_started(entry, group, peer_python, warm_up))
            while pending and (_free() > RESERVE or len(running) <= len(group.measures)):
                running.append(_started(pending.pop(0), group, peer_python, warm_up))
            _alternate(running, rounds, steps)
        finally:
            for c in running:
                c.close()
        for c in running:
            if c.entry in group.measures:
                measured.setdefault(c.entry.name, []).append(c.result())
            else:
                results.append(c.result() | {"heat": heat})
        heat += 1
    size = {
        "parameters": SIZES[group.size].parameters,
        "tokens": ROWS * LENGTH * group.world,
        "flops_per_rank": operations(group.size),
    }
    about = {k: getattr(group, k) for k in ("name", "size", "dtype", "world", "threads")}
    return about | size | {"contenders": results, "measured": measured}


def _started(entry: Entry, group: Group, peer_python: str | None, warm_up: int) -> Contender:
    contender = Contender(entry, group, peer_python)
    contender.attempt("start", warm_up)
    return contender


def _alternate(running: list[Contender], rounds: int, steps: int) -> None:
    """Each round begins with another contender."""
    for r in range(rounds):
        _say(f"round {r + 1} of {rounds}")
        for c in running[r % len(running) :] + running[: r % len(running)]:
            c.attempt("turn", steps)
    for c in running:
        c.attempt("finish")


def _free() -> int:
    found = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
    return int(found[1]) * 1024 if found else 2**62


def _peer_versions(python: str | None) -> dict[str, str]:
    """Versions in the peers' environment, asked of its own interpreter."""
    import subprocess

    if not python:
        return {}
    code = "import json, common; print(json.dumps(common.versions('torch', 'transformers', 'deepspeed')))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=HERE, check=False)
    return json.loads(done.stdout) if done.returncode == 0 else {"error": scrubbed(done.stderr[-200:])}


def _say(text: str) -> None:
    print(text, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds of one step each instead of five of three")
    parser.add_argument("--rounds", type=int, help="rounds")
    parser.add_argument("--steps", type=int, help="steps of each contender in a round")
    parser.add_argument(
        "--groups",
        default=",".join(g.name for g in GROUPS if g.page == "train"),
        help=f"of {','.join(g.name for g in GROUPS)} (default: %(default)s)",
    )
    parser.add_argument(
        "--only", help="contenders whose name begins with one of these, comma-separated: fds,deepspeed3,..."
    )
    parser.add_argument("--size", choices=list(SIZES), help="another model than the group's, to try the harness out")
    parser.add_argument(
        "--peer-python",
        type=os.path.abspath,
        default=os.environ.get("PEER_PYTHON"),
        help="interpreter that has deepspeed (or PEER_PYTHON)",
    )
    parser.add_argument(
        "--out", type=Path, help="result file (default: results/train.json here; out/train.json with --only or --size)"
    )
    return parser.parse_args()


def _selected(args: argparse.Namespace) -> list[Group]:
    """The groups and contenders that were asked for; a name that fits nothing is an error."""
    from dataclasses import replace

    names = [g.name for g in GROUPS]
    unknown = [n for n in args.groups.split(",") if n not in names]
    groups = [g for g in GROUPS if g.name in args.groups.split(",")]
    if args.only:
        wanted = tuple(args.only.split(","))
        groups = [replace(g, entries=tuple(e for e in g.entries if e.name.startswith(wanted))) for g in groups]
        found = [e.name for g in groups for e in g.entries]
        unknown += [w for w in wanted if not any(n.startswith(w) for n in found)]
        names += sorted({e.name for g in GROUPS for e in g.entries})
    if unknown:
        raise ValueError(f"--groups/--only: {', '.join(unknown)} unknown; there are {', '.join(names)}")
    if len({g.page for g in groups}) > 1:
        raise ValueError(f"--groups: {args.groups} go to several result files; give those of one at a time")
    return [replace(g, size=args.size) if args.size else g for g in groups if g.entries or not args.only]


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that folders and ranks are cleaned up
    args = _arguments()
    groups = _selected(args)
    rounds, steps = args.rounds or (2 if args.quick else 5), args.steps or (1 if args.quick else 3)
    partial = args.only or args.size
    (page,) = {g.page for g in groups}
    out: Path = args.out or (Path("out") if partial else HERE / "results") / f"{page}.json"
    warm_up, commit = 2, common.commit()  # before the results make the clone dirty
    result: dict[str, Any] = {
        "benchmark": page,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": machine(),
        "versions": versions("torch", "transformers", "optree", "fds"),
        "peer_versions": _peer_versions(args.peer_python),
        "groups": [],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    for group in groups:
        found = run_group(group, rounds=rounds, steps=steps, warm_up=warm_up, peer_python=args.peer_python)
        protocol = {"rounds": rounds, "steps": steps, "warm_up": warm_up}
        where = {
            "date": result["date"],
            "machine": result["machine"],
        }  # groups of several runs may be put into one file
        result["groups"].append(found | where | {"protocol": protocol, "commit": commit})
        out.write_text(
            json.dumps(result, indent=1) + "\n"
        )  # after each group: hours of measuring outlive a later failure
    _say(f"written: {out}")


if __name__ == "__main__":
    main()
