"""Square roots as IEEE 754 has them.

torch takes those of whole tensors from a vector library that may be off by one unit in the last place
(MKL's on x86, one in six roots). With these in their place torch's Adam can be compared bit for bit.
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
    """Let torch's optimizers, looped and foreach, take correctly rounded square roots of float tensors."""
    single, several = torch.Tensor.sqrt, torch._foreach_sqrt
    torch.Tensor.sqrt, torch._foreach_sqrt = _root, _roots  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.Tensor.sqrt, torch._foreach_sqrt = single, several  # type: ignore[method-assign]
