"""Buffers, the weight pool and optimizer steps (C++: csrc/memory/memory.hpp, csrc/weights)."""

from collections.abc import Sequence
from typing import Any, Literal, final

MemoryKind = Literal["host", "pinned", "device"]

def allocations() -> int:
    """Return the number of buffers that this module has allocated; constant after warm-up."""

def cuda_compiled() -> bool:
    """Return whether this build supports pinned and device memory."""

def cuda_device_count() -> int:
    """Return the number of devices; 0 without a driver."""

@final
class View:
    """Bytes that the core owns: host memory by the buffer protocol, device memory by __cuda_array_interface__."""

    @property
    def nbytes(self) -> int: ...
    @property
    def address(self) -> int: ...
    @property
    def memory(self) -> MemoryKind: ...
    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

def use_device(index: int) -> None:
    """Select the current device of this thread. RuntimeError if it does not exist."""

@final
class Buffer:
    """Zeroed bytes of any kind of memory.

    Args:
        nbytes: number of bytes.
        memory: kind of memory.
    """

    def __init__(self, nbytes: int, memory: MemoryKind = "host") -> None: ...
    def view(self) -> View:
        """Return a view of all bytes."""

def copy(target: View, source: View) -> None:
    """Copy between two kinds of memory and wait for the copy. ValueError unless the views have the same size."""

@final
class WeightPool:
    """Versioned weights in a fixed number of flat slabs, allocated once.

    Version 0 is newest at first. A microbatch holds the version that was newest at its forward until its
    backward. A 1F1B stage with W warm-up microbatches needs W + 1 slabs.

    Args:
        nbytes: bytes of one slab.
        slabs: number of slabs.
        memory: kind of memory.
    """

    def __init__(self, nbytes: int, slabs: int, memory: MemoryKind = "host") -> None: ...
    @property
    def newest(self) -> int:
        """Number of the newest version."""
    @property
    def newest_slab(self) -> int:
        """Slab of the newest version."""
    @property
    def holders(self) -> int:
        """Number of microbatches that hold a version."""
    def __len__(self) -> int:
        """Return the number of slabs."""
    def slab(self, index: int) -> View: ...
    def acquire(self, microbatch: int, version: int = -1) -> int:
        """Hold `version` (-1: the newest) for `microbatch` and return its slab.

        RuntimeError if the microbatch already holds a version or the version is not kept.
        """
    def slab_of(self, microbatch: int) -> int:
        """Return the slab that `microbatch` holds. IndexError if none."""
    def version_of(self, microbatch: int) -> int:
        """Return the version that `microbatch` holds. IndexError if none."""
    def release(self, microbatch: int) -> None: ...
    def begin_update(self, copy: bool, overwrite: bool = False) -> tuple[int, int]:
        """Return the slabs (source, target) of the next version; the same slab if it is updated in place.

        The target is the oldest version that no microbatch holds. With `copy` it starts as a copy of the source.
        With `overwrite` the newest version is updated in place even if it is held. RuntimeError names the holders
        if every slab is held.
        """
    def commit(self) -> int:
        """Make the target of begin_update the newest version and return its number."""

@final
class Sgd:
    """SGD with the hyperparameters of `torch.optim.SGD`.

    Args:
        rate: -lr.
        undampened: 1 - dampening.
        first: whether the momentum buffer is new; it then starts as the gradient.
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
    """Adam at one step, with the hyperparameters of `torch.optim.Adam`.

    Args:
        rate: -lr / (1 - beta1 ** step).
        weight_decay: factor of the weights added to their gradients; with `decoupled` the factor that multiplies
            the weights, 1 - lr * weight_decay.
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

def cpu_has_fma() -> bool:
    """Return whether this CPU has FMA instructions, which multiply and add with one rounding."""

def fused_step(
    rule: Sgd | Adam,
    tensors: Sequence[tuple[int, int, int, int, int, int]],
    *,
    bfloat16_weights: bool = False,
    bfloat16_gradients: bool = False,
    threads: int = 1,
    fma: bool = False,
    streaming: bool | None = None,
    stream: int | None = None,
) -> None:
    """Step many tensors at once: read the old weights and write the new ones. Releases the GIL.

    Args:
        rule: the optimizer, the same for all tensors.
        tensors: for each the number of elements, and the addresses of the old weights (float32), the new
            weights, the gradient and the state (float32): momentum buffer, or averages of gradients and
            squared gradients; 0 for state that does not exist.
        bfloat16_weights: new weights are bfloat16, rounded from the old ones, which are updated in place.
        bfloat16_gradients: gradients are bfloat16.
        threads: number of threads.
        fma: multiply and add with one rounding. ValueError if the CPU cannot.
        streaming: write new weights with streaming stores; None: if the step moves more than 32 MiB.
        stream: address of a cudaStream_t. The tensors are then in device memory, and the step is only started.
    """
