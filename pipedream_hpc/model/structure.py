"""Tensors in nested values: those of lists, tuples, dicts, dataclasses, and any other object with attributes.

A model may pass anything from one module to another, so this is wider than torch's pytrees: an object that nobody has
registered is searched, too.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch

#: Objects without tensors that are not searched.
_ATOMS = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, torch.Size, type)


def tensors_of_value(value: Any) -> list[torch.Tensor]:
    """Return the tensors in a nested value, in a fixed order; a tensor that occurs twice is there twice."""
    return [value] if isinstance(value, torch.Tensor) else _found(value, objects=True)


def output_tensors(value: Any) -> list[torch.Tensor]:
    """Return the tensors that a model returns; not those in objects of its own, such as a cache of keys and values."""
    return _found(value, objects=False)


def _found(value: Any, *, objects: bool) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    _map(note, value, False, torch.Tensor, set(), objects)
    return found


def map_tensors(function: Callable[[Any], Any], value: Any, *, leaf: type = torch.Tensor, objects: bool = True) -> Any:
    """Return `value` with every tensor in it replaced by function(tensor); objects without tensors stay themselves.

    Args:
        function: called for every tensor, in the order of `tensors_of_value`.
        value: the nested value.
        leaf: what to look for instead of tensors.
        objects: whether to look into objects of other classes than lists, tuples, mappings and dataclasses.
    """
    return _map(function, value, True, leaf, set(), objects)


def at_same_places(template: Any, value: Any, leaf: type) -> list[tuple[Any, torch.Tensor]]:
    """Return (what the template has, the tensor) wherever a template has a `leaf` and the value a tensor.

    The value may have fewer or other items than the template, such as a cache that not all layers have filled.
    """
    found: list[tuple[Any, torch.Tensor]] = []

    def walk(template: Any, value: Any, above: frozenset[int]) -> None:
        if isinstance(template, leaf):
            if isinstance(value, torch.Tensor):
                found.append((template, value))
        elif type(template) is type(value) and id(value) not in above and not isinstance(value, _ATOMS):
            items = dict(items_of(value))
            for key, item in items_of(template):
                if key in items:
                    walk(item, items[key], above | {id(value)})

    walk(template, value, frozenset())
    return found


@dataclasses.dataclass
class Filled:
    """What a call returns, and what else it lets others have.

    Attributes:
        returned: what it returns.
        items: what it puts into dicts and lists that it was given: (number of the container among the call's arguments,
            key or index, item).
        shown: (module, what it returns) for the modules in it that have hooks, which may keep that.
    """

    returned: Any
    items: list[tuple[int, Any, Any]]
    shown: list[tuple[torch.nn.Module, Any]]

    def put_into(self, containers: Sequence[Any]) -> None:
        """Put the items into the containers of a call's arguments."""
        for number, key, item in self.items:
            if isinstance(containers[number], list) and key == len(containers[number]):
                containers[number].append(item)
            else:
                containers[number][key] = item

    def taken_from(
        self, containers: Sequence[Any], returned: Any, shown: Sequence[tuple[torch.nn.Module, Any]] = ()
    ) -> Filled:
        """Return the same of another call, which finds the items in the containers of its arguments."""
        held = [dict(items_of(each)) for each in containers]
        return Filled(returned, [(number, key, held[number].get(key)) for number, key, _ in self.items], list(shown))


class Containers:
    """The dicts and lists in a call's arguments, before the call.

    Attributes:
        found: the containers.
    """

    def __init__(self, value: Any) -> None:
        self.found = containers_in(value)
        self._items = [dict(items_of(each)) for each in self.found]

    def filled(self, returned: Any, shown: list[tuple[torch.nn.Module, Any]] | None = None) -> Any:
        """Return what a call has returned, with what it has put into them and shown to hooks if it has."""
        items = [
            (number, key, item)
            for number, (each, before) in enumerate(zip(self.found, self._items, strict=True))
            for key, item in items_of(each)
            if key not in before or item is not before[key]
        ]
        return Filled(returned, items, shown or []) if items or shown else returned


def containers_in(value: Any) -> list[Any]:
    """Return the lists and mutable mappings in nested lists, tuples and mappings, in a fixed order."""
    found: list[Any] = []

    def walk(value: Any) -> None:
        if isinstance(value, list | MutableMapping):
            if any(value is each for each in found):
                return
            found.append(value)
        if isinstance(value, list | tuple | Mapping):
            for _, item in items_of(value):
                walk(item)

    walk(value)
    return found


def _map(
    function: Callable[[Any], Any], value: Any, rebuild: bool, leaf: type, above: set[int], objects: bool = True
) -> Any:
    if isinstance(value, leaf):
        return function(value)
    if isinstance(value, _ATOMS) or id(value) in above:
        return value
    kind = type(value)
    items = items_of(value, objects=objects)
    if not items:
        return value
    above.add(id(value))
    new = {key: _map(function, item, rebuild, leaf, above, objects) for key, item in items}
    above.discard(id(value))
    if not rebuild or all(new[key] is item for key, item in items):
        return value
    if kind is tuple or kind is list:
        return kind(new.values())
    if hasattr(value, "n_sequence_fields"):  # what torch.max returns
        return kind(tuple(new.values()))
    if isinstance(value, tuple):  # a named tuple; not by its own __new__, which may look at what it is given
        return tuple.__new__(kind, new.values())
    rebuilt = copy.copy(value)
    for key, item in new.items():
        if isinstance(value, Mapping | list):
            rebuilt[key] = item
        else:
            object.__setattr__(rebuilt, key, item)
    return rebuilt


def items_of(value: Any, *, objects: bool = True) -> list[tuple[Any, Any]]:
    """Return the (key, item) pairs of a container or object; none if it is not searched, as objects may not be."""
    if isinstance(value, list | tuple):
        return list(enumerate(value))
    if isinstance(value, Mapping):
        return list(value.items())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name, None)) for field in dataclasses.fields(value)]
    if callable(value) or isinstance(value, torch.nn.Module | torch.Generator):
        return []
    if not objects and not isinstance(value, SimpleNamespace):
        return []
    held = getattr(value, "__dict__", None)
    return list(held.items()) if isinstance(held, dict) else []
