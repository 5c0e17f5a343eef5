"""Reduction: sums over ranks, the same bits on all of them. Two kinds, one interface.

A bucket is a flat run of numbers. Every rank fills its own, starts it, goes on computing and finds
the sum in it later. The sum is taken in the order of the ranks: ((b0 + b1) + b2) + ..., half
precision in float32, so a run over MPI and one in a single process agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch

from pipedream_hpc.core import load_core

if TYPE_CHECKING:
    from mpi4py import MPI

    from pipedream_hpc._core import Progress
    from pipedream_hpc._core import Reduction as Core

#: (count of numbers, dtype) of each bucket.
Buckets = Sequence[tuple[int, torch.dtype]]


class Reduction(Protocol):
    """One rank's part in summing some buckets, again and again."""

    def bucket(self, index: int) -> torch.Tensor:
        """What this rank puts in before `start`, and the sum after `wait`."""
        ...

    def start(self, index: int) -> None:
        """Hand the bucket in; all ranks hand them in in the same order."""
        ...

    def done(self, index: int) -> bool:
        """Whether `wait` would wait for no other rank."""
        ...

    def wait(self, index: int) -> None:
        """Wait until the bucket holds the sum."""
        ...


@dataclass
class Meeting:
    """Where ranks of one process meet to sum: what LocalReductions have in common.

    Attributes:
        members: reductions that take part, in the order of the sum.
    """

    members: list[LocalReduction] = field(default_factory=list)

    def join(self, buckets: Buckets) -> LocalReduction:
        """One more member; all bring the same buckets."""
        member = LocalReduction(self, buckets)
        self.members.append(member)
        return member

    def came(self, index: int) -> None:
        """Somebody started a bucket; the last one finds the sum."""
        if not all(member.started[index] for member in self.members):
            return
        first, *others = (member.bucket(index) for member in self.members)
        wide = torch.float32 if first.dtype.itemsize == 2 else first.dtype
        total = first.to(wide, copy=True)
        for other in others:
            total += other.to(wide)
        for member in self.members:
            member.totals[index] = total.to(first.dtype)
            member.started[index] = False


class LocalReduction:
    """A member of a Meeting."""

    def __init__(self, meeting: Meeting, buckets: Buckets) -> None:
        self._meeting = meeting
        self._buckets = [torch.zeros(count, dtype=dtype) for count, dtype in buckets]
        self.started = [False] * len(buckets)
        self.totals: dict[int, torch.Tensor] = {}

    def bucket(self, index: int) -> torch.Tensor:
        return self._buckets[index]

    def start(self, index: int) -> None:
        self.started[index] = True
        self._meeting.came(index)

    def done(self, index: int) -> bool:
        return index in self.totals

    def wait(self, index: int) -> None:
        self._buckets[index].copy_(self.totals.pop(index))


class MpiReduction:
    """The core's reduction over the ranks of a communicator. Made collectively."""

    def __init__(
        self,
        progress: Progress,
        comm: MPI.Comm,
        buckets: Buckets,
        label: str,
        stall_limit_s: float,
        *,
        ordered: bool = True,
    ) -> None:
        shapes = [(count, str(dtype).removeprefix("torch.")) for count, dtype in buckets]
        self._reduction: Core = load_core().Reduction(progress, comm, shapes, ordered, label)
        self._stall_limit_s = stall_limit_s
        self._buckets = [
            torch.frombuffer(self._reduction.bucket(index), dtype=dtype, count=count)
            for index, (count, dtype) in enumerate(buckets)
        ]

    def bucket(self, index: int) -> torch.Tensor:
        return self._buckets[index]

    def start(self, index: int) -> None:
        self._reduction.start(index)

    def done(self, index: int) -> bool:
        return self._reduction.done(index)

    def wait(self, index: int) -> None:
        self._reduction.wait(index, self._stall_limit_s)
