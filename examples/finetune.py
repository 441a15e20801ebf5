"""Train a 10M Llama on the standard library's source, adapt it with LoRA, fuse, generate, export, resume. The main job of fds.

python examples/finetune.py --out out/demo        # starts its own two ranks (gloo on CPU, nccl on CUDA)
"""

import argparse
import math
import os
import sysconfig
import time
from collections import Counter
from pathlib import Path

import torch
import transformers
from reporting import memory, progress, report
from tokenizers import ByteLevelBPETokenizer

import fds

PROMPTS = ("def read_file(path):\n", "class Stack:\n    def push(self, item):\n", "import os\n\ndef main():\n")


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--out", default="out/finetune", help="folder for pictures, checkpoints and the exported model")
    p.add_argument("--ranks", type=int, default=2, help="processes to start; 0: this one only, or under torchrun")
    p.add_argument("--steps", type=int, default=240, help="pre-training steps")
    p.add_argument("--tune-steps", type=int, default=30, help="LoRA fine-tuning steps on held-out files")
    p.add_argument("--batch", type=int, default=4, help="rows of the global batch")
    p.add_argument("--length", type=int, default=128, help="tokens in a row")
    p.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    p.add_argument("--rank", type=int, default=8, help="LoRA rank")
    p.add_argument("--vocabulary", type=int, default=4096, help="size of the BPE vocabulary")
    p.add_argument("--compile", action="store_true", help="compile the steps (a minute each on CPU, more speed after)")
    return p.parse_args()


def corpus(vocabulary, device):
    """Token ids of training files and of held-out files, and the tokeniser trained on the former."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [f.read_text(errors="ignore") for f in files]
    held = [t for i, t in enumerate(texts) if i % 10 == 0]
    train = [t for i, t in enumerate(texts) if i % 10]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(train, vocab_size=vocabulary, special_tokens=["<|end|>"], show_progress=False)
    ids = ([i for t in part for i in [*bpe.encode(t).ids, 0]] for part in (train, held))
    return *(torch.tensor(i, device=device) for i in ids), bpe


def batches(ids, args, axis, seed):
    """Endless random windows; every rank draws the same global batch and takes its own rows."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        at = torch.randint(len(ids) - args.length, (args.batch,), generator=generator)
        rows = torch.stack([ids[i : i + args.length] for i in at])
        yield {"input_ids": rows.chunk(axis.size)[axis.rank]}


def run(step, state, data, steps, title, curve, args, axis):
    """`steps` steps of `step`; appends (loss, tokens/s, memory in bytes) to `curve`."""
    with progress(axis) as bar:
        task = bar.add_task(title, total=steps)
        for _ in range(steps):
            start = time.perf_counter()
            state, metrics = step(state, next(data))
            loss, speed = float(metrics["loss"]), args.batch * args.length / (time.perf_counter() - start)
            curve.append((loss, speed, memory()))
            text = f"{title}  loss {loss:.3f}  {speed:,.0f} tokens/s  {memory() / 1e6:,.0f} MB"
            bar.update(task, advance=1, description=text)
    return state


@torch.no_grad()
def evaluate(program, stored, ids, args, axis):
    """Mean loss on fixed windows, over all ranks."""
    rows = next(batches(ids, argparse.Namespace(**{**vars(args), "batch": 8 * axis.size}), axis, 99))
    return float(axis.mean(fds.losses.causal_lm(program.eval(), stored, rows)))


def main(args):
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // max(args.ranks, 1)))
    out, started = Path(args.out), time.perf_counter()
    mesh = fds.sharding.mesh(dp=-1)
    axis, device = mesh["dp"], mesh.device
    train_ids, held_ids, bpe = corpus(args.vocabulary, device)
    counts, size = Counter(train_ids.tolist()), len(train_ids) + args.vocabulary
    unigram = -sum(math.log((counts[i] + 1) / size) for i in held_ids.tolist()) / len(held_ids)

    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=args.vocabulary, hidden_size=320, intermediate_size=864, num_hidden_layers=6, num_attention_heads=5, max_position_embeddings=512, bos_token_id=0, eos_token_id=0, pad_token_id=0)  # fmt: skip
    program, params = fds.functionalize(transformers.LlamaForCausalLM(config).to(device))

    # 1. Pre-train in bfloat16: ZeRO-3, recomputed blocks, AdamW with its state in host memory.
    train = fds.chain(fds.shard(axis), fds.cast(torch.bfloat16), fds.checkpoint())(program)
    rate = fds.optim.warmup_cosine(args.lr, warmup_steps=args.steps // 10, total_steps=args.steps)
    adamw = fds.optim.offloaded(fds.optim.adamw(rate, weight_decay=0.01))
    compiled = fds.compile if args.compile else (lambda step: step)
    step = compiled(fds.train_step(train, fds.optim.chain(fds.optim.clip_by_global_norm(1.0), adamw)))
    curve, data, half = [], batches(train_ids, args, axis, 0), args.steps // 2
    state = run(step, step.init(params), data, half, "pre-train", curve, args, axis)
    fds.save_state(out / "state", step, state)  # 5. stop here, and go on from the files
    state = fds.load_state(out / "state", step)
    state = run(step, state, data, args.steps - half, "resumed  ", curve, args, axis)
    pretrained, validation = train.restore(state.params), evaluate(train, state.params, held_ids, args, axis)

    # 2. LoRA on held-out files: the base is frozen and sharded, the adapters train.
    adapt = fds.lora(rank=args.rank, targets=("*.[qv]_proj", "*.mlp.*_proj"))
    tune = fds.chain(adapt, fds.shard(axis), fds.checkpoint())(program)
    tuner = compiled(fds.train_step(tune, fds.optim.adamw(args.lr)))
    data = batches(held_ids, args, axis, 1)
    tuned = run(tuner, tuner.init(pretrained), data, args.tune_steps, "LoRA     ", curve, args, axis)
    adapted = evaluate(tune, tuned.params, held_ids, args, axis)
    fds.save_adapters(out / "adapters", tune, tuned.params)

    # 3. Fuse and generate. The base weights are not touched: `tuned` could train on.
    fused = fds.fuse_lora()(tune)
    weights = fds.relayout(tune, fused)(tuned.params)
    ids = [torch.tensor([bpe.encode(prompt).ids], device=device) for prompt in PROMPTS]
    sample = {"max_new_tokens": 48, "temperature": 0.7, "top_k": 40, "seed": 1, "compile": False}
    texts = [bpe.decode(fds.generate(fused, weights, x, **sample)[0].tolist()) for x in ids]

    # 4. Export, and compare with transformers on the exported files.
    fds.save(out / "model", fused, weights)
    ids = held_ids[None, : args.length]
    with torch.no_grad():
        ours = fused.eval()(weights, input_ids=ids).logits
        theirs = transformers.LlamaForCausalLM.from_pretrained(out / "model").to(device).eval()(input_ids=ids).logits
    assert torch.equal(ours, theirs), f"exported logits differ by {float((ours - theirs).abs().max())}"
    if axis.rank == 0:
        bpe.save(str(out / "model" / "tokenizer.json"))
        losses, speeds, peak = zip(*curve, strict=True)
        results = {
            "parameters": f"{sum(v.numel() for v in params.values()) / 1e6:.1f}M on {axis.size} ranks",
            "tokens/s (median)": f"{sorted(speeds[: args.steps])[args.steps // 2]:,.0f}",
            "loss before / after the resume": f"{sum(losses[half - 3 : half]) / 3:.3f} / {sum(losses[half : half + 3]) / 3:.3f}",
            "unigram entropy, held-out files": f"{unigram:.3f}",
            "validation loss": f"{validation:.3f}",
            "after LoRA on them": f"{adapted:.3f}",
            "exported logits in transformers": "equal",
            "peak memory of rank 0": f"{max(peak) / 1e6:,.0f} MB",
            "seconds": f"{time.perf_counter() - started:.0f}",
        }
        report(out, curve, texts, results, unigram=unigram, half=half, steps=args.steps)
    assert args.steps < 50 or validation < unigram, f"validation loss {validation:.3f}, unigram entropy {unigram:.3f}"


if __name__ == "__main__":
    fds.launch(main, arguments())
