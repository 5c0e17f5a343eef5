"""Run a model for a measurement and restore its state."""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict, deque
from collections.abc import Iterator, Set
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from pipedream_hpc.model.outside_state import OF_TORCH, OutsideState, Replayed
from pipedream_hpc.model.placeholder import Placeholder
from pipedream_hpc.model.randomness import preserve_rng_state
from pipedream_hpc.model.writes import version_of


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


#: What an attribute, or an item of a container, has to be to be state: other objects may be caches.
STATE = (int, float, torch.Tensor)


class Contents:
    """What a value holds: the items of its lists, dicts, sets and objects with attributes, however deep, and tensors.

    Args:
        value: the value; modules in it, parameters and objects of Python's own libraries are not looked into.
    """

    def __init__(self, value: Any) -> None:
        self._held: list[tuple[Any, Any]] = []
        self.tensors: list[torch.Tensor] = []
        self._find(value, set())

    def _find(self, value: Any, seen: set[int]) -> None:
        if isinstance(value, (*_ATOMS, Replayed)) or id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            if not isinstance(value, nn.Parameter | Placeholder):
                self.tensors.append(value)
        elif isinstance(value, tuple):
            for item in value:
                self._find(item, seen)
        elif isinstance(value, dict | list | set | deque):
            self._held.append((value, _copied(value)))
            for item in value.values() if isinstance(value, dict) else value:
                self._find(item, seen)
        elif not isinstance(value, nn.Module) and not callable(value) and _is_of_user(type(value)):
            self._find(getattr(value, "__dict__", None), seen)

    def changed(self, *, collected: bool = True) -> bool:
        """Return whether a number or a tensor in a container has been replaced, or a list or set has other items.

        Args:
            collected: whether tensors that have been appended to a list count, too.
        """
        return any(_differs(value, copied, collected) for value, copied in self._held)

    def restore(self) -> None:
        """Put all items back."""
        for value, copied in self._held:
            if isinstance(value, list):
                value[:] = copied
            elif isinstance(value, deque):
                value.clear()
                value.extend(copied)
            else:
                value.clear()
                value.update(copied)

    def replace_tensors(self) -> None:
        """Put copies in place of the tensors that are in containers."""
        copies = {id(each): each.detach().clone() for each in self.tensors if each.is_leaf}
        for value, _ in self._held:
            if isinstance(value, dict | list):
                for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
                    if id(item) in copies:
                        value[key] = copies[id(item)]


#: Objects that hold nothing.
_ATOMS = (str, bytes, int, float, complex, type(None), type, torch.dtype, torch.device)


def _copied(value: Any) -> Any:
    return value.copy() if type(value) is OrderedDict else copy.copy(value)  # which copy.copy takes long for


def _is_of_user(kind: type) -> bool:
    library = kind.__module__.partition(".")[0]
    return kind is SimpleNamespace or not (library == "torch" or library in sys.stdlib_module_names)


def _differs(value: Any, copied: Any, collected: bool) -> bool:
    if isinstance(value, set):
        return bool(value != copied)
    if isinstance(value, dict):
        pairs = [(item, value.get(key)) for key, item in copied.items()]
    else:
        added = list(value)[len(copied) :]
        if len(value) < len(copied) or any(collected or not isinstance(each, torch.Tensor) for each in added):
            return True
        pairs = list(zip(copied, value, strict=False))
    return any(
        isinstance(old, STATE) and old is not new and not (isinstance(new, int | float) and old == new)
        for old, new in pairs
    )


def contents_of(module: nn.Module) -> dict[str, Contents]:
    """Return what each attribute of the user's holds that is neither a number nor a module."""
    found = {key: Contents(value) for key, value in vars(module).items() if key not in OF_TORCH}
    return {key: each for key, each in found.items() if each._held or each.tensors}


@contextmanager
def contents_restored(model: nn.Module) -> Iterator[None]:
    """Restore what forwards change besides tensors, such as the lists that hooks fill, when the block ends."""
    held = [each for module in model.modules() for each in contents_of(module).values()]
    outside = OutsideState(model, attributes=False)  # which may tell of hooks, and these stay
    try:
        yield
    finally:
        for each in held:
            each.restore()
        outside.restore()


class ModuleState:
    """All that the modules of a model hold, the values of their buffers, and what else their code reaches.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.outside = OutsideState(model)
        self._modules = dict(model.named_modules())
        self._attributes = {name: dict(vars(module)) for name, module in self._modules.items()}
        self._contents = [
            (value, _copied(value))
            for attributes in self._attributes.values()
            for key, value in attributes.items()
            if key in OF_TORCH and isinstance(value, dict | set)
        ]
        self._of_user = {name: contents_of(module) for name, module in self._modules.items()}
        tensors = [(name, buffer) for name, buffer in model.named_buffers()]
        users = (contents for of_module in self._of_user.values() for contents in of_module.values())
        tensors += [("", each) for contents in users for each in contents.tensors]
        self._values = {
            id(each): (name, each, each.detach().clone(), version_of(each))
            for name, each in reversed(tensors)
            if not each.is_meta and not isinstance(each, FakeTensor) and each.is_leaf
        }

    def changed_attributes(self) -> dict[str, dict[str, Any]]:
        """Return the attributes that have been set, or hold other items, by module, with what they were before."""
        changed = {}
        for name, module in self._modules.items():
            before = self._attributes[name]
            found = {
                key: before[key] for key, value in vars(module).items() if key in before and before[key] is not value
            }
            found.pop("_compiled_call_impl", None)
            found.update(
                (key, before[key]) for key, each in self._of_user[name].items() if key not in found and each.changed()
            )
            if found:
                changed[name] = found
        return changed

    def holds_others(self, module: str, attribute: str) -> bool:
        """Return whether what was an attribute holds other items."""
        contents = self._of_user[module].get(attribute)
        return contents is not None and contents.changed()

    def changed_buffers(self) -> set[str]:
        """Return the names of buffers that have been written or replaced since."""
        written = {name for name, each, _, version in self._values.values() if name and version_of(each) != version}
        contents = {id(value): copied for value, copied in self._contents}
        for name, module in self._modules.items():
            before: Any = contents[id(module._buffers)]
            written |= {
                f"{name}.{key}" if name else key for key, each in module._buffers.items() if before.get(key) is not each
            }
        return written

    def restore(self) -> None:
        """Put everything back."""
        self.outside.restore()
        for name, module in self._modules.items():
            now: Any = vars(module)
            before = self._attributes[name]
            for key in [key for key in now if key not in before and key != "_compiled_call_impl"]:
                del now[key]
            now.update((key, value) for key, value in before.items() if key != "_compiled_call_impl")
        for value, copied in self._contents:
            value.clear()
            value.update(copied)
        for contents in self._of_user.values():
            for each in contents.values():
                each.restore()
        with torch.no_grad():
            for _, buffer, saved, version in self._values.values():
                # BatchNorm writes its statistics without counting a version.
                dense = buffer.layout is torch.strided
                if version_of(buffer) != version or (dense and not torch.equal(buffer, saved)):
                    buffer.copy_(saved)


def _device_of(model: nn.Module) -> torch.device:
    """Return the GPU of the model, or the CPU if no weight is on a GPU."""
    return next((weight.device for weight in model.parameters() if weight.is_cuda), torch.device("cpu"))
