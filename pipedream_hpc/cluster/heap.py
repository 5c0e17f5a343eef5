"""Heap: keep the memory of freed tensors in the process while it trains on a CPU.

Every minibatch frees its activations, and the next one allocates the same sizes again. By default glibc returns large
blocks to the kernel, which zeroes every page when it is used again: some 20,000 page faults for a minibatch of a VGG,
a twentieth of its time (benchmarks/heap.py).

Kept memory is reused after some minibatches, not at once. torch allocates blocks aligned to 64 bytes; glibc cuts them
out of somewhat larger ones, and the remainders go to its cache of small blocks (tcache), where they prevent two large
free blocks from being merged. A hole of exactly the size that was freed cannot hold an aligned block of the same size,
so glibc takes fresh memory instead. This ends when the cache is full, with a few remainders of each size. How soon
depends on what the process has in that cache, and so on the version of torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import os

#: Environment variables with which the user may have configured malloc (mallopt(3)).
_USER_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
# Constants of <malloc.h>.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST, _LARGEST_OF_OLD_GLIBC = 1 << 30, 32 << 20


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory; returns whether it does.

    Changes nothing if the environment configures malloc, or with another libc.
    """
    if any(name in os.environ for name in _USER_SETTINGS):
        return False
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        large = mallopt(_MMAP_THRESHOLD, _LARGEST) or mallopt(_MMAP_THRESHOLD, _LARGEST_OF_OLD_GLIBC)
        return bool(large and mallopt(_TRIM_THRESHOLD, 2 * _LARGEST - 1))
    return False
