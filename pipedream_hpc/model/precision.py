"""Precision: the numeric precision of the forward passes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from pipedream_hpc.errors import PipedreamError

#: Creates the context that forwards run in.
Precision = Callable[[], AbstractContextManager[Any]]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Autocast:
    """torch.autocast, whose lists of operations depend on the device type.

    Attributes:
        dtype: the dtype it casts to.
        kind: device type, `cpu` or `cuda`.
    """

    dtype: torch.dtype
    kind: str

    def __call__(self) -> AbstractContextManager[Any]:
        # Casts of weights are not cached: the next minibatch may use another weight version.
        return torch.autocast(self.kind, dtype=self.dtype, cache_enabled=False)


def autocast(precision: str | None, kind: str = "cpu") -> Autocast | None:
    """Return torch's autocast to `bf16` or `fp16` on a device type; None for the model's own precision.

    Raises:
        PipedreamError: the precision is unknown.
    """
    if precision is None:
        return None
    if precision not in _DTYPES:
        raise PipedreamError(
            f"unknown precision '{precision}': choose 'bf16' or 'fp16', or None for the dtypes of the model"
        )
    return Autocast(_DTYPES[precision], kind)
