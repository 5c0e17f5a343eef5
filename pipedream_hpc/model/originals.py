"""Originals: the weights that the user's model had before versions of them took their places.

Every version of a weight is another tensor, which the modules of the model refer to while they run. What refers to the
original weight besides, or to its memory, does not see it trained: a closure, a list, a buffer that is a view of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from pipedream_hpc.errors import PipedreamError


@dataclass(frozen=True)
class _Original:
    """An original weight, which it does not keep alive.

    Attributes:
        name: qualified name.
        trained: whether it requires a gradient.
        weight: the weight.
        storage: its memory, which others may keep alive; None if it has none of its own.
        extent: what it takes of it.
    """

    name: str
    trained: bool
    weight: weakref.ref[nn.Parameter]
    storage: Any
    extent: range


class Originals:
    """The original weights of a model.

    Args:
        model: the user's model, with its original weights.

    Raises:
        PipedreamError: two weights have the same memory.
    """

    def __init__(self, model: nn.Module) -> None:
        self._all = [
            _Original(name, weight.requires_grad, weakref.ref(weight), _reference(weight), _extent(weight))
            for name, weight in model.named_parameters()
        ]
        for one, other in self._overlapping():
            raise PipedreamError(
                f"the weights '{one.name}' and '{other.name}' are two parameters with the same memory, of which stages "
                "would train two copies: tie them as one parameter (such as head.weight = embedding.weight)"
            )

    def trained(self) -> list[tuple[nn.Parameter, str]]:
        """Return those that are trained, as far as they exist, with their names."""
        alive = ((each.weight(), each) for each in self._all)
        return [(weight, each.name) for weight, each in alive if weight is not None and each.trained]

    def name_of(self, leaf: torch.Tensor) -> str | None:
        """Return the name of an original weight; None if it is none."""
        return next((each.name for each in self._all if each.weight() is leaf), None)

    def memory(self) -> Memory:
        """Return the memory of those that are trained, as far as anybody holds it."""
        return Memory(each for each in self._all if each.trained)

    def _overlapping(self) -> Iterator[tuple[_Original, _Original]]:
        by_storage: dict[int, list[_Original]] = {}
        for each in self._all:
            if each.storage is not None:
                by_storage.setdefault(each.storage.cdata, []).append(each)
        for group in by_storage.values():
            for one, other in combinations(group, 2):
                if (one.trained or other.trained) and _overlap(one.extent, other.extent):
                    yield one, other


class Memory:
    """Memory of original weights."""

    def __init__(self, originals: Iterable[_Original]) -> None:
        self._by_storage: dict[int, list[_Original]] = {}
        for each in originals:
            if each.storage is not None and not each.storage.expired():
                self._by_storage.setdefault(each.storage.cdata, []).append(each)

    def owner(self, tensor: torch.Tensor) -> str | None:
        """Return the name of the weight whose memory a tensor shows; None if it shows none."""
        if not self._by_storage or not _has_memory(tensor):
            return None
        shown = self._by_storage.get(tensor.untyped_storage()._cdata, ())
        return next((each.name for each in shown if _overlap(each.extent, _extent(tensor))), None)


def _has_memory(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _reference(weight: torch.Tensor) -> Any:
    return StorageWeakRef(weight.untyped_storage()) if _has_memory(weight) else None  # type: ignore[no-untyped-call]


def _extent(tensor: torch.Tensor) -> range:
    """Return the bytes of its storage that a tensor spans."""
    if not _has_memory(tensor) or not tensor.numel():
        return range(0)
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.storage_offset() * tensor.element_size()
    return range(begin, begin + (last + 1) * tensor.element_size())


def _overlap(one: range, other: range) -> bool:
    return bool(one) and bool(other) and one.start < other.stop and other.start < one.stop
