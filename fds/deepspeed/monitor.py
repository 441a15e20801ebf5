"""Where a run's numbers go: TensorBoard, Weights & Biases, Comet, CSV files, JSON lines.

An *event* is ``(name, value, step)``, DeepSpeed's form; a *sink* writes events somewhere; a `Monitor` hands events to its sinks on rank 0, and does
nothing on other ranks.
"""

import csv
import importlib
import importlib.util
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import attrs
from torch import Tensor

from fds import tree
from fds.files import rank

Event = tuple[str, float | Tensor, int]
Scalar = tuple[str, float, int]
_JOB = "DeepSpeedJobName"


class Sink(Protocol):
    """Somewhere that events are written to."""

    def write(self, events: Sequence[Scalar]) -> None: ...
    def close(self) -> None: ...


@attrs.frozen
class Monitor:
    """Sinks, all of which get every event. On other ranks than 0 it has none.

    >>> monitor = Monitor.of({})
    >>> monitor.enabled
    False
    >>> monitor.write_events([("Train/Samples/lr", 1e-3, 8)])
    """

    sinks: tuple[Sink, ...] = ()

    @staticmethod
    def of(config: Any) -> "Monitor":
        """The monitor that a configuration asks for, by its sections `tensorboard`, `wandb`, `comet`, `csv_monitor` and `jsonl_monitor`
        (which DeepSpeed has not), where they have ``enabled: true``. `config` is a mapping or an object with these attributes.

        Raises:
            ValueError: an unknown key in a section; a package that is not installed. On every rank, so that none waits for another.
        """
        sections = {name: _section(config, name) for name in _SECTIONS}
        asked = {name: section for name, section in sections.items() if section.pop("enabled", False)}
        for name, section in asked.items():
            sink = _SECTIONS[name]
            keys = [a.name for a in attrs.fields(sink) if a.init]
            for key in section:
                if key not in keys:
                    raise ValueError(f"{name}.{key}: no such key; {tree.suggest(key, [*keys, 'enabled'])}")
            _check_installed(name, sink)
        return Monitor(tuple(_SECTIONS[n](**s) for n, s in asked.items()) if rank() == 0 else ())

    @property
    def enabled(self) -> bool:
        """Whether anything is written on this rank."""
        return bool(self.sinks)

    def write_events(self, event_list: Iterable[Event]) -> None:
        """Hand ``(name, value, step)`` to every sink. Values are numbers, or tensors of one element, which are waited for.

        Raises `ValueError` for anything else.
        """
        if self.sinks:
            events = [_checked(e) for e in event_list]
            for sink in self.sinks if events else ():
                sink.write(events)

    def close(self) -> None:
        """Flush and close all sinks: at the end of a run."""
        for sink in self.sinks:
            sink.close()


def _section(config: Any, name: str) -> dict[str, Any]:
    section: Any = config.get(name) if tree.is_mapping(config) else getattr(config, name, None)
    if section is None:
        return {}
    if isinstance(section, Mapping):
        return dict(section)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    if attrs.has(type(section)):
        return attrs.asdict(section)
    raise ValueError(f"{name}: got {type(section).__name__}, required a mapping, as {{'enabled': True}}")


def _check_installed(name: str, sink: Any) -> None:
    module, package = sink.needs
    if module and importlib.util.find_spec(module) is None:
        raise ValueError(
            f"{name}.enabled: needs the package {package}, which is not installed; `pip install {package}`, or set {name}.enabled to false"
        )


def _checked(event: Any) -> Scalar:
    if not isinstance(event, tuple | list) or len(event) != 3:  # pyright: ignore[reportUnknownArgumentType]
        raise ValueError(f"write_events: {event!r}, required (name, value, step)")
    name, value, step = event  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(
            f"write_events: {name!r} is a tensor of shape {tuple(value.shape)}, required one number; reduce it"
        )
    try:
        return str(name), float(value), int(step)  # pyright: ignore[reportUnknownArgumentType]
    except (TypeError, ValueError):
        raise ValueError(f"write_events: {event!r}, required a number and a step") from None


# --- sinks ---


@attrs.define
class TensorBoard:
    """Event files in ``output_path/job_name``, by torch's own writer."""

    output_path: str = ""
    job_name: str = _JOB
    writer: Any = attrs.field(init=False, default=None)

    needs = ("tensorboard", "tensorboard")

    def __attrs_post_init__(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(log_dir=str(Path(self.output_path) / self.job_name))

    def write(self, events: Sequence[Scalar]) -> None:
        for name, value, step in events:
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


@attrs.define
class WeightsAndBiases:
    """A run of Weights & Biases; events of one step are logged by one call."""

    group: str | None = None
    team: str | None = None
    project: str = "deepspeed"
    run: Any = attrs.field(init=False, default=None)

    needs = ("wandb", "wandb")

    def __attrs_post_init__(self) -> None:
        self.run = importlib.import_module("wandb").init(project=self.project, group=self.group, entity=self.team)

    def write(self, events: Sequence[Scalar]) -> None:
        for step in dict.fromkeys(s for _, _, s in events):
            self.run.log({n: v for n, v, s in events if s == step}, step=step)

    def close(self) -> None:
        self.run.finish()


@attrs.define
class Comet:
    """An experiment of Comet. A name is sent once in `samples_log_interval` steps (DeepSpeed's steps are samples)."""

    samples_log_interval: int = 100
    project: str | None = None
    workspace: str | None = None
    api_key: str | None = attrs.field(default=None, repr=False)
    experiment_name: str | None = None
    experiment_key: str | None = None
    online: bool | None = None
    mode: str | None = None
    experiment: Any = attrs.field(init=False, default=None)
    sent: dict[str, int] = attrs.field(init=False, factory=dict[str, int])

    needs = ("comet_ml", "comet-ml")

    def __attrs_post_init__(self) -> None:
        given = {k: getattr(self, k) for k in ("api_key", "project", "workspace", "experiment_key", "online", "mode")}
        self.experiment = importlib.import_module("comet_ml").start(**given)
        if self.experiment_name is not None:
            self.experiment.set_name(self.experiment_name)

    def write(self, events: Sequence[Scalar]) -> None:
        for name, value, step in events:
            if name not in self.sent or step - self.sent[name] >= self.samples_log_interval:
                self.sent[name] = step
                self.experiment.log_metric(name, value, step=step)

    def close(self) -> None:
        self.experiment.end()


@attrs.define
class Csv:
    """One file for each name, ``output_path/job_name/Train_Samples_lr.csv``, of rows ``step,lr``. A run that goes on appends to it."""

    output_path: str = ""
    job_name: str = _JOB

    needs = (None, None)

    def write(self, events: Sequence[Scalar]) -> None:
        folder = Path(self.output_path) / self.job_name
        folder.mkdir(parents=True, exist_ok=True)
        for name in dict.fromkeys(n for n, _, _ in events):
            with (folder / f"{name.replace('/', '_').replace(' ', '_')}.csv").open("a", newline="") as file:
                rows = csv.writer(file)
                if file.tell() == 0:
                    rows.writerow(["step", name.rpartition("/")[2]])
                rows.writerows([s, v] for n, v, s in events if n == name)

    def close(self) -> None:
        """Every write closes its files."""


@attrs.define
class JsonLines:
    """``output_path/job_name/events.jsonl``: a line ``{"name": ..., "value": ..., "step": ..., "time": ...}`` for each event.

    `time` is in seconds since 1970. What JSON has no number for is a string: "nan", "inf", "-inf".
    """

    output_path: str = ""
    job_name: str = _JOB

    needs = (None, None)

    def write(self, events: Sequence[Scalar]) -> None:
        folder, now = Path(self.output_path) / self.job_name, time.time()
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "events.jsonl").open("a") as file:
            for name, value, step in events:
                finite = value - value == 0
                line = {"name": name, "value": value if finite else str(value), "step": step, "time": now}
                file.write(json.dumps(line, allow_nan=False) + "\n")

    def close(self) -> None:
        """Every write closes its file."""


_SECTIONS: dict[str, Callable[..., Any]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "comet": Comet,
    "csv_monitor": Csv,
    "jsonl_monitor": JsonLines,
}

__all__ = ["Comet", "Csv", "Event", "JsonLines", "Monitor", "Sink", "TensorBoard", "WeightsAndBiases"]
