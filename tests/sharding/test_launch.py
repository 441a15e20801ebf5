"""`launch`: ranks of one machine without a launcher on the command line."""

import os

import pytest
import torch

import fds


def made(axis):
    program, params = fds.functionalize(torch.nn.Linear(200, 200))
    step = fds.train_step(fds.shard(program, axis), fds.optim.adamw(1e-3))
    return step, step.init({k: torch.full_like(v, 0.5) for k, v in params.items()})


def main(folder):
    """Both ranks save in the background, and nobody asks its future; rank 1 fails."""
    axis = fds.sharding.mesh(dp=-1)["dp"]
    total = axis.sum(torch.tensor([float(axis.rank + 1)]))
    (folder / f"{axis.rank} of {axis.size}").write_text(str(float(total)))
    fds.save_state(folder / "state", *made(axis), asynchronous=True)
    if axis.rank == 1:
        raise RuntimeError(f"boom of {os.environ['LOCAL_RANK']}")
    axis.barrier()  # is not left alone there


def test_ranks_meet_and_the_error_of_one_ends_all_when_its_save_is_written(tmp_path):
    with pytest.raises(Exception, match="boom of 1"):
        fds.launch(main, tmp_path, ranks=2)
    assert {p.name: p.read_text() for p in tmp_path.glob("* of *")} == {"0 of 2": "3.0", "1 of 2": "3.0"}
    step, want = made(fds.sharding.mesh(dp=1)["dp"])
    got = fds.load_state(tmp_path / "state", step)
    assert all(torch.equal(a, b) for a, b in zip(fds.tree.leaves(got), fds.tree.leaves(want), strict=True))


def test_one_rank_and_ranks_of_a_launcher_are_this_process(monkeypatch):
    seen = []
    fds.launch(seen.append, 1, ranks=1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    fds.launch(seen.append, 2, ranks=8)
    assert seen == [1, 2]
