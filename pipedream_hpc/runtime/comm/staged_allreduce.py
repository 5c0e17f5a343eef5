"""Staged all-reduce: all-reduce of buckets on a GPU through pinned host memory.

The inner all-reduce works on host memory. A bucket of gradients is copied to the host on a stream of its own while
backward goes on, and the sum is copied back the same way. The host waits for an event only when it has nothing else
to do::

    compute stream   │ fc2 │ fc1 ●│ conv2 │ conv1 ●│                        ◦ optimizer step
    copy stream                  └─► copy ●         └─► copy ●    ┌─► copy ●┘
    host                                  └─► start           └─► start ... sum        time ──►
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Protocol

import torch

from pipedream_hpc.runtime.comm.allreduce import AllReduce, Buckets


class CopyEvent(Protocol):
    """The completion of a copy, such as a torch.cuda.Event."""

    def query(self) -> bool: ...
    def synchronize(self) -> None: ...


class DeviceCopies(Protocol):
    """Asynchronous copies between a device and pinned host memory."""

    def device_buffer(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Allocate zeros on the device."""
        ...

    def pinned_buffer(self, like: torch.Tensor) -> torch.Tensor:
        """Allocate zeros in pinned memory."""
        ...

    def to_host(self, source: torch.Tensor, target: torch.Tensor) -> CopyEvent:
        """Copy to pinned memory, after all work that is queued on the compute stream now."""
        ...

    def to_device(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy from pinned memory; later work on the compute stream runs after the copy."""
        ...


class CopyStream:
    """DeviceCopies on a CUDA stream of their own.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def device_buffer(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        buffer = torch.zeros(count, dtype=dtype, device=self._device)
        buffer.record_stream(self._stream)
        return buffer

    def pinned_buffer(self, like: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(like, pin_memory=True)

    def to_host(self, source: torch.Tensor, target: torch.Tensor) -> CopyEvent:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return self._copy(source, target)

    def to_device(self, source: torch.Tensor, target: torch.Tensor) -> None:
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
class _StagedBucket:
    """One bucket in its three places: on the device, in pinned memory and in the inner all-reduce.

    The host writes into pinned memory only after this round's copy to the host, and so after the last round's copy
    to the device, which came before it on the same stream.

    Attributes:
        device: the bucket on the device.
        pinned: its copy in pinned memory; `inner` itself if that is pinned.
        inner: the bucket of the inner all-reduce.
    """

    device: torch.Tensor
    pinned: torch.Tensor
    inner: torch.Tensor

    def pinned_to_inner(self) -> None:
        if self.pinned is not self.inner:
            self.inner.copy_(self.pinned)

    def inner_to_pinned(self) -> None:
        if self.pinned is not self.inner:
            self.pinned.copy_(self.inner)


class StagedAllReduce:
    """All-reduce of buckets on a device, by an all-reduce of buckets on the host.

    Args:
        inner: the all-reduce on the host.
        buckets: element count and dtype of each bucket.
        copies: runs the copies.
        n_host_buckets: the last so many buckets stay on the host and are not staged.
    """

    def __init__(self, inner: AllReduce, buckets: Buckets, copies: DeviceCopies, *, n_host_buckets: int = 0) -> None:
        self._inner, self._copies = inner, copies
        self._staged: dict[int, _StagedBucket] = {}
        for index, (count, dtype) in enumerate(buckets[: len(buckets) - n_host_buckets]):
            bucket = inner.bucket(index)
            # An all-reduce with pinned buckets needs no second ones.
            pinned = bucket if bucket.is_pinned() else copies.pinned_buffer(bucket)
            self._staged[index] = _StagedBucket(copies.device_buffer(count, dtype), pinned, bucket)
        self._copying: deque[tuple[int, CopyEvent | None]] = deque()  # started by the caller, not yet by `inner`

    @property
    def nbytes(self) -> int:
        """Bytes of the buckets on the device."""
        return sum(each.device.nbytes for each in self._staged.values())

    def bucket(self, index: int) -> torch.Tensor:
        staged = self._staged.get(index)
        return self._inner.bucket(index) if staged is None else staged.device

    def start(self, index: int) -> None:
        staged = self._staged.get(index)
        self._copying.append((index, None if staged is None else self._copies.to_host(staged.device, staged.pinned)))
        self._start_copied()

    def done(self, index: int) -> bool:
        self._finish_copy(index)
        return self._inner.done(index)

    def wait(self, index: int) -> None:
        self._finish_copy(index)
        self._inner.wait(index)
        staged = self._staged.get(index)
        if staged is not None:
            staged.inner_to_pinned()
            self._copies.to_device(staged.pinned, staged.device)

    def _finish_copy(self, index: int) -> None:
        """Wait for this rank's own copy, which depends on no other rank, and start all buckets up to it."""
        while any(index == copying for copying, _ in self._copying):
            event = self._copying[0][1]
            if event is not None:
                event.synchronize()
            self._start_copied()

    def _start_copied(self) -> None:
        """Start the buckets whose copies are complete, in the caller's order: it is the same on all ranks."""
        while self._copying and ((event := self._copying[0][1]) is None or event.query()):
            index, _ = self._copying.popleft()
            staged = self._staged.get(index)
            if staged is not None:
                staged.pinned_to_inner()
            self._inner.start(index)
