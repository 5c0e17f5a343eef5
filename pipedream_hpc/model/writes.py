"""Writes: the tensors that an operation writes, and whose memory they have."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from pipedream_hpc.model.structure import tensors_of_value

#: Arguments of batch normalizations that are written in training.
_STATISTICS = frozenset({"running_mean", "running_var"})


def written_by(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """Return the tensors that an operation writes."""
    names, written = _written_names(function)
    if not written:
        return []
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if given.get("training") is False:
        written = written - _STATISTICS
    return tensors_of_value([given.get(name) for name in sorted(written)])


@cache  # a model calls few operations, each of them often
def _written_names(function: Any) -> tuple[list[str], frozenset[str]]:
    """Return the names of an operation's arguments, and of those that it writes."""
    arguments = function._schema.arguments
    names = [argument.name for argument in arguments]
    written = {each.name for each in arguments if each.alias_info is not None and each.alias_info.is_write}
    # The schemas of some batch normalizations do not say that they write.
    if "training" in names:
        written |= _STATISTICS & set(names)
    return names, frozenset(written)


def storage_id(tensor: torch.Tensor) -> int:
    """Return the identity of a tensor's memory, which is unique only while the memory is live (see memory_of)."""
    return int(tensor.untyped_storage()._cdata) if tensor.layout is torch.strided else id(tensor)


def memory_of(tensor: torch.Tensor) -> Any:
    """Return what keeps the identity of a tensor's storage its own."""
    return tensor.untyped_storage() if tensor.layout is torch.strided else tensor


def version_of(tensor: torch.Tensor) -> int:
    """Return how often a tensor has been written in place."""
    return 0 if tensor.is_inference() else tensor._version
