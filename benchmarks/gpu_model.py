"""What `gpu.py` times of a whole model: a training step and a decode step of a Llama of 1.2B parameters, against its plain module.

Without a GPU the same code runs on a model of 0.2M parameters, and says nothing about speed.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

import fds

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
ROWS, LENGTH = (4, 2048) if CUDA else (2, 32)
ROUNDS = 5 if CUDA else 1


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192}
    sizes |= {"num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8}
    if not CUDA:
        sizes |= {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=8192, tie_word_embeddings=True)).float()


def batch() -> Tensor:
    return torch.randint(512, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def seconds(contenders: dict[str, Callable[[], Any]], warm: int = 2) -> dict[str, float]:
    """Medians of alternating calls."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(warm + ROUNDS):
        for name, f in contenders.items():
            _wait()
            start = time.perf_counter()
            f()
            _wait()
            if i >= warm:
                times[name].append(time.perf_counter() - start)
    return {name: median(t) for name, t in times.items()}


def _wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def training(limits: dict[str, float] | None) -> dict[str, Any]:
    """bfloat16 over float32 masters, AdamW; the two steps alternate. `peak_gb` is what a step takes above what is there before it."""
    ids, found = batch(), dict[str, Any]()
    found["tokens"] = ids.numel()
    steps, parameters = {}, 0
    for name, build in (("fds", _fds_step), ("torch.compile + fused AdamW", _plain_step)):
        steps[name], parameters = build(ids)
        found[name] = {"losses": [float(steps[name]()) for _ in range(2)]}
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            steps[name]()
            found[name]["peak_gb"] = (torch.cuda.max_memory_allocated() - before) / 1e9
    for name, took in seconds(steps, warm=1).items():
        found[name] |= {"step_s": took, "tokens_per_s": ids.numel() / took}
        if limits is not None:
            operations = ids.numel() * (6 * parameters + 12 * 16 * 2048 * LENGTH / 2)
            found[name]["of_products"] = operations / took / limits["flops_per_s"]
    far = abs(found["fds"]["losses"][1] - found["torch.compile + fused AdamW"]["losses"][1])
    if not far < 3e-2:
        raise ValueError(f"training step: the losses are {far:.1e} apart: {found}")
    return found


def _fds_step(ids: Tensor) -> tuple[Callable[[], Any], int]:
    program, params = fds.functionalize(llama())
    step = fds.compile(fds.train_step(fds.cast(torch.bfloat16)(program), fds.optim.adamw(1e-4)))
    state = [step.init(params)]

    def run() -> Any:
        state[0], metrics = step(state[0], {"input_ids": ids})
        return metrics["loss"]

    return run, sum(p.numel() for p in params.values())


def _plain_step(ids: Tensor) -> tuple[Callable[[], Any], int]:
    model = llama().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    forward = torch.compile(model)

    def run() -> Any:
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return run, sum(p.numel() for p in model.parameters())


def decoding(limits: dict[str, float] | None) -> dict[str, Any]:
    """One token for each of 8 rows of 1,024: the difference of 65 new tokens and one, through `fds.generate` and transformers' own."""
    rows, prompt, new = (8, 1024, 64) if CUDA else (2, 16, 4)
    model = llama().to(torch.bfloat16 if CUDA else torch.float32).eval()
    ids = torch.randint(512, (rows, prompt), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    program, params = fds.functionalize(model)
    stored = program.place(params)
    theirs: dict[str, Any] = {"do_sample": False, "cache_implementation": "static", "pad_token_id": 0}

    def ours(n: int) -> Tensor:
        return fds.generate(program, stored, ids, max_new_tokens=n)

    def plain(n: int) -> Tensor:
        return model.generate(ids, max_new_tokens=n, min_new_tokens=n, **theirs)

    found: dict[str, Any] = {"rows": rows, "equal": bool(torch.equal(ours(new + 1), plain(new + 1)))}
    contenders = {"fds.generate": ours, "transformers, static cache": plain}
    long, short = (seconds({k: lambda n=n, f=f: f(n) for k, f in contenders.items()}) for n in (new + 1, 1))
    for name in contenders:
        row: dict[str, Any] = {"token_s": (long[name] - short[name]) / new}
        if limits is not None:
            cache = 2 * rows * prompt * 16 * 8 * 64 * 2
            moved = sum(p.nbytes for p in params.values()) + cache
            row["of_bytes"] = moved / row["token_s"] / limits["bytes_per_s"]
        found[name] = row | {"tokens_per_s": rows / row["token_s"]}
    return found
