"""Activation checkpointing in the user's own forward: what runs again in backward runs as it ran in the forward.

::

    h = checkpoint(self.block, x)      forward    begin(x) ──► again      self.block(x)
                                       backward   with again(x):          self.block(x)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.utils import checkpoint

#: Called with the arguments of a part that is checkpointed. Its context lasts as long as the part runs in the forward,
#: and yields what the part runs in when it runs again, with the arguments it has then; or None not to checkpoint it.
Begin = Callable[[Any], AbstractContextManager[Callable[[Any], AbstractContextManager[None]] | None]]

_begin: Begin | None = None
_is_counting = False

# torch offers no place to step in: these two make all checkpoints, however a program has imported `checkpoint`.
_GENERATOR: Any = checkpoint._checkpoint_without_reentrant_generator
_REENTRANT = checkpoint.CheckpointFunction
_N_OPTIONS = sum(
    each.kind is each.POSITIONAL_OR_KEYWORD and each.name != "fn"
    for each in inspect.signature(_GENERATOR).parameters.values()
)


class NotKeptError(RuntimeError):
    """What somebody looks for in autograd's graph is not kept, but computed again from the arguments of its part.

    Attributes:
        arguments: the arguments, which are kept.
    """

    def __init__(self, arguments: Any) -> None:
        super().__init__("computed again in backward")
        self.arguments = arguments


@contextmanager
def counting_what_is_kept() -> Iterator[None]:
    """Raise NotKeptError in the block instead of running a part again."""
    global _is_counting
    before, _is_counting = _is_counting, True
    try:
        yield
    finally:
        _is_counting = before


@contextmanager
def checkpoints(begin: Begin) -> Iterator[None]:
    """Call `begin` for every part that a forward checkpoints in the block."""
    global _begin
    before, _begin = _begin, begin
    checkpoint._checkpoint_without_reentrant_generator = _checkpointed  # type: ignore[assignment]
    _REENTRANT.apply = _without_reentrance  # type: ignore[method-assign]
    try:
        yield
    finally:
        _begin = before
        if before is None:
            checkpoint._checkpoint_without_reentrant_generator = _GENERATOR
            del _REENTRANT.apply  # the inherited one is back


def _checkpointed(function: Callable[..., Any], *given: Any, **kwargs: Any) -> Iterator[None]:
    """Yield where the part runs in the forward, as the generator that this stands for."""
    assert _begin is not None
    options, args = given[:_N_OPTIONS], given[_N_OPTIONS:]
    with _begin((args, kwargs)) as again:
        if again is None:
            yield
            return

        def run(*args: Any, **kwargs: Any) -> Any:
            if _is_counting:
                raise NotKeptError((args, kwargs))
            with again((args, kwargs)):
                return function(*args, **kwargs)

        yield from _GENERATOR(run, *options, *args, **kwargs)


def _without_reentrance(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
    """Checkpoint with the same results as the reentrant kind, which has no gradient where none of its arguments has."""
    trains = any(isinstance(each, torch.Tensor) and each.requires_grad for each in args)
    with nullcontext() if trains else torch.no_grad():
        return checkpoint.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)
