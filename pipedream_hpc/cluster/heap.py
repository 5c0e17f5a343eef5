"""Heap: memory of freed tensors stays with the process while it trains on a CPU.

Every minibatch frees its activations and the next one asks for the same sizes again. By default glibc hands large
ones back to the system, which gives them out again page by page, each filled with zeros first: some 20,000 page
faults for a minibatch of a VGG, a twentieth of its time (benchmarks/heap.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import os

#: What a person may have set instead (mallopt(3)).
_OWN = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
# Of <malloc.h>.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST, _LARGEST_OF_OLD_GLIBC = 1 << 30, 32 << 20


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed; whether it does from now on.

    Nothing is changed where the environment has settings of its own, or under another libc.
    """
    if any(name in os.environ for name in _OWN):
        return False
    with contextlib.suppress(OSError, AttributeError):
        adjust = ctypes.CDLL(None).mallopt
        large = adjust(_MMAP_THRESHOLD, _LARGEST) or adjust(_MMAP_THRESHOLD, _LARGEST_OF_OLD_GLIBC)
        return bool(large and adjust(_TRIM_THRESHOLD, 2 * _LARGEST - 1))
    return False
