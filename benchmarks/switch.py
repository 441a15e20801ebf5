"""From training to generating and back, on two ranks with ZeRO-3 and adapters: a part of `make bench-generate`.

    torchrun --standalone --nproc-per-node 2 benchmarks/switch.py

Every round takes one eager training step for each way of switching, so that the weights are new, and times the way there (until the serving weights
are whole), four tokens by one and the same eager `generate`, and the way back. The ways take turns. Two of them are not fds: a second copy of the
model that the gathered and fused weights are copied into, and adapters added to gathered weights, which are split again after subtracting them.
"""

import argparse
import json
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from common import Job, batch, commit, llama, machine, peak_rss, reset_peak, versions
from torch import Tensor

import fds
from fds import tree
from fds.inference import hybrid
from fds.memory import give_back_freed

HERE = Path(__file__).resolve().parent
Stored = Any


class Way:
    """How training weights get to where they serve, and how training goes on."""

    def __init__(self, train: fds.Program) -> None:
        self.train = train
        self.serve = fds.freeze()(train.origin)

    def there(self, stored: Stored) -> Stored:
        """Weights of `serve`."""
        raise NotImplementedError

    def back(self, stored: Stored) -> Stored:
        """The training weights: those that went there, or what has become of them."""
        return stored

    def drop(self) -> None:
        """What the next training step does not need is not kept."""


class Engine(Way):
    def __init__(self, train: fds.Program, **settings: Any) -> None:
        self.train, self.engine = train, hybrid(train, **settings)
        self.serve = self.engine.serve

    def there(self, stored: Stored) -> Stored:
        return self.engine.weights(stored)

    def drop(self) -> None:
        self.engine.release()


class Copy(Way):
    """All weights gathered and fused, then copied into a model that is always there."""

    def __init__(self, train: fds.Program, params: dict[str, Tensor]) -> None:
        super().__init__(train)
        self.kept = self.serve.place({k: v.clone() for k, v in params.items()})

    def there(self, stored: Stored) -> Stored:
        whole = self.train.restore(stored)
        for part in self.kept.values():
            for k, v in part.items():
                v.copy_(whole[k])
        return self.kept


class InPlace(Way):
    """All weights gathered, adapters added to them, subtracted afterwards, and the sum of that split again."""

    def there(self, stored: Stored) -> Stored:
        self.inner, self.whole = self.train.before("lora", stored)
        own = {x.untyped_storage().data_ptr() for x in tree.leaves(stored)}  # what is not split is not to be written
        self.whole = {s: {k: v.clone() if v.untyped_storage().data_ptr() in own else v for k, v in part.items()} for s, part in self.whole.items()}  # fmt: skip
        self.fuse(1.0)
        return {s: {k: v for k, v in part.items() if "lora_" not in k} for s, part in self.whole.items()}

    def fuse(self, sign: float) -> None:
        scale = self.inner.history[-1].settings.scale
        for part in self.whole.values():
            for k in [k for k in part if k.endswith(".lora_A.weight")]:
                delta = part[k.replace("lora_A", "lora_B")] @ part[k]
                part[k.replace(".lora_A", "")].add_(delta, alpha=sign * scale)

    def back(self, stored: Stored) -> Stored:
        self.fuse(-1.0)
        return self.train.after(self.inner, self.whole)

    def drop(self) -> None:
        self.whole = {}


def ways(programs: dict[str, fds.Program], params: dict[str, Tensor]) -> dict[str, tuple[str, Way]]:
    """Each with the program that it trains."""
    zero3, whole = programs["zero3"], programs["whole"]
    return {
        "hybrid, 8 sites at a time": ("zero3", Engine(zero3)),
        "hybrid, 1 site at a time": ("zero3", Engine(zero3, tp_gather_partition_size=1)),
        "gather all, copy into a second model": ("zero3", Copy(zero3, params)),
        "gather all, add adapters, subtract them, split": ("zero3", InPlace(zero3)),
        "hybrid, without ZeRO, adapters beside": ("whole", Engine(whole, fuse=False)),
    }


def timed(f: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the slower rank, and the result."""
    dist.barrier()
    start = time.perf_counter()
    out = f()
    seconds = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds), out


def total(x: float) -> int:
    """Of both ranks."""
    summed = torch.tensor(float(x), dtype=torch.float64)
    dist.all_reduce(summed)
    return int(summed)


def resident() -> int:
    """Bytes of this process in memory, now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def turn(way: Way, stored: Stored, ids: Tensor, found: dict[str, Any]) -> Tensor:
    """One time there and back; appends to what was found, and returns the tokens."""
    reset_peak()
    before = resident()
    seconds, weights = timed(lambda: way.there(stored))
    found["there_s"].append(seconds)
    found["peak"].append(total(peak_rss() - before))
    own = {x.untyped_storage().data_ptr() for x in tree.leaves(stored)}
    held = sum(x.nbytes for x in tree.leaves(weights) if x.untyped_storage().data_ptr() not in own)
    found["held"] = total(held)
    tokens = fds.generate(way.serve, weights, ids, max_new_tokens=4, compile=False)
    if isinstance(way, Engine):  # with the same weights once more
        found["again_s"].append(timed(lambda: way.there(stored))[0])
    del weights
    seconds, after = timed(lambda: way.back(stored))
    found["back_s"].append(seconds)
    changed = sum(int((a != b).sum()) for a, b in zip(tree.leaves(after), tree.leaves(stored), strict=True))
    found["changed"] = total(changed)
    way.drop()
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="60M")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "switch.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    give_back_freed()
    axis = fds.sharding.mesh(dp=-1)["dp"]
    job = Job(args.size, "fp32", axis.rank, axis.size)
    program, params = fds.functionalize(llama(job).eval())
    adapters = fds.lora(rank=16, alpha=32, targets="*_proj")
    chains = {"zero3": fds.shard(axis), "whole": fds.replicate(axis)}
    programs = {k: fds.chain(adapters, t, fds.checkpoint())(program) for k, t in chains.items()}
    contenders = ways(programs, params)
    steps = {k: fds.train_step(p, fds.optim.adamw(1e-2)) for k, p in programs.items()}
    states = {k: step.init(params) for k, step in steps.items()}
    found = {name: {"there_s": [], "again_s": [], "back_s": [], "peak": [], "same": []} for name in contenders}
    train_s: list[float] = []
    for i in range(args.rounds + 1):  # the first one warms up, and is left out below
        texts, ids = dict[str, Tensor](), batch(job, i)
        for k, step in steps.items():
            seconds, (states[k], _) = timed(
                lambda k=k, step=step, ids=ids: step(states[k], {"input_ids": ids[:2, :64]})
            )
            train_s.append(seconds)
        for name, (k, way) in contenders.items():
            tokens = turn(way, states[k].params, ids[:2, :16], found[name])
            found[name]["same"].append(float((tokens == texts.setdefault(k, tokens)).float().mean()))
            if axis.rank == 0:
                there, back = (found[name][f"{x}_s"][-1] * 1e3 for x in ("there", "back"))
                print(f"round {i}: {name}: {there:.1f} ms, back {back:.1f} ms", flush=True)
    found = {name: {k: v[1:] if isinstance(v, list) else v for k, v in f.items()} for name, f in found.items()}
    if axis.rank:
        return
    result = {
        "benchmark": "switch", "date": str(date.today()), "commit": commit(), "machine": machine(), "versions": versions("torch", "transformers"), "peer_versions": {}, "rounds": args.rounds,
        "size": args.size, "parameters": sum(p.numel() for p in params.values()), "train_s": median(train_s[2:]), "contenders": found,
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
