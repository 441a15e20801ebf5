"""Kernels under Triton's interpreter: this folder is collected only where it is on, in the process that `test_interpreted.py` starts."""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["*"]
