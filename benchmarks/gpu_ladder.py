"""What `gpu.py` times of generation: GPT-2 and OPT-1.3B, random weights in bfloat16, against transformers and the bytes that a step has to read.

Figures to beat, published of others on such a chip: GPT-2, one row, 128 tokens then 32: 965 tokens/s (SGLang), 222 (DeepSpeed's hybrid engine). OPT-1.3B,
256 tokens then 128: 5.00 ms a step for one row, 5.37 for 32 (hybrid engine, on an H100). Without a GPU the same code runs on tiny models of both families.
"""

from collections.abc import Callable
from typing import Any

import attrs
import torch
from gpu_model import CUDA, DEVICE, seconds
from torch import Tensor, nn

import fds

LOW = torch.bfloat16 if CUDA else torch.float32


@attrs.frozen
class Rung:
    """A model, the rows of a batch, tokens of the prompt, tokens behind it, and the milliseconds of a step that are to be beaten."""

    name: str
    rows: int
    prompt: int
    new: int
    beat_ms: float | None

    @property
    def label(self) -> str:
        return f"{self.name}, {self.rows} x {self.prompt}, {self.new} more"


RUNGS = (
    Rung("GPT-2", 1, 128, 32, 1e3 / 965),
    Rung("OPT-1.3B", 1, 256, 128, 5.0),
    Rung("OPT-1.3B", 4, 256, 128, None),
    Rung("OPT-1.3B", 16, 256, 128, None),
    Rung("OPT-1.3B", 32, 256, 128, 5.37),
)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    tiny = {} if CUDA else {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 128, "n_positions": 512}
    return GPT2LMHeadModel(GPT2Config(**tiny, eos_token_id=None, bos_token_id=None))


def opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {
        "hidden_size": 2048,
        "ffn_dim": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "word_embed_proj_dim": 2048,
    }
    tiny = {
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 32,
        "vocab_size": 128,
    }
    return OPTForCausalLM(OPTConfig(**(sizes if CUDA else tiny), eos_token_id=None, pad_token_id=1))


def ladder(limits: dict[str, float] | None) -> dict[str, Any]:
    """Seconds a step of every rung: the difference of so many new tokens and one, over their number; medians of alternating calls."""
    found: dict[str, Any] = {}
    for name, build in (("GPT-2", gpt2), ("OPT-1.3B", opt)):
        torch.manual_seed(0)
        with torch.device(DEVICE):
            model = build().to(LOW).eval()
        program, params = fds.functionalize(model)
        program = fds.freeze(program)
        stored = program.place(params)
        for rung in RUNGS if CUDA else RUNGS[:2]:
            if rung.name == name:
                found[rung.label] = _timed(rung, model, program, stored, limits)
        del model, program, params, stored
        if CUDA:
            torch.cuda.empty_cache()
    return found


def _timed(rung: Rung, model: Any, program: fds.Program, stored: Any, limits: dict[str, float] | None) -> dict[str, Any]:  # fmt: skip
    rows, prompt, new = (rung.rows, rung.prompt, rung.new) if CUDA else (2, 16, 4)
    ids = torch.randint(3, 128, (rows, prompt), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    mask = torch.ones_like(ids)

    def ours(n: int) -> Tensor:
        return fds.generate(program, stored, ids, max_new_tokens=n)

    def theirs(**options: Any) -> Callable[[int], Tensor]:
        def run(n: int) -> Tensor:
            return model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=n, min_new_tokens=n, pad_token_id=1, **options)  # fmt: skip

        return run

    contenders = {"fds.generate": ours, "transformers": theirs(), "transformers, static and compiled": theirs(cache_implementation="static")}  # fmt: skip
    texts = {name: f(new + 1) for name, f in contenders.items()}
    same = {name: float((t == texts["transformers"]).float().mean()) for name, t in texts.items()}
    long, short = (seconds({k: lambda n=n, f=f: f(n) for k, f in contenders.items()}) for n in (new + 1, 1))
    found: dict[str, Any] = {} if rung.beat_ms is None or not CUDA else {"to beat, ms": rung.beat_ms}
    config = model.config
    cache = 2 * rows * (prompt + new) * config.num_hidden_layers * config.hidden_size * LOW.itemsize
    for name in contenders:
        step = (long[name] - short[name]) / new
        row = {
            "step_ms": step * 1e3,
            "prefill_ms": short[name] * 1e3,
            "tokens_per_s": rows / step,
            "same_tokens": same[name],
        }
        if limits is not None:
            row["of_bytes"] = (sum(p.nbytes for p in model.parameters()) + cache) / step / limits["bytes_per_s"]
        found[name] = row
    return found
