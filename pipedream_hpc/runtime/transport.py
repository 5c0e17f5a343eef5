"""Transport: how a boundary tensor gets from one stage to the next. Two kinds, one interface.

::

    stage 0                          stage 1
    outbox activation ────────────► inbox activation     slots: in-flight + 1
    inbox  gradient   ◄──────────── outbox gradient      slots: 2

An inbox owns a fixed number of slots, allocated once. `receive` returns the tensor in the slot
itself; the slot is given back with `release`, after the minibatch's backward. An outbox sends the
given tensor itself and keeps it alive until it has gone.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from pipedream_hpc.core import load_core
from pipedream_hpc.errors import PipedreamError

if TYPE_CHECKING:
    from pipedream_hpc._core import Progress, ReceiveChannel, SendChannel


@dataclass(frozen=True)
class Boundary:
    """What crosses the cut behind a stage, in both directions.

    Attributes:
        layer: name of the layer that puts it out.
        stage: the stage it leaves.
        shape: of the largest minibatch; a minibatch may be smaller in the first dimension only.
        dtype: of activation and gradient.
    """

    layer: str
    stage: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the largest minibatch, one way."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def dtype_name(self) -> str:
        """Such as `float32`."""
        return str(self.dtype).removeprefix("torch.")

    def check(self, tensor: torch.Tensor, what: str) -> None:
        """Refuse a tensor that is not what was planned, before it leaves.

        Raises:
            PipedreamError: names the layer, what was expected and what came.
        """
        fits = tensor.dim() == len(self.shape) and tensor.shape[1:] == self.shape[1:]
        if tensor.dtype != self.dtype or not fits or tensor.shape[0] > self.shape[0]:
            raise PipedreamError(
                f"{what} of layer '{self.layer}' (stage {self.stage}) has shape {tuple(tensor.shape)} and dtype "
                f"{str(tensor.dtype).removeprefix('torch.')}, but the example led to {self.shape} and "
                f"{self.dtype_name}: give Pipeline an example as large as the largest minibatch"
            )


class Outbox(Protocol):
    """The sending end of one boundary, one direction."""

    def ready(self) -> bool:
        """Whether `send` would return at once."""
        ...

    def send(self, minibatch: int, tensor: torch.Tensor) -> None:
        """Send `tensor`; waits while two sends are under way."""
        ...

    def drain(self) -> None:
        """Wait until everything sent has gone."""
        ...


class Inbox(Protocol):
    """The receiving end of one boundary, one direction."""

    def ready(self, minibatch: int) -> bool:
        """Whether `receive` would return at once."""
        ...

    def receive(self, minibatch: int) -> torch.Tensor:
        """Wait for this minibatch's tensor; it lives in a slot until `release`."""
        ...

    def release(self, minibatch: int) -> None:
        """Give the slot of this minibatch back."""
        ...


class _Slots:
    """Slots of an inbox as tensors over given memory; which minibatch stands in which."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self._tensors = tensors
        self._holder: dict[int, int] = {}

    def hold(self, minibatch: int, slot: int, samples: int) -> torch.Tensor:
        self._holder[minibatch] = slot
        return self._tensors[slot][:samples]

    def free(self, minibatch: int) -> int:
        return self._holder.pop(minibatch)


class LocalChannel:
    """Both ends of a boundary within one process: the emulator's transport.

    Like the MPI channel it copies into a slot, so that a stage which writes into its input does
    not write into what the sending stage has stashed.
    """

    def __init__(self, boundary: Boundary, slots: int, what: str) -> None:
        self._boundary, self._what = boundary, what
        tensors = [torch.empty(boundary.shape, dtype=boundary.dtype) for _ in range(slots)]
        self._tensors = tensors
        self._slots = _Slots(tensors)
        self._free = deque(range(slots))
        self._arrived: deque[tuple[int, int, int]] = deque()

    def sendable(self) -> bool:
        return bool(self._free)

    def put(self, minibatch: int, tensor: torch.Tensor) -> None:
        self._boundary.check(tensor, self._what)
        slot = self._free.popleft()
        self._tensors[slot][: tensor.shape[0]].copy_(tensor)
        self._arrived.append((minibatch, slot, tensor.shape[0]))

    def ready(self, minibatch: int) -> bool:
        return bool(self._arrived)

    def receive(self, minibatch: int) -> torch.Tensor:
        arrived, slot, samples = self._arrived.popleft()
        if arrived != minibatch:
            raise PipedreamError(f"minibatch {minibatch} was to be received, but {arrived} came: {self._what}")
        return self._slots.hold(minibatch, slot, samples)

    def release(self, minibatch: int) -> None:
        self._free.append(self._slots.free(minibatch))


class LocalOutbox:
    """Sending end of a LocalChannel, which itself is the receiving end."""

    def __init__(self, channel: LocalChannel) -> None:
        self._channel = channel

    def ready(self) -> bool:
        return self._channel.sendable()

    def send(self, minibatch: int, tensor: torch.Tensor) -> None:
        self._channel.put(minibatch, tensor)

    def drain(self) -> None:
        return None


class MpiOutbox:
    """Sends tensors of one boundary to one rank through the core's double-buffered channel."""

    def __init__(
        self, progress: Progress, peer: int, tag: int, boundary: Boundary, what: str, stall_limit_s: float
    ) -> None:
        label = f"{what} of layer '{boundary.layer}' (stage {boundary.stage})"
        self._channel: SendChannel = load_core().SendChannel(progress, peer, tag, boundary.nbytes, label)
        self._boundary, self._what, self._stall_limit_s = boundary, what, stall_limit_s
        # When send number k returns, send number k - 2 has gone: the last two must be kept alive.
        self._under_way: deque[torch.Tensor] = deque(maxlen=2)

    def ready(self) -> bool:
        return self._channel.in_flight < 2

    def send(self, minibatch: int, tensor: torch.Tensor) -> None:
        self._boundary.check(tensor, self._what)
        tensor = tensor.detach().contiguous()
        self._channel.send(
            minibatch,
            tensor.data_ptr(),
            tensor.nbytes,
            self._boundary.dtype_name,
            tuple(tensor.shape),
            self._stall_limit_s,
        )
        self._under_way.append(tensor)

    def drain(self) -> None:
        self._channel.drain(self._stall_limit_s)
        self._under_way.clear()


class MpiInbox:
    """Receives tensors of one boundary from one rank into persistent slots."""

    def __init__(
        self, progress: Progress, peer: int, tag: int, boundary: Boundary, what: str, slots: int, stall_limit_s: float
    ) -> None:
        label = f"{what} of layer '{boundary.layer}' (stage {boundary.stage})"
        self._channel: ReceiveChannel = load_core().ReceiveChannel(
            progress, peer, tag, boundary.nbytes, slots, boundary.dtype_name, boundary.shape, label=label
        )
        count = torch.Size(boundary.shape).numel()
        self._slots = _Slots(
            [
                torch.frombuffer(self._channel.slot(index), dtype=boundary.dtype, count=count).view(boundary.shape)
                for index in range(slots)
            ]
        )
        self._stall_limit_s = stall_limit_s

    def ready(self, minibatch: int) -> bool:
        return self._channel.ready()

    def receive(self, minibatch: int) -> torch.Tensor:
        slot, shape = self._channel.receive(minibatch, self._stall_limit_s)
        return self._slots.hold(minibatch, slot, shape[0])

    def release(self, minibatch: int) -> None:
        self._channel.release(self._slots.free(minibatch))
