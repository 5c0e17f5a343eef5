"""Precision: what forwards are run in."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from pipedream_hpc.errors import PipedreamError

#: Makes a context that forwards run in.
Precision = Callable[[], AbstractContextManager[Any]]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Autocast:
    """torch's autocast, whose lists of operations differ from one kind of device to another.

    Attributes:
        dtype: what it casts to.
        kind: of device, `cpu` or `cuda`.
    """

    dtype: torch.dtype
    kind: str

    def __call__(self) -> AbstractContextManager[Any]:
        # Casts of weights are not kept: a weight of the next minibatch is another version.
        return torch.autocast(self.kind, dtype=self.dtype, cache_enabled=False)


def autocast(precision: str | None, kind: str = "cpu") -> Autocast | None:
    """torch's autocast to `bf16` or `fp16` on a kind of device; None for the model's own precision.

    Raises:
        PipedreamError: there is no such precision.
    """
    if precision is None:
        return None
    if precision not in _DTYPES:
        raise PipedreamError(
            f"precision should be 'bf16' or 'fp16', or left away for that of the model, not '{precision}'"
        )
    return Autocast(_DTYPES[precision], kind)
