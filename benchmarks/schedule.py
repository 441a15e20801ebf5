"""What moving the collectives of a compiled step hides: the same ZeRO-3 step with each of the two passes, both and none, in turns.

    torchrun --standalone --nproc-per-node 2 benchmarks/schedule.py

Ranks of one machine talk through its memory, which leaves little to hide. A slower link, in a network of its own, that ends with the command:

    unshare -rn sh -c 'ip link set lo up; tc qdisc add dev lo root tbf rate 2gbit burst 256kb latency 50ms
        GLOO_SOCKET_IFNAME=lo torchrun --nproc-per-node 2 --master-addr 127.0.0.1 --master-port 29511 benchmarks/schedule.py'
"""

import argparse
import time
from statistics import median

import torch
import torch.distributed as dist
from common import DTYPES, LEARNING_RATE, SIZES, Job, batch, llama

import fds

SCHEDULES = {
    "where they stand": {"prefetch": False, "overlap": False},
    "prefetch": {"prefetch": True, "overlap": False},
    "overlap": {"prefetch": False, "overlap": True},
    "both": {"prefetch": True, "overlap": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="6.5M")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--recompute", action="store_true", help="gather again in backward")
    parser.add_argument("--rounds", type=int, default=8, help="of two steps each")
    args = parser.parse_args()
    torch.set_num_threads(1)
    axis = fds.sharding.mesh(dp=-1)["dp"]
    job = Job(args.size, args.dtype, axis.rank, axis.size)
    program, params = fds.functionalize(llama(job))
    chain = fds.chain(fds.shard(axis), *[fds.cast("bfloat16")] * job.low, *[fds.checkpoint()] * args.recompute)
    step = fds.train_step(chain(program), fds.optim.adamw(LEARNING_RATE))
    runs = {name: fds.compile(step, **options) for name, options in SCHEDULES.items()}
    states = {name: step.init(params) for name in runs}
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for i in range(args.rounds + 1):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            for _ in range(2):
                ids = batch(job, i)
                dist.barrier()
                start = time.perf_counter()
                states[name], _ = runs[name](states[name], {"input_ids": ids})
                dist.barrier()
                if i:  # the first round compiles
                    times[name].append(time.perf_counter() - start)
    if axis.rank == 0:
        still = times["where they stand"]
        print(f"{args.size}, {args.dtype}, {axis.size} ranks, torch {torch.__version__}; {len(still)} steps each")
        for name, took in times.items():
            ratio = median(a / b for a, b in zip(took, still, strict=True))
            print(f"| {name} | {median(took):.3f} s | {ratio:.2f} |")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
