"""Drawn: random numbers in a forward that is recorded, and what depends on them."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy
import torch

from pipedream_hpc.model.calls import unwatched
from pipedream_hpc.model.functions import READS_VALUES, function_name
from pipedream_hpc.model.structure import map_tensors, tensors_of_value

#: Names of torch's functions that draw random numbers.
DRAWING = frozenset(
    {
        *("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal", "poisson"),
        *("bernoulli", "multinomial", "binomial", "rrelu", "rrelu_", "gumbel_softmax"),
        *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "dropout_"),
        *("feature_dropout", "feature_dropout_", "alpha_dropout_", "feature_alpha_dropout_", "native_dropout"),
        *("uniform_", "normal_", "bernoulli_", "random_", "exponential_", "geometric_", "cauchy_", "log_normal_"),
        *("scaled_dot_product_attention", "multi_head_attention_forward"),
    }
)


#: Draw numbers from 0 on and less than 1.
_FRACTIONS = frozenset({"rand", "rand_like"})


@dataclass(frozen=True)
class _Tensor:
    """A tensor that depends on random numbers.

    Attributes:
        tensor: the tensor, whose identity is its own only while it is live.
        ends: what it would be for the smallest and for the largest numbers; None if unknown.
    """

    tensor: torch.Tensor
    ends: tuple[torch.Tensor, torch.Tensor] | None


class Drawn:
    """The tensors in a forward that depend on random numbers and on no call."""

    def __init__(self) -> None:
        self._found: dict[int, _Tensor] = {}

    def call(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], run: Callable[[], Any]
    ) -> tuple[Any, bool]:
        """Call a function; note what it returns or writes, if it draws or takes what was drawn.

        Args:
            function: the function.
            args: its positional arguments.
            kwargs: its keyword arguments.
            run: calls it with them.

        Returns:
            what it returns, and whether that tells Python something that depends on what was drawn.
        """
        name = function_name(function)
        given = [self._found[id(each)] for each in tensors_of_value((args, kwargs)) if id(each) in self._found]
        if name not in DRAWING and not given:
            return run(), False
        ends: tuple[Any, Any] | None = None
        if name not in DRAWING and all(each.ends is not None for each in given):
            with suppress(Exception), unwatched():  # it may not be defined there
                ends = self._at_end(0, function, args, kwargs), self._at_end(1, function, args, kwargs)
        returned = run()
        if name in _FRACTIONS:
            most = 1 - torch.finfo(returned.dtype).eps / 2
            ends = torch.zeros_like(returned), torch.full_like(returned, most)
        written = args[:1] if returned is None else returned  # as by x[0] = ...
        smallest, largest = (tensors_of_value(end) for end in ends or (None, None))
        for position, each in enumerate(tensors_of_value(written)):
            self._found[id(each)] = _Tensor(each, None if ends is None else (smallest[position], largest[position]))
        return returned, name in READS_VALUES and (ends is None or not numpy.array_equal(*ends))

    def _at_end(self, end: int, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return what a function returns, or else writes, for the smallest or for the largest random numbers."""

        def replaced(each: torch.Tensor) -> torch.Tensor:
            drawn = self._found.get(id(each))
            return (each if drawn is None or drawn.ends is None else drawn.ends[end]).clone()

        new_args, new_kwargs = map_tensors(replaced, (tuple(args), dict(kwargs)))
        returned = function(*new_args, **new_kwargs)
        return new_args[:1] if returned is None else returned


def draws_numbers(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Return whether an operation draws random numbers. Attention without dropout has the tag, but does not."""
    names = _names_if_random(function)
    if names is None:
        return False
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return "dropout_p" not in names or bool(given.get("dropout_p"))


@cache  # a model calls few operations, each of them often
def _names_if_random(function: Any) -> list[str] | None:
    """Return the names of an operation's arguments if it may draw random numbers."""
    if torch.Tag.nondeterministic_seeded not in function.tags:
        return None
    return [argument.name for argument in function._schema.arguments]


def python_generators() -> tuple[int, int]:
    """Return numbers that change when Python's or NumPy's generator does."""
    state: Any = numpy.random.get_state()
    return hash(random.getstate()), hash(state[1].tobytes())
