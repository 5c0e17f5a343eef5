"""Batch dimensions: along which dimension of each input the samples are, and how a minibatch is cut along them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import MappingKey, tree_flatten, tree_flatten_with_path, tree_unflatten

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.model.arguments import Arguments
from pipedream_hpc.model.structure import tensors_of_value

#: Name of the loss function's target.
TARGET = "target"


@dataclass(frozen=True)
class BatchDims:
    """The batch dimension of every input and target.

    Attributes:
        by_name: name of an input, or key of a mapping -> its batch dimension; None for one that has none, which every
            microbatch gets whole. Inputs without an entry have their samples along the first dimension.
    """

    by_name: Mapping[str, int | None] = field(default_factory=dict)

    def check(self, arguments: Arguments) -> None:
        """Check the names against the model's arguments.

        Raises:
            PipedreamError: a name is none of an input, or an input has no such dimension.
        """
        self.sizes(arguments.named())
        paths, _ = tree_flatten_with_path(arguments.named())
        keys = (key.key for path, _ in paths for key in path if isinstance(key, MappingKey))
        names = list(dict.fromkeys(keys))
        for name in self.by_name:
            if name not in names and name != TARGET:
                raise PipedreamError(
                    f"batch_dims has '{name}', which is no input of the model: its inputs are {', '.join(names)}; "
                    f"'{TARGET}' is that of the loss"
                )

    def n_samples(self, arguments: Arguments) -> int:
        """Return the number of samples of a minibatch or microbatch."""
        if not self.by_name and arguments.args:
            first = arguments.args[0]
            if isinstance(first, torch.Tensor) and first.dim():
                return int(first.shape[0])
        return next((leaf.shape[dim] for leaf, dim in self._leaves(arguments.named()) if dim is not None), 1)

    def sizes(self, named: Mapping[str, Any]) -> set[int]:
        """Return the numbers of samples that named inputs, or targets, have."""
        return {leaf.shape[dim] for leaf, dim in self._leaves(named) if dim is not None}

    def sample_dims(self, name: str, value: Any) -> list[int | None]:
        """Return the batch dimension of each tensor in an input."""
        return [dim for _, dim in self._leaves({name: value})]

    def split(self, arguments: Arguments, target: Any, n_microbatches: int) -> list[tuple[Arguments, Any]]:
        """Split a minibatch along the samples, as evenly as possible, longer microbatches first.

        Raises:
            PipedreamError: there are fewer samples than microbatches, or tensors of different length.
        """
        if n_microbatches == 1:
            return [(arguments, target)]
        value = (arguments.args, arguments.kwargs, target)
        if self.by_name:
            named = arguments.named()
            _check_sizes(self.sizes(named) | self.sizes(self._target(target)), n_microbatches)
            cut = self._split_by_name(named, n_microbatches)
            targets = self._split_by_name(self._target(target), n_microbatches)
            return [
                (_like(arguments, inputs), own if isinstance(target, Mapping) else own[TARGET])
                for inputs, own in zip(cut, targets, strict=True)
            ]
        tensors = tensors_of_value(value)
        sizes = {each.shape[0] for each in tensors if each.dim()}
        _check_sizes(sizes, n_microbatches)
        samples = next(iter(sizes), 0)
        return [
            (Arguments(args, kwargs, arguments.names), own)
            for args, kwargs, own in _split(value, n_microbatches, samples)
        ]

    def _target(self, target: Any) -> Mapping[str, Any]:
        return target if isinstance(target, Mapping) else {TARGET: target}

    def _leaves(self, named: Mapping[str, Any]) -> list[tuple[torch.Tensor, int | None]]:
        """Return all tensors that have dimensions, with their batch dimensions."""
        return [
            (leaf, self._dim(path, leaf))
            for path, leaf in tree_flatten_with_path(dict(named))[0]
            if isinstance(leaf, torch.Tensor) and leaf.dim()
        ]

    def _dim(self, path: Sequence[Any], leaf: torch.Tensor) -> int | None:
        for key in reversed(path):
            if isinstance(key, MappingKey) and key.key in self.by_name:
                dim = self.by_name[key.key]
                if dim is not None and not -leaf.dim() <= dim < leaf.dim():
                    raise PipedreamError(
                        f"batch_dims says that '{key.key}' has its samples along dimension {dim}, but its shape is "
                        f"{tuple(leaf.shape)}"
                    )
                return dim
        return 0

    def _split_by_name(self, named: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
        leaves, structure = tree_flatten_with_path(dict(named))
        columns: list[Sequence[Any]] = []
        for path, leaf in leaves:
            dim = self._dim(path, leaf) if isinstance(leaf, torch.Tensor) and leaf.dim() else None
            columns.append([leaf] * count if dim is None else leaf.tensor_split(count, dim))
        return [tree_unflatten([column[index] for column in columns], structure) for index in range(count)]


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
            "TrainConfig(batch_dims={name: dimension, or None})"
        )


def _like(arguments: Arguments, named: Mapping[str, Any]) -> Arguments:
    """Return named values as arguments of the same call."""
    values = list(named.values())
    return Arguments(
        tuple(values[: len(arguments.args)]), {name: named[name] for name in arguments.kwargs}, arguments.names
    )


def _split_mapping(value: Mapping[Any, Any], count: int, samples: int) -> list[Any]:
    parts = [copy.copy(value) for _ in range(count)]
    for key, item in value.items():
        for part, own in zip(parts, _split(item, count, samples), strict=True):
            part[key] = own  # type: ignore[index]
    return parts


def _split(value: Any, count: int, samples: int) -> Sequence[Any]:
    # Every tensor is split once: it takes microseconds per microbatch.
    if isinstance(value, torch.Tensor):
        return value.tensor_split(count) if value.dim() else [value] * count
    if type(value) is tuple:
        return list(zip(*(_split(each, count, samples) for each in value), strict=True)) if value else [()] * count
    if type(value) is dict:
        return _split_mapping(value, count, samples)
    if type(value) is list and len(value) == samples > 0 and not tensors_of_value(value):
        raise PipedreamError(
            f"inputs or target have a list of {samples} values, as many as there are samples, which is not split into "
            "microbatches: make it a tensor"
        )
    leaves, structure = tree_flatten(value)
    if len(leaves) == 1 and leaves[0] is value:
        if isinstance(value, Mapping):  # such as what a tokenizer returns
            return _split_mapping(value, count, samples)
        if tensors_of_value(value):
            raise PipedreamError(
                f"inputs or target have {type(value).__name__}, whose tensors cannot be split into microbatches: use "
                "tuples, lists and mappings of tensors"
            )
        return [value] * count
    columns = [_split(leaf, count, samples) for leaf in leaves]
    return [tree_unflatten([column[index] for column in columns], structure) for index in range(count)]
