"""Reading: minibatches out of the user's loader, on ranks that need only some of them.

A replica takes every R-th minibatch. All replicas draw the same order, but each reads only its own
samples where the loader lets us tell the two apart::

    indices      [7 2] [0 5] [3 1] [6 4]        drawn by everyone
    replica 0    read         read
    replica 1          read         read
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

Wanted = Callable[[int], bool]

#: Stands for a minibatch that nobody here wants.
UNREAD = object()


def minibatches(loader: Iterable[Any], wanted: Wanted) -> Iterator[Any]:
    """The minibatches of a pass over `loader`, UNREAD in place of those that are not wanted.

    Args:
        loader: the user's.
        wanted: whether the minibatch with this number is.
    """
    if _is_plain(loader):
        # As DataLoader does at the start of a pass: a generator of the user's own draws the same from here on.
        torch.empty((), dtype=torch.int64).random_(generator=loader.generator)  # type: ignore[attr-defined]
        return _by_indices(loader, wanted)  # type: ignore[arg-type]
    return iter(loader)


def start_workers_apart(loader: Any) -> None:
    """Let a DataLoader's workers be started by a fork server, unless the user chose a way.

    A fork of a process that uses MPI and threads may hang, or take MPI's connections along.
    """
    if isinstance(loader, DataLoader) and loader.num_workers > 0 and loader.multiprocessing_context is None:
        loader.multiprocessing_context = "forkserver"


def _is_plain(loader: Any) -> bool:
    """Whether it reads in this process, by lists of indices, as torch's own class does."""
    return (
        type(loader) is DataLoader
        and loader.num_workers == 0
        and loader.batch_sampler is not None
        and not loader.pin_memory
        and not isinstance(loader.dataset, IterableDataset)
    )


def _by_indices(loader: DataLoader[Any], wanted: Wanted) -> Iterator[Any]:
    several = getattr(loader.dataset, "__getitems__", None)
    for number, indices in enumerate(loader.batch_sampler):  # type: ignore[arg-type]
        if not wanted(number):
            yield UNREAD
            continue
        samples = several(indices) if several is not None else [loader.dataset[index] for index in indices]
        yield loader.collate_fn(samples)
