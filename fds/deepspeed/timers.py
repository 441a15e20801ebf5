"""How long a step's parts take: `Timers`, and the lines and events that `wall_clock_breakdown` and `steps_per_print` ask for.

Lines and events are pure functions; who logs or writes them is the caller's business.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import attrs

from fds import tree
from fds.accelerator import get_accelerator

_SAMPLES = "Train/Samples/"
_EVENTS = {"fwd": "forward", "bwd": "backward", "bwd_inner": "backward_inner", "bwd_allreduce": "backward_allreduce", "step": "step"}  # fmt: skip


def _wait() -> None:
    get_accelerator().synchronize()


@attrs.define
class Timers:
    """Sums of wall-clock time by name, in milliseconds. A timer waits for the device when it starts and when it stops.

    >>> ticks = iter([0.0, 0.25])
    >>> timers = Timers(clock=lambda: next(ticks))
    >>> with timers("fwd"):
    ...     pass
    >>> timers.milliseconds()
    {'fwd': 250.0}
    """

    synchronize: Callable[[], None] = _wait
    clock: Callable[[], float] = time.perf_counter
    _sums: dict[str, float] = attrs.field(init=False, factory=dict[str, float])
    _running: dict[str, float] = attrs.field(init=False, factory=dict[str, float])

    def start(self, name: str) -> None:
        if name in self._running:
            raise ValueError(f"timer {name!r} is running already; stop it first")
        self.synchronize()
        self._running[name] = self.clock()

    def stop(self, name: str) -> None:
        if name not in self._running:
            raise ValueError(f"timer {name!r} is not running; {tree.suggest(name, self._running)}")
        self.synchronize()
        self._sums[name] = self._sums.get(name, 0.0) + self.clock() - self._running.pop(name)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.start(name)
        try:
            yield
        finally:
            self.stop(name)

    def milliseconds(self, *, reset: bool = True) -> dict[str, float]:
        """The time of each name since the last reset; with `reset`, a new sum begins."""
        found = {k: 1000 * v for k, v in self._sums.items()}
        if reset:
            self._sums.clear()
        return found


@attrs.define
class Throughput:
    """Samples per second, without the first steps, which compile and warm up.

    >>> ticks = iter([0.0, 2.0])
    >>> throughput = Throughput(samples=8, warm_up=1, synchronize=lambda: None, clock=lambda: next(ticks))
    >>> [throughput.step() for _ in range(2)]
    [None, 4.0]
    """

    samples: int  # of a step, over all ranks
    warm_up: int = 2  # steps that are not counted
    synchronize: Callable[[], None] = _wait
    clock: Callable[[], float] = time.perf_counter
    steps: int = attrs.field(init=False, default=0)
    _began: float = attrs.field(init=False, default=0.0)

    def step(self) -> float | None:
        """To be called after every step: the mean since the warm-up, or None before there is one."""
        self.steps += 1
        if self.steps < self.warm_up:
            return None
        self.synchronize()
        now = self.clock()
        if self.steps == self.warm_up:
            self._began = now
            return None
        return self.samples * (self.steps - self.warm_up) / (now - self._began)


def due(step: int, every: int | None) -> bool:
    """Whether ``steps_per_print`` asks for a line after `step` (counted from 1); None: never.

    >>> [due(step, 2) for step in (1, 2, 3, 4)]
    [False, True, False, True]
    """
    return every is not None and step % every == 0


def progress_line(step: int, skipped: int, lr: Sequence[float], momentum: Sequence[object]) -> str:
    """What ``steps_per_print`` prints.

    >>> progress_line(10, 1, [0.001], [(0.9, 0.999)])
    'step=10, skipped=1, lr=[0.001], mom=[(0.9, 0.999)]'
    """
    return f"step={step}, skipped={skipped}, lr={list(lr)}, mom={list(momentum)}"


def breakdown_line(milliseconds: Mapping[str, float]) -> str:
    """What ``wall_clock_breakdown`` prints.

    >>> breakdown_line({"fwd": 12.345, "bwd": 20.0})
    'time (ms) | fwd: 12.35 | bwd: 20.00'
    """
    return " | ".join(["time (ms)", *(f"{k}: {v:.2f}" for k, v in milliseconds.items())])


def breakdown_events(milliseconds: Mapping[str, float], samples: int) -> list[tuple[str, float, int]]:
    """The events that a monitor gets of a breakdown, after `samples` samples; by DeepSpeed's names where it has one.

    >>> breakdown_events({"fwd": 12.5}, 64)
    [('Train/Samples/elapsed_time_ms_forward', 12.5, 64)]
    """
    return [(f"{_SAMPLES}elapsed_time_ms_{_EVENTS.get(k, k)}", v, samples) for k, v in milliseconds.items()]


def step_events(loss: float, lr: float, samples: int, loss_scale: float | None = None) -> list[tuple[str, float, int]]:
    """The events of a step, by DeepSpeed's names; `loss_scale` only of float16 training.

    >>> [name for name, _, _ in step_events(2.5, 1e-3, 64)]
    ['Train/Samples/train_loss', 'Train/Samples/lr']
    """
    named = {"train_loss": loss, "lr": lr} | ({} if loss_scale is None else {"loss_scale": loss_scale})
    return [(_SAMPLES + k, v, samples) for k, v in named.items()]


__all__ = ["Throughput", "Timers", "breakdown_events", "breakdown_line", "due", "progress_line", "step_events"]
