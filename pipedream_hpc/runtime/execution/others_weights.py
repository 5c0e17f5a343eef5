"""Others' weights: what is not here, or is not the newest, must not be read.

A loss or a metric must not read weights of other stages. No forward may read a weight by itself: every version of it is
another tensor, which only the modules of the model have.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.model.originals import Originals
from pipedream_hpc.model.placeholder import Placeholder
from pipedream_hpc.model.structure import tensors_of_value


class ForbiddenTensors(TorchFunctionMode, ABC):
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
            if isinstance(leaf, torch.Tensor):
                self._check(leaf)
        return function(*args, **(kwargs or {}))

    def _check(self, tensor: torch.Tensor) -> None:
        if id(tensor) in self._names:
            raise PipedreamError(self.sentence(self._names[id(tensor)]))

    @abstractmethod
    def sentence(self, name: str) -> str:
        """Say what is wrong with a tensor of this name."""


class OthersTensors(ForbiddenTensors):
    """Refuses a loss or a metric that reads weights of other stages, or what hooks have kept of their calls."""

    def _check(self, tensor: torch.Tensor) -> None:
        super()._check(tensor)
        if isinstance(tensor, Placeholder | FakeTensor):
            raise PipedreamError(
                "the loss or a metric reads a tensor that a hook or a module has kept, and that another stage has: "
                "the loss runs on the output stage; return from the model's forward what it needs"
            )

    def sentence(self, name: str) -> str:
        return (
            f"the loss or a metric reads '{name}', which another stage has: let it use the model's output alone, and "
            "return what it needs from the model's forward; the optimizer's weight_decay replaces a penalty on weights"
        )


class HeldWeights(ForbiddenTensors):
    """Refuses a forward that reads a weight of the model, or its memory, other than from its module.

    Args:
        originals: the weights that the model had before versions of them took their places.
    """

    def __init__(self, originals: Originals) -> None:
        self._weights = originals.trained()  # keeps their identities their own
        super().__init__({id(weight): name for weight, name in self._weights})
        self._memory = originals.memory()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = function(*args, **(kwargs or {}))
        if tensors_of_value(returned):  # and not a question, such as next(model.parameters()).dtype
            for leaf in tensors_of_value((args, kwargs)):
                self._check(leaf)
        return returned

    def _check(self, tensor: torch.Tensor) -> None:
        super()._check(tensor)
        name = self._memory.owner(tensor)
        if name is not None:
            raise PipedreamError(self.sentence(name))

    def sentence(self, name: str) -> str:
        return (
            f"the forward uses the parameter '{name}' as a hook, a closure, a list, a buffer or a module outside the "
            "model holds it, and would not see it trained: every version of a weight is another tensor; take it from "
            f"its module in the model when the forward runs (module.{name.rpartition('.')[2]})"
        )
