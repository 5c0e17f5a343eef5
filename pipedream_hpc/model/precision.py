"""Precision: what forwards are run in."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from pipedream_hpc.errors import PipedreamError

#: Makes a context that forwards run in.
Precision = Callable[[], AbstractContextManager[Any]]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str | None) -> Precision | None:
    """torch's autocast to `bf16` or `fp16`; None for the model's own precision.

    Raises:
        PipedreamError: there is no such precision.
    """
    if precision is None:
        return None
    if precision not in _DTYPES:
        raise PipedreamError(
            f"precision should be 'bf16' or 'fp16', or left away for that of the model, not '{precision}'"
        )
    # Casts of weights are not kept: a weight of the next minibatch is another version.
    return lambda: torch.autocast("cpu", dtype=_DTYPES[precision], cache_enabled=False)
