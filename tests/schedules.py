"""Layouts, plans and machines for schedules; schedules whose actions were changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pictures
from hypothesis import assume
from hypothesis import strategies as st

from pipedream_hpc.planning.plan import Edge, Plan, StagePlan
from pipedream_hpc.planning.topology import Level, Topology
from pipedream_hpc.schedule import registry
from pipedream_hpc.schedule.actions import (
    Action,
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    Layout,
    OptimizerStep,
    ReduceGradients,
    Schedule,
    ScheduleError,
    Send,
)
from pipedream_hpc.schedule.one_f_one_b import OneFOneB
from pipedream_hpc.schedule.simulator import simulate


def layout(*replicas: int) -> Layout:
    """Return ranks numbered stage by stage: layout(2, 1) is ((0, 1), (2,))."""
    ranks = iter(range(sum(replicas)))
    return tuple(tuple(next(ranks) for _ in range(count)) for count in replicas)


def planned(members: Layout, forward_s: float = 1.0, backward_s: float = 1.0, **each: Any) -> Plan:
    """Return a plan of equal stages for `members`; only its times and bytes matter."""
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
    """Return the topology of levels given as (count, latency_s, bandwidth)."""
    made = (Level(f"level {i}", count, latency_s, beta) for i, (count, latency_s, beta) in enumerate(levels))
    return Topology(tuple(made), "test")


#: Messages take no time.
INSTANT = machine((4096, 0.0, 1e30))


def drawn(schedule: Schedule, **seconds: float) -> list[str]:
    """Return the schedule as lanes of seconds; forward and backward take one each, unless `seconds` says otherwise."""
    return pictures.timeline(simulate(schedule, planned(schedule.layout, **seconds), INSTANT).trace)


def lanes(schedule: Schedule) -> list[str]:
    """Return what each rank computes, in order: F0 F1 B0 R U ... Both kinds of backward are B."""

    def word(action: Action) -> str:
        if isinstance(action, Forward | Backward | BackwardInput | BackwardWeight):
            letter = {Forward: "F", Backward: "B", BackwardInput: "B", BackwardWeight: "W"}[type(action)]
            return f"{letter}{action.microbatch}"
        return {ReduceGradients: "R", OptimizerStep: "U"}.get(type(action), "")

    ranks = sorted({rank for members in schedule.layout for rank in members})
    return [" ".join(filter(None, map(word, schedule.actions(rank)))) for rank in ranks]


def versions(schedule: Schedule, stage: int) -> str:
    """Return the versions that a stage of one rank runs on: F0v0 F1v0 B0v0 ..."""
    (rank,) = schedule.layout[stage]
    return " ".join(
        f"{type(action).__name__[0]}{action.microbatch}v{action.version}"
        for action in schedule.actions(rank)
        if isinstance(action, Forward | Backward) and action.stage == stage
    )


@st.composite
def any_schedule(draw: st.DrawFn, most_accumulated: int = 3) -> registry.AnySchedule:
    """Draw any schedule on up to five stages of up to five replicas, for up to 60 microbatches."""
    kind = draw(st.sampled_from(registry.NAMES))
    replicas = draw(st.lists(st.integers(1, 5), min_size=1, max_size=1 if kind == "data-parallel" else 5))
    n_microbatches = draw(st.integers(1, 12)) if registry.cuts_minibatches(kind) else 1
    members: Layout = layout(*replicas)
    if kind == "interleaved":
        each, chunks = replicas[0], draw(st.integers(1, 4))
        members = layout(*[each] * len(replicas)) * chunks
        n_microbatches = draw(st.integers(1, 3)) * each * len(replicas)
    stages, edges = len(members), None
    if kind != "interleaved" and draw(st.booleans()):
        # Skip connections: each stage with the next, and any others with any behind them.
        skips = [(a, b) for a in range(stages) for b in range(a + 2, stages)]
        chosen = draw(st.lists(st.sampled_from(skips), unique=True)) if skips else []
        edges = tuple(Edge(*pair) for pair in sorted({*pairwise(range(stages)), *chosen}))
    gradient_accumulation_steps = 1 if kind == "interleaved" else draw(st.integers(1, most_accumulated))
    microbatches = draw(st.integers(0, 60 // n_microbatches)) * n_microbatches
    drains = kind.startswith(("1f1b-flush", "zb", "gpipe", "interleaved", "model-parallel", "data-parallel"))
    norm = drains and len(set(replicas)) == 1 and draw(st.booleans())
    try:
        return registry.make(
            kind,
            members,
            microbatches,
            n_microbatches=n_microbatches,
            edges=edges,
            gradient_accumulation_steps=gradient_accumulation_steps,
            all_reduce_grad_norm=norm,
        )
    except ScheduleError:
        assert kind == "2bw", "no other is refused here"
        assume(False)
        raise


@dataclass(frozen=True)
class Tampered:
    """A schedule whose actions are changed by a function of rank and actions."""

    base: Any
    change: Callable[[int, list[Action]], list[Action]]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base, name)

    def actions(self, rank: int) -> Iterator[Action]:
        return iter(self.change(rank, list(self.base.actions(rank))))


class ReduceFirst(OneFOneB):
    """1F1B-RR with a common mistake: the all-reduce is part of the backward.

    The gradient goes upstream only after it, so upstream waits for all replicas of the stage.
    """

    def actions(self, rank: int) -> Iterator[Action]:
        held: list[Action] = []
        for action in super().actions(rank):
            if isinstance(action, Send) and action.payload == "gradient" and len(self.layout[action.stage]) > 1:
                held = [action]
            else:
                yield action
            if isinstance(action, ReduceGradients):
                yield from held
                held = []
