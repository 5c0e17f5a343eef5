"""Clock: when work was done, on the device that does it.

A CPU has done what a call asked for when the call returns. A GPU has only been told: the moment that counts
is when its stream comes by, and an event put on the stream notes it down. Nobody waits for that; the times
are read when all is over::

    host     forward ─ mark ─ backward ─ mark                              read
    stream            ├── forward ──┤ ● ├──── backward ────┤ ●              seconds from ● to ●
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

#: A moment, as the clock that made it keeps it.
Mark = Any


class Clock(Protocol):
    """Notes down moments, and reads them later."""

    def mark(self) -> Mark:
        """This moment, in the order of the work: what was asked for so far is done."""
        ...

    def read(self, marks: Sequence[Mark]) -> list[float]:
        """Seconds of every one of `marks`, which are in the order they were made, since whenever."""
        ...


class HostClock:
    """The clock of a CPU: time.perf_counter, or another."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.mark = now

    def read(self, marks: Sequence[Mark]) -> list[float]:
        return list(marks)


class StreamClock:
    """The clock of a GPU, by events on the current stream; its time is that of time.perf_counter.

    Args:
        device: the GPU.

    Events tell what is between two of them in milliseconds of single precision, so long times are added up
    from short ones.
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
        apart = (before.elapsed_time(after) * 1e-3 for before, after in itertools.pairwise([self._zero, *marks]))
        return [self._zero_s + since for since in itertools.accumulate(apart)]


def clock_of(device: torch.device) -> Clock:
    """The clock of a device."""
    return StreamClock(device) if device.type == "cuda" else HostClock()
