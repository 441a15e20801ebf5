"""Operators on a GPU: right, and how near to the floor. `make gpu`; under nine minutes, one table last, results in `results/<gpu>-<date>.json`.

Without a GPU it checks what can be checked (the references against float64, every transformation) and says what it left out.
Ceilings are measured in the same run: a large copy for bytes, a large product for operations. Every figure is a median of graph replays.
"""

import argparse
import datetime
import json
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_work
import gpu_work_attention
import gpu_work_optimizer
import gpu_work_quantize
import torch
from common import machine, versions
from gpu_ladder import ladder
from gpu_model import decoding, training
from torch import Tensor

import fds
import fds.kernels

HERE = Path(__file__).resolve().parent
CUDA = torch.cuda.is_available()
WORK = [w for m in (gpu_work, gpu_work_optimizer, gpu_work_attention, gpu_work_quantize) for w in m.WORK]


# --- correctness ---


def checks() -> dict[str, str]:
    """Every operator in every dtype against its reference in float64 on the CPU; "" where it is right."""
    found: dict[str, str] = {}
    for name, op in fds.kernels.operators().items():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            label = f"{name} {str(dtype).removeprefix('torch.')}"
            found[label] = attempt(lambda op=op, dtype=dtype: compare(op, dtype))
            if CUDA:
                found[f"{label}, graph"] = attempt(lambda op=op, dtype=dtype: captured(op, dtype))
    return found


def attempt(f: Callable[[], str]) -> str:
    try:
        return f()
    except Exception as error:
        traceback.print_exc(limit=-3, file=sys.stderr)
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def moved(args: Any) -> Any:
    return tuple(a.cuda() if isinstance(a, Tensor) and CUDA else a for a in args)


def compare(op: Any, dtype: torch.dtype) -> str:
    """The relative distance of each floating result from the reference, which sees the same rounded inputs in higher precision."""
    bound = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
    for seed in range(3):
        args = op.example(seed, dtype)
        wide = tuple(
            a.double() if isinstance(a, Tensor) and a.is_floating_point() and op.differentiable else a for a in args
        )
        got, want = flat(op(*moved(args))), flat(op.reference(*wide))
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            g, w = g.cpu().double(), w.double()
            far = float((g - w).norm() / (w.norm() + 1e-30)) if g.numel() else 0.0
            if not far <= bound:
                return f"result {i}, seed {seed}: {far:.1e} away"
    return ""


def captured(op: Any, dtype: torch.dtype) -> str:
    """The same bits from a CUDA graph."""
    args = moved(op.example(0, dtype))
    want = flat(op(*args))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flat(op(*args))
    graph.replay()
    torch.cuda.synchronize()
    return "" if all(torch.equal(a, b) for a, b in zip(out, want, strict=True)) else "other bits from a graph"


def flat(x: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(x) if isinstance(t, Tensor)]


# --- speed ---


def milliseconds(f: Callable[[], Any]) -> float:
    """The median of graph replays where `f` can be captured, else of calls."""
    import triton

    try:
        return float(triton.testing.do_bench_cudagraph(f, rep=60, return_mode="median"))
    except Exception:
        torch.cuda.synchronize()
        return float(triton.testing.do_bench(f, warmup=20, rep=60, return_mode="median"))


def ceilings() -> dict[str, float]:
    """Bytes a second of a copy (read and written), and operations a second of a bfloat16 product."""
    x = torch.randn(2**28, device="cuda")
    y = torch.empty_like(x)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return {
        "bytes_per_s": 2 * x.nbytes / milliseconds(lambda: y.copy_(x)) * 1e3,
        "flops_per_s": 2 * 8192**3 / milliseconds(lambda: a @ b) * 1e3,
    }


def speeds(limits: dict[str, float]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for work in WORK:
        row: dict[str, Any] = {"work": work.label, "operator": work.operator}
        rows.append(row)
        try:
            contenders, floor = work.build()
            row["floor_ms"] = max(floor.bytes / limits["bytes_per_s"], floor.flops / limits["flops_per_s"]) * 1e3
            for name, f in contenders.items():
                try:
                    row[name] = milliseconds(f)
                except Exception as error:
                    row[f"{name}: failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            row["of_floor"] = row["floor_ms"] / row["fds"] if "fds" in row else None
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        torch.cuda.empty_cache()
    return rows


# --- the report ---


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="result file (default: results/<gpu>-<date>.json here)")
    args = parser.parse_args()
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    device = torch.cuda.get_device_name() if CUDA else "no GPU"
    result: dict[str, Any] = {
        "date": today,
        "device": device,
        "machine": machine(),
        "versions": versions("torch", "triton", "transformers", "fds"),
    }
    result["checks"] = checks()
    timed, known = {w.operator for w in WORK}, fds.kernels.operators().keys()
    result["checks"]["every operator is timed"] = ", ".join(sorted(timed ^ known))
    if CUDA:
        result["ceilings"] = ceilings()
        result["speeds"] = speeds(result["ceilings"])
    limits = result.get("ceilings")
    result["model"] = {}
    for name, f in (("training step", training), ("decode step", decoding), ("generation", ladder)):
        try:
            measured = f(limits)
            result["model"] |= measured if f is ladder else {name: measured}
        except Exception as error:
            traceback.print_exc(limit=-3, file=sys.stderr)
            result["model"][name] = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"}
    out = args.out or HERE / "results" / f"{re.sub('[^a-z0-9]+', '-', device.lower())}-{today}.json"
    if CUDA or args.out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written: {out}")
    table(result)
    failed = [k for k, v in result["model"].items() if "failed" in v]
    sys.exit(bool(failed) or any(result["checks"].values()))


def table(result: dict[str, Any]) -> None:
    wrong = {k: v for k, v in result["checks"].items() if v}
    print(f"{result['device']}: {len(result['checks']) - len(wrong)} of {len(result['checks'])} checks right")
    for k, v in wrong.items():
        print(f"  WRONG {k}: {v}")
    for name, found in result["model"].items():
        print(f"{name}: {_told(found)}")
    if "speeds" not in result:
        print(
            "No GPU: kernels, graphs and speed were left out; what ran is the CPU path of every operator, and the models' steps on tiny ones: their times say nothing."
        )
        return
    top = result["ceilings"]
    print(f"copy {top['bytes_per_s'] / 1e12:.2f} TB/s, bfloat16 products {top['flops_per_s'] / 1e12:.0f} TFLOP/s")
    for row in result["speeds"]:
        times = "  ".join(
            f"{k} {v:.3f}" for k, v in row.items() if isinstance(v, float) and k not in ("floor_ms", "of_floor")
        )
        share = f"{row['of_floor']:.0%} of the floor's rate" if row.get("of_floor") else row.get("failed", "failed")
        print(f"{row['work']:58} floor {row.get('floor_ms', 0):.3f} ms  {times}  {share}")


def _told(found: dict[str, Any]) -> str:
    if "failed" in found:
        return found["failed"]
    parts = [f"{k} {v}" for k, v in found.items() if not isinstance(v, dict)]
    for name, row in found.items():
        if isinstance(row, dict):
            share = next((f", {row[k]:.0%} of the ceiling" for k in ("of_products", "of_bytes") if k in row), "")
            parts.append(f"{name} {row['tokens_per_s']:,.0f} tokens/s{share}")
    return "; ".join(parts)


if __name__ == "__main__":
    main()
