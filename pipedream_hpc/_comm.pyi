"""Channels, all-reduces and losses over MPI (C++: csrc/comm)."""

from collections.abc import Sequence
from typing import Any, final

from pipedream_hpc._weights import MemoryKind, View

comm_bytes: int  # sizeof(MPI_Comm) at build time

class CoreError(RuntimeError): ...

class MpiError(CoreError):
    """An MPI call failed. The text names the rank, the call, the peer and the microbatch."""

class MessageError(CoreError):
    """A message differs from the plan. The text names the sender, what was expected and what arrived."""

class StallError(CoreError):
    """A peer did not answer within the stall limit. The text names who waits, for what and for whom."""

def library_version() -> str:
    """Return the version text of the running MPI library."""

def built_with() -> str:
    """Return the MPI whose header this module was built with."""

def initialized() -> bool:
    """Return whether the MPI library that this module sees is initialised."""

def allocations() -> int:
    """Return the number of buffers that this module has allocated; constant after warm-up."""

@final
class Progress:
    """Progress engine: makes the MPI calls of the core.

    A thread of its own polls while the main thread computes; the main thread polls while it waits.

    Args:
        comm: mpi4py communicator; it is duplicated (collective).
        oversubscribed: whether the node's ranks need more cores than it has; a waiting rank then soon sleeps.
        device: index of the GPU of this process, or -1.
        cores: cores of the progress thread; if empty, those of the calling thread.
        spare: whether no thread computes on `cores`; the progress thread then polls more often.
    """

    def __init__(
        self,
        comm: Any,
        *,
        oversubscribed: bool = False,
        device: int = -1,
        cores: Sequence[int] = (),
        spare: bool = False,
    ) -> None: ...
    def close(self) -> None:
        """Cancel posted receives and free the communicator. Collective; may be called twice."""
    def set_position(self, where: str, first: int, n_microbatches: int) -> None:
        """Set how messages name microbatches. Call it at the start of every epoch.

        With ("epoch 2", 100, 4), microbatch 109 of the run is "epoch 2, minibatch 2, microbatch 1". Before the first
        call, and if the number is less than `first`, it is "microbatch 109 of the run".

        Args:
            where: the epoch, such as "epoch 2".
            first: number of the epoch's first microbatch in the run.
            n_microbatches: microbatches per minibatch; with 1, only the minibatch is named. ValueError if less.
        """
    def microbatch_name(self, microbatch: int) -> str:
        """Return what messages call a microbatch of the run; see `set_position`."""
    def statistics(self) -> dict[str, int]:
        """Return the polls by the main thread, the polls by the progress thread and the completed requests."""

#: One tensor of a channel as planned: label for messages, dtype, bytes of an element, largest shape.
TensorSpec = tuple[str, str, int, Sequence[int]]

def tensor_offsets(specs: Sequence[TensorSpec]) -> list[int]:
    """Return the offsets in bytes of tensors of planned shapes in a slot; each is aligned to a cache line."""

@final
class SendChannel:
    """Sending end of a channel: zero-copy, at most two sends in flight.

    Args:
        peer_rank: rank of the receiver in the communicator.
        tag: the same at both ends, and different from all other channels between the two ranks in this direction.
        specs: the tensors of a message.
        memory: kind of the tensors' memory.
        staged: for device memory that MPI cannot access: send chunks through two pinned buffers.
        chunk: bytes of each of these buffers.
    """

    def __init__(
        self,
        progress: Progress,
        peer_rank: int,
        tag: int,
        specs: Sequence[TensorSpec],
        memory: MemoryKind = "host",
        staged: bool = False,
        chunk: int = ...,
    ) -> None: ...
    def send(
        self,
        microbatch: int,
        tensors: Sequence[tuple[int, Sequence[int] | None]],
        stall_limit_s: float,
        stream: int = 0,
    ) -> None:
        """Send the tensors of a microbatch. Waits while two sends are in flight.

        A tensor is an address and a shape; None means the planned shape.

        When send number k returns, send number k - 2 is complete: keep the last two alive. Device memory is
        read once the work queued on `stream` so far is done; this call does not wait for it.
        Raises MessageError (larger than planned), MpiError, StallError.
        """
    def drain(self, stall_limit_s: float) -> None:
        """Wait until all sends are complete."""
    @property
    def in_flight(self) -> int:
        """Sends in flight, 0 to 2."""
    @property
    def messages(self) -> int: ...
    @property
    def payload_bytes(self) -> int: ...

@final
class RecvChannel:
    """Receiving end of a channel, with `slots` persistent slots; receives are posted ahead into every free one.

    Args: as for SendChannel; `specs`, `memory` and `staged` are the same at both ends.
    """

    def __init__(
        self,
        progress: Progress,
        peer_rank: int,
        tag: int,
        specs: Sequence[TensorSpec],
        slots: int,
        memory: MemoryKind = "host",
        staged: bool = False,
        chunk: int = ...,
    ) -> None: ...
    def ready(self) -> bool:
        """Return whether receive() would return at once."""
    def receive(self, microbatch: int, stall_limit_s: float) -> tuple[int, list[tuple[int, tuple[int, ...]]] | None]:
        """Wait for the next message, which must be that of `microbatch`.

        Returns its slot, and None if all tensors have their planned shapes and the offsets of `tensor_offsets`;
        otherwise the offset in bytes and the shape of each.
        Raises MessageError, MpiError, StallError.
        """
    def slot(self, index: int) -> View:
        """Return the memory of a slot's tensors."""
    def __len__(self) -> int:
        """Return the number of slots."""
    def release(self, index: int, stream: int = 0) -> None:
        """Free a slot and post the next receive into it; for device memory, after the work queued on `stream`."""
    @property
    def messages(self) -> int: ...
    @property
    def payload_bytes(self) -> int: ...

@final
class AllReduce:
    """Sums buckets of numbers over ranks while they compute; all ranks get the same bits.

    Args:
        comm: mpi4py communicator of the ranks that take part; it is duplicated (collective).
        buckets: (count, dtype) of each bucket; dtype is float32, float64, bfloat16 or float16.
        ordered: sum in rank order, which is the same in every run; otherwise MPI chooses the order.
        label: what is summed, for messages.
    """

    def __init__(
        self, progress: Progress, comm: Any, buckets: Sequence[tuple[int, str]], ordered: bool, label: str
    ) -> None: ...
    def __len__(self) -> int:
        """Return the number of buckets."""
    def bucket(self, index: int) -> View:
        """Return a bucket's memory: this rank's numbers before `start`, the sum after `wait`; padded at the end."""
    def start(self, index: int) -> None:
        """Start to sum; all ranks start the buckets in the same order. RuntimeError if not waited for, MpiError."""
    def done(self, index: int) -> bool:
        """Return whether `wait` would return at once."""
    def wait(self, index: int, stall_limit_s: float) -> None:
        """Wait for the sum. Raises MpiError, StallError."""

@final
class LossBoard:
    """Losses of microbatches, readable from all ranks. Create it on every rank of `progress`, and one at a time.

    A request is answered by the thread that polls `progress` on the owner, while its main thread computes or waits.
    Until somebody asks, a board costs one posted receive.

    Args:
        capacity: number of losses of this rank that are kept; older ones are overwritten.
    """

    def __init__(self, progress: Progress, capacity: int) -> None: ...
    def publish(self, microbatch: int, value: float, weight: float, counted: bool = False) -> None:
        """Store the loss of a microbatch of this rank and answer the requests that wait for it."""
    def ask(self, owner_rank: int, microbatch: int, stall_limit_s: float) -> tuple[float, float, bool]:
        """Return (value, weight, counted) of a loss that `owner_rank` has published or will publish. Waits for it.

        Raises CoreError if the owner no longer keeps it, MpiError, StallError.
        """
