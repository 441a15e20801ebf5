"""Prefill and decode of fds and transformers against the bandwidth of the memory, by turns in one process: `make bench-generate`.

A decode step reads every weight once, and the cache: the floor is these bytes over the bandwidth of reading 1 GiB, measured in the same round, as other machines on the host
change it. Figures are medians over rounds; a round generates `--short` and `--long` tokens behind one prompt with each contender, and the difference of the two is decoding.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import commit, machine, versions
from report import of_floor
from torch import Tensor
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM

import fds

HERE = Path(__file__).resolve().parent
# hidden, intermediate, layers, heads, key-value heads; 32,000 words, embeddings tied
SIZES = {"100M": (768, 2048, 12, 12, 4), "500M": (1536, 4096, 18, 12, 4), "tiny": (64, 128, 2, 4, 2)}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Generate = Callable[[Tensor, int], Any]


def model(size: str, dtype: torch.dtype) -> LlamaForCausalLM:
    hidden, intermediate, layers, heads, shared = SIZES[size]
    config = LlamaConfig(
        vocab_size=32000, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=shared,
        max_position_embeddings=2048, tie_word_embeddings=True, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    made = LlamaForCausalLM(config).eval()
    for p in made.parameters():
        p.data = p.data.to(dtype)
    return made


def bandwidth(x: Tensor) -> float:
    """Bytes a second of reading `x`, the best of five."""
    return max(x.nbytes / timed(lambda: x.sum()) for _ in range(5))


def timed(f: Callable[[], Any]) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def contenders(size: str, dtype: torch.dtype, quantized: bool) -> dict[str, Generate]:
    plain = model(size, dtype)

    def theirs(**options: Any) -> Generate:
        def run(ids: Tensor, new: int) -> Tensor:
            mask = torch.ones_like(ids)
            return plain.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=new, min_new_tokens=new, **options)  # fmt: skip

        return run

    def ours(*chain: fds.Transform) -> Generate:
        program, params = fds.functionalize(plain)
        program = fds.chain(fds.freeze(), *chain)(program)
        stored = program.place(params)
        return lambda ids, new: fds.generate(program, stored, ids, max_new_tokens=new)

    everywhere = CompileConfig(fullgraph=False, mode="default")
    everywhere._compile_all_devices = True  # by default transformers compiles on accelerators alone
    static = {"cache_implementation": "static", "compile_config": everywhere}
    found = {"fds": ours(), "transformers, dynamic": theirs(), "transformers, static and compiled": theirs(**static)}
    return found | ({"fds, int8 weights": ours(fds.quantize_frozen("int8"))} if quantized else {})


def measure(size: str, dtype: str, rows: int, prompt: int, short: int, long: int, rounds: int, quantized: bool) -> dict[str, Any]:  # fmt: skip
    """Seconds of each contender: the first call, which compiles; then by rounds the prompt with one token, and a token behind it."""
    ids = torch.randint(3, 32000, (rows, prompt), generator=torch.Generator().manual_seed(1))
    found: dict[str, Any] = {"size": size, "dtype": dtype, "rows": rows, "prompt": prompt, "contenders": {}}
    running = contenders(size, DTYPES[dtype], quantized)
    texts: dict[str, Any] = {}
    for name, generate in running.items():
        try:
            first = timed(lambda g=generate: g(ids, long))
            generate(ids, 1), generate(ids, short)
            texts[name] = generate(ids, long)[:, prompt:]
        except Exception as error:  # a peer that does not run is part of the result
            found["contenders"][name] = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
            continue
        found["contenders"][name] = {"first_s": first, "prefill_s": [], "token_s": []}
        print(f"{size} {dtype} x {rows}: {name} first {first:.1f} s", flush=True)
    memory = torch.ones(2**28)  # float32: the sum of fewer bytes an element is no longer bound by the memory
    found["read_bytes_s"] = []
    for _ in range(rounds):
        found["read_bytes_s"].append(bandwidth(memory))
        for name, generate in running.items():
            c = found["contenders"][name]
            if "error" in c:
                continue
            prefill, a, b = (timed(lambda g=generate, n=n: g(ids, n)) for n in (1, short, long))
            c["prefill_s"].append(prefill)
            c["token_s"].append((b - a) / (long - short))
    plain = model(size, DTYPES[dtype])
    head = plain.config
    cache = 2 * head.num_hidden_layers * head.num_key_value_heads * (head.hidden_size // head.num_attention_heads)
    found["parameters"] = sum(p.numel() for p in plain.parameters())
    found["bytes"] = sum(p.nbytes for p in plain.parameters()) + rows * cache * (prompt + long) * DTYPES[dtype].itemsize
    first = texts.get("transformers, dynamic")
    found["same_tokens"] = {k: float((t == first).float().mean()) for k, t in texts.items() if first is not None}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="100M,500M")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--short", type=int, default=8)
    parser.add_argument("--long", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--int8", action="store_true", help="fds with int8 weights as well")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "generate.json")
    args = parser.parse_args()
    torch.set_num_threads(2)
    groups: list[dict[str, Any]] = []
    for size in args.sizes.split(","):
        groups.append(measure(size, args.dtype, args.rows, args.prompt, args.short, args.long, args.rounds, args.int8))
        gc.collect()
    result = {"benchmark": "generate", "date": str(date.today()), "commit": commit(), "machine": machine(), "versions": versions("torch", "transformers", "fds"), "peer_versions": versions("torch", "transformers"), "rounds": args.rounds, "groups": groups}  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1))
    for g in groups:
        for name, c in g["contenders"].items():
            if "error" in c:
                print(g["size"], name, c["error"])
                continue
            token, share = median(c["token_s"]), of_floor(g, c)
            print(f"{g['size']} {name}: prefill {median(c['prefill_s']) * 1e3:.0f} ms, {1 / token * g['rows']:.1f} tokens/s, {share:.0%} of the floor")  # fmt: skip


if __name__ == "__main__":
    main()
