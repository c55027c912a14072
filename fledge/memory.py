"""What the C library does with memory that is freed: kept where speed counts, returned at once where the peak does."""

import ctypes
import sys

# Parameters of glibc's mallopt (malloc.h).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Keeps what is freed for later; returns whether the C library is one that can be told.

    glibc gives a block of more than 32 MB back to the system as soon as it is freed. The next training step asks for it
    again, and the system clears it again, page by page, which is a sixth of a step of `benchmarks/train_throughput.py`.
    """
    return _mallopt(M_MMAP_THRESHOLD, LARGEST) and _mallopt(M_TRIM_THRESHOLD, LARGEST)


def return_freed_memory() -> bool:
    """Returns every block of 1 MB or more to the system when it is freed; returns whether the C library can be told.

    glibc raises that limit by itself up to 32 MB, and then keeps between live blocks what came and went.
    """
    return _mallopt(M_MMAP_THRESHOLD, 1 << 20)


def empty_memory() -> bool:
    """Returns to the system what has been freed and kept, once; returns whether the C library can be told."""
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
