"""What calls of an engine leave behind until its next update: leaves whose gradients autograd adds up, losses, buffers, counts."""

import attrs
import torch
from torch import Tensor

from fds import tree
from fds.program import Program
from fds.tree import Stored


@attrs.define
class Pending:
    """Empty after each update. A step is several microbatches, each of them calls and backward passes.

    `live`: the parameters of these calls, made by the first one that autograd follows. `updates`: buffers as the calls left them, and what lenses
    keep from pass to pass (`Lens.carries`).
    """

    live: Stored | None = None
    updates: Stored = attrs.field(factory=dict[str, dict[str, Tensor]])
    losses: list[Tensor] = attrs.field(factory=list[Tensor])
    followed: int = 0  # calls that autograd follows
    calls: int = 0  # in this microbatch
    backwards: int = 0  # in this microbatch
    unused: int = 0  # calls that autograd follows, since the last backward pass

    def present(self, params: Stored) -> Stored:
        """A state's parameters, with the buffers as the calls left them."""
        return {s: {**part, **self.updates.get(s, {})} for s, part in params.items()}

    def leaves(self, params: Stored, spec: Stored) -> Stored:
        """The same as leaves of autograd's, which add gradients up until the update."""
        if self.live is None:
            self.live = {s: {k: x.detach().requires_grad_(spec[s][k].requires_grad) for k, x in part.items()} for s, part in self.present(params).items()}  # fmt: skip
        return self.live

    def called(self, updates: Stored, *, followed: bool) -> None:
        """Note a call, and the buffers that it wrote."""
        self.calls += 1
        self.followed += followed
        self.unused += followed
        for s, part in updates.items():
            self.updates.setdefault(s, {}).update({k: v.detach() for k, v in part.items()})
            if self.live is not None:
                self.live[s] = {**self.live[s], **self.updates[s]}

    def passed(self, loss: Tensor) -> None:
        """Note a backward pass, of a loss that is divided by the number of microbatches."""
        self.losses.append(loss.detach())
        self.backwards += 1
        self.unused = 0

    def next_microbatch(self) -> None:
        self.calls = self.backwards = self.unused = 0

    def carry(self, program: Program, params: Stored) -> None:
        """After a backward pass: what lenses keep from pass to pass (error feedback) goes on, as in `train_step`.

        `ValueError` unless one call came before the pass, whose error it is.
        """
        carried = {s: p.carries for s, p in program.sites.items() if p.carries}
        if not carried or self.live is None:
            return
        if self.unused != 1:
            raise ValueError(f"backward: zeropp_loco_param keeps an error from each pass to the next, and {self.unused} calls of the engine came before this one; one engine(batch), then one backward")  # fmt: skip
        grads = {s: {k: gradient(self.live[s][k]) for k in names} for s, names in carried.items()}
        for s, part in program.carry(self.present(params), grads).items():
            self.updates.setdefault(s, {}).update(part)
            self.live[s] = {**self.live[s], **{k: x.detach().requires_grad_() for k, x in part.items()}}

    def has_gradients(self) -> bool:
        return any(x.grad is not None for x in tree.flat(self.live) if x.requires_grad)

    def taken(self, program: Program) -> Stored:
        """The gradients of all that is trained. The leaves are let go."""
        live, self.live = self.live, None
        assert live is not None
        return {s: {k: gradient(x) for k, x in part.items() if program.spec[s][k].requires_grad and k not in program.sites[s].carries} for s, part in live.items()}  # fmt: skip


def gradient(x: Tensor) -> Tensor:
    """A leaf's gradient, zero where no loss depended on it."""
    return torch.zeros_like(x) if x.grad is None else x.grad


__all__ = ["Pending", "gradient"]
