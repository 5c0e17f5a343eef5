"""Arguments: how a minibatch's inputs become the arguments of the model's forward."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, Dataset

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.model.structure import map_tensors


@dataclass(frozen=True)
class Arguments:
    """The arguments of one call of a model.

    Attributes:
        args: the positional arguments.
        kwargs: the keyword arguments.
        names: the names of the positional arguments in the signature of forward, where it has names for them.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    names: tuple[str, ...] = ()

    def named(self) -> dict[str, Any]:
        """Return the arguments by name; positional ones without a name are numbered."""
        positional = {
            self.names[index] if index < len(self.names) else f"input {index}": value
            for index, value in enumerate(self.args)
        }
        return {**positional, **self.kwargs}

    def tensors(self) -> list[torch.Tensor]:
        """Return the tensors among them."""
        return _tensors((self.args, self.kwargs))

    def has_values(self) -> bool:
        """Return whether there are others than tensors and None, such as numbers, which may differ by minibatch."""
        return any(not isinstance(leaf, torch.Tensor | None) for leaf in tree_leaves((self.args, self.kwargs)))

    def exceeds(self, other: Arguments) -> bool:
        """Return whether a tensor is larger than the other's, in any dimension."""
        limits = other.named()
        pairs = (
            pair
            for name, value in self.named().items()
            for pair in zip(_tensors(value), _tensors(limits.get(name)), strict=False)
        )
        return any(a > b for own, limit in pairs for a, b in zip(own.shape, limit.shape, strict=False))

    def like(self, inputs: Any, optional: Collection[str] = ()) -> Arguments:
        """Return a minibatch's inputs as arguments of the same call.

        Args:
            inputs: of the minibatch.
            optional: keyword arguments that may be missing.

        Raises:
            PipedreamError: they are others than those of the example.
        """
        if self.kwargs:
            given = inputs if isinstance(inputs, Mapping) else None
            if given is None:
                raise PipedreamError(
                    f"the loader yielded inputs of type {type(inputs).__name__}, but example_inputs is a mapping of "
                    f"{', '.join(self.kwargs)}: let both be the same"
                )
            # An option that is no tensor, such as use_cache=False, is taken from the example where it is not given.
            options = {name: value for name, value in self.kwargs.items() if not isinstance(value, torch.Tensor)}
            given = {**options, **given}
            kept = {name: None for name in self.kwargs if name in given or name not in optional}
            _same_names(given, kept)
            return Arguments((), {name: given[name] for name in kept}, self.names)
        if len(self.args) == 1 and isinstance(self.args[0], Mapping) and isinstance(inputs, Mapping):
            _same_names(inputs, self.args[0])
            return Arguments((inputs,), {}, self.names)
        if isinstance(inputs, Mapping):
            names = self.names[: len(self.args)]
            _same_names(inputs, dict.fromkeys(names))
            return Arguments(tuple(inputs[name] for name in names), {}, self.names)
        args = tuple(inputs) if type(inputs) in (tuple, list) else (inputs,)
        if len(args) != len(self.args):
            raise PipedreamError(
                f"the loader yielded {len(args)} inputs, but example_inputs has {len(self.args)} "
                f"({', '.join(self.names[: len(self.args)])}): let it yield ((input, ...), target) with the inputs of "
                "example_inputs"
            )
        return Arguments(args, {}, self.names)

    def copied(self) -> Arguments:
        """Return them with copies of the tensors."""
        args, kwargs = tree_map(
            lambda each: each.clone() if isinstance(each, torch.Tensor) else each, (self.args, self.kwargs)
        )
        return Arguments(args, kwargs, self.names)

    def on_meta(self) -> Arguments:
        """Return them with tensors on the meta device."""

        def meta(value: Any) -> Any:
            # Not empty_like: a slice's own bytes count, and not those of the data set that it is a view of.
            if not isinstance(value, torch.Tensor):
                return value
            return torch.empty(value.shape, dtype=value.dtype, device="meta")

        args, kwargs = tree_map(meta, (self.args, self.kwargs))
        return Arguments(args, kwargs, self.names)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _same_names(given: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    missing = [name for name in expected if name not in given]
    more = [str(name) for name in given if name not in expected]
    if missing:
        raise PipedreamError(
            f"the inputs of the loader have no '{missing[0]}', which example_inputs has, but "
            f"{', '.join(map(str, given))}: give all that example_inputs has; an evaluation may leave out those whose "
            "default in the model's forward is None"
        )
    if more:
        raise PipedreamError(
            f"the inputs of the loader have '{more[0]}', which example_inputs does not have: give a minibatch's inputs "
            "as example_inputs"
        )


def optional_inputs(model: nn.Module) -> set[str]:
    """Return the names of the arguments that the model does without."""
    return {name for name, each in inspect.signature(model.forward).parameters.items() if each.default is None}


def as_tensors(value: Any) -> Any:
    """Return a minibatch with its NumPy arrays of numbers as tensors, which share their memory if they can."""
    return map_tensors(_as_tensor, value, leaf=numpy.ndarray, objects=False)


def _as_tensor(array: numpy.ndarray[Any, Any]) -> Any:
    try:
        whole = array.flags.writeable and all(stride >= 0 for stride in array.strides)
        return torch.from_numpy(array if whole else array.copy())
    except TypeError:  # texts or objects
        return array


def bind_inputs(model: nn.Module, inputs: Any) -> Arguments:
    """Return the arguments of `model` for a minibatch's inputs.

    Args:
        model: the user's model.
        inputs: one argument; a tuple or list of positional arguments; or a mapping, which is taken as keyword
            arguments where forward has parameters of these names, and as one argument otherwise. NumPy arrays are taken
            as tensors.

    Raises:
        PipedreamError: they are no minibatch, or forward does not take them.
    """
    if inputs is None or isinstance(inputs, str | bytes | int | float):
        raise PipedreamError(
            f"example_inputs is {inputs!r}: give one minibatch of inputs: a tensor, a tuple of the model's arguments, "
            "or a mapping from their names"
        )
    if isinstance(inputs, DataLoader | Dataset | Iterator):
        raise PipedreamError(
            f"example_inputs is a {type(inputs).__name__}: give one minibatch of its inputs, such as "
            "next(iter(loader))[0], or next(iter(loader)) if minibatches are mappings"
        )
    inputs = as_tensors(inputs)
    signature = inspect.signature(model.forward)
    parameters = list(signature.parameters.values())
    positional = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    names = tuple(each.name for each in positional)
    if isinstance(inputs, Mapping):
        by_keyword = {each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)}
        takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters)
        if set(inputs) <= by_keyword or (takes_any and (set(inputs) & by_keyword or not positional)):
            arguments = Arguments((), dict(inputs), ())
        elif not set(inputs) & by_keyword and positional:
            arguments = Arguments((inputs,), {}, names)
        else:
            unknown = sorted(str(key) for key in set(inputs) - by_keyword)
            raise PipedreamError(
                f"{type(model).__name__}.forward has no parameter '{unknown[0]}', which the inputs have: it takes "
                f"{', '.join(sorted(by_keyword))}"
            )
    elif type(inputs) in (tuple, list):
        arguments = Arguments(tuple(inputs), {}, names)
    else:
        arguments = Arguments((inputs,), {}, names)
    try:
        signature.bind(*arguments.args, **arguments.kwargs)
    except TypeError as error:
        required = [each for each in positional if each.default is each.empty]
        takes = f"{len(required)}" if len(required) == len(names) else f"{len(required)} to {len(names)}"
        given = len(arguments.args) + len(arguments.kwargs)
        raise PipedreamError(
            f"{type(model).__name__}.forward takes {takes} inputs ({', '.join(names)}), but example_inputs has "
            f"{given} ({error}): pass one tensor per input as a tuple, or a mapping from input names to tensors"
        ) from None
    return arguments
