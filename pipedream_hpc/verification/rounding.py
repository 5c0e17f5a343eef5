"""Correctly rounded square roots (IEEE 754) for torch's optimizers.

torch computes square roots of whole tensors with a vector library that may be off by one unit in the last place (MKL
on x86: one root in six). With correctly rounded roots torch's Adam can be compared bitwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch


def _root(values: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.asarray(np.sqrt(values.detach().numpy())))


def _roots(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [_root(values) for values in tensors]


@contextmanager
def correct_square_roots() -> Iterator[None]:
    """Give torch's optimizers, looped and foreach, correctly rounded square roots of float tensors."""
    single, several = torch.Tensor.sqrt, torch._foreach_sqrt
    torch.Tensor.sqrt, torch._foreach_sqrt = _root, _roots  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.Tensor.sqrt, torch._foreach_sqrt = single, several  # type: ignore[method-assign]
