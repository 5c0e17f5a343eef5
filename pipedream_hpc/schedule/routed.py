"""Routed: the base of all generated schedules. It decides which rank runs a microbatch, and what passes between stages.

Microbatch k goes to replica k mod R of every stage, so its backward finds the rank that ran its forward,
and no rank ever asks another what to do next. It passes a stage twice::

    receive activation k ──► forward k  ──► send activation k          (no receive at the input stage,
    send gradient k      ◄── backward k ◄── receive gradient k          no send at the output stage)
    backward for the weights k                                          (where the backward is split, maybe later)

After the last backward of a round comes ReduceGradients, where there are replicas, and OptimizerStep. The
gradient has gone upstream by then: upstream must not wait for the other replicas of this stage,
which may be waiting for upstream.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from itertools import pairwise

from pipedream_hpc.planning.plan import Edge, warm_up
from pipedream_hpc.schedule.actions import (
    Action,
    AllReduceGradNorm,
    Backward,
    BackwardInput,
    Forward,
    Layout,
    OptimizerStep,
    Recv,
    ReduceGradients,
    ScheduleError,
    Send,
)


def alternate(count: int, ahead: int) -> Iterator[tuple[bool, int]]:
    """Yield the order that gives 1F1B its name: (whether forward, number) of `count` microbatches.

    With `ahead` = 2 and five microbatches: F0 F1 F2 B0 F3 B1 F4 B2 B3 B4.
    """
    for turn in range(count + ahead):
        # Turn t runs forward t and, once warmed up, backward t - ahead; at either end only one is left.
        if turn < count:
            yield True, turn
        if 0 <= turn - ahead < count:
            yield False, turn - ahead


@dataclass(frozen=True)
class Routed:
    """A schedule that sends microbatches round robin over the replicas of every stage.

    Attributes:
        layout: ranks of every stage.
        total_microbatches: microbatches that pass through the pipeline.
        edges: pairs of stages that exchange activations and gradients; by default each stage and the next. A skip
            connection over stages goes straight from where it begins to where it ends.
        gradient_accumulation_steps: microbatches per replica that one optimizer step learns from.
        all_reduce_grad_norm: whether all stages exchange the norm of a round's gradients before their steps.

    Raises:
        ScheduleError: an edge does not run forwards, a stage is not connected to those before or behind it, fewer
            than one microbatch is to be accumulated, or gradient norms are to be exchanged in a schedule without a
            point at which all stages can.
    """

    layout: Layout
    total_microbatches: int
    _: KW_ONLY
    edges: tuple[Edge, ...] | None = None
    gradient_accumulation_steps: int = 1
    all_reduce_grad_norm: bool = False
    training = True
    newest = False
    stashes = True
    #: Whether no microbatch is in flight between two rounds, on any stage.
    synchronous = False

    def __post_init__(self) -> None:
        if self.gradient_accumulation_steps < 1:
            raise ScheduleError(
                "gradient_accumulation_steps is the number of minibatches that an optimizer step learns from, so at "
                f"least 1, not {self.gradient_accumulation_steps}"
            )
        if self.all_reduce_grad_norm and self.synchronous and len({len(ranks) for ranks in self.layout}) > 1:
            raise ScheduleError(
                "gradients cannot be clipped by their norm over the model, nor losses be scaled for fp16, where some "
                f"stages have more replicas than others, here {self._config}: give every stage as many; "
                "otherwise use bf16, and clip per stage"
            )
        if self.all_reduce_grad_norm and not self.synchronous:
            raise ScheduleError(
                "gradients cannot be clipped by their norm over the model, nor losses be scaled for fp16, where each "
                "stage updates by itself: use 1f1b-flush, zb-h1 or gpipe; otherwise use bf16, and clip per stage"
            )
        stages = len(self.layout)
        for source, target in self.edges or ():
            if not 0 <= source < target < stages:
                raise ScheduleError(f"an edge from stage {source} to stage {target} does not run forwards")
        for stage in range(1, stages):
            if not self.sources(stage):
                raise ScheduleError(f"stage {stage} receives nothing from the stages before it")
        for stage in range(stages - 1):
            if not self.targets(stage):
                raise ScheduleError(f"stage {stage} sends nothing to the stages behind it")

    def splits(self, stage: int) -> bool:
        """False: all backwards are whole."""
        return False

    def lag(self, stage: int) -> int:
        """0: nothing waits for BackwardWeight."""
        return 0

    def waiting(self, stage: int) -> int:
        """0: nothing waits for BackwardWeight."""
        return 0

    def round_size(self, stage: int, round: int) -> int:
        """The same for every round, but that the last may be short."""
        size = self._full_round(stage)
        left = self.total_microbatches - round * size
        return size if size < left else left

    def sources(self, stage: int) -> tuple[int, ...]:
        """Stages that send activations to `stage`, nearest first."""
        return self._neighbours[0][stage]

    def targets(self, stage: int) -> tuple[int, ...]:
        """Stages that `stage` sends activations to, nearest first."""
        return self._neighbours[1][stage]

    @cached_property
    def stages_of(self) -> dict[int, tuple[int, ...]]:
        """The stages that each rank holds, in order."""
        held: dict[int, tuple[int, ...]] = {}
        for stage, ranks in enumerate(self.layout):
            for rank in ranks:
                held[rank] = (*held.get(rank, ()), stage)
        return held

    @property
    def _config(self) -> str:
        """Replicas per stage, such as 2-1-1."""
        return "-".join(str(len(ranks)) for ranks in self.layout)

    def _full_round(self, stage: int) -> int:
        """Microbatches of a round that is not short."""
        return len(self.layout[stage]) * self.gradient_accumulation_steps

    def _rounds(self, stage: int) -> int:
        """Rounds of `stage` over the whole schedule."""
        return -(-self.total_microbatches // self._full_round(stage))

    @cached_property
    def _neighbours(self) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
        """The stages before each stage that it receives activations from, and those behind it that it sends to."""
        stages = len(self.layout)
        sources: list[list[int]] = [[] for _ in range(stages)]
        targets: list[list[int]] = [[] for _ in range(stages)]
        for source, target in pairwise(range(stages)) if self.edges is None else self.edges:
            sources[target].append(source)
            targets[source].append(target)
        return (
            tuple(tuple(sorted(each, reverse=True)) for each in sources),
            tuple(tuple(sorted(each)) for each in targets),
        )

    @cached_property
    def _warm_ups(self) -> tuple[int, ...]:
        replicas = [len(ranks) for ranks in self.layout]
        return tuple(warm_up(replicas, stage) for stage in range(len(replicas)))

    def _only_stage(self, rank: int) -> int:
        stages = self.stages_of[rank]
        if len(stages) > 1:
            raise ScheduleError(
                f"rank {rank} holds stages {', '.join(map(str, stages))}, which only the interleaved schedule can run: "
                "give every stage ranks of its own"
            )
        return stages[0]

    def _own(self, stage: int, rank: int, first: int = 0, end: int | None = None) -> range:
        """Microbatches from `first` up to `end` that `rank` runs."""
        replicas = self.layout[stage]
        turn = (replicas.index(rank) - first) % len(replicas)
        return range(first + turn, self.total_microbatches if end is None else end, len(replicas))

    @cached_property
    def _peers(self) -> tuple[tuple[tuple[tuple[int, tuple[int, ...]], ...], ...], ...]:
        """For every stage, the stages before and those behind it that it exchanges messages with, and their ranks."""
        return tuple(
            tuple(tuple((peer_stage, self.layout[peer_stage]) for peer_stage in side) for side in sides)
            for sides in zip(*self._neighbours, strict=True)
        )

    def _forward(self, stage: int, microbatch: int, version: int, *, split: bool = False) -> list[Action]:
        before, behind = self._peers[stage]
        actions: list[Action] = []
        for peer_stage, ranks in before:
            actions.append(Recv(stage, microbatch, "activation", peer_stage, ranks[microbatch % len(ranks)]))
        actions.append(Forward(stage, microbatch, version, split))
        for peer_stage, ranks in behind:
            actions.append(Send(stage, microbatch, "activation", peer_stage, ranks[microbatch % len(ranks)]))
        return actions

    def _backward(
        self, stage: int, microbatch: int, version: int, *, last: bool = False, split: bool = False
    ) -> list[Action]:
        before, behind = self._peers[stage]
        actions: list[Action] = []
        for peer_stage, ranks in behind:
            actions.append(Recv(stage, microbatch, "gradient", peer_stage, ranks[microbatch % len(ranks)]))
        actions.append(
            BackwardInput(stage, microbatch, version) if split else Backward(stage, microbatch, version, last)
        )
        for peer_stage, ranks in before:
            actions.append(Send(stage, microbatch, "gradient", peer_stage, ranks[microbatch % len(ranks)]))
        return actions

    def _update(self, stage: int, round: int) -> tuple[Action, ...]:
        """What makes the next version of `stage` once the round's gradients are complete."""
        size = self.round_size(stage, round)
        step = OptimizerStep(stage, round + 1, size)
        if len(self.layout[stage]) == 1 and not self.all_reduce_grad_norm:
            return (step,)
        norm = (AllReduceGradNorm(stage, round, size),) if self.all_reduce_grad_norm else ()
        reduce = (ReduceGradients(stage, round, size),) if len(self.layout[stage]) > 1 else ()
        return (*reduce, *norm, step)


@dataclass(frozen=True)
class Microbatched(Routed):
    """A schedule in which a round is a minibatch that is cut into microbatches.

    The last minibatch may be short. A replica may get no microbatch of some minibatch; it takes part
    in the reduction all the same.

    Attributes:
        n_microbatches: microbatches of a round: those of a minibatch, or of several where gradients are accumulated.

    Raises:
        ScheduleError: there is less than one microbatch to a minibatch.
    """

    n_microbatches: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_microbatches < 1:
            raise ScheduleError(f"a minibatch needs at least one microbatch, not {self.n_microbatches}")
        if self.gradient_accumulation_steps != 1:
            raise ScheduleError("a schedule that cuts minibatches accumulates gradients by a larger n_microbatches")

    def versions(self, stage: int) -> int:
        """One: nothing is in flight at an optimizer step."""
        return 1

    def _full_round(self, stage: int) -> int:
        return self.n_microbatches

    def _flushes(self, stage: int, rank: int) -> Iterator[tuple[int, range]]:
        """Yield the number of every round and the microbatches of it that `rank` runs."""
        for number, first in enumerate(range(0, self.total_microbatches, self.n_microbatches)):
            yield number, self._own(stage, rank, first, min(first + self.n_microbatches, self.total_microbatches))

    def _most_local(self, stage: int) -> int:
        """Most microbatches of a round that fall to one replica."""
        return -(-self.n_microbatches // len(self.layout[stage]))
