"""The communication logger: what it counts in eager and compiled code, bandwidths by the group's size, stragglers, its settings."""

import logging

import pytest
import ranks
import torch
import torch.distributed as dist

from fds import sharding
from fds.sharding import collectives, comms_log
from fds.sharding.comms_log import CommsLogger, CommsRow, CommsSummary

M = 3  # elements of a shard


def loss(axis):
    return lambda x: collectives.gather(x, axis).pow(2).sum()


def counted():
    axis = sharding.mesh(dp=2)["dp"]
    x = torch.arange(1.0, M + 1)
    summaries = []
    for f in (torch.func.grad(loss(axis)), torch.compile(torch.func.grad(loss(axis)), fullgraph=True, backend="aot_eager")):  # fmt: skip
        f(x)  # what compiling itself may run is not asked about
        with CommsLogger(enabled=True) as log, collectives.record() as wire:
            f(x)
            f(x)
            axis.mean(x)
            axis.barrier()
        assert wire.calls == {"gather": 2, "scatter": 2, "total": 1, "barrier": 1}
        f(x)  # after `stop`
        summaries.append(log.summary())
    for s in summaries:
        assert {(r.op, r.nbytes, r.ranks, r.count) for r in s.rows} == {
            ("all_gather", 8 * M, (0, 1), 2),
            ("reduce_scatter", 8 * M, (0, 1), 2),
            ("all_reduce", 4 * M, (0, 1), 1),
            ("barrier", 0, (0, 1), 1),
        }
        assert all(r.total_ms > 0 and r.straggler_ms is None for r in s.rows)
        assert (s.rank, s.world_size, s.operations) == (dist.get_rank(), 2, 6)


def delayed():
    """Rank 1 comes late to two sums of three, and rank 0 to the third one: by clocks that say so. Who comes first waits."""
    axis = sharding.mesh(dp=2)["dp"]
    times = iter([[1.0, 1.5, 2.0, 2.25, 3.5, 4.0], [1.25, 1.5, 2.125, 2.25, 3.0, 4.0]][axis.rank])
    now, comms_log._now = comms_log._now, lambda device: next(times)
    try:
        with CommsLogger(enabled=True) as log:
            for _ in range(3):
                axis.sum(torch.ones(M))
    finally:
        comms_log._now = now
    (row,) = log.summary(show_straggler=True).rows
    return row.total_ms, row.straggler_ms


def uneven():
    axis = sharding.mesh(dp=2)["dp"]
    with CommsLogger(enabled=True) as log:
        axis.sum(torch.ones(M))
        if axis.rank == 1:
            log.reset()
    if axis.rank == 1:
        log.summary(show_straggler=True)
        return ""
    with pytest.raises(ValueError) as caught:
        log.summary(show_straggler=True)
    return str(caught.value)


def settings():
    axis = sharding.mesh(dp=2)["dp"]
    x = torch.ones(M)

    def ops(**kwargs):
        with CommsLogger(**kwargs) as log:
            axis.sum(x)
            axis.barrier()
        return [r.op for r in log.summary().rows]

    assert ops() == ops(enabled=False, verbose=True, prof_ops=["all_reduce"]) == []
    assert ops(enabled=True) == ["all_reduce", "barrier"]
    assert ops(enabled=True, prof_all=False) == []
    assert ops(enabled=True, prof_all=False, prof_ops=["inference_all_reduce"]) == ["all_reduce"]
    with CommsLogger(enabled=True, debug=True) as log, CommsLogger(enabled=True) as other:
        axis.sum(x)
        elsewhere(axis, x)
    assert [r.caller.split()[1] for r in log.summary().rows] == ["elsewhere", "settings"]
    assert [(r.caller, r.count) for r in other.summary().rows] == [("", 2)]
    assert "test_comms_log.py:" in str(log.summary())
    lines = Lines()
    comms_log.LOG.addHandler(lines)
    comms_log.LOG.setLevel("INFO")
    with CommsLogger(enabled=True, verbose=True) as log:
        axis.sum(x)
        log.log_summary()
    comms_log.LOG.removeHandler(lines)
    return lines.said


def elsewhere(axis, x):
    axis.sum(x)


class Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.said = []

    def emit(self, record):
        self.said.append(record.getMessage())


def two_axes():
    """Two groups of two among four ranks."""
    mesh = sharding.mesh(dp=2, tp=2)
    with CommsLogger(enabled=True) as log:
        for axis in (mesh["dp"], mesh["tp"]):
            collectives.gather(torch.ones(M), axis)
    return [(r.ranks, r.nbytes, r.busbw / r.algbw, r.straggler_ms >= 0) for r in log.summary(show_straggler=True).rows]


def test_counts_are_right_eager_and_compiled():
    ranks.run(2, counted)


def test_a_straggler_is_told_from_slow_communication():
    assert ranks.run(2, delayed) == [(1250.0, 375.0), (1375.0, 500.0)]


def test_logs_that_do_not_belong_together():
    said, _ = ranks.run(2, uneven)
    assert "all_reduce of 12 bytes was logged 1 times on rank 0, 0 times on rank 1" in said


def test_settings():
    first, second = ranks.run(2, settings)
    assert second == []  # only rank 0 speaks
    assert first[0].startswith("comm op: all_reduce | time (ms): ") and "msg size: 12 B | algbw (Gbps): " in first[0]
    assert first[1].startswith("operation") and "all_reduce" in first[1]


def test_bandwidth_is_by_the_size_of_the_group():
    results = ranks.run(4, two_axes)
    dp, tp = {0: (0, 2), 1: (1, 3), 2: (0, 2), 3: (1, 3)}, {0: (0, 1), 1: (0, 1), 2: (2, 3), 3: (2, 3)}
    for rank, rows in enumerate(results):
        assert sorted(rows) == sorted([(g[rank], 8 * M, 0.5, True) for g in (dp, tp)])  # not 3/4


def test_the_rules():
    """4 calls of 1 MB over 4 ranks in 16 ms: 2 Gbit/s."""
    rows = [CommsRow(op, 1_000_000, (0, 1, 2, 3), 4, 16.0) for op in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send")]  # fmt: skip
    assert [r.mean_ms for r in rows] == [4.0] * 6
    assert [round(r.algbw, 9) for r in rows] == [2.0] * 6
    assert [round(r.busbw, 9) for r in rows] == [3.0, 1.5, 1.5, 1.5, 2.0, 2.0]
    text = str(CommsSummary((*rows[:1], CommsRow("barrier", 0, (0, 1), 1, 0.0, 0.5)), 0, 4)).splitlines()
    assert text[0].split() == [
        "operation",
        "message",
        "ranks",
        "count",
        "total",
        "ms",
        "mean",
        "ms",
        "algbw",
        "Gbit/s",
        "busbw",
        "Gbit/s",
        "straggler",
        "ms",
    ]
    assert text[1].split() == ["all_reduce", "976.6", "KiB", "4", "4", "16.00", "4.00", "2.00", "3.00", "0.00"]
    assert text[2].split() == ["barrier", "0", "B", "2", "1", "0.00", "0.00", "0.00", "0.00", "0.50"]


def test_an_unknown_operation_is_refused():
    with pytest.raises(ValueError, match=r"prof_ops: 'all_redcue' is no operation; did you mean 'all_reduce'"):
        CommsLogger(prof_ops=["all_redcue"])
    with pytest.raises(ValueError, match=r"prof_ops: 'all_reduce', required a list of operations, as \['all_reduce'\]"):
        CommsLogger(prof_ops="all_reduce")
    with pytest.raises(ValueError, match="enabled: 'false', required True or False"):  # which is true
        CommsLogger(enabled="false")


def test_a_logger_that_is_off_costs_nothing():
    with CommsLogger():
        assert not comms_log._LOGGERS
    with CommsLogger(enabled=True) as log:
        assert [log] == comms_log._LOGGERS
        log.start()  # once is enough
        assert [log] == comms_log._LOGGERS
    assert not comms_log._LOGGERS
