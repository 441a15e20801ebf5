import os
import sys
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch

# Before pytest imports `fds/lora.py` for its doctests, and puts that module in the place of the function `fds.lora`.
import fds  # noqa: F401

# One thread: with several, the scatter-adds of some backwards (Mixtral's experts) sum in another order every time, and the bitwise laws compare two runs.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
