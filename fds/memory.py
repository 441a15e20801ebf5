"""What happens to memory that a step frees, on a CPU."""

import ctypes
import functools
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's names for mallopt
_SIZES = (2**30, 2**25)  # the second one is what older versions of glibc take


@functools.cache
def keep_freed() -> bool:
    """Ask the C library to keep freed memory for this process; whether it does. Process-wide, for good, and only with glibc.

    By default glibc gives the top of its heap, and every buffer above a threshold, back to the system as it is freed, so that each step
    faults all of its activations and gradients in anew: 34,000 faults, a third of a step of 6.5M parameters (0.395 s against 0.260).
    The peak of the process's memory stays; what it holds between steps is that peak.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(any(mallopt(name, size) for size in _SIZES) for name in (_TRIM_THRESHOLD, _MMAP_THRESHOLD))
