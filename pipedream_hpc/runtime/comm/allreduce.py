"""All-reduce over ranks with bitwise equal results on all of them: one interface, in one process or over MPI.

A bucket is a flat run of numbers. Every rank fills its own bucket, starts the all-reduce, goes on computing and
later finds the sum in the same bucket. The sum is taken in rank order: ((b0 + b1) + b2) + ..., half precision in
float32, so a run over MPI and a run in a single process agree bitwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch

from pipedream_hpc.core import load_comm

if TYPE_CHECKING:
    from mpi4py import MPI

    from pipedream_hpc._comm import AllReduce as CoreAllReduce
    from pipedream_hpc._comm import Progress

#: (number of elements, dtype) of each bucket.
Buckets = Sequence[tuple[int, torch.dtype]]


class AllReduce(Protocol):
    """A repeated all-reduce of a fixed set of buckets, as one rank sees it."""

    def bucket(self, index: int) -> torch.Tensor:
        """Return the bucket: this rank's numbers before `start`, the sum after `wait`."""
        ...

    def start(self, index: int) -> None:
        """Start the all-reduce of a bucket; all ranks start their buckets in the same order."""
        ...

    def done(self, index: int) -> bool:
        """Return whether `wait` would return without waiting for another rank."""
        ...

    def wait(self, index: int) -> None:
        """Wait until the bucket holds the sum."""
        ...


@dataclass
class LocalGroup:
    """A group of ranks in one process: the counterpart of an MPI communicator for LocalAllReduce.

    Attributes:
        members: the members' all-reduces, in the order of the sum.
    """

    members: list[LocalAllReduce] = field(default_factory=list)

    def join(self, buckets: Buckets) -> LocalAllReduce:
        """Add a member; all members have the same buckets."""
        member = LocalAllReduce(self, buckets)
        self.members.append(member)
        return member

    def sum_if_complete(self, index: int) -> None:
        """Sum a bucket if all members have started it."""
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


class LocalAllReduce:
    """All-reduce over the members of a LocalGroup. Created by `LocalGroup.join`."""

    def __init__(self, group: LocalGroup, buckets: Buckets) -> None:
        self._group = group
        self._buckets = [torch.zeros(count, dtype=dtype) for count, dtype in buckets]
        self.started = [False] * len(buckets)
        self.totals: dict[int, torch.Tensor] = {}

    def bucket(self, index: int) -> torch.Tensor:
        return self._buckets[index]

    def start(self, index: int) -> None:
        self.started[index] = True
        self._group.sum_if_complete(index)

    def done(self, index: int) -> bool:
        return index in self.totals

    def wait(self, index: int) -> None:
        self._buckets[index].copy_(self.totals.pop(index))


class MpiAllReduce:
    """All-reduce over the ranks of an MPI communicator. The constructor is collective.

    Args:
        progress: the process's progress engine.
        comm: the communicator; it is duplicated.
        buckets: element count and dtype of each bucket.
        label: what is reduced, for messages.
        stall_limit_s: seconds to wait for another rank.
        ordered: whether to sum in rank order; otherwise MPI chooses the order.
    """

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
        self._core: CoreAllReduce = load_comm().AllReduce(progress, comm, shapes, ordered, label)
        self._stall_limit_s = stall_limit_s
        self._buckets = [
            torch.frombuffer(self._core.bucket(index), dtype=dtype, count=count)
            for index, (count, dtype) in enumerate(buckets)
        ]

    def bucket(self, index: int) -> torch.Tensor:
        return self._buckets[index]

    def start(self, index: int) -> None:
        self._core.start(index)

    def done(self, index: int) -> bool:
        return self._core.done(index)

    def wait(self, index: int) -> None:
        self._core.wait(index, self._stall_limit_s)
