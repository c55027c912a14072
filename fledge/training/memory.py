"""Memory on a CPU: what one training step has freed is kept for the next."""

import ctypes
import sys

# Parameters of glibc's mallopt (malloc.h).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tells the C library to keep what is freed; returns whether it is one that can be told.

    glibc gives a block of more than 32 MB back to the system as soon as it is freed. The next step asks for it again,
    and the system clears it again, page by page, which is a sixth of a step of `benchmarks/train_throughput.py`.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return bool(mallopt and mallopt(M_MMAP_THRESHOLD, LARGEST) and mallopt(M_TRIM_THRESHOLD, LARGEST))
