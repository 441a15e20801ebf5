"""What a train step holds in memory, before it runs: `plan`."""

from typing import Any

import attrs
import torch

from fds import tree
from fds.offload.handles import Home
from fds.offload.store import FileStore, HostStore
from fds.train import TrainStep


@attrs.frozen
class Plan:
    """Bytes that a step holds in memory at most, by what they are: always, while it differentiates, and while it updates; and bytes in files.

    Activations are not among them. Prints as a table.
    """

    always: dict[str, int]
    gradient: dict[str, int]
    update: dict[str, int]
    files: int
    overlaps: bool = False  # updates run while the next step's forward pass does

    @property
    def total(self) -> int:
        """In memory, at most."""
        parts = sum(self.gradient.values()), sum(self.update.values())
        return sum(self.always.values()) + (sum(parts) if self.overlaps else max(parts))

    def __str__(self) -> str:
        rows = list(self.always.items())
        rows += [(f"forward and backward: {k}", n) for k, n in self.gradient.items()]
        rows += [(f"update: {k}", n) for k, n in self.update.items()]
        rows = [(k, n) for k, n in rows if n] + [("in memory, at most", self.total), ("in files", self.files)]
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
    always = {
        "parameters that stay": sum(v.nbytes for v in here.values()),
        "their gradients": sum(v.nbytes for v in here.values() if v.requires_grad),
    }
    gradient: dict[str, int] = {}
    if homes:
        gradient["parameters in use"] = largest * 2 if dropped else sum(h.nbytes for h in homes.values())
        gradient["parameters read ahead"] = largest * window
        gradient["gradients on their way"] = largest * (window + 2)
    held: dict[Any, int] = {}  # by store
    for h in homes.values():
        held[h.window.store] = held.get(h.window.store, 0) + h.nbytes
    stream, update = step.tx.stream, dict[str, int]()
    if stream is None:
        always["optimizer state"] = sum(t.nbytes for t in tree.leaves(step.spec.optimizer))
    else:
        buckets = _buckets(step, homes)
        held[stream.window.store] = held.get(stream.window.store, 0) + sum(state for _, state in buckets)
        written = max((away + state for away, state in buckets), default=0)
        gradient["buckets kept from the last update"] = (
            max((n for away, n in buckets if not away), default=0) * stream.ahead
        )
        update["buckets read"] = max((2 * away + state for away, state in buckets), default=0) * (stream.ahead + 1)
        update["buckets written"] = written * (stream.window.ahead + 1)
    always["in HostStore"] = sum(n for store, n in held.items() if isinstance(store, HostStore))
    always["cached by FileStore"] = sum(min(n, s.budget) for s, n in held.items() if isinstance(s, FileStore))
    files = sum(n for store, n in held.items() if isinstance(store, FileStore))
    found = Plan(always, gradient, update, files, overlaps=bool(homes and update))
    if budget is not None and found.total > budget:
        raise ValueError(
            f"plan: {found.total:,} bytes in memory, and the budget is {budget:,}; smaller windows, more leaves offloaded, or checkpoint() after offload make it less:\n{found}"
        )
    return found


def _buckets(step: TrainStep, homes: dict[str, Home]) -> list[tuple[int, int]]:
    """Of each bucket of a streamed optimizer: bytes of its parameters that are away, and of its state."""
    stream, axis = step.tx.stream, step.tx.axis
    trained = tree.named(step.program.trainable(step.program.spec))
    if axis is not None:  # one flat shard for each dtype
        sizes: dict[torch.dtype, int] = {}
        for v in trained.values():
            sizes[v.dtype] = sizes.get(v.dtype, 0) + v.numel()
        trained = {str(d): torch.empty(-(-n // axis.size), dtype=d, device="meta") for d, n in sizes.items()}
    names = list(trained)
    found: list[tuple[int, int]] = []
    for bucket in stream.buckets(list(trained.values())):
        away = [homes[names[i]] for i in bucket if names[i] in homes]
        whole = [torch.empty(h.shape, dtype=h.dtype, device="meta") for h in away]
        whole += [trained[names[i]] for i in bucket if names[i] not in homes]
        found.append((sum(h.nbytes for h in away), stream.state_nbytes(whole)))
    return found
