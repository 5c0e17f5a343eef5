"""Buffers, the weight pool and fused steps (C++: csrc/memory.hpp, weight_pool.hpp, fused.hpp)."""

from collections.abc import Sequence
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

def use_device(index: int) -> None:
    """Make a device the current one of this thread. RuntimeError if there is no such."""

@final
class Buffer:
    """Zeroed bytes of any kind of memory.

    Args:
        nbytes: how many.
        memory: where.
    """

    def __init__(self, nbytes: int, memory: Memory = "host") -> None: ...
    def view(self) -> View:
        """All of it."""

def copy(target: View, source: View) -> None:
    """Copy between two kinds of memory, and wait for it. ValueError unless the views are of the same size."""

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

@final
class Sgd:
    """SGD with its numbers, as `torch.optim.SGD` has them.

    Args:
        rate: -lr.
        undampened: 1 - dampening.
        first: the momentum buffer is new and begins as the gradient.
    """

    def __init__(
        self,
        *,
        rate: float,
        weight_decay: float,
        momentum: float,
        undampened: float,
        first: bool,
        nesterov: bool,
        maximize: bool,
    ) -> None: ...

@final
class Adam:
    """Adam with its numbers at one step, as `torch.optim.Adam` has them.

    Args:
        rate: -lr / (1 - beta1 ** step).
        weight_decay: the factor of the weights that is added to their gradients; or with `decoupled`
            the factor that the weights are multiplied with, 1 - lr * weight_decay.
        weight1: 1 - beta1.
        weight2: 1 - beta2.
        correction2: (1 - beta2 ** step) ** 0.5.
    """

    def __init__(
        self,
        *,
        rate: float,
        weight_decay: float,
        weight1: float,
        beta2: float,
        weight2: float,
        correction2: float,
        epsilon: float,
        decoupled: bool,
        maximize: bool,
    ) -> None: ...

def fused_contracts() -> bool:
    """Whether this CPU can multiply and add with one rounding."""

def fused_step(
    rule: Sgd | Adam,
    tensors: Sequence[tuple[int, int, int, int, int, int]],
    *,
    halves: bool = False,
    half_gradients: bool = False,
    threads: int = 1,
    contracted: bool = False,
    streaming: bool | None = None,
    stream: int | None = None,
) -> None:
    """Step many tensors at once, reading old weights and writing new ones. The GIL is let go of meanwhile.

    Args:
        rule: one for all of them.
        tensors: of each how many numbers it has, and the addresses of the old weights (float32), the new
            weights, the gradient, and the state (float32): momentum buffer or averages of gradients and
            of their squares; 0 where there is none.
        halves: new weights are bfloat16, rounded from the old ones, which are updated in place.
        half_gradients: gradients are bfloat16.
        threads: how many may work.
        contracted: multiply and add with one rounding. ValueError if the CPU cannot.
        streaming: write new weights around the caches; None: if the step moves more than 32 MiB.
        stream: address of a cudaStream_t; the tensors are then in device memory, and the step is started only.
    """
