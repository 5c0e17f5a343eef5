"""Clock: time stamps of work on the device that does it.

On a CPU, the work of a call is done when the call returns. On a GPU it is only enqueued: the time that counts is when
the stream reaches it, and an event recorded on the stream measures that. The host does not wait for the event; times
are read once, after the work::

    host     forward ─ mark ─ backward ─ mark                              read
    stream            ├── forward ──┤ ● ├──── backward ────┤ ●              seconds from ● to ●
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

#: A time stamp; its type is private to the clock that made it.
Mark = Any


class Clock(Protocol):
    """Records time stamps, and reads them later."""

    def mark(self) -> Mark:
        """Return a time stamp that follows all work enqueued so far."""
        ...

    def read(self, marks: Sequence[Mark]) -> list[float]:
        """Return the times of `marks` in seconds from an arbitrary origin; `marks` are in the order of recording."""
        ...


class HostClock:
    """Clock of a CPU.

    Args:
        now: returns seconds.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.mark = now

    def read(self, marks: Sequence[Mark]) -> list[float]:
        return list(marks)


class StreamClock:
    """Clock of a GPU, which records events on the current stream; its times are comparable to time.perf_counter.

    CUDA reports the time between two events as milliseconds in single precision, so long times are summed up from
    the short ones between neighbours.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        stream = torch.cuda.current_stream(device)
        self._zero = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        stream.synchronize()
        self._zero_s = time.perf_counter()
        self._zero.record(stream)

    def mark(self) -> Mark:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def read(self, marks: Sequence[Mark]) -> list[float]:
        if not marks:
            return []
        marks[-1].synchronize()
        gaps = (before.elapsed_time(after) * 1e-3 for before, after in itertools.pairwise([self._zero, *marks]))
        return [self._zero_s + since for since in itertools.accumulate(gaps)]


def clock_of(device: torch.device) -> Clock:
    """Return the clock of a device."""
    return StreamClock(device) if device.type == "cuda" else HostClock()
