"""Python's garbage collector: turned off where it would search much and find nothing; and what it knows of objects."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collection() -> Iterator[None]:
    """Turn automatic collection off within the block.

    For work that makes very many objects that stay: the collector would visit all of them again and again.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def objects_made() -> Iterator[set[int]]:
    """Fill a set with the identities of all objects that were made within the block and that the collector knows.

    A program has some hundred thousand objects, so those from before are not looked at: the collector leaves out what
    is frozen.
    """
    made: set[int] = set()
    if gc.get_freeze_count():  # by somebody else: ours could not be told apart afterwards
        before = gc.get_objects()  # which keeps them, so that no other object gets the identity of one of them
        yield made
        made.update(set(map(id, gc.get_objects())).difference(map(id, before)))
        return
    gc.freeze()
    try:
        yield made
        made.update(map(id, gc.get_objects()))
    finally:
        gc.unfreeze()
