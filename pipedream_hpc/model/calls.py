"""Watch the calls that a model's forward makes: of its modules, and of torch's functions.

While nobody watches, a watched module behaves as usual. A watcher sees each call before it happens, with the arguments
themselves, and decides what it returns::

    model(x) ──► h = self.block(x)        watcher.module(block, (x,), {})
                 y = torch.relu(h) + x    watcher.function(relu, (h,), {}), watcher.function(add, ...)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode, _push_mode


class Watcher(Protocol):
    """Decides what watched calls return."""

    def module(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any: ...
    def function(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any: ...


_watcher: Watcher | None = None


def watch_modules(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """Make modules report their calls to the current watcher; return a function that undoes it."""
    before: list[tuple[nn.Module, Any]] = []
    for module in modules:
        own = vars(module).get("_compiled_call_impl")
        if getattr(own, "is_watched", False):
            continue
        before.append((module, own))
        # Module.__call__ calls this attribute instead of its own implementation, if it is set (Module.compile).
        object.__setattr__(module, "_compiled_call_impl", _watched(module, own))

    def undo() -> None:
        for module, own in before:
            if own is None:
                vars(module).pop("_compiled_call_impl", None)
            else:
                object.__setattr__(module, "_compiled_call_impl", own)

    return undo


def _watched(module: nn.Module, compiled: Callable[..., Any] | None) -> Callable[..., Any]:
    run = compiled or module._call_impl

    def call(*args: Any, **kwargs: Any) -> Any:
        return run(*args, **kwargs) if _watcher is None else _watcher.module(module, args, kwargs)

    call.is_watched = True  # type: ignore[attr-defined]
    return call


def call_unwatched(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call a watched module, with its hooks, without reporting this call; calls within it are reported."""
    implementation: Callable[..., Any] = module._call_impl
    return implementation(*args, **kwargs)


class _FunctionMode(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _watcher is None:
            return function(*args, **(kwargs or {}))
        return _watcher.function(function, args, kwargs or {})


_MODE = _FunctionMode()


class Applied:
    """An autograd.Function that a forward applies, as a function.

    Args:
        kind: its class.
    """

    def __init__(self, kind: type[torch.autograd.Function]) -> None:
        self.kind, self.__name__ = kind, kind.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _APPLY.__func__(self.kind, *args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Applied) and other.kind is self.kind

    def __hash__(self) -> int:
        return hash(self.kind)


#: torch.autograd.Function.apply, which torch's function modes do not see.
_APPLY: Any = vars(torch.autograd.Function)["apply"]


def _watched_apply(kind: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
    if _watcher is None:
        return _APPLY.__func__(kind, *args, **kwargs)
    return _watcher.function(Applied(kind), args, kwargs)


def watched(watcher: Watcher, *, functions: bool = True, applied: bool = True) -> AbstractContextManager[None]:
    """Report the calls in the block to `watcher`.

    Args:
        watcher: decides what the calls return.
        functions: report torch's functions as well.
        applied: report autograd.Functions as well, as Applied.
    """
    return _Watched(watcher, functions, applied)


def is_watching(watcher: Watcher) -> bool:
    """Return whether calls are reported to `watcher` now."""
    return _watcher is watcher


def unwatched() -> AbstractContextManager[None]:
    """Report no calls in the block, which runs at full speed."""
    return _Unwatched()


# Both are entered for every microbatch, or for every module of it; generators would take three times as long.


class _Watched(AbstractContextManager[None]):
    __slots__ = ("_applied", "_before", "_functions", "_watcher")

    def __init__(self, watcher: Watcher, functions: bool, applied: bool) -> None:
        self._watcher, self._functions, self._applied = watcher, functions, applied

    def __enter__(self) -> None:
        global _watcher
        self._before, _watcher = _watcher, self._watcher
        if self._applied:
            torch.autograd.Function.apply = classmethod(_watched_apply)  # type: ignore[assignment, method-assign]
        if self._functions:
            _push_mode(_MODE)  # type: ignore[no-untyped-call]

    def __exit__(self, *error: object) -> None:
        global _watcher
        if self._functions:
            _remove_mode()
        if self._applied:
            torch.autograd.Function.apply = _APPLY  # type: ignore[method-assign]
        _watcher = self._before


class _Unwatched(AbstractContextManager[None]):
    __slots__ = ("_before", "_on_top")

    def __enter__(self) -> None:
        global _watcher
        self._before, _watcher = _watcher, None
        self._on_top = _get_current_function_mode() is _MODE  # type: ignore[no-untyped-call]
        if self._on_top:
            _pop_mode()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: object) -> None:
        global _watcher
        if self._on_top:
            _push_mode(_MODE)  # type: ignore[no-untyped-call]
        _watcher = self._before


def call_function(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call a function; the calls in an autograd.Function are not reported."""
    if not isinstance(function, Applied):
        return function(*args, **kwargs)
    with unwatched():
        return function(*args, **kwargs)


def _remove_mode() -> None:
    """Take our mode off the stack; a model that failed may have left others above it."""
    above = []
    while (mode := _pop_mode()) is not _MODE:  # type: ignore[no-untyped-call]
        above.append(mode)
    for mode in reversed(above):
        _push_mode(mode)  # type: ignore[no-untyped-call]
