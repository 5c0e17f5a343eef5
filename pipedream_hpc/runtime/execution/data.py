"""Data: microbatches from the user's loader for the stages that read them.

A stage that takes one of the model's inputs reads the data itself, and so does the output stage for its targets:
nothing of the data set travels between ranks. All of them read the same minibatches in the same order, whatever the
plan. Some schedules split each minibatch into microbatches; with others a microbatch is a whole minibatch::

    samples         0 1 2 3 4 5 6        0 1 ...
    minibatches     0                    1             from the loader
    microbatches    0   1   2 3          4 5 ...       here 4 per minibatch: as even as possible, longer ones first
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch.utils._pytree import tree_flatten

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.model.arguments import Arguments, as_tensors
from pipedream_hpc.model.batch_dims import BatchDims
from pipedream_hpc.model.checksum import checksum
from pipedream_hpc.model.randomness import seed_for, set_seed
from pipedream_hpc.model.structure import map_tensors
from pipedream_hpc.runtime.comm.tensor_view import CPU
from pipedream_hpc.runtime.execution.dataloader import SKIPPED, minibatches


def to_device(value: Any, device: torch.device) -> Any:
    """Copy a tensor to a GPU on the current stream, without waiting; return anything else unchanged."""
    if not isinstance(value, torch.Tensor) or value.device == device:
        return value
    # A copy from memory that is not pinned would wait for all work on the stream. Pinned memory comes from torch's
    # cache, which reuses it only after the copy.
    source = value if value.is_pinned() or value.is_cuda else value.pin_memory()
    return source.to(device, non_blocking=True)


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
    arguments: Arguments
    target: Any
    samples: int
    weight: float
    readers: int  # readers that have not released it
    on_device: dict[str, Any] = field(default_factory=dict)  # "arguments" and "target"


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
        length: minibatches in the pass; the loader may have more.
        n_microbatches: microbatches per minibatch.
        gradient_accumulation_steps: minibatches whose losses share a round; 1 if the stages average over a round's
            microbatches themselves.
        example: the model's arguments as captured; the first minibatch is checked against them.
        may_be_larger: whether minibatches may be larger than the example.
        optional: inputs of the example that minibatches may lack, such as the labels in an evaluation.
        batch_dims: where samples are in inputs and targets; the first dimension by default.
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
        length: int,
        n_microbatches: int = 1,
        gradient_accumulation_steps: int = 1,
        example: Arguments | None = None,
        batch_dims: BatchDims | None = None,
        may_be_larger: bool = False,
        optional: Collection[str] = (),
        device: torch.device = CPU,
    ) -> None:
        self._device, self._batch_dims = device, batch_dims or BatchDims()
        self._epoch, self._seed = epoch, (seed, epoch)
        set_seed(seed_for("epoch", *self._seed))
        set_epoch_of(loader, epoch)
        self._runs_python = not isinstance(loader, list | tuple)
        self._readers, self._example, self._may_be_larger = readers, example, may_be_larger
        self._optional = optional
        #: Arguments of the first microbatch, on a rank that reads, once the first minibatch is read.
        self.first: Arguments | None = None
        self._n_microbatches, self._accumulation_steps = n_microbatches, gradient_accumulation_steps
        self._length = length
        # The next pass continues an iterator where this one stops, which must be the same place on every rank.
        self._continued = isinstance(loader, Iterator)
        self._last_needed = next((each for each in reversed(range(length)) if any(self._reads(each))), -1)
        self._minibatches: Iterator[Any] = minibatches(loader, self._is_needed)
        self._waiting: dict[int, _Microbatch] = {}
        self._taken = 0  # minibatches
        self._fingerprint: int | None = None
        #: Of some numbers of each minibatch that was read here, by which ranks check that they have read the same.
        #: Empty if the loader is a list.
        self.checksums: dict[int, int] = {}

    def arguments(self, microbatch: int) -> Arguments:
        """Return the arguments of the model for a microbatch, given by its number within the pass."""
        found = self._get(microbatch)
        return found.arguments if self._device.type == "cpu" else self._on_device(found, "arguments", found.arguments)

    def target(self, microbatch: int) -> Any:
        """Return the target of a microbatch, given by its number within the pass."""
        found = self._get(microbatch)
        return self._on_device(found, "target", found.target)

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

    def _on_device(self, microbatch: _Microbatch, name: str, value: Any) -> Any:
        if self._device.type == "cpu":
            return value
        if name not in microbatch.on_device:
            microbatch.on_device[name] = map_tensors(lambda each: to_device(each, self._device), value)
        return microbatch.on_device[name]

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
        seed = seed_for("data", *self._seed, self._taken)
        set_seed(seed)
        with python_seed(seed) if self._runs_python else nullcontext():
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
        inputs, target = _inputs_and_target(as_tensors(minibatch))
        if self._runs_python:
            self.checksums[self._taken] = checksum(map(_some, _tensors((inputs, target))))
        if self._taken == 0:
            arguments = self._arguments(inputs)
            self._check(arguments)
            self._fingerprint = checksum(_tensors(inputs))
            self.first = self._batch_dims.split(arguments, None, self._n_microbatches)[0][0]
        n_readers = self._reads(self._taken)
        if any(n_readers):
            self._split_and_keep(self._taken * self._n_microbatches, n_readers, self._arguments(inputs), target)

    def _check(self, arguments: Arguments) -> None:
        """Check the first minibatch against the example; otherwise it would fail later, inside a layer."""
        if self._example is None:
            return
        planned, given = self._example.named(), arguments.named()
        for name in [each for each in planned if each in given]:
            leaves = (self._batch_dims.leaves(name, values[name]) for values in (planned, given))
            for (expected, dim), (actual, _) in zip(*leaves, strict=False):
                limited = () if self._may_be_larger else [each for each in range(expected.dim()) if each != dim]
                fits = actual.dim() == expected.dim() and all(
                    actual.shape[each] <= expected.shape[each] for each in limited
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

    def _arguments(self, inputs: Any) -> Arguments:
        return self._example.like(inputs, self._optional) if self._example is not None else Arguments((inputs,), {})

    def _split_and_keep(self, first: int, n_readers: list[int], arguments: Arguments, target: Any) -> None:
        microbatches = self._batch_dims.split(arguments, target, self._n_microbatches)
        sizes = [self._batch_dims.n_samples(own) for own, _ in microbatches]
        round_begin = self._taken // self._accumulation_steps * self._accumulation_steps
        in_round = min(self._accumulation_steps, max(self._length - round_begin, 1))
        for index, (own, own_target) in enumerate(microbatches):
            if n_readers[index]:
                full = self._n_microbatches == 1 and in_round == 1
                weight = 1.0 if full else sizes[index] / sum(sizes) / in_round
                self._waiting[first + index] = _Microbatch(own, own_target, sizes[index], weight, n_readers[index])


def _inputs_and_target(minibatch: Any) -> tuple[Any, Any]:
    """Return the inputs and the target of a minibatch; a mapping, such as a tokenized batch, is both."""
    if isinstance(minibatch, Mapping):
        return minibatch, minibatch
    if isinstance(minibatch, tuple | list) and len(minibatch) == 2:
        return minibatch[0], minibatch[1]
    what = type(minibatch).__name__
    if isinstance(minibatch, tuple | list):
        what = f"a {what} of {len(minibatch)}"
    raise PipedreamError(
        f"the loader yielded {what} instead of an (input, target) pair, or of a mapping of the model's arguments"
    )


def _some(tensor: torch.Tensor) -> torch.Tensor:
    """Return some numbers of a tensor, from all of it."""
    if tensor.layout is not torch.strided or tensor.is_cuda:
        return tensor.new_empty(0)
    return tensor.flatten()[:: max(1, tensor.numel() // 256)]


def set_epoch_of(loader: Any, epoch: int) -> None:
    """Tell everything of a loader that asks for it which epoch begins, as DistributedSampler does."""
    sampler = getattr(loader, "sampler", None)
    batch_sampler = getattr(loader, "batch_sampler", None)
    told: set[int] = set()
    parts = (loader, sampler, batch_sampler, getattr(batch_sampler, "sampler", None), getattr(loader, "dataset", None))
    for part in parts:
        tell = getattr(part, "set_epoch", None)
        if callable(tell) and id(part) not in told:
            told.add(id(part))
            tell(epoch)


@contextmanager
def python_seed(seed: int) -> Iterator[None]:
    """Seed Python's and NumPy's generators for the block: every rank that reads draws the same."""
    python, numbers = random.getstate(), numpy.random.get_state()
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(python)
        numpy.random.set_state(numbers)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, torch.Tensor)]
