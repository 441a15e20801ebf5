"""A training script that was written for DeepSpeed, with one line changed: ``import fds as deepspeed``.

    torchrun --standalone --nproc-per-node 2 examples/deepspeed_migration.py --deepspeed_config examples/ds_config.json

ZeRO-3, bfloat16, optimizer and parameters in host memory, accumulation, a warm-up, resumed from a checkpoint. On rank 0 the engine prints what the
configuration means, as a program of fds's own; `--steps 4` is the short form. With ``import deepspeed`` in its place the file runs there.
"""

import argparse
from collections.abc import Iterator

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

import fds as deepspeed  # this is the change: it was `import deepspeed`


class Sums(Dataset):
    """Token sequences that count up, from different starts: easy to learn."""

    def __len__(self) -> int:
        return 256

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(32) * (1 + i % 3) + i) % 97
        return {"input_ids": ids, "labels": ids}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--checkpoints", default="out/deepspeed_migration")
    return deepspeed.add_config_arguments(parser).parse_args()


def forever(loader: Iterator) -> Iterator:
    while True:
        yield from loader


def main() -> None:
    args = arguments()
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=32)  # fmt: skip
    model = LlamaForCausalLM(config)
    model.gradient_checkpointing_enable()

    engine, _optimizer, loader, _scheduler = deepspeed.initialize(
        args=args, model=model, model_parameters=model.parameters(), training_data=Sums()
    )
    _, client_state = engine.load_checkpoint(args.checkpoints)
    seen = (client_state or {}).get("batches", 0)

    engine.train()
    batches = forever(loader)
    while engine.global_steps < args.steps:
        batch = {k: v.to(engine.device) for k, v in next(batches).items()}
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        seen += 1
        if engine.was_step_applied() and engine.global_rank == 0:
            print(f"step {engine.global_steps}: loss {loss.item():.4f}, lr {engine.get_lr()[0]:.2e}, norm {engine.get_global_grad_norm():.3f}")  # fmt: skip

    engine.save_checkpoint(args.checkpoints, client_state={"batches": seen})
    engine.save_16bit_model(args.checkpoints, "pytorch_model.bin")


if __name__ == "__main__":
    main()
