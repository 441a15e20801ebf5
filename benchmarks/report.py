"""Writes the tables of RESULTS.md from the result files: `python benchmarks/report.py`.

Only what stands between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->`` is replaced (NAME is the file's "benchmark"); prose around it stays.
"""

import argparse
import json
import re
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
TOLERANCE = {
    "fp32": 2e-3,
    "bf16": 3e-2,
}  # of the losses, absolute: rounding, grown by Adam's normalisation over some twenty steps
GB = 1e9
Json = dict[str, Any]


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    line = "|---" + "|---:" * (len(head) - 1) + "|"
    return "\n".join(["| " + " | ".join(head) + " |", line, *("| " + " | ".join(r) + " |" for r in rows)])


def train(result: Json) -> str:
    """All tables of `train.py`."""
    parts = [
        _machine(result),
        "Within a group all contenders alternate in one run. Every contender starts twice, from nothing and with the caches of its first start, and the second one is timed; s/step is the median of the slower rank's steps, with the quartiles beside it.",
    ]
    for group in result["groups"]:
        parts += [_heading(group), _speed(group), _compared(group), _losses(group), _traffic(group)]
    return "\n\n".join(part for part in parts if part)


def _machine(result: Json) -> str:
    m = result["machine"]
    has = ", ".join(m["instructions"]) or "no wide vectors"
    own = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    peer = ", ".join(f"{k} {v}" for k, v in result["peer_versions"].items()) or "none"
    return (
        f"{result['date']}, {m['cpu']} ({has}), {m['cores']} cores, {m['memory_gib']} GiB. Here: {own}. Peers: {peer}."
    )


def _heading(group: Json) -> str:
    ranks = f"{group['world']} gloo ranks" if group["world"] > 1 else "one process"
    threads = f"{group['threads']} thread{'s'[: group['threads'] > 1]}"
    p = group["protocol"]
    title = f"### {group['size']} Llama, {group['dtype']}, {ranks}, {threads} each"
    return (
        f"{title}\n\nCommit {group['commit']}, {p['rounds']} rounds of {p['steps']} steps after {p['warm_up'] + 1} that are not timed. {group['parameters']:,} parameters, {group['tokens']:,} tokens a step, "
        f"{group['flops_per_rank'] / 1e9:.0f} GFLOP a rank and step. {_probed(group)}"
    )


def _probes(group: Json) -> list[Json]:
    return [m for run in group["measured"].get("probe", []) for m in run.get("measured", [])]


def _peaks(group: Json) -> Json:
    """GFLOP/s of one rank by dtype, the best of all rounds."""
    probes = _probes(group)
    return {k: max(m["gflops"][k] for m in probes) for k in probes[0]["gflops"]} if probes else {}


def _probed(group: Json) -> str:
    probes, peaks = _probes(group), _peaks(group)
    text = (
        "Measured matmul peak of a rank, all ranks busy: "
        + ", ".join(f"{v:.0f} GFLOP/s {k}" for k, v in peaks.items())
        + "."
    )
    moved = [m["all_gather_gb_s"] for m in probes if "all_gather_gb_s" in m]
    return (text if peaks else "") + (f" All-gather of 8 MiB over gloo: {max(moved):.2f} GB/s." if moved else "")


def _speed(group: Json) -> str:
    sharded = group["world"] > 1
    head = ["", "s/step", "quartiles", "tokens/s", "of peak", "build + first step, s", "again, s"]
    head += ["peak RSS, GB: sum" if sharded else "peak RSS, GB", "at the start from nothing", "others' CPU"]
    return table(head, [_row(c, group, len(head)) for c in group["contenders"]])


def _row(c: Json, group: Json, width: int) -> list[str]:
    if "error" in c:
        return [c["label"], f"did not run: `{c['error'].replace('|', '/').replace('`', '')}`", *[""] * (width - 2)]
    rates = [v for k, v in _peaks(group).items() if k.startswith(group["dtype"])]  # bf16 by itself, and by way of fp32
    peak, life = max(rates, default=None), c["peak_rss"]["life"]
    low, _, high = c["step_s_quartiles"]
    share = group["flops_per_rank"] / (c["step_s"] * peak * 1e9) if peak else None
    starts = [c[k]["setup_s"] + c[k]["first_step_s"] for k in ("from_nothing", "again")]
    return [
        c["label"],
        f"{c['step_s']:.3f}",
        f"{low:.3f} to {high:.3f}",
        f"{c['tokens_per_s']:,.0f}",
        f"{share:.0%}" if share else "",
        *(f"{t:.0f}" for t in starts),
        f"{sum(life) / GB:.2f}",
        f"{sum(c['from_nothing']['peak_rss']) / GB:.2f}",
        f"{c['others_share']:.0%}",
    ]


def _ran(group: Json) -> list[Json]:
    return [c for c in group["contenders"] if "error" not in c]


def _compared(group: Json) -> str:
    """Each peer against each fds row: tokens/s and memory."""
    ours = [c for c in _ran(group) if c["name"].startswith("fds")]
    peers = [c for c in _ran(group) if not c["name"].startswith("fds")]
    if not ours or not peers:
        return ""
    rows = [[p["label"], *(f"{_times(o, p)}" for o in ours)] for p in peers]
    text = "Times a peer's tokens/s (the median of the rounds' ratios: the machine's speed drifts), and times its peak RSS (summed over ranks; of the timed processes; of those that started from nothing):"
    return text + "\n\n" + table(["", *(o["label"] for o in ours)], rows) + _applied(group)


def _times(ours: Json, peer: Json) -> str:
    life = sum(ours["peak_rss"]["life"]) / sum(peer["peak_rss"]["life"])
    new = sum(ours["from_nothing"]["peak_rss"]) / sum(peer["from_nothing"]["peak_rss"])
    rounds = zip(ours["step_s_rounds"], peer["step_s_rounds"], strict=True)
    return f"{median(median(p) / median(o) for o, p in rounds):.2f}x; {life:.2f}; {new:.2f}"


def _applied(group: Json) -> str:
    runs = [m for run in group["measured"].get("apply", []) for m in run.get("measured", [])]
    if not runs:
        return ""
    middle = {k: sorted(m[k]["ratio"] for m in runs)[len(runs) // 2] for k in runs[0]}
    return (
        f"\n\nEager `program.apply` takes {middle['forward']:.3f} times the module's forward pass, "
        f"{middle['forward_backward']:.3f} times its forward and backward (medians of neighbouring calls)."
    )


def _losses(group: Json) -> str:
    """Whether all contenders computed the same thing."""
    curves = {c["label"]: c["losses"] for c in _ran(group)}
    if len(curves) < 2:
        return ""
    n = min(map(len, curves.values()))
    middle = [sorted(c[i] for c in curves.values())[len(curves) // 2] for i in range(n)]
    off = {k: max(abs(c[i] - middle[i]) for i in range(n)) for k, c in curves.items()}
    limit = TOLERANCE[group["dtype"]]
    wrong = [f"**{k} is off by {d:.4f}**" for k, d in off.items() if not d <= limit]
    ends = ", ".join(f"{k} {c[n - 1]:.4f}" for k, c in curves.items())
    verdict = "; ".join(wrong) or f"largest difference at any step {max(off.values()):.1e}, allowed {limit:.0e}"
    return f"Loss after {n} steps, from {middle[0]:.4f}: {ends} ({verdict})."


def _traffic(group: Json) -> str:
    lines = []
    for c in _ran(group):
        moved = c["facts"].get("traffic")
        if moved and moved["bytes"]:
            calls = ", ".join(f"{n} {name}" for name, n in moved["calls"].items())
            lines.append(f"{c['label']}: {moved['times_parameters']:.4g} times the parameters a step ({calls})")
    return "Traffic. " + "; ".join(lines) + "." if lines else ""


def spliced(text: str, name: str, body: str) -> str:
    """`text` with the part between the markers of `name` replaced; appended, markers included, if there are none."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if (begin in text) != (end in text):
        raise ValueError(f"RESULTS.md: only one of {begin} and {end} is there; required both or neither")
    block = f"{begin}\n\n{body}\n\n{end}"
    if begin not in text:
        return f"{text.rstrip()}\n\n{block}\n".lstrip()
    return re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: block, text, flags=re.DOTALL)


RENDERERS = {"train": train}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="result files (default: all in results/)")
    parser.add_argument("--out", type=Path, default=HERE / "RESULTS.md", help="the page to write into")
    args = parser.parse_args()
    text = args.out.read_text() if args.out.exists() else "# Results\n"
    for file in args.files or sorted((HERE / "results").glob("*.json")):
        result = json.loads(file.read_text())
        text = spliced(text, result["benchmark"], RENDERERS[result["benchmark"]](result))
    args.out.write_text(text)


if __name__ == "__main__":
    main()
