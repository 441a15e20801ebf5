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
        parts += [
            _heading(group),
            _elsewhere(result, group),
            _speed(group),
            _compared(group),
            _losses(group),
            _traffic(group),
        ]
    return "\n\n".join(part for part in parts if part)


def _machine(result: Json) -> str:
    m = result["machine"]
    has = ", ".join(m["instructions"]) or "no wide vectors"
    own = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    peer = ", ".join(f"{k} {v}" for k, v in result["peer_versions"].items()) or "none"
    return (
        f"{result['date']}, {m['cpu']} ({has}), {m['cores']} cores, {m['memory_gib']} GiB. Here: {own}. Peers: {peer}."
    )


def _elsewhere(result: Json, group: Json) -> str:
    """The machine of a group that was measured on another one than the file's."""
    return _machine(result | group) if group.get("machine", result["machine"]) != result["machine"] else ""


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


# --- offload ---


def offload(result: Json) -> str:
    """Steps with state and parameters in files, and AdamW on the CPU."""
    parts = [_machine(result)]
    for group in result["groups"]:
        parts += [_adamw(group)] if "copy" in group["measured"] else [_heading(group), _stores(group), _losses(group)]
    return "\n\n".join(parts)


def _of(group: Json, name: str, key: str) -> list[float]:
    return [m[key] for run in group["measured"].get(name, []) for m in run.get("measured", []) if key in m]


TWINS = {
    "fds-state": "fds-memory",
    "fds-params": "fds-memory-recompute",
    "deepspeed-state": "deepspeed3",
    "deepspeed-params": "deepspeed3-recompute",
}


def _stores(group: Json) -> str:
    """Each contender beside the same step in memory, and the larger of that and the time its bytes take on the disk."""
    write, read = median(_of(group, "disk", "write_gb_s")), median(_of(group, "disk", "read_gb_s"))
    ran = {c["name"]: c for c in _ran(group)}
    rows = []
    for c in group["contenders"]:
        row = [c["label"], f"did not run: `{c['error']}`" if "error" in c else f"{c['step_s']:.3f}"]
        if "error" not in c:
            low, _, high = c["step_s_quartiles"]
            row += [f"{low:.3f} to {high:.3f}", f"{sum(c['peak_rss']['steady']) / GB:.2f}"]
            io, twin = c["facts"].get("io") or {}, ran.get(TWINS.get(c["name"], ""))
            disk = io["read"] / read / GB + io["write"] / write / GB if io.get("read") else None
            row += [f"{io['read'] / GB:.2f} + {io['write'] / GB:.2f}", f"{disk:.2f}"] if disk else ["", ""]
            row += [f"{_over(c, twin):.2f}" if twin else "", f"{_over(c, twin, disk):.2f}" if twin and disk else ""]
        rows.append(row + [""] * (8 - len(row)))
    head = ["", "s/step", "quartiles", "peak RSS, GB", "GB read + written", "of the disk alone, s"]
    head += ["times the step in memory", "times max(step in memory, disk)"]
    return f"Disk: {write:.2f} GB/s written, {read:.2f} GB/s read, 1 GiB in one file, in the same rounds.\n\n{table(head, rows)}"


def _over(c: Json, twin: Json, disk: float | None = None) -> float:
    rounds = zip(c["step_s_rounds"], twin["step_s_rounds"], strict=True)
    return median(median(a) / max(median(b), disk or 0.0) for a, b in rounds)


def _adamw(group: Json) -> str:
    copied, ours = median(_of(group, "copy", "gb_s")), _of(group, "fds", "seconds")
    rows = []
    for name, runs in group["measured"].items():
        label, error = runs[0]["label"], runs[0].get("error")
        if error or name == "copy":
            rows += [[label, f"did not run: `{error}`", "", "", ""]] if error else []
            continue
        took, bytes_each = _of(group, name, "seconds"), 26 if "bf16" in name else 28
        rate = bytes_each * 0.1 / median(took)
        against = median(t / o for t, o in zip(took, ours, strict=True))
        rows.append([label, f"{1e3 * median(took):.0f}", f"{rate:.1f}", f"{rate / copied:.0%}", f"{against:.2f}"])
    sums = {name: _of(group, name, "sum")[-1] for name in group["measured"] if _of(group, name, "sum")}
    middle = sorted(sums.values())[len(sums) // 2]
    off = max(abs(v - middle) for v in sums.values())
    head = ["", "ms", "GB/s", "of the copy's bandwidth", "times fds.optim.adamw's time"]
    return (
        f"### AdamW, 100M float32 parameters in 25 leaves, {group['threads']} threads\n\nCommit {group['commit']}, medians of {len(ours)} rounds of 3 updates. "
        f"28 bytes a parameter are read or written (26 with bf16 gradients). A copy of 1 GiB moves {copied:.1f} GB/s, read and written; it also reads what it is about to write over, "
        f"which an update in place has read anyway.\n\n{table(head, rows)}\n\nSum of 25,000 parameters after the last update: largest difference {off:.1e}."
    )


# --- files ---


def states(result: Json) -> str:
    """Seconds of a state to the disk and back."""
    (group,) = result["groups"]
    rows = list[list[str]]()
    for name, runs in group["measured"].items():
        if _of(group, name, "plain_s"):  # of steps beside a save: see `_behind`
            continue
        seconds, size = (
            [_of(group, name, k) for k in ("returned_s", "on_disk_s", "loaded_s")],
            _of(group, name, "bytes"),
        )
        cells = [f"did not run: `{runs[0].get('error')}`"]
        if size:
            cells = [*(f"{median(s):.2f}" for s in seconds), f"{median(size) / GB:.2f}"]
            others = [_of(group, "fds", k) for k in ("on_disk_s", "loaded_s")]
            cells += [f"{median(a / b for a, b in zip(s, o, strict=True)):.2f}" for s, o in zip(seconds[1:], others, strict=True)]  # fmt: skip
        rows.append([runs[0]["label"], *cells, *[""] * (6 - len(cells))])
    head = ["", "save returns, s", "on the disk, s", "loaded, s", "GB in files", "times fds: on the disk", "loaded"]
    p = group["protocol"]
    return (
        f"{_machine(result)}\n\nCommit {group['commit']}, medians of {p['rounds']} rounds in which all take turns, {group['world']} ranks, {group['parameters']:,} float32 parameters and two moments each. "
        f"Loaded with nothing in the page cache.\n\n{table(head, rows)}{_behind(group)}"
    )


def _behind(group: Json) -> str:
    """What a save in the background costs the steps beside it."""
    plain, saving, returned, steps = (
        _of(group, "fds-asynchronous", k) for k in ("plain_s", "saving_s", "asynchronous_s", "steps")
    )
    if not plain:
        return ""
    ratios = [a / b for a, b in zip(saving, plain, strict=True)]
    return (
        f"\n\nA save in the background (`asynchronous=True`) and the {steps[0]} eager steps after it take {median(ratios):.3f} times as long as {steps[0]} steps without "
        f"({min(ratios):.3f} to {max(ratios):.3f} by round; {median(plain) / steps[0]:.2f} s a step); `save_state` itself returns after {median(returned):.2f} s."
    )


def of_floor(group: Json, contender: Json) -> float:
    """The floor of a token, bytes over the bandwidth of reading, by its time: each round by its own bandwidth, and of these the median."""
    return median(
        group["bytes"] / rate / token for rate, token in zip(group["read_bytes_s"], contender["token_s"], strict=True)
    )


def generate(result: Json) -> str:
    """Prefill and decode of each contender, and how near decoding is to the bandwidth of the memory."""
    parts = [
        f"{_machine(result)}\n\nCommit {result['commit']}, medians of {result['rounds']} rounds in which all take turns, 2 threads."
    ]
    for group in result["groups"]:
        rows = list[list[str]]()
        best = max((1 / median(c["token_s"]) for k, c in group["contenders"].items() if "token_s" in c and not k.startswith("fds")), default=0.0)  # fmt: skip
        for name, c in group["contenders"].items():
            if "error" in c:
                rows.append([name, f"did not run: `{c['error']}`", *[""] * 5])
                continue
            token, prefill = median(c["token_s"]), median(c["prefill_s"])
            floor = "" if "int8" in name else f"{of_floor(group, c):.0%}"
            rows.append([name, f"{c['first_s']:.1f}", f"{prefill * 1e3:.0f}", f"{group['rows'] / token:.1f}", f"{1 / token / best:.2f}" if best else "", floor, f"{group['same_tokens'].get(name, 0):.0%}"])  # fmt: skip
        head = ["", "first call, s", f"prompt of {group['prompt']}, ms", "tokens/s", "times the better peer", "of the floor", "same tokens"]  # fmt: skip
        parts.append(
            f"### {group['size']} Llama ({group['parameters']:,} parameters), {group['dtype']}, {group['rows']} row{'s'[: group['rows'] > 1]}\n\nReading 1 GiB, by rounds: {min(group['read_bytes_s']) / GB:.1f} to {max(group['read_bytes_s']) / GB:.1f} GB/s.\n\n{table(head, rows)}"
        )
    return "\n\n".join(parts)


def switch(result: Json) -> str:
    """Time and memory of each way from training to generating and back."""
    rows = list[list[str]]()
    for name, c in result["contenders"].items():
        there, back = (f"{median(c[k]) * 1e3:.1f}" for k in ("there_s", "back_s"))
        again = f"{median(c['again_s']) * 1e3:.2f}" if c["again_s"] else ""
        rows.append([name, there, again, back, f"{median(c['peak']) / 1e6:.0f}", f"{c['held'] / 1e6:.0f}", f"{c['changed']:,}", f"{min(c['same']):.0%}"])  # fmt: skip
    head = ["", "train to generate, ms", "again, same weights, ms", "generate to train, ms", "peak above training, MB", "held while generating, MB", "training weights changed", "same tokens"]  # fmt: skip
    return (
        f"{_machine(result)}\n\nCommit {result['commit']}, medians of {result['rounds']} rounds in which all take turns, {result['parameters']:,} float32 parameters, LoRA of rank 16 on every linear layer of a block, "
        f"2 gloo ranks with 1 thread each; times are the slower rank's, memory is the sum of both ranks. An eager training step of 128 tokens a rank takes {result['train_s'] * 1e3:.0f} ms.\n\n{table(head, rows)}"
    )


def io_throughput(result: Json) -> str:
    """GB/s of each contender's best settings."""
    m = result["machine"]
    names = list(dict.fromkeys(n for row in result["best"].values() for n in row))
    rows = []
    for key, row in result["best"].items():
        cells = [f"{row[n]['gb_s']:.2f}" if n in row else "" for n in names]
        ratios = [f"{row['fds']['gb_s'] / row[n]['gb_s']:.2f}x" if n in row else "" for n in ("deepspeed", "fio")]
        rows.append([key, *cells, *ratios])
    found = [f"{k} {v}" for known in result["versions"].values() for k, v in known.items() if k != "python"]
    versions = ", ".join(dict.fromkeys(found))
    missing = "".join(f" {k} was not measured: {why}." for k, why in result["missing"].items())
    return (
        f"{result['date']}, {m['cpu']}, {m['cores']} cores, Linux {result['kernel'].split('-')[0]}. {versions}. Medians of {result['rounds']} rounds in which all settings take turns; GB/s of each contender's best settings.{missing}\n\n"
        + table(["", *names, "fds / aio_handle", "fds / fio"], rows)
    )


def spliced(text: str, name: str, body: str) -> str:
    """`text` with the part between the markers of `name` replaced; appended, markers included, if there are none."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if (begin in text) != (end in text):
        raise ValueError(f"RESULTS.md: only one of {begin} and {end} is there; required both or neither")
    block = f"{begin}\n\n{body}\n\n{end}"
    if begin not in text:
        return f"{text.rstrip()}\n\n{block}\n".lstrip()
    return re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: block, text, flags=re.DOTALL)


def parity(result: Json) -> str:
    """The table of `deepspeed_parity.py`."""
    own, peer = (", ".join(f"{k} {v}" for k, v in result[x].items()) for x in ("versions", "peer_versions"))
    head = ["configuration", "loss, first", f"DeepSpeed, step {result['steps']}", f"fds, step {result['steps']}", "largest difference", "allowed"]  # fmt: skip
    rows = [_parity_row(r) for r in result["rows"]]
    return f"Here: {own}. Peer: {peer}.\n\n{table(head, rows)}"


def _parity_row(row: Json) -> list[str]:
    if "difference" not in row:
        return [row["case"], *["failed"] * 4, f"{row['tolerance']:g}"]
    ours, theirs = row["fds"]["losses"], row["deepspeed"]["losses"]
    return [row["case"], f"{theirs[0]:.4f}", f"{theirs[-1]:.4f}", f"{ours[-1]:.4f}", f"{row['difference']:.1e}", f"{row['tolerance']:g}"]  # fmt: skip


RENDERERS = {
    "deepspeed_parity": parity,
    "train": train,
    "zero": train,
    "states": states,
    "offload": offload,
    "io_throughput": io_throughput,
    "generate": generate,
    "switch": switch,
}


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
