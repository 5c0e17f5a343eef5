"""Feed: minibatches from the user's loader to the stages that need them."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from pipedream_hpc.errors import PipedreamError


def seed_for(*what: object) -> int:
    """A 63-bit seed that depends on `what` alone: the same on every rank and under every plan."""
    digest = hashlib.blake2b(repr(what).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Feed:
    """One pass over a loader, read by the input stage (inputs) and the output stage (targets).

    With MPI each of the two ranks has a feed of its own over the same data in the same order;
    in one process both read from one feed, which keeps a minibatch until the second has had it.

    Args:
        loader: yields (input, target) pairs.
        epoch: shuffling depends on the seed and the epoch alone, so that all ranks agree.
        seed: of the run.
        sides: which of `input` and `target` are read here.
    """

    def __init__(self, loader: Iterable[Any], *, epoch: int, seed: int, sides: frozenset[str]) -> None:
        self._seed = (seed, epoch)
        torch.manual_seed(seed_for("epoch", *self._seed))
        self._minibatches: Iterator[Any] = iter(loader)
        self._sides = sides
        self._waiting: dict[int, dict[str, Any]] = {}
        self._read = 0

    def input(self, minibatch: int) -> torch.Tensor:
        """Input of the minibatch with this number within the epoch."""
        inputs: torch.Tensor = self._take(minibatch, "input")
        return inputs

    def target(self, minibatch: int) -> Any:
        """Target of the minibatch with this number within the epoch."""
        return self._take(minibatch, "target")

    def fingerprint(self) -> int:
        """Checksum of the first minibatch's input, by which ranks see that they read the same data."""
        if not self._sides or (self._read == 0 and not self._advance()):
            return 0
        return zlib.crc32(self._waiting[0]["fingerprint"].contiguous().view(-1).view(torch.uint8).numpy())

    def _take(self, minibatch: int, side: str) -> Any:
        while self._read <= minibatch:
            if not self._advance():
                raise PipedreamError(
                    f"the loader ended after {self._read} minibatches but its length promised more: "
                    "make len(loader) and iteration agree"
                )
        pair = self._waiting[minibatch]
        value = pair.pop(side)
        if not pair.keys() & self._sides:
            del self._waiting[minibatch]
        return value

    def _advance(self) -> bool:
        # Random augmentation must not depend on what else drew numbers in this process.
        torch.manual_seed(seed_for("data", *self._seed, self._read))
        pair = next(self._minibatches, None)
        if pair is None:
            return False
        try:
            inputs, targets = pair
        except (TypeError, ValueError):
            raise PipedreamError(
                f"minibatch {self._read} of the loader is no (input, target) pair but {type(pair).__name__}"
            ) from None
        kept = {"input": inputs, "target": targets}
        self._waiting[self._read] = {side: kept[side] for side in self._sides}
        if self._read == 0:
            self._waiting[0]["fingerprint"] = inputs
        self._read += 1
        return True
