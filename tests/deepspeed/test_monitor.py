"""Where events go: files, packages that are not installed, ranks; timers and their lines."""

import csv
import importlib.machinery
import json
import sys
import types

import attrs
import pytest
import ranks
import torch

from fds.deepspeed.monitor import Monitor
from fds.deepspeed.timers import Throughput, Timers, breakdown_events, due, step_events

EVENTS = [("Train/Samples/lr", 1e-3, 8), ("Train/Samples/train_loss", torch.tensor(2.5), 8), ("a b", 3, 8)]


def test_csv_files_are_deepspeeds_and_a_run_that_goes_on_appends(tmp_path):
    config = {"csv_monitor": {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}}
    Monitor.of(config).write_events(EVENTS)
    Monitor.of(config).write_events([("Train/Samples/lr", 2e-3, 16)])  # a new process
    rows = list(csv.reader((tmp_path / "job" / "Train_Samples_lr.csv").open()))
    assert rows == [["step", "lr"], ["8", "0.001"], ["16", "0.002"]]
    assert sorted(p.name for p in (tmp_path / "job").iterdir()) == [
        "Train_Samples_lr.csv",
        "Train_Samples_train_loss.csv",
        "a_b.csv",
    ]


def test_json_lines_hold_what_is_not_finite_as_strings(tmp_path):
    monitor = Monitor.of({"jsonl_monitor": {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}})
    monitor.write_events([*EVENTS, ("loss", float("nan"), 9), ("loss", float("-inf"), 10)])
    lines = [json.loads(x) for x in (tmp_path / "job" / "events.jsonl").read_text().splitlines()]
    assert [(x["name"], x["value"], x["step"]) for x in lines] == [
        ("Train/Samples/lr", 1e-3, 8),
        ("Train/Samples/train_loss", 2.5, 8),
        ("a b", 3.0, 8),
        ("loss", "nan", 9),
        ("loss", "-inf", 10),
    ]


def test_sections_may_be_attrs_and_nothing_is_written_unless_enabled(tmp_path):
    @attrs.frozen
    class Section:
        enabled: bool
        output_path: str
        job_name: str = "job"

    def config(enabled):
        return types.SimpleNamespace(csv_monitor=Section(enabled, str(tmp_path)))

    off = Monitor.of(config(False))
    assert not off.enabled
    off.write_events(EVENTS)
    assert not list(tmp_path.iterdir())
    Monitor.of(config(True)).write_events(EVENTS)
    assert (tmp_path / "job").is_dir()


class Recorder:
    """Stands for a package: remembers every call."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            return self

        return call


def pretend(monkeypatch, name, **attributes):
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    for k, v in attributes.items():
        setattr(module, k, v)
    monkeypatch.setitem(sys.modules, name, module)


def test_tensorboard(monkeypatch, tmp_path):
    writer = Recorder()
    pretend(monkeypatch, "tensorboard")
    pretend(monkeypatch, "torch.utils.tensorboard", SummaryWriter=lambda **k: writer.made(**k))
    monitor = Monitor.of({"tensorboard": {"enabled": True, "output_path": str(tmp_path)}})
    monitor.write_events(EVENTS[:1])
    monitor.close()
    assert writer.calls == [
        ("made", (), {"log_dir": str(tmp_path / "DeepSpeedJobName")}),
        ("add_scalar", ("Train/Samples/lr", 1e-3, 8), {}),
        ("flush", (), {}),
        ("close", (), {}),
    ]


def test_tensorboard_itself(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monitor = Monitor.of({"tensorboard": {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}})
    monitor.write_events(EVENTS)
    monitor.close()
    found = reader.EventAccumulator(str(tmp_path / "job")).Reload()
    assert [(e.step, e.value) for e in found.Scalars("Train/Samples/train_loss")] == [(8, 2.5)]


def test_weights_and_biases_gets_one_call_for_a_step(monkeypatch):
    run = Recorder()
    pretend(monkeypatch, "wandb", init=run.init)
    monitor = Monitor.of({"wandb": {"enabled": True, "team": "t", "group": "g", "project": "p"}})
    monitor.write_events([("a", 1, 8), ("b", 2, 8), ("a", 3, 16)])
    assert run.calls == [
        ("init", (), {"project": "p", "group": "g", "entity": "t"}),
        ("log", ({"a": 1.0, "b": 2.0},), {"step": 8}),
        ("log", ({"a": 3.0},), {"step": 16}),
    ]


def test_comet_is_sent_a_name_once_in_an_interval(monkeypatch):
    experiment = Recorder()
    pretend(monkeypatch, "comet_ml", start=experiment.start)
    section = {"enabled": True, "samples_log_interval": 10, "experiment_name": "e", "api_key": "secret"}
    monitor = Monitor.of({"comet": section})
    for step in (0, 4, 10, 12, 20):
        monitor.write_events([("loss", 1.0, step)])
    assert experiment.calls[0][2]["api_key"] == "secret"
    assert experiment.calls[1] == ("set_name", ("e",), {})
    assert [kwargs["step"] for name, _, kwargs in experiment.calls if name == "log_metric"] == [0, 10, 20]
    assert "secret" not in repr(monitor)


@pytest.mark.parametrize(
    ("module", "section", "package"),
    [
        ("tensorboard", "tensorboard", "tensorboard"),
        ("wandb", "wandb", "wandb"),
        ("comet_ml", "comet", "comet-ml"),
    ],
)
def test_a_missing_package_is_named(monkeypatch, module, section, package):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else 1 / 0)
    with pytest.raises(ValueError, match=rf"{section}\.enabled: needs the package {package}.*pip install {package}"):
        Monitor.of({section: {"enabled": True}})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"csv_monitor": {"enabled": True, "outputpath": "x"}}, "csv_monitor.outputpath.*output_path"),
        ({"csv_monitor": 3}, "csv_monitor: got int"),
    ],
)
def test_wrong_sections_name_the_key(config, message):
    with pytest.raises(ValueError, match=message):
        Monitor.of(config)


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (("a", 1), "required"),
        (("a", torch.ones(2), 1), "tensor of shape"),
        (("a", "x", 1), "required a number"),
        (("a", 1.0, None), "required a number"),
    ],
)
def test_wrong_events_are_refused(event, message, tmp_path):
    monitor = Monitor.of({"csv_monitor": {"enabled": True, "output_path": str(tmp_path)}})
    with pytest.raises(ValueError, match=message):
        monitor.write_events([event])


def _write(folder):
    monitor = Monitor.of({"csv_monitor": {"enabled": True, "output_path": folder}})
    monitor.write_events([("a", 1.0, 1)])
    return monitor.enabled


def test_rank_0_alone_writes(tmp_path):
    assert ranks.run(2, _write, str(tmp_path)) == [True, False]
    assert (tmp_path / "DeepSpeedJobName" / "a.csv").read_text().splitlines() == ["step,a", "1,1.0"]


# --- timers ---


def test_timers_add_up_until_they_are_reset():
    now = iter([0.0, 1.0, 10.0, 12.0, 20.0, 20.5])
    waits = []
    timers = Timers(synchronize=lambda: waits.append(1), clock=lambda: next(now))
    for _ in range(2):
        with timers("fwd"):
            pass
    assert timers.milliseconds(reset=False) == {"fwd": 3000.0} == timers.milliseconds()
    with timers("bwd"):
        pass
    assert timers.milliseconds() == {"bwd": 500.0}
    assert len(waits) == 6  # at every start and stop: a device works on after its call has returned


def test_timers_refuse_what_is_not_running():
    timers = Timers()
    with pytest.raises(ValueError, match=r"'fwd' is not running"):
        timers.stop("fwd")
    timers.start("fwd")
    with pytest.raises(ValueError, match="running already"):
        timers.start("fwd")


def test_throughput_leaves_the_warm_up_out():
    now = iter([100.0, 102.0, 103.0])
    throughput = Throughput(10, warm_up=2, synchronize=lambda: None, clock=lambda: next(now))
    assert [throughput.step() for _ in range(4)] == [None, None, 5.0, 20 / 3]


def test_events_have_deepspeeds_names():
    assert breakdown_events({"bwd_allreduce": 1.0, "mine": 2.0}, 4) == [
        ("Train/Samples/elapsed_time_ms_backward_allreduce", 1.0, 4),
        ("Train/Samples/elapsed_time_ms_mine", 2.0, 4),
    ]
    assert step_events(1.0, 2.0, 4, loss_scale=8.0)[-1] == ("Train/Samples/loss_scale", 8.0, 4)
    assert not due(10, None)
