"""Manner: how a plan is run, and the plan as it is run so.

What a user asks for is a plan, replicas of stages, or their number; what comes of it is a Plan whose schedule,
microbatches, units in flight and memory are those of the run.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.files import load
from pipedream_hpc.model.graph import LayerGraph
from pipedream_hpc.model.profiler import count
from pipedream_hpc.planning.even import even, replicas_of
from pipedream_hpc.planning.memory import MemoryParts, MemoryRule
from pipedream_hpc.planning.plan import COUNTED, Plan, StagePlan
from pipedream_hpc.planning.profile import Profile
from pipedream_hpc.planning.scale import scaled
from pipedream_hpc.planning.solver import Request, solve
from pipedream_hpc.planning.topology import Level, Topology
from pipedream_hpc.schedule import kinds
from pipedream_hpc.schedule.actions import Layout, Schedule
from pipedream_hpc.schedule.interleaved import folded
from pipedream_hpc.schedule.play import channels


@dataclass(frozen=True)
class Manner:
    """In which manner a plan is run.

    Attributes:
        schedule: one of schedule.kinds.NAMES; None for the plan's.
        microbatches: to a minibatch; None for the plan's.
        chunks: stages per rank, for the interleaved schedule.
        accumulate: minibatches per replica to an update.
        agree: whether all stages agree about gradients before they update.
        split: whether backwards are split.
        zero_bubble: whether they are, with twice as many units in flight.
        recompute: whether stages run their forwards again before backwards; None for what the plan says of each.
    """

    schedule: str | None = None
    microbatches: int | None = None
    chunks: int = 1
    accumulate: int = 1
    agree: bool = False
    split: bool = False
    zero_bubble: bool = False
    recompute: bool | None = None

    @property
    def times_split(self) -> int:
        """0 where backwards are whole, 1 where they are split, 2 where twice as many units are in flight for it."""
        return 2 if self.zero_bubble else int(self.split)

    @property
    def parts(self) -> str:
        """How backwards are run, in words."""
        return ("whole", "split", "split, without a bubble")[self.times_split]

    def pieces(self, wanted: Plan | tuple[int, ...] | int) -> int:
        """Units that a minibatch is cut into."""
        planned = wanted if isinstance(wanted, Plan) else None
        schedule = self.schedule or (planned.schedule if planned else "1f1b")
        if not kinds.takes_microbatches(schedule):
            if self.microbatches not in (None, 1):
                kinds.make(schedule, ((0,),), 0, microbatches=self.microbatches)  # says what is wrong
            return 1
        if self.microbatches is not None:
            return self.microbatches
        return planned.microbatches if planned and self.schedule is None else 1


def given(plan: Plan | str | Path | int) -> Plan | tuple[int, ...] | int:
    """What a user asks for: a plan (read, if it is a file), the replicas of even stages, or their number."""
    if isinstance(plan, str) and (replicas := replicas_of(plan)) is not None:
        return replicas
    if isinstance(plan, str) and re.fullmatch(r"[\dxX,:-]+", plan) and not Path(plan).exists():
        raise PipedreamError(
            f"plan '{plan}' is neither a file, nor replicas of stages such as 2-1-1, nor a number of them"
        )
    return load(Plan, plan) if isinstance(plan, str | Path) else plan


def resolve(wanted: Plan | tuple[int, ...] | int, name: str, graph: LayerGraph, manner: Manner) -> Plan:
    """The plan itself, or an even cut into stages, as it is run in this manner.

    Raises:
        PipedreamError: the plan's figures are of another schedule than its own.
        ScheduleError: the schedule does not go with its layout or microbatches.
    """
    if isinstance(wanted, int):
        flat = Topology((Level("node", wanted, 0.0, 1e9),), device="counted")
        plan = solve(_counted(graph, manner.pieces(wanted)), flat, Request(straight=True))
    else:
        plan = wanted if isinstance(wanted, Plan) else even(_counted(graph, manner.pieces(wanted)), wanted)
    if not isinstance(wanted, Plan):
        plan = dataclasses.replace(plan, notes=(*plan.notes, COUNTED))
    if manner.schedule is None:
        whole = dataclasses.replace(manner, split=False, zero_bubble=False)  # as plans are made
        _check_in_flight(plan, name, _schedule(plan, plan.schedule, plan.microbatches, whole))
    kind, pieces = manner.schedule or plan.schedule, manner.pieces(wanted)
    schedule = _schedule(plan, kind, pieces, manner)
    return dataclasses.replace(
        plan,
        schedule=kind,
        microbatches=pieces,
        stages=tuple(
            _as_run(stage, index, plan, schedule, pieces, manner.recompute) for index, stage in enumerate(plan.stages)
        ),
    )


def _counted(graph: LayerGraph, pieces: int) -> Profile:
    """By counting, of a whole minibatch of as many `pieces` as the graph was captured with one of."""
    profile = count(graph)
    return scaled(profile, minibatch=profile.minibatch * pieces)


def _schedule(plan: Plan, kind: str, pieces: int, manner: Manner) -> kinds.AnySchedule:
    """Of no minibatches: what it says of its stages."""
    return kinds.make(
        kind,
        layout_of(plan, kind, manner),
        0,
        microbatches=pieces,
        accumulate=manner.accumulate,
        split=manner.split,
        zero_bubble=manner.zero_bubble,
    )


def layout_of(plan: Plan, kind: str, manner: Manner) -> Layout:
    return folded(plan.layout, manner.chunks) if kind == "interleaved" else plan.layout


def _as_run(
    stage: StagePlan, index: int, planned: Plan, schedule: kinds.AnySchedule, pieces: int, recompute: bool | None
) -> StagePlan:
    """A stage of a plan that is run in another way than it was planned for: what is in flight then, and its memory.

    Args:
        stage: as planned.
        index: its number.
        planned: the plan it is of.
        schedule: that is run.
        pieces: that minibatches are cut into.
        recompute: whether forwards are run again; None as planned.
    """
    again = stage.recompute if recompute is None else recompute
    units, was = schedule.in_flight(index), stage.memory
    if was is None:
        return dataclasses.replace(stage, in_flight=units, recompute=again)
    sent = stage.output_bytes if index + 1 < len(planned.stages) else 0
    received = max(0, was.slots * planned.microbatches - 2 * sent) / (stage.in_flight + 1)
    parts = MemoryRule(planned.optimizer, schedule.versions(index), pieces).parts(
        parameter_bytes=stage.parameter_bytes,
        stash_bytes=was.activations * planned.microbatches / (1 if stage.recompute else stage.in_flight),
        input_bytes=received * _peers(schedule.layout, index, index - 1),
        output_bytes=sent * _peers(schedule.layout, index, index + 1),
        in_flight=units,
        recompute=again,
        lag=schedule.lag(index),
        waiting=schedule.waiting(index),
        waiting_bytes=stage.waiting_bytes,
        outside_bytes=stage.outside_bytes,
    )
    parts["weights"] = schedule.versions(index) * stage.parameter_bytes  # as many slabs, used or not
    memory = MemoryParts(**{part: math.ceil(size) for part, size in parts.items()})
    return dataclasses.replace(stage, in_flight=units, memory=memory, recompute=again)


def _peers(layout: Layout, stage: int, far: int) -> int:
    """Ranks of stage `far` that a rank of `stage` has a channel with."""
    if not 0 <= far < len(layout):
        return 0
    return len(channels(layout, stage, far)) // len(layout[stage])


def _check_in_flight(plan: Plan, name: str, schedule: Schedule) -> None:
    for index, stage in enumerate(plan.stages):
        if stage.in_flight != schedule.in_flight(index):
            raise PipedreamError(
                f"{name}: field 'stages[{index}].in_flight' is {stage.in_flight}, but {plan.schedule} on {plan.ranks} "
                f"ranks keeps {schedule.in_flight(index)} minibatches in flight there: make the plan anew with "
                "pipedream partition"
            )
