"""Buffers and the weight pool (C++, csrc/memory.hpp and csrc/weight_pool.hpp)."""

from typing import Any, Literal, final

Memory = Literal["host", "pinned", "device"]

def allocations() -> int:
    """Buffers this module has allocated; constant after warm-up."""

def cuda_compiled() -> bool:
    """Whether this build has pinned and device memory."""

def cuda_device_count() -> int:
    """Devices there are; 0 without a driver."""

@final
class View:
    """Bytes that the core owns. Host memory has the buffer protocol, device memory __cuda_array_interface__."""

    @property
    def nbytes(self) -> int: ...
    @property
    def address(self) -> int: ...
    @property
    def memory(self) -> Memory: ...
    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

@final
class WeightPool:
    """Versioned parameters in a fixed number of flat slabs, allocated once.

    Version 0 is newest at first; a minibatch holds the version newest at its forward until its
    backward. A 1F1B stage with W warm-up minibatches needs W + 1 slabs.

    Args:
        nbytes: bytes of one slab.
        slabs: how many.
        memory: where.
    """

    def __init__(self, nbytes: int, slabs: int, memory: Memory = "host") -> None: ...
    @property
    def newest(self) -> int:
        """Number of the newest version."""
    @property
    def newest_slab(self) -> int:
        """Slab of the newest version."""
    @property
    def holders(self) -> int:
        """Minibatches that hold a version."""
    def __len__(self) -> int:
        """Slabs."""
    def slab(self, index: int) -> View: ...
    def acquire(self, minibatch: int, version: int = -1) -> int:
        """Hold `version` (-1: the newest) for `minibatch`; returns its slab.

        RuntimeError if it holds one already or the version is not kept.
        """
    def slab_of(self, minibatch: int) -> int:
        """Slab that `minibatch` holds. IndexError if none."""
    def version_of(self, minibatch: int) -> int:
        """Version that `minibatch` holds. IndexError if none."""
    def release(self, minibatch: int) -> None: ...
    def begin_update(self, copy: bool, overwrite: bool = False) -> tuple[int, int]:
        """Slabs (source, target) of the next version; the same one when it is updated in place.

        The oldest version that nobody holds is written over. With `copy` the target begins as a copy
        of the source. With `overwrite` the newest is updated in place whoever holds it. RuntimeError
        names the holders when every slab is held.
        """
    def commit(self) -> int:
        """Make the target of begin_update the newest version; returns its number."""
