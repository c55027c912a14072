"""Tells the C library to keep freed memory, which is faster, or to return it at once, which lowers the peak."""

import ctypes
import sys

# Parameters of glibc's mallopt (malloc.h).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Keeps freed memory for reuse; returns whether the C library supports this.

    glibc returns a block of more than 32 MB to the system as soon as it is freed. The next training step requests it
    again, and the system clears it page by page, which takes a sixth of a step of `benchmarks/train_throughput.py`.
    """
    return _mallopt(M_MMAP_THRESHOLD, LARGEST) and _mallopt(M_TRIM_THRESHOLD, LARGEST)


def return_freed_memory(least: int = 1 << 20) -> bool:
    """Returns every block of `least` bytes or more to the system when it is freed; whether the C library can be told.

    By default glibc raises this limit up to 32 MB while it runs, and freed blocks then stay between live ones.
    """
    return _mallopt(M_MMAP_THRESHOLD, least)


def empty_memory() -> bool:
    """Returns all freed memory to the system now; returns whether the C library supports this."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None  # as above
    if malloc_trim is None:
        return False
    malloc_trim(0)
    return True


def _mallopt(parameter: int, value: int) -> bool:
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return bool(mallopt and mallopt(parameter, value))
