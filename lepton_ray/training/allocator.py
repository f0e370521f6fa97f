"""What the C allocator does with memory that a step frees: it keeps it, for the next step needs as much.

A rank's function runs in a thread, and what a thread frees at the top of its heap glibc gives back to the system once
it is 128 KB or more: then every step takes the pages of its activations anew, one page fault for every 4 KB. On the
4-layer text encoder of benchmarks/training.py that were 20,000 faults a second per rank and a twelfth of the time.
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT = 1 << 30
"""Bytes that a heap may keep at its top."""
_LARGEST_IN_HEAP = 32 << 20
"""Larger blocks are mapped one by one; the most that glibc allows."""


def keep_freed_memory() -> bool:
    """Let this process keep what it frees; whether the allocator is one that can be told so (glibc's)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # musl, macOS: nothing to tell, and not the same habit
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_IN_HEAP)) and bool(mallopt(_M_TRIM_THRESHOLD, _KEPT))
