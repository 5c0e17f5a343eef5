"""Written: a schedule whose actions were written by hand, or by another program.

A file (see `text`) describes the actions of every rank for some minibatches; nothing is in flight at its end, so that
it can be repeated for any multiple of these minibatches::

    file       F0 F1 B0 U B1 U                                 2 minibatches
    repeated   F0 F1 B0 U B1 U   F2 F3 B2 U B3 U   ...         microbatches, rounds and versions go on

What the generated schedules know in advance (microbatches in flight, weight versions, sizes of rounds) is counted here
along each rank's actions. The verifier proves that they fit together; nothing is launched before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from pipedream_hpc.planning.plan import Edge
from pipedream_hpc.schedule.actions import (
    Action,
    AllReduceGradNorm,
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    Layout,
    OptimizerStep,
    Recv,
    ReduceGradients,
    ScheduleError,
    Send,
)


@dataclass(frozen=True)
class _Counts:
    """What the actions of a stage add up to; the most of any replica.

    Attributes:
        in_flight: microbatches between forward and end of backward at once.
        versions: weight versions from the oldest in use to the newest.
        lag: microbatches that wait for BackwardWeight while another's backward runs.
        waiting: microbatches that wait for BackwardWeight at once.
        rounds: microbatches of each round, as the optimizer steps of the first replica say.
    """

    in_flight: int
    versions: int
    lag: int
    waiting: int
    rounds: tuple[int, ...]


@dataclass(frozen=True)
class Written:
    """A schedule of given actions.

    Attributes:
        layout: ranks of every stage.
        rank_actions: actions of rank 0, rank 1, ...
        n_microbatches: microbatches per minibatch; 1 for whole minibatches.
        repeats: how many times the actions are carried out, one after the other.

    Raises:
        ScheduleError: the layout is impossible, an action is not one for its rank, a stage is not connected to the
            others, or the actions describe no whole number of minibatches.
    """

    layout: Layout
    rank_actions: tuple[tuple[Action, ...], ...]
    n_microbatches: int = 1
    repeats: int = 1
    newest = False
    stashes = True

    def __post_init__(self) -> None:
        check_layout(self.layout)
        ranks = 1 + max(rank for members in self.layout for rank in members)
        if len(self.rank_actions) != ranks:
            raise ScheduleError(f"the layout has {ranks} ranks, but there are actions for {len(self.rank_actions)}")
        for rank, actions in enumerate(self.rank_actions):
            for action in actions:
                problem = misplaced(action, rank, self.layout)
                if problem is not None:
                    raise ScheduleError(f"rank {rank}: {problem}")
        if self.n_microbatches < 1 or self._described == 0 or self._described % self.n_microbatches:
            raise ScheduleError(
                f"the actions run {self._described} microbatches, which is no whole number of minibatches of "
                f"{self.n_microbatches} microbatches"
            )
        for stage in range(1, len(self.layout)):
            if not self.sources(stage):
                raise ScheduleError(f"stage {stage} receives nothing from the stages before it")
        for stage in range(len(self.layout) - 1):
            if not self.targets(stage):
                raise ScheduleError(f"stage {stage} sends nothing to the stages behind it")

    # ------------------------------------------------------------------ for how many minibatches

    @property
    def minibatches(self) -> int:
        """Minibatches that the actions describe, without repeats."""
        return self._described // self.n_microbatches

    def for_minibatches(self, minibatches: int) -> Written:
        """Return this schedule repeated for so many minibatches.

        Raises:
            ScheduleError: they are no multiple of the minibatches described, or replicas would not take turns.
        """
        if minibatches % self.minibatches:
            raise ScheduleError(
                f"the schedule describes {self.minibatches} minibatches and cannot be repeated for {minibatches}: use "
                f"a multiple of {self.minibatches} minibatches, or write a schedule for {minibatches}"
            )
        repeats = minibatches // self.minibatches
        for stage, ranks in enumerate(self.layout):
            if repeats > 1 and self._described % len(ranks):
                raise ScheduleError(
                    f"the schedule describes {self._described} microbatches, so its {len(ranks)} replicas of stage "
                    f"{stage} do not take equal turns and it cannot be repeated for {minibatches} minibatches: write "
                    f"it for a multiple of {len(ranks)} microbatches"
                )
        return dataclasses.replace(self, repeats=repeats)

    def check_against(self, layout: Layout, edges: tuple[Edge, ...]) -> None:
        """Check that the schedule is one for a plan with this layout and a model with these edges.

        Raises:
            ScheduleError: it has another layout, or sends along other edges.
        """
        if self.layout != layout:
            raise ScheduleError(
                f"the schedule has layout {layout_text(self.layout)}, but the plan has {layout_text(layout)}: write "
                "the schedule for the plan, or use another plan"
            )
        for source, target in sorted({*edges} ^ {*self.edges}):
            if (source, target) in self.edges:
                raise ScheduleError(
                    f"the schedule sends from stage {source} to stage {target}, but no tensor of the model goes there"
                )
            raise ScheduleError(
                f"the schedule sends nothing from stage {source} to stage {target}, but tensors of the model go there"
            )

    # ------------------------------------------------------------------ the Schedule protocol

    @property
    def total_microbatches(self) -> int:
        """Microbatches of all repeats."""
        return self._described * self.repeats

    @cached_property
    def training(self) -> bool:
        """Whether there are backwards."""
        backwards = (Backward, BackwardInput)
        return any(isinstance(action, backwards) for actions in self.rank_actions for action in actions)

    @cached_property
    def all_reduce_grad_norm(self) -> bool:
        """Whether all stages exchange the gradient norm of a round before they update."""
        return any(isinstance(action, AllReduceGradNorm) for actions in self.rank_actions for action in actions)

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """Pairs of stages that exchange messages, in order."""
        found = {
            Edge(min(action.stage, action.peer_stage), max(action.stage, action.peer_stage))
            for actions in self.rank_actions
            for action in actions
            if isinstance(action, Recv | Send)
        }
        return tuple(sorted(found))

    def sources(self, stage: int) -> tuple[int, ...]:
        """Stages that send activations to `stage`, nearest first."""
        return tuple(source for source, target in reversed(self.edges) if target == stage)

    def targets(self, stage: int) -> tuple[int, ...]:
        """Stages that `stage` sends activations to, nearest first."""
        return tuple(target for source, target in self.edges if source == stage)

    def in_flight(self, stage: int) -> int:
        """Most microbatches between forward and end of backward at once, on a replica of `stage`."""
        return self._counts[stage].in_flight

    def versions(self, stage: int) -> int:
        """Weight versions from the oldest in use to the newest, at most."""
        return self._counts[stage].versions

    def splits(self, stage: int) -> bool:
        """Whether any backward in `stage` is split."""
        return self._counts[stage].waiting > 0

    def lag(self, stage: int) -> int:
        """Most microbatches that wait for BackwardWeight while another's backward runs."""
        return self._counts[stage].lag

    def waiting(self, stage: int) -> int:
        """Most microbatches that wait for BackwardWeight at once."""
        return self._counts[stage].waiting

    def round_size(self, stage: int, round: int) -> int:
        """Microbatches of a round, as the optimizer steps of the first replica say; 0 if there is no such round."""
        rounds = self._counts[stage].rounds
        return rounds[round % len(rounds)] if 0 <= round < len(rounds) * self.repeats else 0

    def actions(self, rank: int) -> Iterator[Action]:
        """The actions of `rank`, in order."""
        actions = self.rank_actions[rank]
        for repeat in range(self.repeats):
            if repeat == 0:
                yield from actions
            else:
                for action in actions:
                    rounds = len(self._counts[action.stage].rounds)
                    yield _later(action, repeat * self._described, repeat * rounds)

    # ------------------------------------------------------------------

    @cached_property
    def _described(self) -> int:
        """Microbatches of one repeat."""
        forwards = (action for actions in self.rank_actions for action in actions if isinstance(action, Forward))
        return 1 + max((forward.microbatch for forward in forwards), default=-1)

    @cached_property
    def _counts(self) -> tuple[_Counts, ...]:
        return tuple(self._counted(stage) for stage in range(len(self.layout)))

    def _counted(self, stage: int) -> _Counts:
        rounds = tuple(
            action.n_microbatches
            for action in self.rank_actions[self.layout[stage][0]]
            if isinstance(action, OptimizerStep) and action.stage == stage
        )
        in_flight = versions = 1
        lag = most_waiting = 0
        for rank in self.layout[stage]:
            held: dict[int, int] = {}
            waiting: set[int] = set()
            newest = 0
            for action in self.rank_actions[rank]:
                if action.stage != stage:
                    continue
                if isinstance(action, Forward):
                    versions = max(versions, newest - action.version + 1)
                    if self.training:
                        held[action.microbatch] = action.version
                        in_flight = max(in_flight, len(held))
                elif isinstance(action, Backward | BackwardInput | BackwardWeight):
                    versions = max(versions, newest - action.version + 1)
                    if isinstance(action, BackwardWeight):
                        waiting.discard(action.microbatch)
                    else:
                        lag = max(lag, len(waiting))
                    if isinstance(action, BackwardInput):
                        waiting.add(action.microbatch)
                        most_waiting = max(most_waiting, len(waiting))
                    else:
                        held.pop(action.microbatch, None)
                elif isinstance(action, OptimizerStep):
                    newest += 1
                    versions = max(versions, newest - min(held.values(), default=newest) + 1)
        return _Counts(in_flight, versions, lag, most_waiting, rounds)


def check_layout(layout: Layout) -> None:
    """Check that ranks are numbered from 0, and that those with several stages have one replica number.

    Raises:
        ScheduleError: the layout is another.
    """
    if not layout or not all(layout):
        raise ScheduleError("a layout needs at least one stage, and every stage at least one rank")
    ranks = {rank for members in layout for rank in members}
    if ranks != set(range(len(ranks))):
        raise ScheduleError(f"the ranks of a layout should be 0 to {len(ranks) - 1}, but are {sorted(ranks)}")
    place: dict[int, tuple[int, int]] = {}
    for stage, members in enumerate(layout):
        for replica, rank in enumerate(members):
            if place.setdefault(rank, (replica, len(members))) != (replica, len(members)) or members.count(rank) > 1:
                raise ScheduleError(
                    f"rank {rank} holds several stages and should be the same replica of as many in each, but is not "
                    f"in stage {stage}"
                )


def layout_text(layout: Layout) -> str:
    """Return the layout as files have it, such as `0 | 1,2 | 3`."""
    return " | ".join(",".join(map(str, ranks)) for ranks in layout)


def misplaced(action: Action, rank: int, layout: Layout) -> str | None:
    """Return why an action is not one for `rank`, as a sentence; None if it is."""
    if not 0 <= action.stage < len(layout) or rank not in layout[action.stage]:
        held = ", ".join(str(stage) for stage, ranks in enumerate(layout) if rank in ranks)
        return f"stage {action.stage} is not on rank {rank}, which holds stage {held}"
    if isinstance(action, Recv | Send):
        upstream = isinstance(action, Recv) == (action.payload == "activation")
        side = "before" if upstream else "behind"
        stages = range(action.stage) if upstream else range(action.stage + 1, len(layout))
        if action.peer_stage not in stages:
            verb, preposition = ("received", "from") if isinstance(action, Recv) else ("sent", "to")
            return (
                f"an {action.payload} is {verb} {preposition} a stage {side} stage {action.stage}, "
                f"not {preposition} stage {action.peer_stage}"
            ).replace("an gradient", "a gradient")
        if action.peer_rank not in layout[action.peer_stage]:
            return f"stage {action.peer_stage} is not on rank {action.peer_rank}"
    return None


def _later(action: Action, microbatches: int, rounds: int) -> Action:
    """Return the action of a later repeat."""
    if isinstance(action, Recv | Send):
        return dataclasses.replace(action, microbatch=action.microbatch + microbatches)
    if isinstance(action, ReduceGradients | AllReduceGradNorm):
        return dataclasses.replace(action, round=action.round + rounds)
    if isinstance(action, OptimizerStep):
        return dataclasses.replace(action, version=action.version + rounds)
    return dataclasses.replace(action, microbatch=action.microbatch + microbatches, version=action.version + rounds)
