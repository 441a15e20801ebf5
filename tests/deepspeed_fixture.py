"""Writes tests/data/deepspeed.tar.gz: tiny checkpoints by the real DeepSpeed, and what DeepSpeed says is in them. Run by hand, in the peers' environment:

    make .venv-peers/ready
    DS_ACCELERATOR=cpu .venv-peers/bin/python -m torch.distributed.run --nproc-per-node 2 tests/deepspeed_fixture.py

The tests have no DeepSpeed. They share `build` and `rows` with this script, and read the archive.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

ARCHIVE = Path(__file__).parent / "data" / "deepspeed.tar.gz"
BEFORE, AFTER, RANKS = 3, 3, 2
ADAM = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
CASES = {
    "zero1": {"zero_optimization": {"stage": 1}},
    "zero1-bf16": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    "zero2-bf16": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
    "zero2-shuffled": {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
    "zero3": {"zero_optimization": {"stage": 3, "sub_group_size": 300, "stage3_param_persistence_threshold": 10}},
}  # fmt: skip
UNIVERSAL = {"zero1": "universal1", "zero3": "universal3"}


def build():
    """A Llama with tied embeddings, sizes that do not divide, a frozen leaf, a buffer that files hold."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 11, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=19, num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, **sizes))  # fmt: skip
    model.config.use_cache = False
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    model.model.register_buffer("scale", torch.tensor([1.5, 2.25]))
    return model


def rows(step):
    """The global batch of a step: [4, 9] int64."""
    return torch.randint(3, 19, (4, 9), generator=torch.Generator().manual_seed(step))


def train(case, out):
    """`BEFORE` steps, a save, `AFTER` more; the losses of all, and the leaves and moments at the save and at the end."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    model = build()
    decayed = [p for p in model.parameters() if p.dim() > 1 and p.requires_grad]
    rest = [p for p in model.parameters() if p.dim() <= 1 and p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": rest}], **ADAM)  # two groups
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **CASES[case],
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    rank, losses, report = torch.distributed.get_rank(), [], {}

    def note(when):
        for name, p in model.named_parameters():
            if p.requires_grad and case == "zero2-shuffled":
                report[f"{when}/fp32/{name}"] = (
                    p  # safe_get_... look in places of the order before the shuffle (0.19.8)
                )
            elif p.requires_grad:
                report[f"{when}/fp32/{name}"] = safe_get_full_fp32_param(p)
                for key in ("exp_avg", "exp_avg_sq"):
                    report[f"{when}/{key}/{name}"] = safe_get_full_optimizer_state(p, key)
        report.update({k: v.detach().float().clone() for k, v in report.items()})

    for step in range(BEFORE + AFTER):
        if step == BEFORE:
            note("saved")
            engine.save_checkpoint(out / case)
        ids = rows(step).chunk(RANKS)[rank]
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        # It links moments to parameters in the first update of the first group, when the second group has none yet (0.19.8).
        engine.optimizer._hp_optimizer_states_linked = False
        engine.step()
        mean = loss.detach().float().clone()
        torch.distributed.all_reduce(mean)
        losses.append(float(mean) / RANKS)
    note("end")
    if rank == 0:
        from safetensors.torch import save_file

        kept = {k: v.contiguous() for k, v in report.items() if not k.startswith("end/exp")}
        save_file(kept, out / case / "report.safetensors")
        (out / case / "losses.json").write_text(json.dumps(losses))


def convert(out):
    """The universal format, by DeepSpeed's own script."""
    for case, name in UNIVERSAL.items():
        tag = (out / case / "latest").read_text()
        (out / name).mkdir()
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state", "--num_extract_workers", "1", "--num_merge_workers", "1"]  # fmt: skip
        subprocess.run([*command, "--input_folder", out / case / tag, "--output_folder", out / name / f"{tag}_universal"], check=True)  # fmt: skip


def main():
    out = Path(os.environ.setdefault("FDS_FIXTURE", tempfile.mkdtemp()))
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # no compiler: gloo alone
    deepspeed.init_distributed("gloo")
    where = [str(out)]
    torch.distributed.broadcast_object_list(where, src=0)
    out = Path(where[0])
    for case in CASES:
        train(case, out)
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        convert(out)
        ARCHIVE.parent.mkdir(exist_ok=True)
        with tarfile.open(ARCHIVE, "w:gz") as archive:
            for f in sorted(out.rglob("*")):
                if f.is_file() and f.suffix != ".py":
                    archive.add(f, f.relative_to(out), filter=_anonymous)
        shutil.rmtree(out)
        print(f"{ARCHIVE}: {ARCHIVE.stat().st_size:,} bytes")


def _anonymous(info):
    info.uid = info.gid = info.mtime = 0
    info.uname = info.gname = ""
    return info


if __name__ == "__main__":
    main()
