"""One rank of `deepspeed_parity.py`: the same script over either library, `import deepspeed` or `import fds as deepspeed`.

    python parity_work.py LIBRARY FOLDER CASE...      with RANK, WORLD_SIZE and so on in the environment

Writes ``FOLDER/LIBRARY-CASE.json``: the mean loss over ranks of every step, and what failed.
"""

import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

STEPS, ROWS, LENGTH, WORDS = 20, 4, 32, 256
RATE = 1e-3
TORCH_ADAM = {"type": "AdamW", "params": {"lr": RATE, "betas": [0.9, 0.95], "weight_decay": 0.1, "torch_adam": True}}
WARM = {"type": "WarmupLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": RATE, "warmup_num_steps": 5, "warmup_type": "linear"}}  # fmt: skip
DECAY = {"type": "WarmupDecayLR", "params": {"total_num_steps": STEPS, "warmup_max_lr": RATE, "warmup_num_steps": 5}}


def zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **more}}


def cases(folder: str) -> dict[str, dict[str, Any]]:
    """Configurations as people use them; all with AdamW, and clipping."""
    away = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    files = {"offload_optimizer": {"device": "nvme", "nvme_path": folder}, "offload_param": {"device": "nvme", "nvme_path": folder}}  # fmt: skip
    found = {
        "zero-1": {**zero(1), "scheduler": WARM},
        "zero-2": {**zero(2), "scheduler": DECAY},
        "zero-3": zero(3),
        "offload-cpu": zero(3, **away),
        "offload-nvme": zero(3, **files),
        "bf16": {**zero(2), "bf16": {"enabled": True}},
        "fp16": {**zero(2), "fp16": {"enabled": True, "initial_scale_power": 22}},
        "lora-zero-3": zero(3),
        "hybrid-engine": {**zero(2), "hybrid_engine": {"enabled": True, "max_out_tokens": 64}},
        "activation-checkpointing": {**zero(2), "activation_checkpointing": {"partition_activations": False, "cpu_checkpointing": False}},
        "gradient-accumulation": {**zero(3), "gradient_accumulation_steps": 2, "scheduler": WARM},
    }  # fmt: skip
    common = {"train_batch_size": 2 * ROWS, "gradient_clipping": 1.0, "optimizer": TORCH_ADAM, "zero_force_ds_cpu_optimizer": False}  # fmt: skip
    return {k: {**common, **v} for k, v in found.items()}


class LowRank(nn.Module):
    """A linear layer, frozen, with an adapter beside it, as DeepSpeed-Chat and PEFT have it."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        generator = torch.Generator().manual_seed(7)
        self.a = nn.Parameter(0.1 * torch.randn(rank, base.in_features, generator=generator))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


def model(case: str, folder: Path) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=WORDS, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=LENGTH)  # fmt: skip
    made = LlamaForCausalLM(config)
    made.load_state_dict(torch.load(folder / "weights.pt"))
    if case in ("bf16", "fp16"):  # DeepSpeed's masters begin with rounded weights
        low = torch.bfloat16 if case == "bf16" else torch.float16
        with torch.no_grad():
            for p in made.parameters():
                p.copy_(p.to(low))
    if case.startswith("lora"):
        made.requires_grad_(False)
        for layer in made.model.layers:
            layer.self_attn.q_proj, layer.self_attn.v_proj = LowRank(layer.self_attn.q_proj), LowRank(layer.self_attn.v_proj)  # fmt: skip
    if case == "activation-checkpointing":
        made.gradient_checkpointing_enable({"use_reentrant": False})
    return made


def losses(deepspeed: Any, case: str, config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """DeepSpeed's training loop."""
    made = model(case, folder)
    if deepspeed.__name__ == "deepspeed":
        config = {k: v for k, v in config.items() if k != "hybrid_engine"}  # its kernels have no CPU form: it raises
    trained = [p for p in made.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=made, model_parameters=trained, config=config)
    rank, world = dist.get_rank(), dist.get_world_size()
    data = torch.load(folder / "data.pt").chunk(world, dim=1)[rank]  # [steps, rows, length]
    engine.train()
    found: list[float] = []
    for ids in data:
        mean = torch.zeros(())
        for part in ids.chunk(engine.gradient_accumulation_steps()):
            loss = engine(input_ids=part, labels=part, use_cache=False).loss
            engine.backward(loss)
            engine.step()
            mean += loss.detach().float() / engine.gradient_accumulation_steps()
        dist.all_reduce(mean)
        found.append(float(mean / world))
    facts = {"norm": float(engine.get_global_grad_norm() or 0.0), "skipped": int(engine.skipped_steps)}
    if case == "hybrid-engine" and deepspeed.__name__ == "fds":
        engine.eval()
        prompts, greedy = data[0, :2, :8], {"max_new_tokens": 8, "do_sample": False}
        facts["generates"] = torch.equal(engine.generate(prompts, **greedy), engine.module.generate(prompts, **greedy))
    return {"losses": found, **facts}


def main() -> None:
    library, folder, names = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    os.environ["DS_ACCELERATOR"] = "cpu"  # read at import
    torch.set_num_threads(1)
    deepspeed = importlib.import_module(library)
    if (
        library == "deepspeed" and "fp16" in names
    ):  # it asks for instructions that make float16 fast, and refuses to be slow
        type(deepspeed.get_accelerator()).is_fp16_supported = lambda self: True
    deepspeed.init_distributed("gloo")
    for case in names:
        try:
            answer = losses(deepspeed, case, cases(str(folder / library))[case], folder)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"[:400]}
        if dist.get_rank() == 0:
            (folder / f"{library}-{case}.json").write_text(json.dumps(answer))
        if "error" in answer:
            sys.exit(1)


if __name__ == "__main__":
    main()
