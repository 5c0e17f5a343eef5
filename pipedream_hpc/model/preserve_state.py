"""Run a model for a measurement and restore its state."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pipedream_hpc.model.randomness import preserve_rng_state


@contextmanager
def preserve_state(model: nn.Module, written: Set[str] = frozenset()) -> Iterator[None]:
    """Run the block in training mode, then restore the model and the generators.

    Modes, weights that modules refer to, gradients, buffers, attributes and hooks are as they were.

    Args:
        model: the model.
        written: names of weights whose values are restored, too.
    """
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    kept = ModuleState(model)
    weights = [
        (weight, weight.data, weight.detach().clone())
        for name, weight in model.named_parameters()
        if name in written and not weight.is_meta
    ]
    with preserve_rng_state(_device_of(model)):
        try:
            model.train()
            for parameter in gradients:
                parameter.grad = None
            yield
        finally:
            kept.restore()
            for parameter, gradient in gradients.items():
                parameter.grad = gradient
            for weight, memory, values in weights:
                weight.data = memory.copy_(values)


#: Attributes of a module whose contents are restored: of all others the object itself is.
_CONTAINERS = (dict, list, set)


class ModuleState:
    """All that the modules of a model hold, and the values of their buffers.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules())
        self._attributes = {name: dict(vars(module)) for name, module in self._modules.items()}
        # Hooks, buffers, weights and the like are in containers of the module.
        self._contents = [
            (value, value.copy() if type(value) is OrderedDict else copy.copy(value))  # which copy.copy takes long for
            for attributes in self._attributes.values()
            for key, value in attributes.items()
            if isinstance(value, _CONTAINERS) and (key.startswith("_") or not isinstance(value, nn.Module))
        ]
        self._values = {
            id(buffer): (name, buffer, buffer.clone(), version_of(buffer))
            for name, buffer in model.named_buffers()
            if not buffer.is_meta
        }

    def changed_attributes(self) -> dict[str, dict[str, Any]]:
        """Return the attributes that have been set since, by module, with what they were before."""
        changed = {}
        for name, module in self._modules.items():
            before = self._attributes[name]
            found = {
                key: before[key] for key, value in vars(module).items() if key in before and before[key] is not value
            }
            found.pop("_compiled_call_impl", None)
            if found:
                changed[name] = found
        return changed

    def changed_buffers(self) -> set[str]:
        """Return the names of buffers that have been written or replaced since."""
        written = {name for name, buffer, _, version in self._values.values() if version_of(buffer) != version}
        contents = {id(value): copied for value, copied in self._contents}
        for name, module in self._modules.items():
            before: Any = contents[id(module._buffers)]
            written |= {
                f"{name}.{key}" if name else key for key, each in module._buffers.items() if before.get(key) is not each
            }
        return written

    def restore(self) -> None:
        """Put everything back."""
        for name, module in self._modules.items():
            now: Any = vars(module)
            before = self._attributes[name]
            for key in [key for key in now if key not in before and key != "_compiled_call_impl"]:
                del now[key]
            now.update((key, value) for key, value in before.items() if key != "_compiled_call_impl")
        for value, copied in self._contents:
            if isinstance(value, list):
                value[:] = copied
            else:
                value.clear()
                value.update(copied)
        with torch.no_grad():
            for _, buffer, saved, version in self._values.values():
                # BatchNorm writes its statistics without counting a version.
                dense = buffer.layout is torch.strided
                if version_of(buffer) != version or (dense and not torch.equal(buffer, saved)):
                    buffer.copy_(saved)


def version_of(tensor: torch.Tensor) -> int:
    """Return how often a tensor has been written in place."""
    return 0 if tensor.is_inference() else tensor._version


def _device_of(model: nn.Module) -> torch.device:
    """Return the GPU of the model, or the CPU if no weight is on a GPU."""
    return next((weight.device for weight in model.parameters() if weight.is_cuda), torch.device("cpu"))
