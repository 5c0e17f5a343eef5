"""Channels and reductions over MPI (C++, csrc/channel.hpp, csrc/reduction.hpp and csrc/progress.hpp)."""

from collections.abc import Sequence
from typing import Any, final

from pipedream_hpc._memory import Memory, View

comm_bytes: int  # sizeof(MPI_Comm) at build time

class CoreError(RuntimeError): ...

class MpiError(CoreError):
    """An MPI call failed: names rank, call, peer and minibatch."""

class MessageError(CoreError):
    """A message is not what was planned: names who sent it, what was expected and what came."""

class StallError(CoreError):
    """Nobody answered within the stall limit: names who waits for what from whom."""

def library_version() -> str:
    """The running MPI library's own words."""

def built_with() -> str:
    """The MPI whose header this was built with."""

def initialized() -> bool:
    """Whether the MPI library this module sees is initialised."""

def allocations() -> int:
    """Buffers this module has allocated; constant after warm-up."""

@final
class Progress:
    """Makes every MPI call of the core: a thread while the main thread computes, the main thread while it waits.

    Args:
        comm: an mpi4py communicator; duplicated (collective).
        crowded: whether the node's ranks want more cores than there are; who waits then soon sleeps.
        device: index of the GPU that this process uses, or -1.
        cores: that the thread runs on; those of the calling thread if there are none.
        spare: whether nobody computes on them; it then looks more often.
    """

    def __init__(
        self, comm: Any, *, crowded: bool = False, device: int = -1, cores: Sequence[int] = (), spare: bool = False
    ) -> None: ...
    def close(self) -> None:
        """Cancel what is posted and free the communicator. Collective; harmless when called twice."""
    def statistics(self) -> dict[str, int]:
        """Polls by the main thread, polls by the progress thread, requests completed."""

#: One tensor of a line as planned: label for messages to people, dtype, bytes of an element, largest shape.
Part = tuple[str, str, int, Sequence[int]]

def places(parts: Sequence[Part]) -> list[int]:
    """Offsets in a slot of tensors as large as planned, in bytes: each begins on a cache line."""

@final
class SendChannel:
    """Sending end of one direction of a link: zero-copy, at most two sends under way.

    Args:
        peer: rank of the receiver in the communicator.
        tag: the same on both ends, and of no other channel between the two ranks in this direction.
        parts: the tensors of one message.
        memory: kind of the tensors' memory.
        staged: of device memory that MPI cannot reach: through two pinned buffers, chunk by chunk.
        chunk: bytes of each of these.
    """

    def __init__(
        self,
        progress: Progress,
        peer: int,
        tag: int,
        parts: Sequence[Part],
        memory: Memory = "host",
        staged: bool = False,
        chunk: int = ...,
    ) -> None: ...
    def send(
        self, minibatch: int, tensors: Sequence[tuple[int, Sequence[int] | None]], stall_limit_s: float, stream: int = 0
    ) -> None:
        """Send tensors, each an address and a shape, as one message. Waits while two sends are under way.

        None is for the shape as planned.

        When send number k returns, send number k - 2 is complete: keep the last two alive. Device memory is
        read when everything put on `stream` so far is done; this call waits for none of it.
        Raises MessageError (larger than planned), MpiError, StallError.
        """
    def drain(self, stall_limit_s: float) -> None:
        """Wait until everything sent is complete."""
    @property
    def in_flight(self) -> int:
        """Sends under way, 0 to 2."""
    @property
    def messages(self) -> int: ...
    @property
    def payload_bytes(self) -> int: ...

@final
class ReceiveChannel:
    """Receiving end, with `slots` persistent slots; receives are posted ahead into every free one.

    Args: like SendChannel's; `parts`, `memory` and `staged` are the same at both ends.
    """

    def __init__(
        self,
        progress: Progress,
        peer: int,
        tag: int,
        parts: Sequence[Part],
        slots: int,
        memory: Memory = "host",
        staged: bool = False,
        chunk: int = ...,
    ) -> None: ...
    def ready(self) -> bool:
        """Whether receive() would return at once."""
    def receive(self, minibatch: int, stall_limit_s: float) -> tuple[int, list[tuple[int, tuple[int, ...]]] | None]:
        """Wait for the next message, which must be that of `minibatch`.

        Returns its slot, and None if every tensor is as large as planned and stands where `places` says;
        otherwise the offset in bytes and the shape of each.
        Raises MessageError, MpiError, StallError.
        """
    def slot(self, index: int) -> View:
        """Memory of a slot's tensors."""
    def __len__(self) -> int:
        """Number of slots."""
    def release(self, index: int, stream: int = 0) -> None:
        """Give a slot back: the next receive into it is posted, on a device once `stream` has come so far."""
    @property
    def messages(self) -> int: ...
    @property
    def payload_bytes(self) -> int: ...

@final
class Reduction:
    """Sums buckets of numbers over ranks while they compute; the same bits on all of them.

    Args:
        comm: an mpi4py communicator of those that take part, in the order of the sum; duplicated (collective).
        buckets: (count, dtype) of each; dtype is float32, float64, bfloat16 or float16.
        ordered: sum in the order of the ranks, the same at every run; otherwise MPI chooses the order.
        label: what is summed, for messages to people.
    """

    def __init__(
        self, progress: Progress, comm: Any, buckets: Sequence[tuple[int, str]], ordered: bool, label: str
    ) -> None: ...
    def __len__(self) -> int:
        """Buckets."""
    def bucket(self, index: int) -> View:
        """What this rank puts in before `start`, and the sum after `wait`; room at the end makes it even."""
    def start(self, index: int) -> None:
        """Start to sum; all ranks start buckets in the same order. RuntimeError if not waited for, MpiError."""
    def done(self, index: int) -> bool:
        """Whether `wait` would return at once."""
    def wait(self, index: int, stall_limit_s: float) -> None:
        """Wait for the sum. Raises MpiError, StallError."""
