"""Batch dimensions: along which dimension of each input the samples are, and how a minibatch is cut along them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_flatten_with_path, tree_unflatten

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.model.arguments import Arguments
from pipedream_hpc.model.structure import tensors_of_value

#: Name of the loss function's target.
TARGET = "target"


class _Place(NamedTuple):
    """Where a value is: its name, the batch dimension of what is in it, and whether that was said of this value."""

    path: str
    dim: int | None = 0
    stated: bool = False

    @property
    def holds_samples(self) -> bool:
        """Whether a list here has an item for each sample."""
        return self.stated and self.dim == 0


@dataclass(frozen=True)
class BatchDims:
    """The batch dimension of every input and target.

    Attributes:
        by_name: name of an input, or key of a mapping, or a path such as `states.0` or `target.boxes` -> its batch
            dimension; None for one that has none, which every microbatch gets whole. It is that of everything within
            that has no entry of its own. 0 for a list or tuple: it has an item for each sample. Values without an entry
            have their samples along the first dimension.
    """

    by_name: Mapping[str, int | None] = field(default_factory=dict)

    def check(self, arguments: Arguments) -> None:
        """Check the names against the model's arguments.

        Raises:
            PipedreamError: a name is none of an input, or an input has no such dimension.
        """
        self.sizes(arguments.named())
        names = dict.fromkeys(_names(arguments.named(), ""))
        for name in self.by_name:
            if name not in names and name.partition(".")[0] != TARGET:
                shown = ", ".join(each for each in names if "." not in each)
                raise PipedreamError(
                    f"batch_dims has '{name}', which is no input of the model: its inputs are {shown}; "
                    f"'{TARGET}' is that of the loss"
                )

    def n_samples(self, arguments: Arguments) -> int:
        """Return the number of samples of a minibatch or microbatch."""
        if not self.by_name and arguments.args:
            first = arguments.args[0]
            if isinstance(first, torch.Tensor) and first.dim():
                return int(first.shape[0])
        return next(self._sizes(arguments.named(), _Place("")), 1)

    def sizes(self, named: Mapping[str, Any]) -> set[int]:
        """Return the numbers of samples that named inputs, or targets, have."""
        return set(self._sizes(named, _Place("")))

    def leaves(self, name: str, value: Any) -> list[tuple[torch.Tensor, int | None]]:
        """Return the tensors in an input that have dimensions, with their batch dimensions."""
        walk = self._walk(value, self._within(_Place(""), name))
        return [(each, where.dim) for each, where in walk if isinstance(each, torch.Tensor) and each.dim()]

    def cuts_lists(self, target: Any) -> bool:
        """Return whether a target has lists of samples."""
        return any(
            place.holds_samples and isinstance(value, list | tuple)
            for value, place in self._walk(target, self._of_target(target))
        )

    def split(self, arguments: Arguments, target: Any, n_microbatches: int) -> list[tuple[Arguments, Any]]:
        """Split a minibatch along the samples, as evenly as possible, longer microbatches first.

        Raises:
            PipedreamError: there are fewer samples than microbatches, or tensors of different length; or a list has as
                many values as there are samples, of which is not said what they are.
        """
        if n_microbatches == 1:
            return [(arguments, target)]
        named, of_target = arguments.named(), self._of_target(target)
        self._check_target(target)
        sizes = {*self._sizes(named, _Place("")), *self._sizes(target, of_target)}
        _check_sizes(sizes, n_microbatches)
        samples = next(iter(sizes), 0)
        inputs = self._split(named, _Place(""), n_microbatches, samples)
        targets = self._split(target, of_target, n_microbatches, samples)
        return [(_like(arguments, each), own) for each, own in zip(inputs, targets, strict=True)]

    def _of_target(self, target: Any) -> _Place:
        if isinstance(target, Mapping) and TARGET in target:  # an input has this name
            return _Place(TARGET)
        return _Place(TARGET, self.by_name.get(TARGET, 0), TARGET in self.by_name)

    def _check_target(self, target: Any) -> None:
        paths = [name for name in self.by_name if name.startswith(f"{TARGET}.")]
        if paths and target is not None:
            names = set(_names(target, TARGET))
            for path in paths:
                if path not in names:
                    raise PipedreamError(
                        f"batch_dims has '{path}', which is not in the target: give the keys of mappings and the "
                        "numbers of items"
                    )

    def _within(self, place: _Place, key: str) -> _Place:
        """Return the place of an item."""
        path = f"{place.path}.{key}" if place.path else key
        name = path if path in self.by_name else key
        if name in self.by_name:
            return _Place(path, self.by_name[name], stated=True)
        return _Place(path, place.dim)

    def _walk(self, value: Any, place: _Place) -> Iterator[tuple[Any, _Place]]:
        """Visit a nested value and everything in it; not what is in a list of samples."""
        yield value, place
        if isinstance(value, torch.Tensor) or (place.holds_samples and isinstance(value, list | tuple)):
            return
        for key, item in _items(value):
            yield from self._walk(item, self._within(place, key))

    def _sizes(self, value: Any, place: _Place) -> Iterator[int]:
        for each, where in self._walk(value, place):
            if isinstance(each, torch.Tensor):
                if where.dim is not None and each.dim():
                    yield each.shape[_checked(each, where)]
            elif where.holds_samples and isinstance(each, list | tuple):
                yield len(each)

    def _split(self, value: Any, place: _Place, count: int, samples: int) -> Sequence[Any]:
        if isinstance(value, torch.Tensor):
            return [value] * count if place.dim is None or not value.dim() else value.tensor_split(count, place.dim)
        if isinstance(value, list | tuple) and len(value) == samples > 0 and place.dim == 0:
            if place.stated:
                indices = torch.arange(samples).tensor_split(count)
                return [_like_list(value, [value[index] for index in own.tolist()]) for own in indices]
            if not any(each.dim() for each in tensors_of_value(value)):
                raise _unclear(value, place, samples)
        items = _items(value)
        if items:
            columns = [self._split(item, self._within(place, key), count, samples) for key, item in items]
            return [_rebuilt(value, [column[index] for column in columns]) for index in range(count)]
        if place.dim is not None and not isinstance(value, str | bytes):
            if tensors_of_value(value):
                raise PipedreamError(
                    f"inputs or target have {type(value).__name__}, whose tensors cannot be split into microbatches: "
                    "use tuples, lists and mappings of tensors"
                )
            if isinstance(value, Sized) and len(value) == samples > 0:
                raise _unclear(value, place, samples)
        return [value] * count


def _checked(tensor: torch.Tensor, place: _Place) -> int:
    """Return the batch dimension of a tensor that has one."""
    dim = place.dim or 0
    if not -tensor.dim() <= dim < tensor.dim():
        raise PipedreamError(
            f"batch_dims says that '{place.path}' has its samples along dimension {dim}, but its shape is "
            f"{tuple(tensor.shape)}"
        )
    return dim


def _unclear(value: Any, place: _Place, samples: int) -> PipedreamError:
    return PipedreamError(
        f"inputs or target have a {type(value).__name__} of {samples} values, as many as there are samples, which is "
        f"not split into microbatches: make it a tensor, or say what it is with TrainConfig(batch_dims="
        f"{{'{place.path}': 0}}), if it has one for each sample, or None"
    )


def _check_sizes(sizes: set[int], n_microbatches: int) -> None:
    if len(sizes) == 1 and min(sizes) < n_microbatches:
        raise PipedreamError(
            f"{min(sizes)} samples cannot be split into {n_microbatches} microbatches: use at most {min(sizes)}, or "
            "drop a last minibatch that is too short (DataLoader(drop_last=True))"
        )
    if len(sizes) > 1:
        raise PipedreamError(
            f"tensors of {' and '.join(map(str, sorted(sizes)))} samples cannot be split into {n_microbatches} "
            "microbatches: samples must be the first dimension of every tensor, or say where they are with "
            "TrainConfig(batch_dims={name: dimension, or None; 0 for a list with an item for each sample})"
        )


def _like(arguments: Arguments, named: Mapping[str, Any]) -> Arguments:
    """Return named values as arguments of the same call."""
    values = list(named.values())
    return Arguments(
        tuple(values[: len(arguments.args)]), {name: named[name] for name in arguments.kwargs}, arguments.names
    )


def _items(value: Any) -> list[tuple[str, Any]]:
    """Return the items of a mapping, list or tuple, or of a class that torch's pytrees know, by their names."""
    if isinstance(value, Mapping):
        return [(str(key), item) for key, item in value.items()]
    if type(value) in (tuple, list):
        return [(str(index), item) for index, item in enumerate(value)]
    paths, _ = _opened(value)
    return [] if paths is None else [(str(path[0]).strip(".[]'"), item) for path, item in paths]


def _opened(value: Any) -> tuple[list[tuple[Any, Any]] | None, Any]:
    """Return the items of one level of a pytree, with its structure."""
    paths, structure = tree_flatten_with_path(value, is_leaf=lambda each: each is not value)
    return (None if len(paths) == 1 and paths[0][1] is value else paths), structure


def _rebuilt(value: Any, items: list[Any]) -> Any:
    """Return a value like another with other items."""
    if isinstance(value, Mapping):
        rebuilt: Any = copy.copy(value)
        for key, item in zip(value, items, strict=True):
            rebuilt[key] = item
        return rebuilt
    if type(value) in (tuple, list):
        return type(value)(items)
    return tree_unflatten(items, _opened(value)[1])


def _like_list(value: Any, items: list[Any]) -> Any:
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def _names(value: Any, path: str) -> Iterator[str]:
    """Visit the names that `batch_dims` may have for what is in a value."""
    if isinstance(value, torch.Tensor):
        return
    for key, item in _items(value):
        own = f"{path}.{key}" if path else key
        yield own
        if isinstance(value, Mapping):
            yield key
        yield from _names(item, own)
