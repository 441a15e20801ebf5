"""Train through the death of a worker, and go on with another number of ranks: the run is its newest checkpoint.

    torchrun --standalone --nproc-per-node 2 --max-restarts 3 examples/elastic.py --steps 8 --kill 5
    torchrun --standalone --nproc-per-node 1 examples/elastic.py --steps 12
    torchrun --standalone --nproc-per-node 2 examples/elastic.py --steps 16

torchrun starts all workers again when one is gone. Each start does the same: it looks for a checkpoint, and goes on from there on the ranks
that there are. Parameters are created where they are stored, so that no rank ever holds the whole model.
"""

import argparse
import json
import os
import signal
from pathlib import Path

import torch
import transformers

import fds


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", default="out/elastic", help="folder of the checkpoints, and of losses.jsonl")
    p.add_argument("--steps", type=int, default=8, help="steps of the whole run, those of earlier starts included")
    p.add_argument("--every", type=int, default=2, help="steps between two checkpoints")
    p.add_argument("--kill", type=int, default=None, help="the last rank dies at this step, the first time")
    return p.parse_args()


def model() -> transformers.LlamaForCausalLM:
    with torch.device("meta"):
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=97, **sizes))


def batch(row: int, axis: fds.sharding.Axis) -> dict[str, torch.Tensor]:
    """This rank's part of the four rows from `row` on, of data without end that is the same whoever asks."""
    rows = [torch.randint(97, (16,), generator=torch.Generator().manual_seed(row + i)) for i in range(4)]
    return {"input_ids": torch.stack(rows).chunk(axis.size)[axis.rank]}


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    axis, out = fds.sharding.mesh(dp=-1)["dp"], Path(args.out)
    program, _ = fds.functionalize(model())
    train = fds.chain(fds.shard(axis), fds.checkpoint())(program)
    step = fds.train_step(train, fds.optim.adamw(1e-2))
    if (out / "state.json").exists():
        state, row = fds.load_state(out, step), fds.load_extra(out)["row"]
    else:
        state, row = step.init(fds.init_params(train, seed=0)), 0
    while int(state.step) < args.steps:
        number = int(state.step)
        if number == args.kill and axis.rank == axis.size - 1 and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        state, metrics = step(state, batch(row, axis))
        row += 4
        if axis.rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            with open(out / "losses.jsonl", "a") as f:
                print(json.dumps({"step": number, "ranks": axis.size, "loss": float(metrics["loss"])}), file=f)
        if int(state.step) % args.every == 0 or int(state.step) == args.steps:
            fds.save_state(out, step, state, keep=2, extra={"row": row})
    if axis.rank == 0:
        print(f"{int(state.step)} steps; the last ones on {axis.size} ranks; {out}")


if __name__ == "__main__":
    main(arguments())
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
