"""Staging: sums over ranks of numbers that are on a GPU, by way of pinned host memory.

The reduction itself knows the host's memory alone. A bucket of gradients is copied there on a stream of its
own while backward goes on, and the sum comes back the same way. The host waits for events, and then only
where it has nothing else to do::

    compute stream   │ fc2 │ fc1 ●│ conv2 │ conv1 ●│                        ◦ update
    copy stream                  └─► copy ●         └─► copy ●    ┌─► copy ●┘
    host                                  └─► start           └─► start ... sum        time ──►
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Protocol

import torch

from pipedream_hpc.runtime.reduction import Buckets, Reduction


class Moment(Protocol):
    """A moment on a stream, such as torch.cuda.Event."""

    def query(self) -> bool: ...
    def synchronize(self) -> None: ...


class Lane(Protocol):
    """Where copies between a device and pinned memory run."""

    def buffer(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Zeros on the device."""
        ...

    def pinned(self, like: torch.Tensor) -> torch.Tensor:
        """Zeros in pinned memory."""
        ...

    def out(self, source: torch.Tensor, target: torch.Tensor) -> Moment:
        """Copy to pinned memory, after all that the compute stream has been told so far."""
        ...

    def back(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy from pinned memory; the compute stream goes on after it."""
        ...


class CopyStream:
    """A stream of a GPU, beside the one that computes.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def buffer(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        made = torch.zeros(count, dtype=dtype, device=self._device)
        made.record_stream(self._stream)
        return made

    def pinned(self, like: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(like, pin_memory=True)

    def out(self, source: torch.Tensor, target: torch.Tensor) -> Moment:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return self._copy(source, target)

    def back(self, source: torch.Tensor, target: torch.Tensor) -> None:
        # Whatever read the target before is done when the copy begins.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        self._copy(source, target)
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def _copy(self, source: torch.Tensor, target: torch.Tensor) -> torch.cuda.Event:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event


@dataclass
class _Staged:
    """One bucket, everywhere it stands: on the device, in pinned memory, and where the reduction has it.

    The host writes into pinned memory when the round's copy out has come, and so after the last round's copy
    back, which was on the same stream before it.
    """

    near: torch.Tensor
    pinned: torch.Tensor
    far: torch.Tensor

    def put_in(self) -> None:
        if self.pinned is not self.far:
            self.far.copy_(self.pinned)

    def take_out(self) -> None:
        if self.pinned is not self.far:
            self.pinned.copy_(self.far)


class StagedReduction:
    """A Reduction of buckets on a device, around one of buckets on the host.

    Args:
        reduction: which sums.
        buckets: count and dtype of each.
        lane: where copies run.
        on_host: the last so many buckets are the host's own and are not staged.
    """

    def __init__(self, reduction: Reduction, buckets: Buckets, lane: Lane, *, on_host: int = 0) -> None:
        self._reduction, self._lane = reduction, lane
        self._staged: dict[int, _Staged] = {}
        for index, (count, dtype) in enumerate(buckets[: len(buckets) - on_host]):
            far = reduction.bucket(index)
            # A reduction whose buckets are pinned needs no second ones.
            pinned = far if far.is_pinned() else lane.pinned(far)
            self._staged[index] = _Staged(lane.buffer(count, dtype), pinned, far)
        self._leaving: deque[tuple[int, Moment | None]] = deque()  # handed in, not yet started

    @property
    def nbytes(self) -> int:
        """Bytes of the buckets on the device."""
        return sum(each.near.nbytes for each in self._staged.values())

    def bucket(self, index: int) -> torch.Tensor:
        staged = self._staged.get(index)
        return self._reduction.bucket(index) if staged is None else staged.near

    def start(self, index: int) -> None:
        staged = self._staged.get(index)
        self._leaving.append((index, None if staged is None else self._lane.out(staged.near, staged.pinned)))
        self._start_arrived()

    def done(self, index: int) -> bool:
        self._arrive(index)
        return self._reduction.done(index)

    def wait(self, index: int) -> None:
        self._arrive(index)
        self._reduction.wait(index)
        staged = self._staged.get(index)
        if staged is not None:
            staged.take_out()
            self._lane.back(staged.pinned, staged.near)

    def _arrive(self, index: int) -> None:
        """Wait for the own copy, which no other rank holds up, and start what has come with it."""
        while any(index == leaving for leaving, _ in self._leaving):
            moment = self._leaving[0][1]
            if moment is not None:
                moment.synchronize()
            self._start_arrived()

    def _start_arrived(self) -> None:
        """Start what has come to the host, in the order handed in: all ranks start in the same."""
        while self._leaving and ((moment := self._leaving[0][1]) is None or moment.query()):
            index, _ = self._leaving.popleft()
            staged = self._staged.get(index)
            if staged is not None:
                staged.put_in()
            self._reduction.start(index)
