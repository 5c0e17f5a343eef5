"""Minibatches from the user's loader, on ranks that need only some of them.

A replica takes every R-th minibatch. All replicas draw the same order, but each reads only its own samples, if the
loader allows drawing without reading, and its data set has no generator of random numbers that reading advances::

    indices      [7 2] [0 5] [3 1] [6 4]        drawn on every rank
    replica 0    read         read
    replica 1          read         read
"""

from __future__ import annotations

import functools
import io
import itertools
import multiprocessing
import pickle
import random
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from multiprocessing import forkserver
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy
import torch
from torch.utils.data import DataLoader, IterableDataset

from pipedream_hpc.errors import PipedreamError

#: Stands for a minibatch that is not needed here and was not read.
SKIPPED = object()


def minibatches(loader: Iterable[Any], is_needed: Callable[[int], bool]) -> Iterator[Any]:
    """Iterate over `loader`; yield SKIPPED for minibatches that are not needed, if reading them can be avoided.

    Args:
        loader: the user's loader.
        is_needed: whether the minibatch with this number is needed here.

    Raises:
        PipedreamError: the loader's workers cannot be given its data set or functions, or one of them has ended.
    """
    if _reads_by_indices(loader):
        # As DataLoader does at the start of a pass, so that the user's own generator draws the same numbers after it.
        torch.empty((), dtype=torch.int64).random_(generator=loader.generator)  # type: ignore[attr-defined]
        return _by_indices(loader, is_needed)  # type: ignore[arg-type]
    try:
        with warnings.catch_warnings():
            # torch's advice to fork is none for processes that use MPI.
            warnings.filterwarnings("ignore", "Got pickle error")
            iterator = iter(loader)
    except (AttributeError, TypeError, pickle.PicklingError) as error:
        problem = _not_carried(loader)
        if problem is None:
            raise
        raise PipedreamError(problem) from error
    return _from_workers(iterator) if _has_workers(loader) else iterator


def _has_workers(loader: Any) -> bool:
    return isinstance(loader, DataLoader) and loader.num_workers > 0


def _from_workers(iterator: Iterator[Any]) -> Iterator[Any]:
    """Yield what the worker processes of a DataLoader read.

    Raises:
        PipedreamError: one of them has ended.
    """
    try:
        yield from iterator
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise PipedreamError(
            f"{error}; what it printed is above: a worker imports the program anew, so let classes and functions that "
            "it needs be defined when the program is imported, outside of its start under "
            '`if __name__ == "__main__":`, or read without workers (num_workers=0)'
        ) from error


def _not_carried(loader: Any) -> str | None:
    """Return in words what of a DataLoader cannot be sent to its workers; None if everything can."""
    if not _has_workers(loader):
        return None
    for name in ("dataset", "collate_fn", "worker_init_fn"):
        try:
            ForkingPickler(io.BytesIO()).dump(getattr(loader, name))
        except Exception as error:
            return (
                f"the {name} of the DataLoader cannot be sent to its worker processes, which are not forked from this "
                f"one: {error}: define its classes and functions at the top level of a module, or read without workers "
                "(num_workers=0)"
            )
    return None


def use_forkserver(loader: Any) -> None:
    """Let a fork server start a DataLoader's workers, unless the user chose a start method.

    A fork of a process that uses MPI and threads may hang, or inherit MPI's connections. The server imports torch once,
    which takes each worker seconds otherwise; what the user has told it to import stays.
    """
    if _has_workers(loader) and loader.multiprocessing_context is None:
        loader.multiprocessing_context = "forkserver"
        if forkserver._forkserver._preload_modules == ["__main__"]:  # type: ignore[attr-defined]
            multiprocessing.set_forkserver_preload(["__main__", "torch"])


def _reads_by_indices(loader: Any) -> bool:
    """Return whether the loader is torch's own class and reads in this process, by lists of indices."""
    return (
        type(loader) is DataLoader
        and loader.num_workers == 0
        and loader.batch_sampler is not None
        and not loader.pin_memory
        and not isinstance(loader.dataset, IterableDataset)
        and not _has_generator(loader.dataset, set())
        and not _has_generator(loader.collate_fn, set())
    )


_GENERATORS = (random.Random, numpy.random.Generator, numpy.random.RandomState, torch.Generator, Iterator)
#: Items of a container that are looked at: generators are not among thousands of others.
_FEW = 64


def _has_generator(value: Any, seen: set[int]) -> bool:
    """Return whether an object, or what it holds, is a generator of random numbers, or another iterator."""
    if isinstance(value, _GENERATORS):
        return True
    if id(value) in seen or isinstance(value, torch.Tensor | numpy.ndarray | type):
        return False
    seen.add(id(value))
    held = vars(value).values() if hasattr(value, "__dict__") else ()
    if isinstance(value, Mapping):
        held = itertools.islice(value.values(), _FEW)
    elif isinstance(value, list | tuple | set | frozenset):
        held = itertools.islice(value, _FEW)
    elif isinstance(value, types.MethodType):
        held = [value.__self__]
    elif isinstance(value, types.FunctionType):
        held = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
    elif isinstance(value, functools.partial):
        held = [value.func, *value.args, *value.keywords.values()]
    return any(_has_generator(each, seen) for each in held)


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _by_indices(loader: DataLoader[Any], is_needed: Callable[[int], bool]) -> Iterator[Any]:
    get_items = getattr(loader.dataset, "__getitems__", None)
    for number, indices in enumerate(loader.batch_sampler):  # type: ignore[arg-type]
        if not is_needed(number):
            yield SKIPPED
            continue
        samples = get_items(indices) if get_items is not None else [loader.dataset[index] for index in indices]
        yield loader.collate_fn(samples)
