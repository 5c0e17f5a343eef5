"""Transport: how boundary tensors get from one stage to another. Two kinds, one interface.

::

    stage 0                          stage 1
    outbox activation ────────────► inbox activation     slots: in-flight + 1
    inbox  gradient   ◄──────────── outbox gradient      slots: 2

A link between two stages carries one tensor or several; each has a channel of its own, and an inbox
or outbox is all of a link's channels in one direction. Gradients come back only for tensors that
have one.

An inbox owns a fixed number of slots, allocated once. `receive` returns the tensors in the slot
itself; the slot is given back with `release`, after the unit's backward. An outbox sends the given
tensors themselves and keeps them alive until they have gone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from pipedream_hpc.core import load_core
from pipedream_hpc.errors import PipedreamError

if TYPE_CHECKING:
    from pipedream_hpc._core import Progress, ReceiveChannel, SendChannel


@dataclass(frozen=True)
class Boundary:
    """One tensor that crosses a cut.

    Attributes:
        layer: name of the layer that puts it out.
        stage: the stage it leaves.
        shape: of the largest unit; others may be smaller in any dimension.
        dtype: of activation and gradient.
        gradient: whether a gradient comes back.
    """

    layer: str
    stage: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    gradient: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes of the largest unit, one way."""
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
        fits = tensor.dim() == len(self.shape) and all(a <= b for a, b in zip(tensor.shape, self.shape, strict=True))
        if tensor.dtype != self.dtype or not fits:
            raise PipedreamError(
                f"{what} of layer '{self.layer}' (stage {self.stage}) has shape {tuple(tensor.shape)} and dtype "
                f"{str(tensor.dtype).removeprefix('torch.')}, but the example led to {self.shape} and "
                f"{self.dtype_name}: give Pipeline an example as large as the largest minibatch"
            )


class _Out(Protocol):
    def ready(self) -> bool: ...
    def send(self, unit: int, tensor: torch.Tensor) -> None: ...
    def drain(self) -> None: ...


class _In(Protocol):
    def ready(self, unit: int) -> bool: ...
    def receive(self, unit: int) -> torch.Tensor: ...
    def release(self, unit: int) -> None: ...


class Outbox:
    """The sending end of one link, one direction."""

    def __init__(self, channels: Sequence[_Out]) -> None:
        self._channels = channels

    def ready(self) -> bool:
        """Whether `send` would return at once."""
        return all(channel.ready() for channel in self._channels)

    def send(self, unit: int, tensors: Sequence[torch.Tensor]) -> None:
        """Send `tensors`; waits while two units are under way."""
        for channel, tensor in zip(self._channels, tensors, strict=True):
            channel.send(unit, tensor)

    def drain(self) -> None:
        """Wait until everything sent has gone."""
        for channel in self._channels:
            channel.drain()


class Inbox:
    """The receiving end of one link, one direction."""

    def __init__(self, channels: Sequence[_In]) -> None:
        self._channels = channels

    def ready(self, unit: int) -> bool:
        """Whether `receive` would return at once."""
        return all(channel.ready(unit) for channel in self._channels)

    def receive(self, unit: int) -> list[torch.Tensor]:
        """Wait for this unit's tensors; they live in a slot until `release`."""
        return [channel.receive(unit) for channel in self._channels]

    def release(self, unit: int) -> None:
        """Give the slot of this unit back."""
        for channel in self._channels:
            channel.release(unit)


class _Slots:
    """Slots of a channel as flat tensors over given memory; which unit stands in which."""

    def __init__(self, flat: list[torch.Tensor]) -> None:
        self._flat = flat
        self._holder: dict[int, int] = {}

    def hold(self, unit: int, slot: int, shape: Sequence[int]) -> torch.Tensor:
        self._holder[unit] = slot
        size = torch.Size(shape)
        return self._flat[slot][: size.numel()].view(size)

    def free(self, unit: int) -> int:
        return self._holder.pop(unit)


class LocalChannel:
    """Both ends of a channel within one process: the emulator's transport.

    Like the MPI channel it copies into a slot, so that a stage which writes into its input does
    not write into what the sending stage has stashed.
    """

    def __init__(self, boundary: Boundary, slots: int, what: str) -> None:
        self._boundary, self._what = boundary, what
        count = torch.Size(boundary.shape).numel()
        self._flat = [torch.empty(count, dtype=boundary.dtype) for _ in range(slots)]
        self._slots = _Slots(self._flat)
        self._free = deque(range(slots))
        self._arrived: deque[tuple[int, int, torch.Size]] = deque()

    def sendable(self) -> bool:
        return bool(self._free)

    def put(self, unit: int, tensor: torch.Tensor) -> None:
        self._boundary.check(tensor, self._what)
        slot = self._free.popleft()
        # Detached: autograd would note every copy down in the slot's history, which never ends.
        self._flat[slot][: tensor.numel()].view(tensor.shape).copy_(tensor.detach())
        self._arrived.append((unit, slot, tensor.shape))

    def ready(self, unit: int) -> bool:
        return bool(self._arrived)

    def receive(self, unit: int) -> torch.Tensor:
        arrived, slot, shape = self._arrived.popleft()
        if arrived != unit:
            raise PipedreamError(f"minibatch {unit} was to be received, but {arrived} came: {self._what}")
        return self._slots.hold(unit, slot, shape)

    def release(self, unit: int) -> None:
        self._free.append(self._slots.free(unit))


class LocalSender:
    """Sending end of a LocalChannel, which itself is the receiving end."""

    def __init__(self, channel: LocalChannel) -> None:
        self._channel = channel

    def ready(self) -> bool:
        return self._channel.sendable()

    def send(self, unit: int, tensor: torch.Tensor) -> None:
        self._channel.put(unit, tensor)

    def drain(self) -> None:
        return None


class MpiSender:
    """Sends one tensor of a link to one rank through the core's double-buffered channel."""

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

    def send(self, unit: int, tensor: torch.Tensor) -> None:
        self._boundary.check(tensor, self._what)
        tensor = tensor.detach().contiguous()
        self._channel.send(
            unit,
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


class MpiReceiver:
    """Receives one tensor of a link from one rank into persistent slots."""

    def __init__(
        self, progress: Progress, peer: int, tag: int, boundary: Boundary, what: str, slots: int, stall_limit_s: float
    ) -> None:
        label = f"{what} of layer '{boundary.layer}' (stage {boundary.stage})"
        self._channel: ReceiveChannel = load_core().ReceiveChannel(
            progress, peer, tag, boundary.nbytes, slots, boundary.dtype_name, boundary.shape, label=label
        )
        self._slots = _Slots([self._flat(index, boundary) for index in range(slots)])
        self._stall_limit_s = stall_limit_s

    def _flat(self, index: int, boundary: Boundary) -> torch.Tensor:
        count = torch.Size(boundary.shape).numel()
        if not count:
            return torch.empty(0, dtype=boundary.dtype)
        return torch.frombuffer(self._channel.slot(index), dtype=boundary.dtype, count=count)

    def ready(self, unit: int) -> bool:
        return self._channel.ready()

    def receive(self, unit: int) -> torch.Tensor:
        slot, shape = self._channel.receive(unit, self._stall_limit_s)
        return self._slots.hold(unit, slot, shape)

    def release(self, unit: int) -> None:
        self._channel.release(self._slots.free(unit))
