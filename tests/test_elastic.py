"""A worker is killed, torchrun starts all of them again, and the run goes on; then with one rank, then with two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(out, ranks, steps, *more):
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    script = [str(ROOT / "examples" / "elastic.py"), "--out", str(out), "--steps", str(steps), *more]
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "--max-restarts", "1"]
    done = subprocess.run(
        [sys.executable, *(start if ranks else []), *script], env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]


@pytest.mark.slow  # `make examples` kills and goes on, in every run
def test_a_killed_worker_and_other_numbers_of_ranks_follow_the_uninterrupted_run(tmp_path):
    want = run(tmp_path / "straight", 0, 8)
    assert [x["step"] for x in want] == list(range(8)) and len({x["loss"] for x in want}) == 8
    run(tmp_path / "elastic", 2, 4, "--kill", "3")
    run(tmp_path / "elastic", 1, 6)
    got = run(tmp_path / "elastic", 2, 8)
    # Killed before step 3, begun again from the checkpoint at step 2.
    assert [(x["step"], x["ranks"]) for x in got] == [(0, 2), (1, 2), (2, 2), (2, 2), (3, 2), (4, 1), (5, 1), (6, 2), (7, 2)]  # fmt: skip
    for x in got:
        assert x["loss"] == pytest.approx(want[x["step"]]["loss"], rel=1e-5), x
