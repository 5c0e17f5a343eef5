"""Garbage: Python's collector, kept from stalling the worker loop.

A full collection looks at every object of the process, and torch brings a few hundred thousand: some 100 ms,
at a moment nobody chose, while other ranks wait for this one. What is freed in the loop is freed by counting
references; cycles are only in what users' code leaves behind. So the collector is off during a pass, what was
there before is not looked at, and now and then, after an update, what came since is collected: a millisecond.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager

#: Seconds between two collections.
EVERY_S = 2.0


class Collector:
    """Collects between actions what became garbage since last time, at most every `EVERY_S` seconds."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def between_updates(self) -> None:
        """Called where a pause disturbs least: after an update."""
        now = time.monotonic()
        if now - self._last > EVERY_S:
            self._last = now
            gc.collect()  # frozen objects are none of its business


@contextmanager
def no_stalls() -> Iterator[Collector]:
    """No collection that nobody asked for; afterwards everything is as it was."""
    was_on, frozen = gc.isenabled(), gc.get_freeze_count() > 0
    gc.disable()
    # What somebody else has frozen could not be told apart afterwards: then nothing more is.
    if not frozen:
        gc.freeze()
    try:
        yield Collector()
    finally:
        if not frozen:
            gc.unfreeze()
        if was_on:
            gc.enable()
