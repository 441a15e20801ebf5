"""Kernels under Triton's interpreter. It is on or off for a whole process, so these tests run in one of their own."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent / "interpreted"


def test_kernels_under_the_interpreter():
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", str(HERE), "-o", "addopts=--import-mode=importlib"],
        env=env,
        cwd=HERE.parents[2],
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
