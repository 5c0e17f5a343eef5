"""Channels: boundary tensors travel from one stage to another, in one process or over MPI, by one interface.

::

    stage 0                           stage 1
    send activation ───────────────► recv activation     slots: in-flight + 1
    recv gradient   ◄─────────────── send gradient       slots: 2

An edge between two stages carries one tensor or several, which travel together. Gradients come back only for
tensors that have one. Tensors are in host memory or on a GPU; the Route decides how they reach the network.

A RecvChannel owns a fixed number of slots, allocated once. `receive` returns the tensors in the slot itself; the
stage gives the slot back with `release`, after the microbatch's backward. A SendChannel sends the given tensors
without a copy and keeps them alive until they have been sent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import torch

from pipedream_hpc.core import load_comm
from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.planning.plan import Edge
from pipedream_hpc.runtime.comm.gpu_route import ON_CPU, Route
from pipedream_hpc.runtime.comm.tensor_view import CPU, memory_on, tensor_over
from pipedream_hpc.schedule.actions import Payload

if TYPE_CHECKING:
    from pipedream_hpc._comm import Progress
    from pipedream_hpc._comm import RecvChannel as CoreRecvChannel
    from pipedream_hpc._comm import SendChannel as CoreSendChannel


@dataclass(frozen=True)
class TensorMeta:
    """Shape, dtype and origin of one tensor that crosses a stage boundary.

    Attributes:
        layer: name of the layer that computes it.
        stage: the stage that computes it.
        shape: shape for the largest microbatch; others may be smaller in any dimension.
        dtype: of the activation and of its gradient.
        has_gradient: whether a gradient comes back for it.
    """

    layer: str
    stage: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    has_gradient: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes for the largest microbatch, in one direction."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def dtype_name(self) -> str:
        """Name of the dtype, such as `float32`."""
        return str(self.dtype).removeprefix("torch.")

    def larger(self, other: TensorMeta) -> TensorMeta:
        """Return one that both fit into; the other itself where it has more or fewer dimensions."""
        same_rank = len(self.shape) == len(other.shape)
        return replace(self, shape=tuple(map(max, self.shape, other.shape)) if same_rank else other.shape)

    def check(self, tensor: torch.Tensor, payload: Payload) -> None:
        """Refuse to send a tensor of another dtype or a larger shape than planned.

        Raises:
            PipedreamError: names the layer, the expected and the actual shape and dtype.
        """
        if tensor.shape == self.shape and tensor.dtype == self.dtype:
            return
        fits = tensor.dim() == len(self.shape) and all(a <= b for a, b in zip(tensor.shape, self.shape, strict=True))
        if tensor.dtype != self.dtype or not fits:
            raise PipedreamError(
                f"{payload} of layer '{self.layer}' (stage {self.stage}) has shape {tuple(tensor.shape)} and dtype "
                f"{str(tensor.dtype).removeprefix('torch.')}, but example_inputs led to {self.shape} and "
                f"{self.dtype_name}: give example_inputs that are as large as the largest minibatch (in an evaluation "
                "the first minibatch may be the largest instead)"
            )


#: The tensors that travel along every edge.
EdgeTensors = Mapping[Edge, tuple[TensorMeta, ...]]

#: (stage, rank) of a replica: one end of a channel.
Endpoint = tuple[int, int]

#: (payload, peer stage, peer rank): how a replica of a stage addresses one of its channels.
ChannelKey = tuple[Payload, int, int]


@dataclass(frozen=True)
class ChannelSpec:
    """One channel between two replicas, in one direction.

    Attributes:
        source: the sending replica.
        target: the receiving replica.
        payload: what travels.
        tensors: the tensors of one message; none if nothing travels in this direction.
        tag: MPI tag.
        slots: receive slots.
    """

    source: Endpoint
    target: Endpoint
    payload: Payload
    tensors: tuple[TensorMeta, ...]
    tag: int
    slots: int

    @property
    def send_key(self) -> ChannelKey:
        """Key of the SendChannel among the source's channels."""
        return (self.payload, *self.target)

    @property
    def recv_key(self) -> ChannelKey:
        """Key of the RecvChannel among the target's channels."""
        return (self.payload, *self.source)


class SendChannel(Protocol):
    """The sending end of one channel."""

    def ready(self) -> bool:
        """Return whether `send` would return at once."""
        ...

    def send(self, microbatch: int, tensors: Sequence[torch.Tensor]) -> None:
        """Send the tensors of a microbatch; waits while two earlier messages are still being sent."""
        ...

    def drain(self) -> None:
        """Wait until everything has been sent."""
        ...


class RecvChannel(Protocol):
    """The receiving end of one channel."""

    def ready(self, microbatch: int) -> bool:
        """Return whether `receive` would return at once."""
        ...

    def receive(self, microbatch: int) -> list[torch.Tensor]:
        """Wait for a microbatch's tensors and return them; they live in a slot until `release`."""
        ...

    def release(self, microbatch: int) -> None:
        """Give back the slot of a microbatch."""
        ...


@dataclass
class StageChannels:
    """The channel ends of one replica of one stage."""

    recv: dict[ChannelKey, RecvChannel] = field(default_factory=dict)
    send: dict[ChannelKey, SendChannel] = field(default_factory=dict)


class NullChannel:
    """Both ends of a channel that carries nothing, because none of its tensors has a gradient."""

    def ready(self, microbatch: int = 0) -> bool:
        return True

    def send(self, microbatch: int, tensors: Sequence[torch.Tensor]) -> None:
        return None

    def drain(self) -> None:
        return None

    def receive(self, microbatch: int) -> list[torch.Tensor]:
        return []

    def release(self, microbatch: int) -> None:
        return None


class LocalRecvChannel:
    """The receiving end of a channel within one process.

    Like the MPI channel it copies into a slot, so that a stage that writes into its input does not write into what
    the sending stage has stashed.
    """

    def __init__(self, tensors: Sequence[TensorMeta], slots: int, payload: Payload, device: torch.device = CPU) -> None:
        self._metas, self._payload = tensors, payload
        self._slots = [
            [torch.empty(meta.shape, dtype=meta.dtype, device=device).flatten() for meta in tensors]
            for _ in range(slots)
        ]
        self._free = deque(range(slots))
        self._arrived: deque[tuple[int, int, list[torch.Tensor]]] = deque()
        self._slot_of: dict[int, int] = {}

    def has_free_slot(self) -> bool:
        """Return whether a message can be put without an error."""
        return bool(self._free)

    def put(self, microbatch: int, tensors: Sequence[torch.Tensor]) -> None:
        """Copy the tensors into a free slot. Called by the sending end."""
        slot = self._free.popleft()
        copies = []
        for meta, flat, tensor in zip(self._metas, self._slots[slot], tensors, strict=True):
            meta.check(tensor, self._payload)
            # Detached: autograd would record every copy in the slot's history, which never ends.
            copies.append(flat[: tensor.numel()].view(tensor.shape).copy_(tensor.detach()))
        self._arrived.append((microbatch, slot, copies))

    def ready(self, microbatch: int) -> bool:
        return bool(self._arrived)

    def receive(self, microbatch: int) -> list[torch.Tensor]:
        arrived, slot, tensors = self._arrived.popleft()
        if arrived != microbatch:
            raise PipedreamError(f"expected {self._payload} of microbatch {microbatch} but got microbatch {arrived}")
        self._slot_of[microbatch] = slot
        return tensors

    def release(self, microbatch: int) -> None:
        self._free.append(self._slot_of.pop(microbatch))


class LocalSendChannel:
    """The sending end of a channel within one process."""

    def __init__(self, target: LocalRecvChannel) -> None:
        self._target = target

    def ready(self) -> bool:
        return self._target.has_free_slot()

    def send(self, microbatch: int, tensors: Sequence[torch.Tensor]) -> None:
        self._target.put(microbatch, tensors)

    def drain(self) -> None:
        return None


def _core_specs(metas: Sequence[TensorMeta], payload: Payload) -> list[tuple[str, str, int, tuple[int, ...]]]:
    """Describe the tensors of a message for the core: (label, dtype, bytes of an element, shape)."""
    return [
        (f"{payload} of layer '{meta.layer}' (stage {meta.stage})", meta.dtype_name, meta.dtype.itemsize, meta.shape)
        for meta in metas
    ]


#: Tensors that MPI may read until the process ends.
_unsent: list[list[torch.Tensor]] = []


class MpiSendChannel:
    """Sends to one rank through the core's double-buffered channel.

    Args:
        progress: the process's progress engine.
        peer_rank: the receiving rank.
        tag: MPI tag, the same at the other end.
        tensors: the tensors of one message.
        payload: what they are, for messages.
        stall_limit_s: seconds to wait for the peer.
        route: how tensors reach the network.
    """

    def __init__(
        self,
        progress: Progress,
        peer_rank: int,
        tag: int,
        tensors: Sequence[TensorMeta],
        payload: Payload,
        stall_limit_s: float,
        route: Route = ON_CPU,
    ) -> None:
        # When send number k returns, send number k - 2 is complete: the last two must be kept alive.
        self._sending: deque[list[torch.Tensor]] = deque(maxlen=2)
        self._core: CoreSendChannel = load_comm().SendChannel(
            progress, peer_rank, tag, _core_specs(tensors, payload), memory_on(route.device), route.staged
        )
        self._metas, self._payload, self._stall_limit_s = tensors, payload, stall_limit_s
        self._stream = route.stream

    def ready(self) -> bool:
        return self._core.in_flight < 2

    def send(self, microbatch: int, tensors: Sequence[torch.Tensor]) -> None:
        sending, buffers = [], []
        for meta, tensor in zip(self._metas, tensors, strict=True):
            full_size = tensor.shape == meta.shape
            if not full_size or tensor.dtype != meta.dtype:
                meta.check(tensor, self._payload)
            if tensor.requires_grad:
                tensor = tensor.detach()  # it outlives the microbatch, and its graph must not
            # In memory, a view such as z.conj() has the numbers of z.
            tensor = tensor.contiguous().resolve_conj().resolve_neg()
            sending.append(tensor)
            buffers.append((tensor.data_ptr(), None if full_size else tensor.shape))
        self._core.send(microbatch, buffers, self._stall_limit_s, self._stream())
        self._sending.append(sending)

    def drain(self) -> None:
        self._core.drain(self._stall_limit_s)
        self._sending.clear()

    def __del__(self) -> None:
        # Dropped before the end of a pass, with sends that nobody received: no other tensor may get their memory.
        if self._sending and self._may_be_in_flight():
            _unsent.extend(self._sending)

    def _may_be_in_flight(self) -> bool:
        try:
            return self._core.in_flight > 0
        except RuntimeError:  # the channels are closed, and MPI may still read
            return True


class MpiRecvChannel:
    """Receives from one rank into persistent slots.

    Args:
        progress: the process's progress engine.
        peer_rank: the sending rank.
        tag: MPI tag, the same at the other end.
        tensors: the tensors of one message.
        payload: what they are, for messages.
        slots: number of slots.
        stall_limit_s: seconds to wait for the peer.
        route: how tensors come from the network.
    """

    def __init__(
        self,
        progress: Progress,
        peer_rank: int,
        tag: int,
        tensors: Sequence[TensorMeta],
        payload: Payload,
        slots: int,
        stall_limit_s: float,
        route: Route = ON_CPU,
    ) -> None:
        core, specs = load_comm(), _core_specs(tensors, payload)
        self._core: CoreRecvChannel = core.RecvChannel(
            progress, peer_rank, tag, specs, slots, memory_on(route.device), route.staged
        )
        self._metas, self._stall_limit_s = tensors, stall_limit_s
        self._device, self._stream = route.device, route.stream
        offsets = core.tensor_offsets(specs)
        # Views for the usual case, microbatches of the planned size, are created once.
        self._full_size = [
            [self._view(slot, *each) for each in zip(tensors, offsets, (m.shape for m in tensors), strict=True)]
            for slot in range(slots)
        ]
        self._slot_of: dict[int, int] = {}

    def _view(self, slot: int, meta: TensorMeta, offset: int, shape: Sequence[int]) -> torch.Tensor:
        view = self._core.slot(slot)
        return tensor_over(view, torch.Size(shape), meta.dtype, offset=offset, device=self._device)

    def ready(self, microbatch: int) -> bool:
        return self._core.ready()

    def receive(self, microbatch: int) -> list[torch.Tensor]:
        slot, smaller = self._core.receive(microbatch, self._stall_limit_s)
        self._slot_of[microbatch] = slot
        if smaller is None:
            return self._full_size[slot]
        return [self._view(slot, meta, *each) for meta, each in zip(self._metas, smaller, strict=True)]

    def release(self, microbatch: int) -> None:
        self._core.release(self._slot_of.pop(microbatch), self._stream())
