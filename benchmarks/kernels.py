"""The table of operators in docs/kernels.md: `python benchmarks/kernels.py`. Compiles every configuration for three chips; needs no GPU."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fds.kernels
from fds.kernels import Configured
from fds.kernels.aot import SHARED, Compiled, compiled

PAGE = Path(__file__).resolve().parents[1] / "docs" / "kernels.md"
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
    rows = ["| operator | computes | why a kernel |", "|---|---|---|"]
    rows += [f"| `{op.name}` | {_cell(op.formula)} | {_cell(op.why)} |" for op in fds.kernels.operators().values()]
    return "\n".join(rows)


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
