"""The time, with the device's work."""

import time

import torch


def now() -> float:
    """Seconds on a clock that only goes forward, after all that the device was given is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
