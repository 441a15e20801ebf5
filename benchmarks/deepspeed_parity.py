"""The same configurations, model and data in fds and in the real DeepSpeed, on two gloo ranks: the losses have to be the same.

    python benchmarks/deepspeed_parity.py --peer-python .venv-peers/bin/python

Exits with 1 if a case differs by more than its tolerance, fails here, or fails there without a reason that is known.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import versions
from fleet import LAUNCHER, rendezvous, scrubbed
from parity_work import LENGTH, ROWS, STEPS, WORDS, cases

HERE = Path(__file__).resolve().parent
# float32: the bound. 16 bits: libraries round at other places (DeepSpeed rounds buffers and sums gradients of microbatches and ranks in 16
# bits, fds rounds parameters alone), and a rounding of 2^-8 (bf16) or 2^-11 (fp16) of a logit shows in the loss of every step.
TOLERANCE = {"bf16": 2e-3, "fp16": 1e-3}
EXACT = 1e-4


def prepare(folder: Path) -> None:
    """Weights and batches, the same for both."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=WORDS, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=LENGTH)  # fmt: skip
    torch.save(LlamaForCausalLM(config).state_dict(), folder / "weights.pt")
    step = torch.arange(LENGTH)[None, None] * torch.randint(1, 4, (STEPS, 2 * ROWS, 1))
    torch.save((step + torch.randint(WORDS, (STEPS, 2 * ROWS, 1))) % WORDS, folder / "data.pt")
    for library in ("fds", "deepspeed"):
        (folder / library).mkdir()


def run(python: str, library: str, names: list[str], folder: Path, patience: float) -> str:
    """Both ranks to their end; what they said."""
    env = {k: v for k, v in os.environ.items() if k not in (*LAUNCHER, "PYTHONPATH")} | rendezvous(2)
    env |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "GLOO_SOCKET_IFNAME": "lo"}
    env |= {"PYTHONPATH": str(HERE.parent)} if library == "fds" else {}
    command = [python, str(HERE / "parity_work.py"), library, str(folder), *names]
    logs = [(folder / f"{library}-{r}.log").open("a+") for r in range(2)]
    ranks = [
        subprocess.Popen(command, env=env | {"RANK": str(r), "LOCAL_RANK": str(r)}, stdout=log, stderr=log, cwd=folder)
        for r, log in enumerate(logs)
    ]
    try:
        for rank in ranks:
            rank.wait(patience)
    except subprocess.TimeoutExpired:
        pass
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
                rank.wait()
    for log in logs:
        log.seek(0)
    words = "".join(log.read() for log in logs)
    for log in logs:
        log.close()
    return words


def answer(library: str, case: str, folder: Path, words: str) -> dict[str, Any]:
    path = folder / f"{library}-{case}.json"
    return json.loads(path.read_text()) if path.is_file() else {"error": words.strip()[-600:]}


def compared(case: str, ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    limit = TOLERANCE.get(case, EXACT)
    row: dict[str, Any] = {"case": case, "tolerance": limit, "fds": ours, "deepspeed": theirs}
    if "losses" in ours and "losses" in theirs:
        row["difference"] = max(abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=True))
        learned, skipped = ours["losses"][-1] < ours["losses"][0], ours["skipped"] == theirs["skipped"]
        row["ok"] = row["difference"] <= limit and learned and skipped and ours.get("generates", True)
    else:
        row["ok"] = False
    return row


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer-python", default=".venv-peers/bin/python")
    parser.add_argument("--cases", default="")
    parser.add_argument("--patience", type=float, default=900.0, help="seconds for a library's run")
    parser.add_argument("--result", type=Path, default=HERE / "results" / "deepspeed_parity.json")
    parser.add_argument("--separate", action="store_true", help="a process for each case, if one fails in company")
    args = parser.parse_args()
    chosen = args.cases.split(",") if args.cases else list(cases(""))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="parity-") as scratch:
        folder = Path(scratch)
        prepare(folder)
        said: dict[tuple[str, str], str] = {}
        for library, python in (("fds", sys.executable), ("deepspeed", str(Path(args.peer_python).absolute()))):
            for names in [[c] for c in chosen] if args.separate else [chosen]:
                left = names
                while left:  # what comes after a case that failed starts anew
                    words = run(python, library, left, folder, args.patience)
                    done = [c for c in left if (folder / f"{library}-{c}.json").is_file()]
                    said |= {(library, c): words for c in left}
                    left = left[max(len(done), 1) :]
        for case in chosen:
            row = compared(case, *(answer(b, case, folder, said[b, case]) for b in ("fds", "deepspeed")))
            rows.append(row)
            print(line(row), flush=True)
    result = {"benchmark": "deepspeed_parity", "steps": STEPS, "rows": rows, "versions": versions("fds", "torch", "transformers"), "peer_versions": peer_versions(args.peer_python)}  # fmt: skip
    if not args.cases:
        args.result.parent.mkdir(exist_ok=True)
        args.result.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(row["ok"] for row in rows) else 1


def line(row: dict[str, Any]) -> str:
    if "difference" in row:
        ours, theirs = row["fds"]["losses"], row["deepspeed"]["losses"]
        verdict = "ok" if row["ok"] else "DIFFERS"
        return f"{row['case']:26} {verdict:8} {row['difference']:.1e} <= {row['tolerance']:g}   loss {theirs[0]:.4f} -> {theirs[-1]:.4f}, here {ours[-1]:.4f}"
    errors = [f"{k}: {scrubbed(row[k]['error'])}" for k in ("fds", "deepspeed") if "error" in row[k]]
    return f"{row['case']:26} FAILED   {' | '.join(errors)}"


def peer_versions(python: str) -> dict[str, str]:
    code = "import json, importlib.metadata as m; print(json.dumps({k: m.version(k) for k in ('deepspeed', 'torch', 'transformers')}))"
    return json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)


if __name__ == "__main__":
    sys.exit(main())
