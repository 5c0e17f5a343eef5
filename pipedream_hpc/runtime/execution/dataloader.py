"""Minibatches from the user's loader, on ranks that need only some of them.

A replica takes every R-th minibatch. All replicas draw the same order, but each reads only its own samples, if the
loader allows drawing without reading::

    indices      [7 2] [0 5] [3 1] [6 4]        drawn on every rank
    replica 0    read         read
    replica 1          read         read
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

#: Stands for a minibatch that is not needed here and was not read.
SKIPPED = object()


def minibatches(loader: Iterable[Any], is_needed: Callable[[int], bool]) -> Iterator[Any]:
    """Iterate over `loader`; yield SKIPPED for minibatches that are not needed, if reading them can be avoided.

    Args:
        loader: the user's loader.
        is_needed: whether the minibatch with this number is needed here.
    """
    if _reads_by_indices(loader):
        # As DataLoader does at the start of a pass, so that the user's own generator draws the same numbers after it.
        torch.empty((), dtype=torch.int64).random_(generator=loader.generator)  # type: ignore[attr-defined]
        return _by_indices(loader, is_needed)  # type: ignore[arg-type]
    return iter(loader)


def use_forkserver(loader: Any) -> None:
    """Let a fork server start a DataLoader's workers, unless the user chose a start method.

    A fork of a process that uses MPI and threads may hang, or inherit MPI's connections.
    """
    if isinstance(loader, DataLoader) and loader.num_workers > 0 and loader.multiprocessing_context is None:
        loader.multiprocessing_context = "forkserver"


def _reads_by_indices(loader: Any) -> bool:
    """Return whether the loader is torch's own class and reads in this process, by lists of indices."""
    return (
        type(loader) is DataLoader
        and loader.num_workers == 0
        and loader.batch_sampler is not None
        and not loader.pin_memory
        and not isinstance(loader.dataset, IterableDataset)
    )


def _by_indices(loader: DataLoader[Any], is_needed: Callable[[int], bool]) -> Iterator[Any]:
    get_items = getattr(loader.dataset, "__getitems__", None)
    for number, indices in enumerate(loader.batch_sampler):  # type: ignore[arg-type]
        if not is_needed(number):
            yield SKIPPED
            continue
        samples = get_items(indices) if get_items is not None else [loader.dataset[index] for index in indices]
        yield loader.collate_fn(samples)
