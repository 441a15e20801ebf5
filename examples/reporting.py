"""What `finetune.py` shows while it runs and leaves behind: a progress bar, loss.png, memory.png, a table, result.json."""

import json
import os
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


def memory():
    """Resident bytes of this process, or allocated bytes of its GPU."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def progress(axis):
    """A progress bar on rank 0, nothing on the others."""
    columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}")]
    return Progress(*columns, TimeRemainingColumn(), disable=axis.rank > 0)


def report(out, curve, texts, results, *, unigram, half, steps):
    """Print the generated texts and the table of `results`; draw `curve`, rows of (loss, tokens/s, memory in bytes)."""
    console = Console()
    for text in texts:
        console.print(text.strip(), "\n", style="dim", markup=False)
    marks = {"saved, resumed": half, "LoRA": steps}
    draw(out / "loss.png", [c[0] for c in curve], "loss (nats per token)", marks, unigram)
    draw(out / "memory.png", [c[2] / 1e6 for c in curve], "memory of rank 0 (MB)", marks)
    table = Table("", "result", title="fds")
    for key, value in results.items():
        table.add_row(key, value)
    console.print(table)
    (out / "result.json").write_text(json.dumps(results, indent=2))


def draw(file, values, label, marks, level=None):
    """A curve over steps, with named vertical marks, and the unigram entropy as a level."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(7, 3.5), layout="constrained")
    ax.plot(values, lw=1.5)
    for name, x in marks.items():
        ax.axvline(x, color="gray", ls="--", lw=1)
        place = {"xycoords": ("data", "axes fraction"), "xytext": (4, 6), "textcoords": "offset points"}
        ax.annotate(name, (x, 0.0), fontsize=9, **place)
    if level is not None:
        ax.axhline(level, color="tab:red", lw=1, label="unigram entropy of the held-out files")
        ax.legend(loc="upper right")
    ax.set(xlabel="step", ylabel=label)
    fig.savefig(file, dpi=120)
    plt.close(fig)
