"""Train a model whose parameters and optimizer state are eight times what it may hold in memory: they live in files.

    python examples/train_larger_than_memory.py --path /fast/disk

Prints the plan before it starts, and how much of the reading and writing hid behind computing; draws it.
"""

import argparse
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch
from matplotlib.figure import Figure
from transformers import LlamaConfig, LlamaForCausalLM

import fds
from fds.offload import FileStore, record
from fds.offload.plan import plan


def model(width: int, layers: int) -> LlamaForCausalLM:
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_attention_heads": 8}
    config = LlamaConfig(vocab_size=256, num_hidden_layers=layers, max_position_embeddings=128, **sizes)
    return LlamaForCausalLM(config)


def draw(events: list, begun: float, ended: float, name: str) -> None:
    """A row each for writing, reading, waiting for either, and computing, which is what the step does when it does not wait."""
    rows = {k: [(e.start - begun, e.stop - begun) for e in events if e.kind == k] for k in ("write", "read", "wait")}
    edges = [(0, 0), *sorted(rows["wait"]), (ended - begun, ended - begun)]
    rows["compute"] = [(a, b) for (_, a), (b, _) in pairwise(edges)]
    figure = Figure(figsize=(10, 2.8), layout="constrained")
    axes = figure.subplots()
    for row, (kind, color) in enumerate({"write": "orange", "read": "blue", "wait": "red", "compute": "green"}.items()):
        axes.broken_barh([(a, b - a) for a, b in rows[kind]], (row, 0.8), color=f"tab:{color}", linewidth=0)
    axes.set_yticks([0.4, 1.4, 2.4, 3.4], ["writing", "reading", "waiting for either", "computing"])
    axes.set_xlabel("seconds of one step")
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(name, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--path", default=None, help="a folder on a fast disk (default: a temporary one)")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=56)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", default="out/timeline.png", help="the picture of the last step")
    args = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir=args.path) as path, FileStore(path) as store:
        program, params = fds.functionalize(model(args.width, args.layers))
        total = 3 * sum(p.nbytes for p in params.values())
        away = fds.chain(fds.offload(store, window=1), fds.checkpoint())(program)
        step = fds.train_step(away, fds.optim.streamed(fds.optim.adamw(1e-3), store, window=1))
        print(f"parameters and AdamW's moments: {total / 2**20:.0f} MiB; a budget of {total / 8 / 2**20:.0f} MiB")
        print(plan(step, budget=total // 8))
        state = step.init(params)
        del params, program
        batch = {"input_ids": torch.randint(256, (4, 64))}
        for i in range(args.steps):
            begun = time.perf_counter()
            with record() as events:
                state, metrics = step(state, batch)
            ended = time.perf_counter()
            print(f"step {i}: loss {float(metrics['loss']):.3f}, {ended - begun:.2f} s")
        took = {k: sum(e.stop - e.start for e in events if e.kind == k) for k in ("read", "write", "wait")}
        disk = took["read"] + took["write"]
        print(f"{disk:.2f} s of reading and writing, {max(0, 1 - took['wait'] / disk):.0%} of it behind computing")
        draw(events, begun, ended, args.out)


if __name__ == "__main__":
    main()
