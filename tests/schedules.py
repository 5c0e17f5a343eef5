"""Layouts, plans and machines for schedules; a schedule that is tampered with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pictures

from pipedream_hpc.planning.plan import Plan, StagePlan
from pipedream_hpc.planning.topology import Level, Topology
from pipedream_hpc.schedule.actions import (
    Action,
    Backward,
    Forward,
    Layout,
    Reduce,
    Schedule,
    Send,
    Update,
    WeightGradient,
)
from pipedream_hpc.schedule.one_f_one_b import OneFOneB
from pipedream_hpc.schedule.simulator import simulate


def layout(*replicas: int) -> Layout:
    """Ranks numbered stage by stage: layout(2, 1) is ((0, 1), (2,))."""
    ranks = iter(range(sum(replicas)))
    return tuple(tuple(next(ranks) for _ in range(count)) for count in replicas)


def planned(members: Layout, forward_s: float = 1.0, backward_s: float = 1.0, **each: Any) -> Plan:
    """A plan of equal stages for `members`; only its times and bytes count."""
    figures = {
        "forward_s": forward_s,
        "backward_s": backward_s,
        "compute_s": forward_s + backward_s,
        "sync_s": 0.0,
        "boundary_s": 0.0,
        "in_flight": 1,
        "parameter_bytes": 0,
        "output_bytes": 0,
        "output_shape": None,
        "output_dtype": None,
        "limit": "compute",
        **each,
    }
    made, rank = [], 0
    for index, ranks in enumerate(members):
        own = tuple(range(rank, rank + len(ranks)))
        made.append(StagePlan(layers=(f"l{index}",), ranks=own, **figures))
        rank += len(ranks)
    whole_s = forward_s + backward_s
    return Plan("test", 1, "1f1b", "paper2018", tuple(made), whole_s, len(made) * whole_s)


def machine(*levels: tuple[int, float, float]) -> Topology:
    """Levels as (count, latency_s, bandwidth)."""
    made = (Level(f"level {i}", count, latency_s, beta) for i, (count, latency_s, beta) in enumerate(levels))
    return Topology(tuple(made), "test")


#: Messages take no time.
INSTANT = machine((4096, 0.0, 1e30))


def drawn(schedule: Schedule, **seconds: float) -> list[str]:
    """The schedule as lanes of seconds; forward and backward take one each, unless `seconds` says otherwise."""
    return pictures.timeline(simulate(schedule, planned(schedule.layout, **seconds), INSTANT).trace)


def lanes(schedule: Schedule) -> list[str]:
    """What each rank computes, in order: F0 F1 B0 R U ..."""

    def word(action: Action) -> str:
        if isinstance(action, Forward | Backward | WeightGradient):
            return f"{type(action).__name__[0]}{action.minibatch}"
        return {Reduce: "R", Update: "U"}.get(type(action), "")

    ranks = sorted({rank for members in schedule.layout for rank in members})
    return [" ".join(filter(None, map(word, schedule.actions(rank)))) for rank in ranks]


def versions(schedule: Schedule, stage: int) -> str:
    """The versions that one stage of one rank runs on: F0v0 F1v0 B0v0 ..."""
    (rank,) = schedule.layout[stage]
    return " ".join(
        f"{type(action).__name__[0]}{action.minibatch}v{action.version}"
        for action in schedule.actions(rank)
        if isinstance(action, Forward | Backward) and action.stage == stage
    )


@dataclass(frozen=True)
class Tampered:
    """A schedule in which each rank's actions were changed by a function of rank and actions."""

    base: Any
    change: Callable[[int, list[Action]], list[Action]]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base, name)

    def actions(self, rank: int) -> Iterator[Action]:
        return iter(self.change(rank, list(self.base.actions(rank))))


class ReduceFirst(OneFOneB):
    """1F1B-RR as naive implementations have it: the all-reduce is part of backward.

    The gradient goes upstream only after it, so upstream waits for all replicas of the stage.
    """

    def actions(self, rank: int) -> Iterator[Action]:
        held: list[Action] = []
        for action in super().actions(rank):
            if isinstance(action, Send) and action.payload == "gradient" and len(self.layout[action.stage]) > 1:
                held = [action]
            else:
                yield action
            if isinstance(action, Reduce):
                yield from held
                held = []
