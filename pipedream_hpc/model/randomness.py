"""Random numbers that depend on explicit seeds, and not on what this process has drawn before."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy
import torch
from torch import nn

from pipedream_hpc.model.calls import call_function, call_unwatched, is_watching, unwatched, watched
from pipedream_hpc.model.graph import Notes


def seed_for(*what: object) -> int:
    """Return a 63-bit seed that depends only on `what`: the same on every rank and under every plan."""
    digest = hashlib.blake2b(repr(what).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def set_seed(seed: int) -> None:
    """Seed torch's generators of the CPU and, once CUDA is in use, of the current CUDA device.

    torch.manual_seed does the same, but takes 200 µs: it collects a stack trace for every device type that is absent.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(seed)


@contextmanager
def preserve_rng_state(device: torch.device) -> Iterator[None]:
    """Restore the generators that `set_seed` seeds when the block ends."""
    devices = set()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        devices.add(torch.cuda.current_device())
    if device.type == "cuda":
        devices.add(torch.cuda.current_device() if device.index is None else device.index)
    with torch.random.fork_rng(devices=sorted(devices)):
        yield


#: Seeds the generators for a draw with this name; None while no stage computes.
_reseed: Callable[[str], None] | None = None
#: How often each module has been called so far, of those whose draws are numbered.
_calls: dict[str, int] = {}


def seeding(reseed: Callable[[str], None] | None) -> AbstractContextManager[None]:
    """Seed what modules and functions draw in the block, one by one, by their names: it does not depend on the plan.

    Args:
        reseed: seeds the generators for a draw with a name; None to seed nothing.
    """
    return _Seeding(reseed)


class _Seeding(AbstractContextManager[None]):
    __slots__ = ("_before", "_now")

    def __init__(self, reseed: Callable[[str], None] | None) -> None:
        self._now = reseed

    def __enter__(self) -> None:
        global _reseed, _calls
        self._before = _reseed, _calls
        _reseed, _calls = self._now, {}

    def __exit__(self, *error: object) -> None:
        global _reseed, _calls
        _reseed, _calls = self._before


def seeding_from_here() -> Callable[[], AbstractContextManager[None]]:
    """Return what makes a context, at any time later, in which draws are seeded as they are from here on."""
    reseed, calls = _reseed, dict(_calls)

    @contextmanager
    def again() -> Iterator[None]:
        with seeding(reseed):
            count_calls(calls)
            yield

    return again


def count_calls(calls: Mapping[str, int]) -> None:
    """Count calls of modules that another stage makes."""
    for name, count in calls.items():
        _calls[name] = _calls.get(name, 0) + count


def seed_draw(number: int) -> None:
    """Seed a draw by a function in an opened module, by the number of such draws before it in the forward."""
    if _reseed is not None:
        _reseed(f"function {number}")


def run_drawing(number: int, run: Callable[[], Any]) -> tuple[Any, bool]:
    """Run a function that may draw random numbers, seeded by the number of draws before; return whether it drew."""
    before = torch.get_rng_state()
    seed_draw(number)
    seeded = torch.get_rng_state()
    returned = run()
    drew = not torch.equal(torch.get_rng_state(), seeded)
    if not drew:
        torch.set_rng_state(before)
    return returned, drew


class DrawsOnly:
    """A watcher under which a model runs as it is, and draws the random numbers that its stages draw.

    Args:
        whole: identities of the modules that are kept whole.
        drawing: functions that draw random numbers.
    """

    def __init__(self, whole: set[int], drawing: set[Any]) -> None:
        self._whole, self._drawing, self._n_draws = whole, drawing, 0

    def module(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if id(module) not in self._whole:
            return call_unwatched(module, args, kwargs)
        with unwatched():
            return call_unwatched(module, args, kwargs)

    def function(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if function not in self._drawing:
            return call_function(function, args, kwargs)
        returned, drew = run_drawing(self._n_draws, lambda: function(*args, **kwargs))
        self._n_draws += drew
        return returned

    @contextmanager
    def checkpointed(self, arguments: Any) -> Iterator[Callable[[Any], AbstractContextManager[None]]]:
        """Let what runs again in backward draw what it drew (see checkpoints.Begin)."""
        n_draws, watching, seeded = self._n_draws, is_watching(self), seeding_from_here()

        @contextmanager
        def again(arguments: Any) -> Iterator[None]:
            before, self._n_draws = self._n_draws, n_draws
            try:
                with seeded(), watched(self) if watching else nullcontext():
                    yield
            finally:
                self._n_draws = before

        yield again


def seed_modules(model: nn.Module, notes: Notes) -> Callable[[], None]:
    """Make every module whose own code draws random numbers seed the generators when it is called.

    Args:
        model: the user's model.
        notes: which modules draw.

    Returns:
        a function that undoes it.
    """
    drawing = (notes.random - notes.random_functions) | notes.python_random
    handles = []
    for name, module in model.named_modules():
        for registered in (module._forward_pre_hooks, module._forward_hooks):
            # Those of an earlier pipeline of the same model: a call is seeded once.
            for key in [key for key, hook in registered.items() if is_seeding(hook)]:
                del registered[key]
        if name not in drawing:
            continue
        inner = any(name.startswith(f"{other}.") or not other for other in drawing - {name})
        hooks = _Hooks(name, restores=inner, python=name in notes.python_random)
        handles.append(module.register_forward_pre_hook(hooks.before, prepend=True))
        if hooks.restores or hooks.python:
            handles.append(module.register_forward_hook(hooks.after, always_call=True))

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo


def is_seeding(hook: Any) -> bool:
    """Return whether a hook of a module is one of seed_modules."""
    return isinstance(getattr(hook, "__self__", None), _Hooks)


class _Hooks:
    """Seeds the generators for one module.

    Args:
        name: qualified name of the module.
        restores: give the generators back as they were: code around it draws, too.
        python: seed Python's and NumPy's generators as well.
    """

    def __init__(self, name: str, *, restores: bool, python: bool) -> None:
        self._name, self.restores, self.python = name, restores, python
        self._before: list[Any] = []

    def before(self, module: nn.Module, arguments: Any) -> None:
        if _reseed is None:
            return
        if self.restores or self.python:
            self._before.append((torch.get_rng_state(), random.getstate(), numpy.random.get_state()))
        number = _calls.get(self._name, 0)
        _calls[self._name] = number + 1
        name = f"{self._name}@{number}" if number else self._name
        _reseed(name)
        if self.python:
            seed = torch.initial_seed()
            random.seed(seed)
            numpy.random.seed(seed % 2**32)

    def after(self, module: nn.Module, arguments: Any, returned: Any) -> None:
        if self._before:
            state, python, numbers = self._before.pop()
            torch.set_rng_state(state)
            random.setstate(python)
            numpy.random.set_state(numbers)
