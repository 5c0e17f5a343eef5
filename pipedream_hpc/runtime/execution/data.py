"""Data: microbatches from the user's loader for the stages that read them.

A stage that takes one of the model's inputs reads the data itself, and so does the output stage for its targets:
nothing of the data set travels between ranks. All of them read the same minibatches in the same order, whatever the
plan. Some schedules split each minibatch into microbatches; with others a microbatch is a whole minibatch::

    samples         0 1 2 3 4 5 6        0 1 ...
    minibatches     0                    1             from the loader
    microbatches    0   1   2 3          4 5 ...       here 4 per minibatch: as even as possible, longer ones first
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
from pipedream_hpc.runtime.comm.tensor_view import CPU
from pipedream_hpc.runtime.execution.dataloader import SKIPPED, minibatches
from pipedream_hpc.runtime.state.checksum import checksum

#: Index of the target among the tensors of a microbatch on the device, where inputs have their argument numbers.
_TARGET = -1


def to_device(value: Any, device: torch.device) -> Any:
    """Copy a tensor to a GPU on the current stream, without waiting; return anything else unchanged."""
    if not isinstance(value, torch.Tensor) or value.device == device:
        return value
    # A copy from memory that is not pinned would wait for all work on the stream. Pinned memory comes from torch's
    # cache, which reuses it only after the copy.
    source = value if value.is_pinned() or value.is_cuda else value.pin_memory()
    return source.to(device, non_blocking=True)


def split_minibatch(value: Any, n_microbatches: int) -> list[Any]:
    """Split a tensor, or a structure of tensors, along the samples.

    Raises:
        PipedreamError: there are fewer samples than microbatches, or tensors of different length.
    """
    if n_microbatches == 1:
        return [value]
    sizes = {tensor.shape[0] for tensor in _tensors(value) if tensor.dim()}
    if len(sizes) == 1 and min(sizes) < n_microbatches:
        raise PipedreamError(
            f"{min(sizes)} samples cannot be split into {n_microbatches} microbatches: use at most {min(sizes)}, or "
            "drop a last minibatch that is too short (DataLoader(drop_last=True))"
        )
    if len(sizes) > 1:
        raise PipedreamError(
            f"tensors of {' and '.join(map(str, sorted(sizes)))} samples cannot be split into {n_microbatches} "
            "microbatches: samples must be the first dimension of every tensor"
        )
    return list(_split(value, n_microbatches))


def _split(value: Any, count: int) -> Sequence[Any]:
    # Every tensor is split once: it takes microseconds per microbatch.
    if isinstance(value, torch.Tensor):
        return value.tensor_split(count) if value.dim() else [value] * count
    if type(value) is tuple:
        return list(zip(*(_split(each, count) for each in value), strict=True)) if value else [()] * count
    leaves, structure = tree_flatten(value)
    if len(leaves) == 1 and leaves[0] is value:
        return [value] * count
    columns = [_split(leaf, count) for leaf in leaves]
    return [tree_unflatten([column[index] for column in columns], structure) for index in range(count)]


@dataclass(frozen=True)
class Reader:
    """A replica of a stage that reads data: microbatches `replica`, `replica` + `replicas`, ..."""

    replica: int
    replicas: int

    def has(self, microbatch: int) -> bool:
        """Return whether this replica runs the microbatch."""
        return microbatch % self.replicas == self.replica


@dataclass
class _Microbatch:
    inputs: Sequence[Any]
    target: Any
    samples: int
    weight: float
    readers: int  # readers that have not released it
    on_device: dict[int, Any] = field(default_factory=dict)  # by argument number, and _TARGET


class MicrobatchLoader:
    """One pass over a loader, as microbatches.

    With MPI every rank that reads has its own MicrobatchLoader over the same data in the same order; in one process
    all stages share one, which keeps a microbatch until its last reader has released it.

    Args:
        loader: yields (inputs, target) pairs. An iterator is advanced by exactly `length` minibatches on every rank
            that reads.
        epoch: number of the pass. Shuffling depends on the seed and the epoch only, so it is the same on all ranks.
        seed: seed of the run.
        readers: the replicas here that read.
        input_names: names of the model's arguments, in their order.
        length: minibatches in the pass; the loader may have more.
        n_microbatches: microbatches per minibatch.
        gradient_accumulation_steps: minibatches whose losses share a round; 1 if the stages average over a round's
            microbatches themselves.
        example: the model's arguments as captured; the first minibatch is checked against them.
        device: where stages compute. Inputs and targets are copied there when they are first read, through pinned
            memory and without waiting; DataLoader(pin_memory=True) saves the copy to pinned memory.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        *,
        epoch: int,
        seed: int,
        readers: Sequence[Reader],
        input_names: Sequence[str],
        length: int,
        n_microbatches: int = 1,
        gradient_accumulation_steps: int = 1,
        example: Sequence[Any] = (),
        device: torch.device = CPU,
    ) -> None:
        self._device = device
        self._epoch, self._seed = epoch, (seed, epoch)
        set_seed(seed_for("epoch", *self._seed))
        set_epoch = getattr(getattr(loader, "sampler", None), "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)
        self._readers, self._input_names, self._example = readers, input_names, example
        self._n_microbatches, self._accumulation_steps = n_microbatches, gradient_accumulation_steps
        self._length = length
        # The next pass continues an iterator where this one stops, which must be the same place on every rank.
        self._continued = isinstance(loader, Iterator)
        self._last_needed = next((each for each in reversed(range(length)) if any(self._reads(each))), -1)
        self._minibatches: Iterator[Any] = minibatches(loader, self._is_needed)
        self._waiting: dict[int, _Microbatch] = {}
        self._taken = 0  # minibatches
        self._fingerprint: int | None = None

    def input(self, microbatch: int, argument: int) -> Any:
        """Return an argument of the model.

        Args:
            microbatch: number within the pass.
            argument: number of the argument.
        """
        found = self._get(microbatch)
        if argument >= len(found.inputs):
            raise PipedreamError(
                f"{self._position(microbatch // self._n_microbatches)}: the model takes input "
                f"'{self._input_names[argument]}', but the loader yielded {len(found.inputs)} inputs: let it yield "
                "((input, ...), target) with the inputs of example_inputs"
            )
        return self._on_device(found, argument, found.inputs[argument])

    def target(self, microbatch: int) -> Any:
        """Return the target of a microbatch, given by its number within the pass."""
        found = self._get(microbatch)
        return self._on_device(found, _TARGET, found.target)

    def samples(self, microbatch: int) -> int:
        """Return the number of samples of a microbatch."""
        return self._get(microbatch).samples

    def weight(self, microbatch: int) -> float:
        """Return the weight of a microbatch's mean loss in its round.

        It is the microbatch's share of its minibatch's samples, divided by `gradient_accumulation_steps` (less at
        the end of a pass): the weights of a round add up to 1.
        """
        return self._get(microbatch).weight

    def release(self, microbatch: int) -> None:
        """Tell that one of its readers is done with a microbatch."""
        found = self._waiting[microbatch]
        found.readers -= 1
        if not found.readers:
            del self._waiting[microbatch]

    def fingerprint(self) -> int | None:
        """Return the checksum of the first minibatch's inputs, by which ranks check that they read the same data.

        None if no stage here reads, or the loader yields nothing.
        """
        if self._readers and self._taken == 0 and self._length and self._take():
            self._take_rest()
        return self._fingerprint

    def _position(self, minibatch: int) -> str:
        return f"epoch {self._epoch}, minibatch {minibatch}"

    def _on_device(self, microbatch: _Microbatch, index: int, value: Any) -> Any:
        if self._device.type == "cpu":
            return value
        if index not in microbatch.on_device:
            microbatch.on_device[index] = tree_map(lambda each: to_device(each, self._device), value)
        return microbatch.on_device[index]

    def _get(self, microbatch: int) -> _Microbatch:
        found = self._waiting.get(microbatch)
        if found is None:
            while self._taken * self._n_microbatches <= microbatch:
                self._require()
            found = self._waiting[microbatch]
            self._take_rest()
        return found

    def _take_rest(self) -> None:
        """Advance an iterator to the end of the pass once no further minibatch is needed here."""
        if self._continued and self._taken > self._last_needed:
            while self._taken < self._length:
                self._require()

    def _require(self) -> None:
        if not self._take():
            raise PipedreamError(
                f"the loader ended after {self._taken} minibatches of {self._length}: make len(loader) and its "
                "iteration agree, or ask for fewer steps"
            )

    def _take(self) -> bool:
        """Take the next minibatch from the loader; return whether there was one."""
        # Random augmentation must not depend on other random numbers drawn in this process.
        set_seed(seed_for("data", *self._seed, self._taken))
        minibatch = next(self._minibatches, None)
        if minibatch is None:
            return False
        if minibatch is not SKIPPED:
            try:
                self._add(minibatch)
            except PipedreamError as error:
                raise PipedreamError(f"{self._position(self._taken)}: {error}") from None
        self._taken += 1
        return True

    def _add(self, minibatch: Any) -> None:
        """Check a minibatch, split it and keep the microbatches that are read here."""
        try:
            inputs, target = minibatch
        except (TypeError, ValueError):
            raise PipedreamError(
                f"the loader yielded {type(minibatch).__name__} instead of an (input, target) pair"
            ) from None
        if self._taken == 0:
            self._check(inputs)
            self._fingerprint = checksum(_tensors(inputs))
        n_readers = self._reads(self._taken)
        if any(n_readers):
            self._split_and_keep(self._taken * self._n_microbatches, n_readers, inputs, target)

    def _check(self, inputs: Any) -> None:
        """Check the first minibatch against the example; otherwise it would fail later, inside a layer."""
        arguments = self._arguments(inputs)
        for name, planned, argument in zip(self._input_names, self._example, arguments, strict=False):
            for expected, actual in zip(_tensors(planned), _tensors(argument), strict=False):
                fits = actual.dim() == expected.dim() and all(
                    a <= b for a, b in zip(actual.shape[1:], expected.shape[1:], strict=True)
                )
                if actual.dtype != expected.dtype or not fits:
                    raise PipedreamError(
                        f"input '{name}' has shape {tuple(actual.shape)} and dtype {actual.dtype}, but example_inputs "
                        f"has shape {tuple(expected.shape)} and dtype {expected.dtype}: give a minibatch of the loader "
                        "as example_inputs"
                    )

    def _reads(self, minibatch: int) -> list[int]:
        """Return the number of readers here of each microbatch of a minibatch."""
        first = minibatch * self._n_microbatches
        return [sum(reader.has(first + index) for reader in self._readers) for index in range(self._n_microbatches)]

    def _is_needed(self, minibatch: int) -> bool:
        # Every rank that reads checks the first one.
        return minibatch == 0 or any(self._reads(minibatch))

    def _arguments(self, inputs: Any) -> tuple[Any, ...]:
        if not isinstance(inputs, Mapping):
            return arguments_of(inputs)
        missing = [name for name in self._input_names if name not in inputs]
        if missing:
            raise PipedreamError(
                f"the inputs of the loader have no '{missing[0]}', which the model takes, but {', '.join(inputs)}"
            )
        return tuple(inputs[name] for name in self._input_names)

    def _split_and_keep(self, first: int, n_readers: list[int], inputs: Any, target: Any) -> None:
        microbatches = split_minibatch((self._arguments(inputs), target), self._n_microbatches)
        sizes = [_n_samples(arguments) for arguments, _ in microbatches]
        round_begin = self._taken // self._accumulation_steps * self._accumulation_steps
        in_round = min(self._accumulation_steps, max(self._length - round_begin, 1))
        for index, (arguments, own_target) in enumerate(microbatches):
            if n_readers[index]:
                full = self._n_microbatches == 1 and in_round == 1
                weight = 1.0 if full else sizes[index] / sum(sizes) / in_round
                self._waiting[first + index] = _Microbatch(
                    arguments, own_target, sizes[index], weight, n_readers[index]
                )


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, torch.Tensor)]


def _n_samples(arguments: Any) -> int:
    if isinstance(arguments, tuple) and arguments and isinstance(arguments[0], torch.Tensor) and arguments[0].dim():
        return int(arguments[0].shape[0])
    first = next(iter(_tensors(arguments)), None)
    return int(first.shape[0]) if first is not None and first.dim() else 1
