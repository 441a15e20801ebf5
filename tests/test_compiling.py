"""Compiled functions that are called again and again: a graph for each set of shapes, and recorded steps."""

from contextlib import contextmanager
from functools import partial

import pytest
import torch

from fds.compiling import ByShape, Recorded, again, traced


def test_more_shapes_than_dynamo_allows():
    """Each has a graph of its own; without, the second one is an error."""

    def scaled(weight, x):
        return weight * x.sum()

    rows = [torch.arange(n + 1.0) for n in range(3)]
    with torch._dynamo.config.patch(recompile_limit=1):
        by_shape = ByShape(scaled)
        assert [by_shape(torch.tensor(2.0), x).item() for x in rows] == [0.0, 2.0, 6.0]
        assert by_shape.of(rows[1]) is by_shape.of(-rows[1]) is not by_shape.of(rows[2])
        plain = torch.compile(scaled, fullgraph=True, dynamic=False, backend="eager")
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            _ = [plain(torch.tensor(2.0), x) for x in rows]


def test_what_is_traced_knows_that_it_is_compiled():
    """Masks of transformers look at data unless they are told so. torch 2.11 tells only what Dynamo itself reads."""
    told = []

    def looks(x):
        told.append(torch.compiler.is_compiling())
        return x + 1

    f = traced(looks)
    f(torch.ones(2))
    assert told == [False]
    torch.compile(f, fullgraph=True, backend="aot_eager")(torch.ones(2))
    assert len(told) > 1 and all(told[1:])
    assert not torch.compiler.is_compiling()


def test_a_call_again_is_the_graph_alone_with_the_same_tensors():
    """Values are read anew, nothing is looked at by Dynamo, and what calls no graph is called as it is."""

    def added(weight, total):
        total.add_(weight)
        return total

    weight, total, by_shape, called = torch.tensor(2.0), torch.zeros(3), ByShape(added), []
    same = again(lambda: (called.append(1), by_shape(weight, total)))
    assert total.tolist() == [2.0] * 3
    weight.fill_(5.0)
    same()
    assert total.tolist() == [7.0] * 3 and called == [1]
    eager = partial(added, weight, total)
    assert again(eager) is eager and total.tolist() == [12.0] * 3


def test_a_step_runs_once_is_recorded_once_and_is_played_from_then_on(monkeypatch):
    """By a stand-in for CUDA's graphs, which knows no more than that recording runs nothing."""
    done, recording = [], []

    class Graph:
        def replay(self):
            done.append("played")

    @contextmanager
    def record(graph):
        recording.append(graph)
        yield
        recording.append(None)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    step = Recorded(lambda: done.append("recorded" if recording[-1:] and recording[-1] else "run"))
    for _ in range(4):
        step()
    assert done == ["run", "recorded", "played", "played", "played"]
