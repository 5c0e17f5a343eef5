"""Others' weights: a loss or a metric must not read weights of other stages, which are not here, or not the newest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from pipedream_hpc.errors import PipedreamError


class ForbiddenTensors(TorchFunctionMode):
    """Refuses functions of some tensors.

    Args:
        names: the identity of each tensor -> its name in the model.

    Raises:
        PipedreamError: a function in the block takes one of them.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self._names = names

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs or {})):
            if isinstance(leaf, torch.Tensor) and id(leaf) in self._names:
                raise PipedreamError(
                    f"the loss or a metric reads '{self._names[id(leaf)]}', which another stage has: let it use the "
                    "model's output alone, and return what it needs from the model's forward"
                )
        return function(*args, **(kwargs or {}))
