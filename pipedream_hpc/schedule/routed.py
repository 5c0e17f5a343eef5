"""What all schedules have in common: the way of a unit through a stage, and who takes it.

Unit k goes to replica k mod R of every stage, so its backward finds the rank that ran its forward,
and no rank ever asks another what to do next. At a stage it passes twice::

    receive activation k ──► forward k  ──► send activation k          (no receive at the input stage,
    send gradient k      ◄── backward k ◄── receive gradient k          no send at the output stage)
    weight gradient k                                                   (where backwards are split, maybe later)

After the last backward of a round comes `reduce`, where there are replicas, and `update`. The
gradient has gone upstream by then: upstream must not wait for the other replicas of this stage,
which may be waiting for upstream.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from functools import cached_property

from pipedream_hpc.planning.plan import warm_up
from pipedream_hpc.schedule.actions import (
    Action,
    Agree,
    Backward,
    Forward,
    Layout,
    Links,
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
    """`minibatches` units, sent round robin over the replicas of every stage of `layout`.

    Attributes:
        layout: ranks of every stage.
        minibatches: how many units pass.
        links: which stages exchange activations and gradients; by default each and the next. A skip
            connection over stages goes straight from where it begins to where it ends.
        accumulate: units per replica that one update learns from.
        agree: whether all stages agree about a round before they update.

    Raises:
        ScheduleError: a link does not run forwards, stages are cut off from those before them, fewer
            than one unit is to be accumulated, or stages are to agree that have no point at which to.
    """

    layout: Layout
    minibatches: int
    _: KW_ONLY
    links: Links | None = None
    accumulate: int = 1
    agree: bool = False
    training = True
    newest = False
    stashes = True
    #: Whether all stages come to the same point between two rounds.
    synchronous = False

    def __post_init__(self) -> None:
        if self.accumulate < 1:
            raise ScheduleError(f"an update needs gradients of at least one minibatch, not of {self.accumulate}")
        if self.agree and self.synchronous and len({len(ranks) for ranks in self.layout}) > 1:
            raise ScheduleError(
                "stages cannot agree about gradients (to clip by their global norm, or to scale losses) where some "
                f"have more replicas than others, here {'-'.join(str(len(ranks)) for ranks in self.layout)}: give "
                "every stage as many; otherwise bf16, and clip per stage"
            )
        if self.agree and not self.synchronous:
            raise ScheduleError(
                "stages cannot agree about gradients (to clip by their global norm, or to scale losses) where each "
                "updates by itself: for fp16 or clipping over the model use 1f1b-flush or gpipe; otherwise bf16, and "
                "clip per stage"
            )
        stages = len(self.layout)
        for source, target in self.links or ():
            if not 0 <= source < target < stages:
                raise ScheduleError(f"a link from stage {source} to stage {target} does not run forwards")
        for stage in range(1, stages):
            if not self.sources(stage):
                raise ScheduleError(f"stage {stage} receives nothing from the stages before it")
        for stage in range(stages - 1):
            if not self.targets(stage):
                raise ScheduleError(f"stage {stage} sends nothing to the stages behind it")

    def splits(self, stage: int) -> bool:
        """Never; schedules of microbatches may."""
        return False

    def puts_off(self, stage: int, unit: int) -> bool:
        """Never, likewise."""
        return False

    def lag(self, stage: int) -> int:
        """None."""
        return 0

    def waiting(self, stage: int) -> int:
        """None."""
        return 0

    def last_of_round(self, stage: int, unit: int) -> bool:
        """Whether the replica that has `unit` has none after it in the same round."""
        following, per_update = unit + len(self.layout[stage]), self.per_update(stage)
        return following >= self.minibatches or following // per_update != unit // per_update

    def per_update(self, stage: int) -> int:
        """`accumulate` units from every replica."""
        return len(self.layout[stage]) * self.accumulate

    def sources(self, stage: int) -> tuple[int, ...]:
        """Stages that send activations to `stage`, nearest first."""
        return self._neighbours[0][stage]

    def targets(self, stage: int) -> tuple[int, ...]:
        """Stages that `stage` sends activations to, nearest first."""
        return self._neighbours[1][stage]

    @cached_property
    def _neighbours(self) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
        stages = range(len(self.layout))
        links = [(stage, stage + 1) for stage in stages[:-1]] if self.links is None else self.links
        return (
            tuple(tuple(sorted((s for s, t in links if t == stage), reverse=True)) for stage in stages),
            tuple(tuple(sorted(t for s, t in links if s == stage)) for stage in stages),
        )

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

    @cached_property
    def _ends(self) -> tuple[tuple[tuple[tuple[int, tuple[int, ...]], ...], ...], ...]:
        """Of every stage, the stages before and behind that it talks to, with their ranks."""
        return tuple(tuple(tuple((far, self.layout[far]) for far in each) for each in way) for way in self._neighbours)

    def _forward(self, stage: int, unit: int, version: int) -> Iterator[Action]:
        for far, ranks in self._ends[0][stage]:
            yield Receive(stage, unit, "activation", ranks[unit % len(ranks)], far)
        yield Forward(stage, unit, version)
        for far, ranks in self._ends[1][stage]:
            yield Send(stage, unit, "activation", ranks[unit % len(ranks)], far)

    def _backward(self, stage: int, unit: int, version: int) -> Iterator[Action]:
        for far, ranks in self._ends[1][stage]:
            yield Receive(stage, unit, "gradient", ranks[unit % len(ranks)], far)
        yield Backward(stage, unit, version)
        for far, ranks in self._ends[0][stage]:
            yield Send(stage, unit, "gradient", ranks[unit % len(ranks)], far)

    def _update(self, stage: int, round: int) -> tuple[Action, ...]:
        made = Update(stage, round + 1)
        agree = (Agree(stage, round),) if self.agree else ()
        if len(self.layout[stage]) == 1:
            return (*agree, made)
        units = self.per_update(stage)
        return Reduce(stage, round, min(units, self.minibatches - round * units)), *agree, made


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
        super().__post_init__()
        if self.microbatches < 1:
            raise ScheduleError(f"a minibatch needs at least one microbatch, not {self.microbatches}")
        if self.accumulate != 1:
            raise ScheduleError("units that are microbatches add up within a minibatch: ask for more of these instead")

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
