"""`python -m fds.offload.tune`: keeps to its time, removes its file, and prints settings that can be pasted."""

import json
import os
import re

import pytest

from fds.offload import tune as tuning
from fds.offload.aio import Settings
from fds.offload.tune import Measured, candidates, main, table, tune

SIZE = 2**20


def test_the_defaults_are_measured_first_and_nothing_twice():
    grid = candidates()
    assert grid[0] == Settings() and len(set(grid)) == len(grid) == 48
    assert {s.queue_depth * s.thread_count for s in grid} == {4, 8, 16, 32}


def test_better_halves_until_the_rounds_are_over(tmp_path, monkeypatch):
    speed = {s: float(i + 1) for i, s in enumerate(candidates()[:8])}
    asked = []
    monkeypatch.setattr(tuning, "_measure", lambda s, file, x: (asked.append(s), (speed[s], speed[s]))[1])
    found = tune(tmp_path, seconds=1000, size=SIZE, settings=list(speed))
    assert [len(m.write) for m in found] == [5, 3, 2, 2, 1, 1, 1, 1]
    assert [m.settings for m in found] == sorted(speed, key=lambda s: speed[s], reverse=True)
    assert not os.listdir(tmp_path)


def test_the_time_limit_holds_and_the_first_is_measured_in_any_case(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(tuning.time, "monotonic", lambda: now[0])

    def measure(s, file, x):
        now[0] += 1.0
        return 1.0, 1.0

    monkeypatch.setattr(tuning, "_measure", measure)
    assert len(tune(tmp_path, seconds=3.5, size=SIZE)) == 4
    now[0] = 0.0
    assert [m.settings for m in tune(tmp_path, seconds=1e-9, size=SIZE)] == [Settings()]


def test_one_lucky_measurement_does_not_beat_those_who_got_further(tmp_path, monkeypatch):
    a, b, c, d = candidates()[:4]
    rates = {a: iter([9.0, 2.0, 2.0, 2.0, 2.0]), b: iter([8.0, 1.0]), c: iter([7.0]), d: iter([6.0])}
    monkeypatch.setattr(tuning, "_measure", lambda s, file, x: (next(rates[s]),) * 2)
    assert [m.settings for m in tune(tmp_path, seconds=1000, size=SIZE, settings=[a, b, c, d])] == [a, b, c, d]


def test_the_slower_direction_counts_for_more():
    assert Measured(Settings(), (1.0,), (3.0,)).score < Measured(Settings(), (2.0,), (2.0,)).score
    assert Measured(Settings(), (1.0, 9.0, 2.0), (2.0, 2.0, 2.0)).score == 2.0


def test_the_command(tmp_path, capsys):
    assert main([str(tmp_path), "--seconds", "0.5", "--size", "1"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == [
        "block_size",
        "queue_depth",
        "thread_count",
        "write",
        "GB/s",
        "read",
        "GB/s",
        "measured",
    ]
    printed = re.search(r"^Settings\(.*?\)", out, re.M)
    assert printed is not None
    best = eval(printed[0], {"Settings": Settings})
    assert Settings.of(json.loads(out[out.index("{") :])["aio"]) == best
    assert out.splitlines()[1].split()[:3] == [str(best.block_size), str(best.queue_depth), str(best.thread_count)]
    assert not os.listdir(tmp_path)


def test_the_table_has_a_line_for_each():
    lines = table([Measured(Settings(), (1.0, 2.0), (3.0, 4.0))]).splitlines()
    assert lines[1].split() == ["1048576", "8", "1", "1.50", "3.50", "2x"] and len(lines) == 2


@pytest.mark.parametrize("arguments", [["--seconds", "0"], ["--size", "0"], ["--size", "1e12"]])
def test_what_cannot_be_done_is_said(tmp_path, capsys, arguments):
    assert main([str(tmp_path), *arguments]) == 1
    assert "allowed more than 0" in (said := capsys.readouterr().err) or "bytes are free" in said
    assert not os.listdir(tmp_path)


def test_a_path_that_is_no_directory(tmp_path, capsys):
    assert main([str(tmp_path / "none")]) == 1
    assert "not a directory" in capsys.readouterr().err


def test_an_error_leaves_no_file(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk gone")

    monkeypatch.setattr(tuning, "_measure", fail)
    with pytest.raises(OSError, match="disk gone"):
        tune(tmp_path, size=SIZE)
    assert not os.listdir(tmp_path)
