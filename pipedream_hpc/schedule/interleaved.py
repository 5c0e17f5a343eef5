"""Interleaved 1F1B: every rank holds several chunks of the model (Narayanan et al., SC 2021, 2.2).

Rank s mod p holds stage s. Two ranks with two chunks each, so four stages, minibatches of four
microbatches; capitals are a rank's first chunk, small letters its second::

    rank 0   F0 F1 f0 f1 F2 b0 F3 b1 f2 B0 f3 B1    b2    b3 B2 B3 U
    rank 1      F0 F1 f0 b0 f1 b1 F2 B0 F3 B1 f2 b2 f3 b3 B2 B3 U
                                                          time ──►

Microbatches go in groups of p: a rank runs a group through its first chunk, then the same group
through its second, and so on; backwards go from the last chunk to the first. A chunk is 1/v of what a rank
holds, so start-up and drain are v times as short: the bubble is (p - 1) / (v·m + p - 1) of the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from pipedream_hpc.planning.plan import Edge
from pipedream_hpc.schedule.actions import (
    Action,
    AllReduceGradNorm,
    Layout,
    OptimizerStep,
    ReduceGradients,
    ScheduleError,
)
from pipedream_hpc.schedule.routed import Microbatched, alternate


def folded(layout: Layout, chunks: int) -> Layout:
    """Return the layout in which every rank of the first stages holds `chunks` of all stages.

    Raises:
        ScheduleError: the number of stages is not a multiple of `chunks`.
    """
    if chunks < 1 or len(layout) % chunks:
        raise ScheduleError(
            f"{len(layout)} stages cannot be distributed {chunks} per rank: "
            f"use a plan whose number of stages is a multiple of {max(chunks, 1)}"
        )
    ranks = len(layout) // chunks
    return tuple(layout[stage % ranks] for stage in range(len(layout)))


@dataclass(frozen=True)
class Interleaved(Microbatched):
    """Megatron's order within every minibatch, then one optimizer step per chunk.

    A last minibatch that is short goes in the order of whole groups without the missing microbatches:
    nothing comes earlier than it would, so no more is in flight.

    Raises:
        ScheduleError: stage s is not on rank s mod p, or a minibatch is not whole groups.
    """

    synchronous = True

    def __post_init__(self) -> None:
        super().__post_init__()
        straight = tuple(Edge(stage, stage + 1) for stage in range(len(self.layout) - 1))
        if self.edges is not None and self.edges != straight:
            raise ScheduleError(
                "interleaved sends from each stage to the next only, but the model's skip connections go over stages: "
                "use a plan that cuts where one tensor is alive, or another schedule"
            )
        ranks, replicas = self._ranks, len(self.layout[0])
        turns = [self.layout[stage % ranks] for stage in range(len(self.layout))]
        if list(self.layout) != turns or len(self.layout) % ranks or any(len(x) != replicas for x in turns):
            raise ScheduleError(
                "interleaved needs stage s on rank s mod p, the same number of chunks on every rank and the same "
                f"number of replicas of every stage, but the layout is {self.layout}"
            )
        if self._chunks > 1 and self.n_microbatches % (ranks * replicas):
            raise ScheduleError(
                f"interleaved needs the microbatches of a minibatch to be a multiple of {ranks * replicas} "
                f"({ranks} ranks in turn, {replicas} replicas), not {self.n_microbatches}"
            )

    @cached_property
    def _ranks(self) -> int:
        """Stages until the first stage's ranks come again."""
        again = (stage for stage in range(1, len(self.layout)) if self.layout[stage] == self.layout[0])
        return next(again, len(self.layout))

    @property
    def _chunks(self) -> int:
        return len(self.layout) // self._ranks

    def in_flight(self, stage: int) -> int:
        """Most microbatches between forward and backward, counted in the order of the rank."""
        return self._most_alive[stage]

    @cached_property
    def _most_alive(self) -> dict[int, int]:
        most = dict.fromkeys(range(len(self.layout)), 0)
        for place in range(self._ranks):
            alive = dict.fromkeys(range(place, len(self.layout), self._ranks), 0)
            for forward, stage, _ in self._order(place, self._most_local(place)):
                alive[stage] += 1 if forward else -1
                most[stage] = max(most[stage], alive[stage])
        return most

    def actions(self, rank: int) -> Iterator[Action]:
        """The actions of `rank`, in order."""
        stages = self.stages_of[rank]
        for number, own in self._flushes(stages[0], rank):
            for forward, stage, index in self._order(stages[0], len(own)):
                if forward:
                    yield from self._forward(stage, own[index], version=number)
                else:
                    yield from self._backward(stage, own[index], version=number, last=index == len(own) - 1)
            updates = [action for stage in stages for action in self._update(stage, number)]
            # The norm of a rank is that of all its chunks together.
            yield from [action for action in updates if isinstance(action, ReduceGradients)]
            yield from [action for action in updates if isinstance(action, AllReduceGradNorm)][:1]
            yield from [action for action in updates if isinstance(action, OptimizerStep)]

    def _order(self, place: int, count: int) -> Iterator[tuple[bool, int, int]]:
        """Yield (whether forward, stage, number) for `count` microbatches on the rank at `place`."""
        ranks, stages = self._ranks, range(place, len(self.layout), self._ranks)
        groups = [range(first, first + ranks) for first in range(0, count, ranks)]
        forwards = [(stage, index) for group in groups for stage in stages for index in group]
        backwards = [(stage, index) for group in groups for stage in reversed(stages) for index in group]
        after = ranks - 1 - place
        ahead = after if self._chunks == 1 else 2 * after + (self._chunks - 1) * ranks
        for forward, turn in alternate(len(forwards), ahead):
            stage, index = forwards[turn] if forward else backwards[turn]
            if index < count:
                yield forward, stage, index
