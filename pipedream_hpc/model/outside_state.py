"""State that a forward reaches besides the tensors of its modules: globals, closures, class attributes, objects.

    modules ──► their functions ──► names in their code ──► globals, functions, classes, objects ... ──► Holders

A Holder is one place in which values are replaced: the globals that a function names, its closure, the attributes of a
class or of an object, a list, an array, an iterator. Code of Python, torch and NumPy is not looked into.
"""

from __future__ import annotations

import functools
import operator
import random
import sys
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from types import CellType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from pipedream_hpc.model.placeholder import Placeholder
from pipedream_hpc.model.writes import version_of

#: A place in which a value is, among all others: the identity of what holds it, and a key.
Place = tuple[int, Any]

#: Attributes that torch gives every module.
OF_TORCH = frozenset(vars(nn.Module())) | {"_compiled_call_impl"}

_ABSENT: Any = type("Absent", (), {})()
#: Key of how many plain values a container has: to append one to a list replaces none.
_COUNT: Any = type("Count", (), {})()
_ATOMS = (str, bytes, bool, int, float, complex, numpy.generic, type(None))
_LIBRARIES = sys.stdlib_module_names | {"torch", "numpy", "transformers", "pipedream_hpc"}
#: Arrays and tensors of more bytes are data, and no state.
MOST_BYTES = 1 << 28
#: Items of longer containers are not looked into.
_MOST_ITEMS = 4096


@dataclass(frozen=True)
class Where:
    """How a place is named.

    Attributes:
        text: in a message: "global 'STEP'".
        module: name of the model's module in whose attribute it is; None if it is in none.
        attribute: that attribute.
        weight: whether it is an attribute of a weight.
    """

    text: str
    module: str | None = None
    attribute: str = ""
    weight: bool = False

    def of(self, key: Any) -> Where:
        """Return how one of its values is named."""
        return replace(self, text=self.text.replace("{key}", str(key)))


@dataclass(eq=False)
class Holder:
    """A place in which values are replaced.

    Attributes:
        of: the object that is the place.
        where: how it is named.
        read: returns its values by key.
        write: puts other values in place of all of them.
        by_name: whether keys are names of attributes.
    """

    of: Any
    where: Where
    read: Callable[[], dict[Any, Any]]
    write: Callable[[Mapping[Any, Any]], None]
    by_name: bool = False


@dataclass(eq=False)
class Change:
    """A value that has been replaced.

    Attributes:
        holder: where it is.
        key: which value of the holder.
        before: what it was, `_ABSENT` if it was not there.
    """

    holder: Holder
    key: Any
    before: Any

    @property
    def place(self) -> Place:
        """What names it among all others."""
        return id(self.holder.of), self.key

    @property
    def text(self) -> str:
        """How a message names it."""
        return self.holder.where.of(self.key).text

    def is_in(self, attributes: Mapping[str, Set[str]]) -> bool:
        """Return whether it is an attribute, or in one, of those that are given by module."""
        where = self.holder.where
        return where.module is not None and (where.attribute or self.key) in attributes.get(where.module, ())

    def again(self) -> bool:
        """Return whether it has been replaced since the last time that this returned true."""
        now = self.holder.read().get(self.key, _ABSENT)
        if _alike(self.before, now):
            return False
        self.before = now
        return True


class OutsideState:
    """What the code of modules reaches, as it is now.

    Args:
        model: the model.
        modules: which of its modules, by name; all by default. Those in them count if they are here, too.
        attributes: whether attributes of the modules count, besides what these hold.
    """

    def __init__(
        self, model: nn.Module, modules: Mapping[str, nn.Module] | None = None, *, attributes: bool = True
    ) -> None:
        named = dict(model.named_modules()) if modules is None else modules
        self._reach = reach = _Reach(model, named, attributes)
        self.tensors = reach.tensors
        self._held = [(holder, holder.read()) for holder in reach.holders]
        self._values = [
            (each, each.detach().clone(), version_of(each))
            for each, _ in self.tensors
            if each.is_leaf and not each.is_meta and not isinstance(each, FakeTensor)
        ]

    def places(self) -> set[Place]:
        """Return the places that the code of the modules names, or may change (see Change)."""
        found = {
            (id(holder.of), key)
            for holder, values in self._held
            for key in values
            if (not holder.by_name or key in self._reach.names)
            # What an attribute holds that no code names is only changed by hooks, as in a log.
            and (not holder.where.attribute or holder.where.attribute in self._reach.names)
        }
        return found | {(id(each), "") for each, _ in self.tensors}

    def changes(self) -> list[Change]:
        """Return where a number or another plain value, but no flag, has been put, or a tensor replaced.

        What was not there and is no plain value is a cache.
        """
        found = []
        for holder, before in self._held:
            now = holder.read()
            if _identical(before, now):
                continue
            for key in before | now:
                old, new = before.get(key, _ABSENT), now.get(key, _ABSENT)
                if isinstance(new, bool):
                    continue  # most often a flag that something has been done: a warning, a cache
                if not _alike(old, new) and (
                    isinstance(old, (int, float, torch.Tensor)) or (_is_plain(new) and new is not _ABSENT)
                ):
                    found.append(Change(holder, key, old))
        return found

    def restore(self) -> None:
        """Put everything back."""
        for holder, before in self._held:
            if not _identical(before, holder.read()):
                holder.write(before)
        with torch.no_grad():
            for tensor, value, version in self._values:
                if version_of(tensor) != version:
                    tensor.copy_(value)


def settle(changes: Iterable[Change]) -> Callable[[], list[Change]]:
    """Note plain values as they are now; return what puts them back and returns the changes as those from there."""
    settled = [(each, each.holder.read().get(each.key, _ABSENT)) for each in changes]

    def put() -> list[Change]:
        for each, value in settled:
            if _is_plain(value):
                values = each.holder.read()
                if value is _ABSENT:
                    values.pop(each.key, None)
                else:
                    values[each.key] = value
                each.holder.write(values)
        for each, _ in settled:
            each.before = each.holder.read().get(each.key, _ABSENT)
        return [each for each, _ in settled]

    return put


def _identical(one: dict[Any, Any], other: dict[Any, Any]) -> bool:
    return (
        len(one) == len(other) and all(map(operator.is_, one, other)) and all(map(_same, one.values(), other.values()))
    )


def _same(one: Any, other: Any) -> bool:
    return one is other or (isinstance(one, _Saved) and one == other)


def _alike(one: Any, other: Any) -> bool:
    if one is other:
        return True
    return _is_plain(one) and _is_plain(other) and type(one) is type(other) and bool(one == other)


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is _ABSENT or isinstance(value, (*_ATOMS, _Saved))


# -- what is held -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Saved:
    """What an object was whose values are no Python objects, such as an array."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Saved) and _equal(self.value, other.value)

    __hash__ = None  # type: ignore[assignment]


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, _Mark):
        return isinstance(other, _Mark) and one.position == other.position
    if isinstance(one, numpy.ndarray) and isinstance(other, numpy.ndarray):
        return one.shape == other.shape and one.dtype == other.dtype and one.tobytes() == other.tobytes()
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(value, other[key]) for key, value in one.items())
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)


def _set_array(array: Any, value: Any) -> None:
    array[...] = value


def _set_bits(generator: Any, value: Any) -> None:
    generator.bit_generator.state = value


#: Objects that can be put back: how their state is read and set.
_SAVED: tuple[tuple[type, Callable[[Any], Any], Callable[[Any, Any], Any]], ...] = (
    (numpy.ndarray, lambda array: array.copy(), _set_array),
    (random.Random, lambda each: each.getstate(), lambda each, value: each.setstate(value)),
    (numpy.random.Generator, lambda each: each.bit_generator.state, _set_bits),
    (numpy.random.RandomState, lambda each: each.get_state(), lambda each, value: each.set_state(value)),
    (torch.Generator, lambda each: each.get_state(), lambda each, value: each.set_state(value)),
)


def _count_of(values: Collection[Any]) -> _Saved:
    return _Saved(len(values) if len(values) > _MOST_ITEMS else sum(map(_is_plain, values)))


@dataclass(eq=False)
class _Mark:
    """A position in an iterator."""

    position: int


class Replayed:
    """An iterator that can go back to where it was marked; it stands in place of the user's.

    Args:
        iterator: the user's.
    """

    def __init__(self, iterator: Iterator[Any]) -> None:
        self._iterator, self._items, self._first = iterator, deque[Any](), 0
        self._marks: weakref.WeakSet[_Mark] = weakref.WeakSet()
        self.position = 0

    def __iter__(self) -> Replayed:
        return self

    def __next__(self) -> Any:
        if self.position == self._first + len(self._items):
            self._items.append(next(self._iterator))
        self.position += 1
        return self._items[self.position - 1 - self._first]

    def __reduce__(self) -> Any:
        ahead = [self._items[index - self._first] for index in range(self.position, self._first + len(self._items))]
        return _replayed, (self._iterator, ahead)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._iterator, name)

    def mark(self) -> _Mark:
        """Return the position; until it is let go, the iterator can go back there."""
        made = _Mark(self.position)
        self._marks.add(made)
        while self._items and self._first < min(each.position for each in self._marks):
            self._items.popleft()
            self._first += 1
        return made


def _replayed(iterator: Iterator[Any], ahead: list[Any]) -> Replayed:
    made = Replayed(iterator)
    made._items.extend(ahead)
    return made


def _is_iterator(value: Any) -> bool:
    return type(value).__module__ in ("builtins", "itertools") and hasattr(value, "__next__")


# -- what is reached --------------------------------------------------------------------------------------------------


def _package_of(value: Any) -> str:
    return str(getattr(value, "__module__", None)).partition(".")[0]


@functools.lru_cache
def _is_installed(package: str) -> bool:
    file = getattr(sys.modules.get(package), "__file__", None) or ""
    return "site-packages" in file or "dist-packages" in file


@functools.lru_cache(maxsize=4096)
def _names_in(code: CodeType) -> frozenset[str]:
    """Return the names of globals and attributes in a function's code, and in the functions in it."""
    inner = (each for each in code.co_consts if isinstance(each, CodeType))
    return frozenset(code.co_names).union(*map(_names_in, inner))


@dataclass
class _Namespace:
    """The names of a namespace that count."""

    of: dict[str, Any]
    where: Where
    names: set[str] = field(default_factory=set)


class _Reach:
    def __init__(self, model: nn.Module, modules: Mapping[str, nn.Module], attributes: bool) -> None:
        self.holders: list[Holder] = []
        self.tensors: list[tuple[torch.Tensor, Where]] = []
        self._seen = {id(each) for each in model.modules()}
        self._live: list[Any] = []  # an identity is unique only while the object is live
        self._todo: list[tuple[Any, Where]] = []
        self._namespaces: dict[int, _Namespace] = {}
        self._of_modules: list[_Namespace] = []  # of Python's modules: all names count that are in any code
        self.names = {"forward", "__call__", "__getattr__"}  # in all code
        self._packages = {_package_of(type(each)) for each in modules.values()}
        self._members: list[tuple[str, Any, Where]] = []  # functions of classes, looked into once they are named
        for name, module in modules.items():
            self._module(name, module, attributes)
        while self._todo or self._named():
            while self._todo:
                self._visit(*self._todo.pop())
        for each in self._namespaces.values():
            self._hold_namespace(each)

    def _module(self, name: str, module: nn.Module, own: bool) -> None:
        attributes = vars(module)
        for key, value in attributes.items():
            if key not in OF_TORCH:
                self._item(attributes, key, value, Where(f"what '{key}' holds", name, key))
            elif key == "_parameters":
                for weight in value:
                    self._weight(value, weight, f"{name}.{weight}" if name else weight)
            elif key.endswith("_hooks") and value:
                self._todo += [(each, Where("")) for each in list(value.values())]
        if own:
            self._attributes(module, Where(f"'{{key}}' of module '{name}'", name), OF_TORCH)
        self._todo.append((type(module), Where("")))

    def _weight(self, weights: dict[str, Any], key: str, name: str) -> None:
        """Hold the attributes of a weight, or of what stands for it."""
        if weights[key] is not None:
            self._hold(
                weights,
                Where(f"'{{key}}' of weight '{name}'", weight=True),
                lambda: _attributes_of(weights[key]),
                lambda values: _write_attributes(weights[key], values),
                by_name=True,
            )

    def _named(self) -> bool:
        """Look into what has been named by now; return whether there is anything."""
        members, self._members = self._members, []
        for name, value, where in members:
            if name in self.names:
                self._todo.append((value, where))
            else:
                self._members.append((name, value, where))
        for each in self._of_modules:
            self._use(each, self.names)
        return bool(self._todo)

    def _namespace(self, namespace: dict[str, Any], where: Where) -> _Namespace:
        return self._namespaces.setdefault(id(namespace), _Namespace(namespace, where))

    def _use(self, namespace: _Namespace, names: Set[str]) -> None:
        new = names - namespace.names
        namespace.names |= new
        for name in new & namespace.of.keys():
            self._item(namespace.of, name, namespace.of[name], namespace.where.of(name))

    def _visit(self, value: Any, where: Where) -> None:
        if isinstance(value, (*_ATOMS, Placeholder, nn.Parameter)) or id(value) in self._seen:
            return
        self._seen.add(id(value))
        self._live.append(value)
        if isinstance(value, torch.Tensor):
            if value.nbytes <= MOST_BYTES:
                self.tensors.append((value, where))
        elif isinstance(value, FunctionType):
            self._function(value)
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, MethodType):
            self._todo += [(value.__func__, where), (value.__self__, where)]
        elif isinstance(value, functools.partial):
            self._todo += [(each, where) for each in (value.func, *value.args, *value.keywords.values())]
        elif isinstance(value, staticmethod | classmethod):
            self._todo.append((value.__func__, where))
        elif isinstance(value, property):
            self._todo += [(each, where) for each in (value.fget, value.fset) if each is not None]
        elif isinstance(value, ModuleType):
            if self._is_of_user(value.__name__):
                self._of_modules.append(self._namespace(vars(value), Where(f"'{{key}}' of {value.__name__}")))
        elif isinstance(value, tuple):
            self._todo += [(each, where) for each in value[:_MOST_ITEMS]]
        elif isinstance(value, _KINDS):
            self._saved(value, where)
        else:
            self._object(value, where)

    def _saved(self, value: Any, where: Where) -> None:
        get, put = next((get, put) for kind, get, put in _SAVED if isinstance(value, kind))
        if getattr(value, "nbytes", 0) <= MOST_BYTES and not getattr(getattr(value, "dtype", None), "hasobject", False):
            self._hold(value, where, lambda: {"": _Saved(get(value))}, lambda values: put(value, values[""].value))

    def _object(self, value: Any, where: Where) -> None:
        kind = type(value)
        if isinstance(value, dict):
            self._mapping(value, where, counted=True)
        elif isinstance(value, list) and any(isinstance(each, nn.Parameter) for each in value):
            pass  # torch's recurrent layers list their weights, which stages replace
        elif isinstance(value, list | deque):
            self._items(value, enumerate(value), where)

            def put(values: Mapping[Any, Any]) -> None:
                value.clear()
                value.extend(values[key] for key in sorted(values.keys() - {_COUNT}))

            self._hold(value, where, lambda: {**dict(enumerate(value)), _COUNT: _count_of(value)}, put)
        elif isinstance(value, set):

            def put_set(values: Mapping[Any, Any]) -> None:
                value.clear()
                value.update(values.keys() - {_COUNT})

            self._hold(value, where, lambda: {**dict.fromkeys(value, True), _COUNT: _count_of(value)}, put_set)
        wrapped = getattr(value, "__wrapped__", None)
        if isinstance(wrapped, FunctionType):  # functools.cache
            self._todo.append((wrapped, where))
        if kind is SimpleNamespace or isinstance(value, nn.Module) or self._is_of_user(kind.__module__):
            named = Where(f"'{{key}}' of a {kind.__name__}", where.module, where.attribute)
            self._attributes(value, named, ())
            if self._is_of_user(kind.__module__):
                self._todo.append((kind, where))

    def _function(self, function: FunctionType) -> None:
        if not self._is_of_user(function.__module__):
            return
        named = function.__qualname__
        names = _names_in(function.__code__)
        self.names |= names
        self._use(self._namespace(function.__globals__, Where("global '{key}'")), names)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            self._cell(name, cell, named)
        self._attributes(function, Where(f"'{{key}}' of function {named}"), ())
        self._todo.append((function.__defaults__ or (), Where(f"a default of {named}")))
        self._todo.append((tuple((function.__kwdefaults__ or {}).values()), Where(f"a default of {named}")))

    def _cell(self, name: str, cell: CellType, function: str) -> None:
        if id(cell) in self._seen:
            return
        self._seen.add(id(cell))
        where = Where(f"'{name}' of the closure {function}")

        def read() -> dict[Any, Any]:
            try:
                return {"": cell.cell_contents}
            except ValueError:  # empty
                return {}

        def write(values: Mapping[Any, Any]) -> None:
            if values:
                cell.cell_contents = values[""]
            else:
                del cell.cell_contents

        for value in read().values():
            if _is_iterator(value):
                cell.cell_contents = Replayed(value)
            self._value(cell.cell_contents, where)
        self._hold(cell, where, read, write)

    def _class(self, kind: type) -> None:
        for base in kind.__mro__:
            if (id(base) in self._seen and base is not kind) or not self._is_of_user(base.__module__):
                continue
            self._seen.add(id(base))
            for key, value in list(vars(base).items()):
                if isinstance(value, FunctionType | staticmethod | classmethod | property | functools.cached_property):
                    function = value.func if isinstance(value, functools.cached_property) else value
                    self._members.append((key, function, Where("")))
                elif not key.startswith("__"):
                    if _is_iterator(value):
                        value = Replayed(value)
                        setattr(base, key, value)
                    self._value(value, Where(f"'{key}' of class {base.__name__}"))
            self._hold(
                base,
                Where(f"'{{key}}' of class {base.__name__}"),
                functools.partial(_read_class, base),
                functools.partial(_write_class, base),
                by_name=True,
            )

    def _attributes(self, value: Any, where: Where, but: Iterable[str]) -> None:
        """Hold the attributes of an object, those in slots included."""
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict):
            self._mapping(attributes, where, but, by_name=True)
        slots = [
            each
            for base in type(value).__mro__
            for each in _slots_of(base)
            if each not in ("__dict__", "__weakref__") and self._is_of_user(base.__module__)
        ]
        if not slots:
            return

        def read() -> dict[Any, Any]:
            return {each: getattr(value, each) for each in slots if hasattr(value, each)}

        def write(values: Mapping[Any, Any]) -> None:
            for each in slots:
                if each in values:
                    object.__setattr__(value, each, values[each])
                elif hasattr(value, each):
                    object.__delattr__(value, each)

        for key, item in read().items():
            self._value(item, where.of(key))
        self._hold(value, where, read, write, by_name=True)

    def _mapping(
        self,
        value: dict[Any, Any],
        where: Where,
        but: Iterable[str] = (),
        *,
        by_name: bool = False,
        counted: bool = False,
    ) -> None:
        left_out = frozenset(but)
        if not left_out:
            self._items(value, list(value.items()), where)

        def read() -> dict[Any, Any]:
            found = {key: each for key, each in value.items() if key not in left_out} if left_out else dict(value)
            return {**found, _COUNT: _count_of(found.values())} if counted else found

        def write(values: Mapping[Any, Any]) -> None:
            for key in [key for key in value if key not in values and key not in left_out]:
                del value[key]
            value.update((key, each) for key, each in values.items() if key is not _COUNT)

        self._hold(value, where, read, write, by_name=by_name)

    def _hold_namespace(self, each: _Namespace) -> None:
        namespace, names = each.of, sorted(each.names)

        def read() -> dict[Any, Any]:
            return {name: namespace[name] for name in names if name in namespace}

        def write(values: Mapping[Any, Any]) -> None:
            for name in names:
                if name not in values:
                    namespace.pop(name, None)
            namespace.update(values)

        self._hold(namespace, each.where, read, write)

    def _items(self, container: Any, items: Iterable[tuple[Any, Any]], where: Where) -> None:
        for _, (key, item) in zip(range(_MOST_ITEMS), list(items), strict=False):
            self._item(container, key, item, where.of(key))

    def _item(self, container: Any, key: Any, item: Any, where: Where) -> None:
        if _is_iterator(item):
            item = container[key] = Replayed(item)
        self._value(item, where)

    def _value(self, value: Any, where: Where) -> None:
        if not isinstance(value, Replayed):
            self._todo.append((value, where))
        elif id(value) not in self._seen:
            self._seen.add(id(value))
            self._live.append(value)

            def put(values: Mapping[Any, Any]) -> None:
                value.position = values[""].value.position

            self._hold(value, where, lambda: {"": _Saved(value.mark())}, put)

    def _hold(
        self,
        of: Any,
        where: Where,
        read: Callable[[], dict[Any, Any]],
        write: Callable[[Mapping[Any, Any]], None],
        *,
        by_name: bool = False,
    ) -> None:
        self._live.append(of)
        self.holders.append(Holder(of, where, read, write, by_name))

    def _is_of_user(self, module: str | None) -> bool:
        """Return whether code is the user's, by the name of its module: his own files, and the packages of modules."""
        package = "" if module is None else module.partition(".")[0]
        known = package in self._packages or not _is_installed(package)
        return bool(package) and package not in _LIBRARIES and known


_KINDS = tuple(kind for kind, _, _ in _SAVED)


@functools.cache
def _of_fakes() -> frozenset[str]:
    """Return the attributes that every tensor without values has."""
    with FakeTensorMode():
        return frozenset(vars(torch.empty(0)))


def _attributes_of(weight: nn.Parameter) -> dict[Any, Any]:
    """Return the attributes that the user has set on a weight, or on what stands for it."""
    others = _of_fakes() if isinstance(weight, FakeTensor) else frozenset[str]()
    return {key: value for key, value in vars(weight).items() if not key.startswith("_") and key not in others}


def _write_attributes(weight: nn.Parameter, values: Mapping[Any, Any]) -> None:
    for key in _attributes_of(weight).keys() - values.keys():
        delattr(weight, key)
    vars(weight).update(values)


def _slots_of(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _read_class(kind: type) -> dict[Any, Any]:
    return {
        key: value
        for key, value in vars(kind).items()
        if not key.startswith("__") and not callable(value) and not hasattr(type(value), "__get__")
    }


def _write_class(kind: type, values: Mapping[Any, Any]) -> None:
    now = _read_class(kind)
    for key in now.keys() - values.keys():
        delattr(kind, key)
    for key, value in values.items():
        if now.get(key, _ABSENT) is not value:
            setattr(kind, key, value)
