"""What all schedules have in common: the way of a unit through a stage, and who takes it.

Unit k goes to replica k mod R of every stage, so its backward finds the rank that ran its forward,
and no rank ever asks another what to do next. At a stage it passes twice::

    receive activation k ──► forward k  ──► send activation k          (no receive at the input stage,
    send gradient k      ◄── backward k ◄── receive gradient k          no send at the output stage)

After the last backward of a round comes `reduce`, where there are replicas, and `update`. The
gradient has gone upstream by then: upstream must not wait for the other replicas of this stage,
which may be waiting for upstream.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from pipedream_hpc.planning.plan import warm_up
from pipedream_hpc.schedule.actions import (
    Action,
    Backward,
    Forward,
    Layout,
    Receive,
    Reduce,
    ScheduleError,
    Send,
    Update,
)


def alternate(count: int, ahead: int) -> Iterator[tuple[bool, int]]:
    """The order that gives 1F1B its name: (whether forward, number) of `count` units.

    With `ahead` = 2 and five units: F0 F1 F2 B0 F3 B1 F4 B2 B3 B4.
    """
    for turn in range(count + ahead):
        # Turn t runs forward t and, once warmed up, backward t - ahead; at either end only one is left.
        if turn < count:
            yield True, turn
        if 0 <= turn - ahead < count:
            yield False, turn - ahead


@dataclass(frozen=True)
class Routed:
    """`minibatches` units, sent round robin over the replicas of every stage of `layout`."""

    layout: Layout
    minibatches: int
    training = True
    newest = False

    def per_update(self, stage: int) -> int:
        """One unit from every replica."""
        return len(self.layout[stage])

    def updates(self, stage: int) -> int:
        """Updates of `stage` over the whole schedule; the last may be of a short round."""
        return -(-self.minibatches // self.per_update(stage))

    @cached_property
    def stages_of(self) -> dict[int, tuple[int, ...]]:
        """The stages that each rank holds, in order."""
        held: dict[int, tuple[int, ...]] = {}
        for stage, ranks in enumerate(self.layout):
            for rank in ranks:
                held[rank] = (*held.get(rank, ()), stage)
        return held

    @cached_property
    def _warm_ups(self) -> tuple[int, ...]:
        replicas = [len(ranks) for ranks in self.layout]
        return tuple(warm_up(replicas, stage) for stage in range(len(replicas)))

    def _only_stage(self, rank: int) -> int:
        stages = self.stages_of[rank]
        if len(stages) > 1:
            raise ScheduleError(
                f"rank {rank} stands in stages {', '.join(map(str, stages))}, which only the interleaved schedule "
                "can have: give every stage ranks of its own"
            )
        return stages[0]

    def _own(self, stage: int, rank: int, first: int = 0, end: int | None = None) -> range:
        """Units from `first` up to `end` that fall to `rank`."""
        replicas = self.layout[stage]
        turn = (replicas.index(rank) - first) % len(replicas)
        return range(first + turn, self.minibatches if end is None else end, len(replicas))

    def _forward(self, stage: int, unit: int, version: int) -> tuple[Action, ...]:
        run = Forward(stage, unit, version)
        receive = () if stage == 0 else (Receive(stage, unit, "activation", self._peer(stage - 1, unit)),)
        if stage + 1 == len(self.layout):
            return (*receive, run)
        return (*receive, run, Send(stage, unit, "activation", self._peer(stage + 1, unit)))

    def _backward(self, stage: int, unit: int, version: int) -> tuple[Action, ...]:
        run = Backward(stage, unit, version)
        send = () if stage == 0 else (Send(stage, unit, "gradient", self._peer(stage - 1, unit)),)
        if stage + 1 == len(self.layout):
            return (run, *send)
        return (Receive(stage, unit, "gradient", self._peer(stage + 1, unit)), run, *send)

    def _update(self, stage: int, round: int) -> tuple[Action, ...]:
        made = Update(stage, round + 1)
        if len(self.layout[stage]) == 1:
            return (made,)
        units = self.per_update(stage)
        return Reduce(stage, round, min(units, self.minibatches - round * units)), made

    def _peer(self, stage: int, unit: int) -> int:
        ranks = self.layout[stage]
        return ranks[unit % len(ranks)]


@dataclass(frozen=True)
class Microbatched(Routed):
    """Units are microbatches: `microbatches` of them make a minibatch, and one update.

    The last minibatch may be short. A replica may get no microbatch of some minibatch; it takes part
    in the reduction all the same.

    Raises:
        ScheduleError: there is less than one microbatch to a minibatch.
    """

    microbatches: int = 1

    def __post_init__(self) -> None:
        if self.microbatches < 1:
            raise ScheduleError(f"a minibatch needs at least one microbatch, not {self.microbatches}")

    def per_update(self, stage: int) -> int:
        """One minibatch, whatever the replicas."""
        return self.microbatches

    def versions(self, stage: int) -> int:
        """One: nothing is in flight at an update."""
        return 1

    def _flushes(self, stage: int, rank: int) -> Iterator[tuple[int, range]]:
        """Number of every minibatch and the microbatches of it that fall to `rank`."""
        for number, first in enumerate(range(0, self.minibatches, self.microbatches)):
            yield number, self._own(stage, rank, first, min(first + self.microbatches, self.minibatches))

    def _most_local(self, stage: int) -> int:
        return -(-self.microbatches // len(self.layout[stage]))
