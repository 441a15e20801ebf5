"""What a profile is, and how it is shown."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

import attrs
from torch import nn

from fds.deepspeed.flops import Cost

PHASES = ("forward", "backward", "recompute")


@attrs.frozen
class ModuleProfile:
    """What one module costs, its children included."""

    path: str
    kind: str  # the class
    parameters: int
    costs: Mapping[str, Cost]  # by phase: "forward", "backward", and "recompute" (forward again, inside of backward)
    calls: int = 0
    seconds: float | None = None  # of its forward, if it was timed

    @property
    def macs(self) -> int:
        """Of all phases."""
        return sum(c.macs for c in self.costs.values())

    @property
    def flops(self) -> int:
        """Of all phases."""
        return sum(c.flops for c in self.costs.values())


@attrs.frozen(repr=False)
class Profile:
    """The profile of a call. ``profile.modules[""]`` is all of it, what runs outside of modules included; ``print(profile)`` shows it."""

    modules: Mapping[str, ModuleProfile]  # in the module's order
    operators: Mapping[str, Cost]  # by operator, all phases together
    uncounted: Mapping[str, int]  # calls of operators on floating tensors that there is no rule for

    @property
    def total(self) -> ModuleProfile:
        return self.modules[""]

    def __repr__(self) -> str:
        return "\n".join(lines(self))


def number(x: float, unit: str = "") -> str:
    """`x` with a prefix of three digits.

    >>> number(1234567), number(0.00123, "s"), number(12)
    ('1.23 M', '1.23 ms', '12 ')
    """
    for scale, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K"), (1, ""), (1e-3, "m")):
        if abs(x) >= scale or (scale == 1 and x == 0):
            return f"{round(x / scale, 2):g} {prefix}{unit}"
    return f"{round(x / 1e-6, 2):g} u{unit}"


def lines(
    found: Profile,
    *,
    module_depth: int = -1,
    top_modules: int = 1,
    detailed: bool = True,
    ignore: Sequence[type[nn.Module] | str] | None = None,
) -> list[str]:
    """A profile as text: the whole; the classes that cost most at each depth; with `detailed` every module.

    Args:
        module_depth: down to this depth (the model itself is 0); -1: all.
        top_modules: how many classes are named at each depth.
        ignore: classes of modules that are left out; what they cost stays in those that contain them.
    """
    total, left_out = found.total, {c if isinstance(c, str) else c.__name__ for c in ignore or ()}
    rows = [m for m in found.modules.values() if m.kind not in left_out or not m.path]
    deepest = max(_depth(m) for m in rows)
    limit = deepest if module_depth < 0 else min(module_depth, deepest)
    text = [f"profile of {total.kind}: {number(total.parameters).strip()} parameters"]
    for phase in PHASES:
        cost = total.costs[phase]
        if cost.flops:
            text.append(f"  {phase}: {number(cost.macs, 'MACs')}, {number(cost.flops, 'FLOPs')}")
    if total.seconds:
        rate = number(total.costs["forward"].flops / total.seconds, "FLOP/s")
        text.append(f"  forward latency: {number(total.seconds, 's')}, {rate}")
    if found.uncounted:
        text.append(f"  not counted: {', '.join(f'{k} x {n}' for k, n in found.uncounted.items())}")
    text.append("most expensive classes, by depth")
    for depth in range(limit + 1):
        text += _top([m for m in rows if _depth(m) == depth], depth, top_modules)
    if detailed:
        text.append("modules: parameters, MACs and their share, FLOPs" + (", forward latency" if total.seconds else ""))
        text += [_row(m, total) for m in rows if _depth(m) <= limit]
    return text


def _depth(m: ModuleProfile) -> int:
    return len(m.path.split(".")) if m.path else 0


def _top(rows: list[ModuleProfile], depth: int, n: int) -> list[str]:
    text: list[str] = []
    sums: dict[str, dict[str, float]] = {"MACs": {}, "parameters": {}, "latency": {}}
    for m in rows:
        for key, value in (("MACs", m.macs), ("parameters", m.parameters), ("latency", m.seconds or 0.0)):
            sums[key][m.kind] = sums[key].get(m.kind, 0) + value
    for key, by in sums.items():
        best = sorted(((v, k) for k, v in by.items() if v), reverse=True)[:n]
        unit = {"MACs": "MACs", "parameters": "", "latency": "s"}[key]
        if best:
            text.append(f"  depth {depth}, {key}: {', '.join(f'{k} {number(v, unit).strip()}' for v, k in best)}")
    return text


def _row(m: ModuleProfile, total: ModuleProfile) -> str:
    share = f"{100 * m.macs / total.macs:.1f}%" if total.macs else "-"
    parts = [number(m.parameters).strip(), number(m.macs, "MACs"), share, number(m.flops, "FLOPs")]
    if total.seconds:
        parts.append("-" if m.seconds is None else number(m.seconds, "s"))
    return f"{'  ' * (_depth(m) + 1)}{m.path or '(model)'} {m.kind}: {', '.join(parts)}"


def write(text: Sequence[str], output_file: str | Path | None = None, stream: TextIO | None = None) -> None:
    """Lines to a file, whose folder is made, or to a stream (standard output)."""
    if output_file:
        Path(output_file).parent.mkdir(parents=True, exist_ok=True)
        Path(output_file).write_text("\n".join(text) + "\n")
    else:
        (stream or sys.stdout).write("\n".join(text) + "\n")


__all__ = ["PHASES", "ModuleProfile", "Profile", "lines", "number", "write"]
