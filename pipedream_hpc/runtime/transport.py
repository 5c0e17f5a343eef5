"""Transport: how boundary tensors get from one stage to another. Two kinds, one interface.

::

    stage 0                          stage 1
    outbox activation ────────────► inbox activation     slots: in-flight + 1
    inbox  gradient   ◄──────────── outbox gradient      slots: 2

A link between two stages carries one tensor or several, which travel as one message. Gradients come back
only for tensors that have one.

Tensors are in host memory or on a GPU, and go as the Route says.

An inbox owns a fixed number of slots, allocated once. `receive` returns the tensors in the slot
itself; the slot is given back with `release`, after the unit's backward. An outbox sends the given
tensors themselves and keeps them alive until they have gone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from pipedream_hpc.core import load_core
from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.runtime.route import ON_CPU, Route
from pipedream_hpc.runtime.view import CPU, memory_on, tensor_over

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
        if tensor.shape == self.shape and tensor.dtype == self.dtype:
            return
        fits = tensor.dim() == len(self.shape) and all(a <= b for a, b in zip(tensor.shape, self.shape, strict=True))
        if tensor.dtype != self.dtype or not fits:
            raise PipedreamError(
                f"{what} of layer '{self.layer}' (stage {self.stage}) has shape {tuple(tensor.shape)} and dtype "
                f"{str(tensor.dtype).removeprefix('torch.')}, but the example led to {self.shape} and "
                f"{self.dtype_name}: give Pipeline an example as large as the largest minibatch"
            )


#: (stage it leaves, stage it enters) -> what goes over.
Lines = Mapping[tuple[int, int], tuple[Boundary, ...]]


class Outbox(Protocol):
    """The sending end of one link, one direction."""

    def ready(self) -> bool:
        """Whether `send` would return at once."""
        ...

    def send(self, unit: int, tensors: Sequence[torch.Tensor]) -> None:
        """Send `tensors`, one for each boundary; waits while two units are under way."""
        ...

    def drain(self) -> None:
        """Wait until everything sent has gone."""
        ...


class Inbox(Protocol):
    """The receiving end of one link, one direction."""

    def ready(self, unit: int) -> bool:
        """Whether `receive` would return at once."""
        ...

    def receive(self, unit: int) -> list[torch.Tensor]:
        """Wait for this unit's tensors; they live in a slot until `release`."""
        ...

    def release(self, unit: int) -> None:
        """Give the slot of this unit back."""
        ...


class NoBox:
    """Both ends of a link that carries nothing in this direction: no tensor of it has a gradient."""

    def ready(self, unit: int = 0) -> bool:
        return True

    def send(self, unit: int, tensors: Sequence[torch.Tensor]) -> None:
        return None

    def drain(self) -> None:
        return None

    def receive(self, unit: int) -> list[torch.Tensor]:
        return []

    def release(self, unit: int) -> None:
        return None


class LocalInbox:
    """The receiving end of a link within one process: the emulator's transport.

    Like the MPI channel it copies into a slot, so that a stage which writes into its input does
    not write into what the sending stage has stashed.
    """

    def __init__(self, boundaries: Sequence[Boundary], slots: int, what: str, device: torch.device = CPU) -> None:
        self._boundaries, self._what = boundaries, what
        self._slots = [
            [torch.empty(each.shape, dtype=each.dtype, device=device).flatten() for each in boundaries]
            for _ in range(slots)
        ]
        self._free = deque(range(slots))
        self._arrived: deque[tuple[int, int, list[torch.Tensor]]] = deque()
        self._holder: dict[int, int] = {}

    def sendable(self) -> bool:
        """Whether there is a free slot."""
        return bool(self._free)

    def put(self, unit: int, tensors: Sequence[torch.Tensor]) -> None:
        """What the sending end does: copy the tensors into a free slot."""
        slot = self._free.popleft()
        landed = []
        for boundary, flat, tensor in zip(self._boundaries, self._slots[slot], tensors, strict=True):
            boundary.check(tensor, self._what)
            # Detached: autograd would note every copy down in the slot's history, which never ends.
            landed.append(flat[: tensor.numel()].view(tensor.shape).copy_(tensor.detach()))
        self._arrived.append((unit, slot, landed))

    def ready(self, unit: int) -> bool:
        return bool(self._arrived)

    def receive(self, unit: int) -> list[torch.Tensor]:
        arrived, slot, tensors = self._arrived.popleft()
        if arrived != unit:
            raise PipedreamError(f"minibatch {unit} was to be received, but {arrived} came: {self._what}")
        self._holder[unit] = slot
        return tensors

    def release(self, unit: int) -> None:
        self._free.append(self._holder.pop(unit))


class LocalOutbox:
    """The sending end of a link within one process."""

    def __init__(self, inbox: LocalInbox) -> None:
        self._inbox = inbox

    def ready(self) -> bool:
        return self._inbox.sendable()

    def send(self, unit: int, tensors: Sequence[torch.Tensor]) -> None:
        self._inbox.put(unit, tensors)

    def drain(self) -> None:
        return None


def _parts(boundaries: Sequence[Boundary], what: str) -> list[tuple[str, str, int, tuple[int, ...]]]:
    return [
        (f"{what} of layer '{each.layer}' (stage {each.stage})", each.dtype_name, each.dtype.itemsize, each.shape)
        for each in boundaries
    ]


#: Tensors that MPI may read for as long as it runs.
_left_behind: list[list[torch.Tensor]] = []


class MpiOutbox:
    """Sends to one rank through the core's double-buffered channel."""

    def __init__(
        self,
        progress: Progress,
        peer: int,
        tag: int,
        boundaries: Sequence[Boundary],
        what: str,
        stall_limit_s: float,
        route: Route = ON_CPU,
    ) -> None:
        # When send number k returns, send number k - 2 has gone: the last two must be kept alive.
        self._under_way: deque[list[torch.Tensor]] = deque(maxlen=2)
        self._channel: SendChannel = load_core().SendChannel(
            progress, peer, tag, _parts(boundaries, what), memory_on(route.device), route.staged
        )
        self._boundaries, self._what, self._stall_limit_s = boundaries, what, stall_limit_s
        self._stream = route.stream

    def ready(self) -> bool:
        return self._channel.in_flight < 2

    def send(self, unit: int, tensors: Sequence[torch.Tensor]) -> None:
        leaving, places = [], []
        for boundary, tensor in zip(self._boundaries, tensors, strict=True):
            whole = tensor.shape == boundary.shape
            if not whole or tensor.dtype != boundary.dtype:
                boundary.check(tensor, self._what)
            if tensor.requires_grad:
                tensor = tensor.detach()  # it outlives the unit, and its graph must not
            tensor = tensor.contiguous()
            leaving.append(tensor)
            places.append((tensor.data_ptr(), None if whole else tensor.shape))
        self._channel.send(unit, places, self._stall_limit_s, self._stream())
        self._under_way.append(leaving)

    def drain(self) -> None:
        self._channel.drain(self._stall_limit_s)
        self._under_way.clear()

    def __del__(self) -> None:
        # Dropped after an error, with sends that nobody took: no other tensor may get their memory.
        if self._under_way and self._channel.in_flight:
            _left_behind.extend(self._under_way)


class MpiInbox:
    """Receives from one rank into persistent slots."""

    def __init__(
        self,
        progress: Progress,
        peer: int,
        tag: int,
        boundaries: Sequence[Boundary],
        what: str,
        slots: int,
        stall_limit_s: float,
        route: Route = ON_CPU,
    ) -> None:
        core, parts = load_core(), _parts(boundaries, what)
        self._channel: ReceiveChannel = core.ReceiveChannel(
            progress, peer, tag, parts, slots, memory_on(route.device), route.staged
        )
        self._boundaries, self._stall_limit_s = boundaries, stall_limit_s
        self._device, self._stream = route.device, route.stream
        offsets = core.places(parts)
        # The usual case, units as large as planned: their views are made once.
        self._whole = [
            [self._view(slot, *each) for each in zip(boundaries, offsets, (b.shape for b in boundaries), strict=True)]
            for slot in range(slots)
        ]
        self._holder: dict[int, int] = {}

    def _view(self, slot: int, boundary: Boundary, offset: int, shape: Sequence[int]) -> torch.Tensor:
        view = self._channel.slot(slot)
        return tensor_over(view, torch.Size(shape), boundary.dtype, offset=offset, device=self._device)

    def ready(self, unit: int) -> bool:
        return self._channel.ready()

    def receive(self, unit: int) -> list[torch.Tensor]:
        slot, smaller = self._channel.receive(unit, self._stall_limit_s)
        self._holder[unit] = slot
        if smaller is None:
            return self._whole[slot]
        return [self._view(slot, boundary, *each) for boundary, each in zip(self._boundaries, smaller, strict=True)]

    def release(self, unit: int) -> None:
        self._channel.release(self._holder.pop(unit), self._stream())
