"""What a train step holds in memory, before it runs: `plan`."""

from typing import Any

import attrs
import torch
from torch import Tensor

from fds import tree
from fds.offload.handles import Home
from fds.offload.store import FileStore, HostStore
from fds.train import TrainStep


@attrs.frozen
class Plan:
    """Bytes that a step holds in memory at most, by what they are, and bytes in stores. Activations are not among them. Prints as a table."""

    parts: dict[str, int]
    away: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def __str__(self) -> str:
        rows = [*self.parts.items(), ("in memory, at most", self.total), *self.away.items()]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:{width}}  {n / 2**20:10,.1f} MiB" for name, n in rows)


def plan(step: TrainStep, *, budget: int | None = None) -> Plan:
    """Where the parameters, gradients and optimizer state of a step are, and what it holds of them in memory at most.

    All offload decisions of the program and its optimizer are in it: what stays, what is under way in each window, what stores keep for
    themselves. Raises `ValueError` with the numbers if that is more than `budget` bytes.
    """
    program = step.program
    homes: dict[str, Home] = {tree.qualified(s, k): h for s, p in program.sites.items() for k, h in p.handles.items()}
    leaves = tree.named(program.spec)
    here = {k: v for k, v in leaves.items() if k not in homes}
    largest = max((h.nbytes for h in homes.values()), default=0)
    window = max((h.window.ahead for h in homes.values()), default=0)
    names = [t.name for t in program.history]
    dropped = "checkpoint" in names and "offload" in names and names.index("checkpoint") > names.index("offload")
    parts = {
        "parameters that stay": sum(v.nbytes for v in here.values()),
        "their gradients": sum(v.nbytes for v in here.values() if v.requires_grad),
        "parameters in use": largest * 2 if dropped else sum(h.nbytes for h in homes.values()),
        "parameters read ahead": largest * window,
        "gradients on their way": largest * (window + 2),
    }
    parts |= _optimizer(step, leaves, homes)
    held: dict[Any, int] = {}  # by store
    for h in homes.values():
        held[h.window.store] = held.get(h.window.store, 0) + h.nbytes
    if getattr(step.tx.step, "takes_handles", False):
        stream: Any = step.tx.step
        held[stream.window.store] = held.get(stream.window.store, 0) + sum(_states(stream, leaves, homes))
    parts["in HostStore"] = sum(n for store, n in held.items() if isinstance(store, HostStore))
    parts["cached by FileStore"] = sum(min(n, s.budget) for s, n in held.items() if isinstance(s, FileStore))
    away = {"in files": sum(n for store, n in held.items() if isinstance(store, FileStore))}
    found = Plan({k: n for k, n in parts.items() if n}, {k: n for k, n in away.items() if n})
    if budget is not None and found.total > budget:
        raise ValueError(
            f"plan: {found.total:,} bytes in memory, and the budget is {budget:,}; smaller windows, more leaves offloaded, or checkpoint() after offload make it less:\n{found}"
        )
    return found


def _optimizer(step: TrainStep, leaves: dict[str, Tensor], homes: dict[str, Home]) -> dict[str, int]:
    stream: Any = step.tx.step
    if not getattr(stream, "takes_handles", False):
        return {"optimizer state": sum(t.nbytes for t in tree.leaves(step.spec.optimizer))}
    away = [2 * homes[k].nbytes if k in homes else 0 for k, v in leaves.items() if v.requires_grad]
    most = max((a + s for a, s in zip(away, _states(stream, leaves, homes), strict=True)), default=0)
    return {
        "leaves in the update": most * (stream.ahead + 1),
        "leaves on their way out": most * (stream.window.ahead + 1),
    }


def _states(stream: Any, leaves: dict[str, Tensor], homes: dict[str, Home]) -> list[int]:
    """Bytes of optimizer state in the store, of each trainable leaf."""
    found: list[int] = []
    for k, v in leaves.items():
        if v.requires_grad:
            h = homes.get(k)
            p = v if h is None else torch.empty(h.shape, dtype=h.dtype, device="meta")
            found.append(sum(t.nbytes for t in tree.leaves(stream.tx.init(p)) if t.dim()))
    return found
