"""Adapters of several kinds and ranks, from PEFT folders, in one batch: every row is answered by its own.

    python examples/serve_adapters.py

Trains three adapters of one tiny Llama, each on another way through the alphabet, writes PEFT folders, and serves them together. Every row is that
of its adapter fused alone.
"""

import argparse
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fds
from fds.inference import NONE, adapters, choose, load_adapter

TARGETS, LETTERS = "*_proj", 26
# letters from one to the next, and the settings of the adapter
KINDS = {
    "forwards": (1, {"rank": 4}),
    "every second": (2, {"rank": 8, "rslora": True}),
    "backwards": (-1, {"rank": 4, "alpha": 8, "dora": True}),
}


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=LETTERS, eos_token_id=None, pad_token_id=0, **sizes))


def tuned(train: fds.Program, params: dict, jump: int, steps: int) -> dict:
    """Weights that continue "a" by every `jump`-th letter."""
    step = fds.train_step(train, fds.optim.adamw(1e-2))
    state, draw = step.init(params), torch.Generator().manual_seed(1)
    for _ in range(steps):
        first = torch.randint(LETTERS, (16, 1), generator=draw)
        state, _ = step(state, {"input_ids": (first + jump * torch.arange(10)) % LETTERS})
    return state.params


def fused(train: fds.Program, params: dict, folder: Path) -> tuple[fds.Program, dict]:
    """An adapter by itself, in the weights."""
    stored, plain = fds.load_adapters(folder, train, train.place(params)), fds.fuse_lora()(train)
    return plain, fds.relayout(train, plain)(stored)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120, help="of training each adapter")
    parser.add_argument("--out", type=Path, default=Path("out/adapters"))
    args = parser.parse_args()
    program, params = fds.functionalize(model())
    trained = {name: fds.lora(targets=TARGETS, **settings)(program) for name, (_, settings) in KINDS.items()}
    for name, train in trained.items():
        fds.save_adapters(args.out / name, train, tuned(train, params, KINDS[name][0], args.steps))

    serve = adapters(len(KINDS), rank=8, targets=TARGETS, rows=4)(program)
    stored = serve.place(params)
    for slot, name in enumerate(KINDS):
        stored = load_adapter(serve, stored, slot, args.out / name)
    rows = [2, 0, NONE, 1]  # each row's adapter
    stored, prompts = choose(serve, stored, rows), torch.full((len(rows), 1), 12)
    out = fds.generate(serve, stored, prompts, max_new_tokens=8, details=True)

    names = [*KINDS, "none"]
    alone = [fused(trained[name], params, args.out / name) for name in KINDS] + [(program, program.place(params))]
    for row, slot in enumerate(rows):
        want = fds.generate(*alone[slot], prompts[:1], max_new_tokens=8, details=True, compile=False)
        torch.testing.assert_close(out.logprobs[row], want.logprobs[0], rtol=1e-4, atol=1e-4)
        assert torch.equal(out.tokens[row], want.tokens[0])
        print(f"{names[slot]:>12}: {''.join(chr(ord('a') + t) for t in out.tokens[row].tolist())}")


if __name__ == "__main__":
    main()
