"""Feed: minibatches from the user's loader to the stages that need them.

A stage that takes one of the model's inputs reads the data itself, and so does the output stage for
its targets: nothing of the data set travels. All read the same minibatches in the same order,
whatever the plan. Where minibatches are cut, units are microbatches::

    minibatch 0   0 1 2 3 4 5 6        minibatch 1   ...
    units         0   1   2 3 (of 4)   4 5 6 7             as even as can be, the longer ones first
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.model.capture import arguments_of
from pipedream_hpc.model.randomness import seed_for, set_seed
from pipedream_hpc.runtime.checksum import checksum
from pipedream_hpc.runtime.reading import UNREAD, minibatches
from pipedream_hpc.runtime.view import CPU

#: Instead of an input's number.
_TARGET = -1


def onto(value: Any, device: torch.device) -> Any:
    """A tensor copied to a GPU on the current stream, without a wait; anything else as it is."""
    if not isinstance(value, torch.Tensor) or value.device == device:
        return value
    # From memory that is not pinned the host would wait for all that the stream has yet to do. Pinned memory
    # comes from torch's cache, which gives it out again only when the copy is done.
    source = value if value.is_pinned() or value.is_cuda else value.pin_memory()
    return source.to(device, non_blocking=True)


def cut(value: Any, pieces: int) -> list[Any]:
    """`value`, a tensor or a structure of them, in so many pieces along the samples.

    Raises:
        PipedreamError: there are fewer samples than pieces, or tensors of different length.
    """
    if pieces == 1:
        return [value]
    sizes = {tensor.shape[0] for tensor in _tensors(value) if tensor.dim()}
    if len(sizes) > 1 or min(sizes, default=pieces) < pieces:
        what = f"tensors of {' and '.join(map(str, sorted(sizes)))} samples"
        raise PipedreamError(
            f"a minibatch has {what}, which cannot be cut into {pieces} microbatches: give all tensors the samples as "
            "first dimension, and leave away a last minibatch that is too short (DataLoader(drop_last=True))"
        )

    return list(_pieces(value, pieces))


def _pieces(value: Any, count: int) -> Sequence[Any]:
    # Every tensor is split once: microbatches are made in microseconds.
    if isinstance(value, torch.Tensor):
        return value.tensor_split(count) if value.dim() else [value] * count
    if type(value) is tuple:
        return list(zip(*(_pieces(each, count) for each in value), strict=True)) if value else [()] * count
    leaves, structure = tree_flatten(value)
    if len(leaves) == 1 and leaves[0] is value:
        return [value] * count
    columns = [_pieces(leaf, count) for leaf in leaves]
    return [tree_unflatten([column[index] for column in columns], structure) for index in range(count)]


@dataclass(frozen=True)
class Taker:
    """A replica of a stage that reads data: units `replica`, `replica` + `replicas`, ..."""

    replica: int
    replicas: int

    def has(self, unit: int) -> bool:
        """Whether the unit is one of its own."""
        return unit % self.replicas == self.replica


@dataclass
class _Unit:
    inputs: Sequence[Any]
    target: Any
    samples: int
    weight: float
    readers: int  # that are not done with it
    placed: dict[int, Any] = field(default_factory=dict)  # on the device: the target, and inputs by their number


class Feed:
    """One pass over a loader.

    With MPI every rank that reads has a feed of its own over the same data in the same order; in one
    process all read from one feed, which keeps a unit until the last has had it.

    Args:
        loader: yields (inputs, target) pairs.
        epoch: shuffling depends on the seed and the epoch alone, so that all ranks agree.
        seed: of the run.
        takers: who reads here.
        names: of the model's arguments, in order.
        pieces: microbatches to a minibatch; 1 for whole minibatches.
        accumulate: minibatches that share an update, where minibatches are cut.
        length: minibatches in the pass.
        example: the model's arguments as captured, against which the first minibatch is held.
        device: where inputs and targets are wanted. They are copied when they are first asked for, by way of
            pinned memory, and nobody waits; a DataLoader(pin_memory=True) saves the way there.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        *,
        epoch: int,
        seed: int,
        takers: Sequence[Taker],
        names: Sequence[str],
        pieces: int = 1,
        accumulate: int = 1,
        length: int = 0,
        example: Sequence[Any] = (),
        device: torch.device = CPU,
    ) -> None:
        self._device = device
        self._seed = (seed, epoch)
        set_seed(seed_for("epoch", *self._seed))
        set_epoch = getattr(getattr(loader, "sampler", None), "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)
        self._takers, self._names, self._example = takers, names, example
        self._pieces, self._accumulate, self._length = pieces, accumulate, length
        self._minibatches: Iterator[Any] = minibatches(loader, self._wanted)
        self._waiting: dict[int, _Unit] = {}
        self._read = 0
        self._fingerprint: int | None = None

    def input(self, unit: int, argument: int) -> Any:
        """The model's argument of this number, of the unit with this number within the epoch."""
        waiting = self._unit(unit)
        if argument >= len(waiting.inputs):
            raise PipedreamError(
                f"the model takes input '{self._names[argument]}', but a minibatch of the loader has "
                f"{len(waiting.inputs)}: let the loader yield ((input, ...), target) as the example has it"
            )
        return self._placed(waiting, argument, waiting.inputs[argument])

    def target(self, unit: int) -> Any:
        """Target of the unit with this number within the epoch."""
        waiting = self._unit(unit)
        return self._placed(waiting, _TARGET, waiting.target)

    def samples(self, unit: int) -> int:
        """Samples of the unit."""
        return self._unit(unit).samples

    def weight(self, unit: int) -> float:
        """Part of the unit's samples in its minibatch, shared by the minibatches of an update."""
        return self._unit(unit).weight

    def leave(self, unit: int) -> None:
        """One of those who read the unit is done with it."""
        waiting = self._waiting[unit]
        waiting.readers -= 1
        if not waiting.readers:
            del self._waiting[unit]

    def fingerprint(self) -> int | None:
        """Checksum of the first minibatch's inputs, by which ranks see that they read the same data.

        None where nobody reads, or nothing is to be had.
        """
        if self._takers and self._read == 0:
            self._advance()
        return self._fingerprint

    def _placed(self, unit: _Unit, which: int, value: Any) -> Any:
        if self._device.type == "cpu":
            return value
        if which not in unit.placed:
            unit.placed[which] = tree_map(lambda each: onto(each, self._device), value)
        return unit.placed[which]

    def _unit(self, unit: int) -> _Unit:
        while self._read * self._pieces <= unit:
            if not self._advance():
                raise PipedreamError(
                    f"the loader ended after {self._read} minibatches but its length promised more: "
                    "make len(loader) and iteration agree"
                )
        return self._waiting[unit]

    def _advance(self) -> bool:
        # Random augmentation must not depend on what else drew numbers in this process.
        set_seed(seed_for("data", *self._seed, self._read))
        pair = next(self._minibatches, None)
        if pair is None:
            return False
        if pair is UNREAD:
            self._read += 1
            return True
        try:
            inputs, target = pair
        except (TypeError, ValueError):
            raise PipedreamError(
                f"minibatch {self._read} of the loader is no (input, target) pair but {type(pair).__name__}"
            ) from None
        if self._read == 0:
            self._check(inputs)
            self._fingerprint = checksum(_tensors(inputs))
        own = self._readers(self._read)
        if any(own):
            self._keep(self._read * self._pieces, own, inputs, target)
        self._read += 1
        return True

    def _check(self, inputs: Any) -> None:
        """Hold the first minibatch against the example: later on it would fail inside some layer."""
        for name, planned, argument in zip(self._names, self._example, self._arguments(inputs), strict=False):
            pairs = zip(_tensors(planned), _tensors(argument), strict=False)
            for wanted, got in pairs:
                fits = got.dim() == wanted.dim() and all(
                    a <= b for a, b in zip(got.shape[1:], wanted.shape[1:], strict=True)
                )
                if got.dtype != wanted.dtype or not fits:
                    raise PipedreamError(
                        f"input '{name}' of the loader's first minibatch has shape {tuple(got.shape)} and dtype "
                        f"{got.dtype}, but the example has {tuple(wanted.shape)} and {wanted.dtype}: "
                        "make the example a minibatch as the loader yields it"
                    )

    def _readers(self, minibatch: int) -> list[int]:
        """How many here read each unit of a minibatch."""
        first = minibatch * self._pieces
        return [sum(taker.has(first + piece) for taker in self._takers) for piece in range(self._pieces)]

    def _wanted(self, minibatch: int) -> bool:
        # The first one is looked at by all who read.
        return minibatch == 0 or any(self._readers(minibatch))

    def _arguments(self, inputs: Any) -> tuple[Any, ...]:
        if not isinstance(inputs, Mapping):
            return arguments_of(inputs)
        missing = [name for name in self._names if name not in inputs]
        if missing:
            raise PipedreamError(f"it has no input '{missing[0]}', which the model takes: it has {', '.join(inputs)}")
        return tuple(inputs[name] for name in self._names)

    def _keep(self, first: int, own: list[int], inputs: Any, target: Any) -> None:
        try:
            pieces = cut((self._arguments(inputs), target), self._pieces)
        except PipedreamError as error:
            raise PipedreamError(f"minibatch {self._read} of the loader: {error}") from None
        sizes = [_samples(arguments) for arguments, _ in pieces]
        group = self._read // self._accumulate * self._accumulate
        sharing = min(self._accumulate, max(self._length - group, 1))
        for piece, (arguments, part) in enumerate(pieces):
            if own[piece]:
                weight = 1.0 if self._pieces == 1 and sharing == 1 else sizes[piece] / sum(sizes) / sharing
                self._waiting[first + piece] = _Unit(arguments, part, sizes[piece], weight, own[piece])


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, torch.Tensor)]


def _samples(arguments: Any) -> int:
    if isinstance(arguments, tuple) and arguments and isinstance(arguments[0], torch.Tensor) and arguments[0].dim():
        return int(arguments[0].shape[0])
    first = next(iter(_tensors(arguments)), None)
    return int(first.shape[0]) if first is not None and first.dim() else 1
