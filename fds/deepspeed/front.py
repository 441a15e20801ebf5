"""What stands where a script expects an optimizer and a scheduler: their numbers, in torch's form. The engine makes the steps."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fds.deepspeed.client import Group, numbers
from fds.deepspeed.methods import complete
from fds.optim import get_hyperparams, set_hyperparams

_BY_ENGINE = "the engine makes the steps: call engine.step(), which steps the {what} too"


class EngineOptimizer(torch.optim.Optimizer):
    """Hyperparameters by group, as torch's schedulers and scripts read and write them: ``param_groups[0]["lr"] = 1e-4`` counts for the next step.

    Its `params` are placeholders: parameters and moments are in ``engine.state``. `step` raises `ValueError`.
    """

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        super().__init__([{"params": [nn.Parameter(torch.empty(0))]} for _ in groups], {})
        self.param_groups: list[dict[str, Any]] = list(groups)

    def step(self, closure: Any = None) -> Any:
        raise ValueError(f"optimizer.step(): {_BY_ENGINE.format(what='optimizer')}")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Gradients are the engine's, which drops them after a step; `engine.zero_grad()` drops them before."""

    def state_dict(self) -> dict[str, Any]:
        """The groups' numbers; what belongs to parameters is saved by `engine.save_checkpoint`."""
        return {"param_groups": [_plain(g) for g in self.param_groups]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        groups = state_dict.get("param_groups", ())
        if len(groups) != len(self.param_groups):
            raise ValueError(f"optimizer.load_state_dict: {len(groups)} groups, this one has {len(self.param_groups)}")
        for mine, theirs in zip(self.param_groups, groups, strict=True):
            mine.update({k: tuple(v) if isinstance(v, list) else v for k, v in theirs.items() if k != "params"})


def _plain(group: Mapping[str, Any]) -> dict[str, Any]:
    found = {k: float(v) if isinstance(v, torch.Tensor) else v for k, v in group.items() if k != "params"}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items() if isinstance(v, int | float | str | bool | tuple | list) or v is None}  # fmt: skip


def groups_for(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Groups of torch's form for those of a configuration."""
    return [
        {"params": [nn.Parameter(torch.empty(0))], **_tuples(complete(g.type, g.params)), "name": g.name}
        for g in groups
    ]


def _tuples(params: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in params.items()}


class Hyperparameters:
    """The numbers of a front optimizer and of an optimizer's state, kept the same. Numbers that a schedule of fds gives only go one way: out."""

    def __init__(self, front: EngineOptimizer, schedules: Sequence[Callable[..., Any] | None]) -> None:
        self.front, self.schedules = front, list(schedules)
        self.pushed: list[dict[str, float]] = [{} for _ in front.param_groups]
        self.first = [numbers(g) for g in front.param_groups]
        self.shown: list[float | None] = [None for _ in front.param_groups]

    def push(self, state: Any) -> Any:
        """`state` with the numbers of the groups, as far as they were changed."""
        states = [state] if len(self.pushed) == 1 else list(state)
        for i, group in enumerate(self.front.param_groups):
            if self.schedules[i] is not None:
                self._check(i, group)
            if "muon_lr" in group:  # two rules with numbers of their own: those of the configuration
                self._check_unchanged(i, group)
                continue
            own = get_hyperparams(states[i]) if not self.pushed[i] else self.pushed[i]
            wanted = {k: v for k, v in numbers(group).items() if k in own}
            changed = {k: v for k, v in wanted.items() if v != own[k]}
            self.pushed[i] = own | changed
            if changed:
                states[i] = set_hyperparams(states[i], **changed)
        return states[0] if len(self.pushed) == 1 else tuple(states)

    def show(self, updates: int) -> None:
        """Write into the groups what schedules say of the next update."""
        for i, schedule in enumerate(self.schedules):
            if schedule is not None:
                self.front.param_groups[i]["lr"] = self.shown[i] = float(schedule(torch.tensor(updates)))

    def forget(self) -> None:
        """The state is another one: all numbers are pushed anew."""
        self.pushed = [{} for _ in self.pushed]

    def _check_unchanged(self, i: int, group: Mapping[str, Any]) -> None:
        if self.schedules[i] is None and numbers(group) != self.first[i]:
            raise ValueError(f"optimizer.param_groups[{i}]: {numbers(group)}, and Muon's two rules have the numbers of the configuration, {self.first[i]}; give a scheduler there")  # fmt: skip

    def _check(self, i: int, group: Mapping[str, Any]) -> None:
        if self.shown[i] is not None and float(group["lr"]) != self.shown[i]:
            raise ValueError(
                f"optimizer.param_groups[{i}]['lr'] was set to {group['lr']}, and the configuration's scheduler says {self.shown[i]}; leave the scheduler out of the configuration, or the assignment"
            )


class EngineScheduler:
    """The position of a configuration's schedule, which is a pure function of the number of updates; the engine's step moves it."""

    def __init__(self, front: EngineOptimizer, updates: Callable[[], int]) -> None:
        self.optimizer, self._updates = front, updates

    def step(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(f"lr_scheduler.step(): {_BY_ENGINE.format(what='scheduler')}")

    def get_lr(self) -> list[float]:
        """The learning rates of the next update, by group."""
        return [float(g["lr"]) for g in self.optimizer.param_groups]

    def get_last_lr(self) -> list[float]:
        return self.get_lr()

    def state_dict(self) -> dict[str, int]:
        return {"last_batch_iteration": self._updates() - 1}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """The position is part of the engine's state: `ValueError` for another one."""
        if state_dict.get("last_batch_iteration") != self._updates() - 1:
            raise ValueError(
                f"lr_scheduler.load_state_dict: {dict(state_dict)}, and the engine has made {self._updates()} updates; the schedule follows them: load the engine's checkpoint"
            )
