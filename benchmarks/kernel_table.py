"""The table of operators in docs/kernels.md: `python benchmarks/kernel_table.py`. Compiles every configuration for three chips; needs no GPU."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fds.kernels
from fds.kernels import Configured
from fds.kernels.aot import SHARED, Compiled, compiled

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "kernels.md"
BEGIN, END = "<!-- kernels:begin -->", "<!-- kernels:end -->"


def main() -> None:
    configured = [(op, c) for op in fds.kernels.operators().values() for c in op.kernels]
    jobs = [(c, chip) for _, c in configured for chip in SHARED]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = dict(
            zip(((c.label, chip) for c, chip in jobs), pool.map(lambda job: compiled(*job), jobs), strict=True)
        )
    page = PAGE.read_text()
    before, after = page[: page.index(BEGIN)], page[page.index(END) :]
    PAGE.write_text("\n\n".join([before + BEGIN, _operators(), _configurations(configured, results), after]))
    print(
        f"{PAGE.name}: {len(fds.kernels.operators())} operators, {len(configured)} configurations, {len(results)} compiled kernels"
    )


def _operators() -> str:
    rows = [
        "| operator | computes | floor, and why a kernel | measured: share of the floor's rate |",
        "|---|---|---|---|",
    ]
    for op in fds.kernels.operators().values():
        rows.append(f"| `{op.name}` | {_cell(op.formula)} | {_cell(op.why)} | {_measured(op.name)} |")
    return "\n".join(rows)


def _measured(name: str) -> str:
    """The operator's rows of the newest result file that `make gpu` wrote on a GPU."""
    found = [json.loads(f.read_text()) for f in (HERE / "results").glob("*.json")]
    with_gpu = sorted((r for r in found if r.get("speeds")), key=lambda r: r["date"])
    rows = [r for r in with_gpu[-1]["speeds"] if r["operator"] == name] if with_gpu else []
    return "; ".join(f"{r['work']}: {r['of_floor']:.0%}" for r in rows if r.get("of_floor")) or "not yet"


def _configurations(configured, results: dict[tuple[str, int], Compiled]) -> str:
    chips = " | ".join(f"sm_{chip}: registers, shared KB" for chip in SHARED)
    rows = [f"| kernel | {chips} | 128-bit loads | matrix instructions |", "|---|" + "---:|" * (len(SHARED) + 2)]
    for _, c in configured:
        each = [results[c.label, chip] for chip in SHARED]
        faults = [f for chip, r in zip(SHARED, each, strict=True) for f in r.faults(c, chip)]
        sizes = " | ".join(f"{r.registers}, {r.shared / 1024:.1f}" for r in each)
        middle = results[c.label, 90]
        rows.append(
            f"| {_short(c)}{' **' + '; '.join(faults) + '**' if faults else ''} | {sizes} | {middle.wide_loads} | {middle.products} |"
        )
    return "\n".join(rows)


def _short(c: Configured) -> str:
    """A configuration in a table's cell: dtypes of its tensors in order, switches that are on, sizes."""
    dtypes = dict.fromkeys(t[1:] for t in c.types.values() if t.startswith("*") and t not in ("*i64", "*i32"))
    flags = [k.lower() for k, v in c.constants.items() if v is True]
    sizes = [f"{k.lower()} {v}" for k, v in c.constants.items() if not isinstance(v, bool) and v != ""]
    return f"`{c.kernel.__name__}` " + ", ".join([" ".join(dtypes), *flags, *sizes, f"{c.warps} warps"])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    main()
