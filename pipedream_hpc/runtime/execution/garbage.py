"""Garbage collection: keep Python's collector from stalling the worker loop.

A full collection visits every object of the process, and torch has a few hundred thousand: it takes some 100 ms, at
an arbitrary moment, while other ranks wait for this one. The loop itself frees objects by reference counting; only
users' code leaves cycles behind. So during a pass the collector is off, objects from before the pass are frozen, and
now and then, after an optimizer step, the objects since then are collected, which takes a millisecond.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager

#: Seconds between two collections.
INTERVAL_S = 2.0


class Collector:
    """Collects the garbage of a pass at most once in `INTERVAL_S` seconds."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def collect_if_due(self) -> None:
        """Collect if the last time was long enough ago. Call it after an optimizer step, where a pause costs least."""
        now = time.monotonic()
        if now - self._last > INTERVAL_S:
            self._last = now
            gc.collect()  # it does not visit frozen objects


@contextmanager
def deferred_collection() -> Iterator[Collector]:
    """Turn automatic collection off within the block and restore its state afterwards."""
    was_enabled, frozen = gc.isenabled(), gc.get_freeze_count() > 0
    gc.disable()
    # If somebody else has frozen objects, ours could not be told apart afterwards: then freeze nothing.
    if not frozen:
        gc.freeze()
    try:
        yield Collector()
    finally:
        if not frozen:
            gc.unfreeze()
        if was_enabled:
            gc.enable()
