"""Trace: what ran, when, on which rank. Measured by workers or predicted by the simulator."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

from pipedream_hpc.files import STRICT
from pipedream_hpc.planning.profile import Count
from pipedream_hpc.schedule.actions import Agree, Backward, Forward, Receive, Reduce, Send, Update, WeightGradient

Kind = Literal["forward", "backward", "weight-gradient", "receive", "send", "reduce", "agree", "update"]

#: What spans call an action.
KIND_OF: dict[type, Kind] = {
    Forward: "forward",
    Backward: "backward",
    WeightGradient: "weight-gradient",
    Receive: "receive",
    Send: "send",
    Reduce: "reduce",
    Agree: "agree",
    Update: "update",
}


@dataclass(slots=True, unsafe_hash=True)
class Span:
    """One action that ran. Not frozen, though nobody may change it, for the reason actions are not.

    Attributes:
        rank: who ran it.
        stage: for which of its stages.
        kind: which action.
        minibatch: number of the unit within the trace; -1 for updates, reductions and agreements.
        version: weight version used or made; -1 for messages, reductions and agreements.
        start_s: seconds since the trace's begin, on one clock for all ranks.
        end_s: likewise.
    """

    __pydantic_config__ = STRICT

    rank: int
    stage: int
    kind: Kind
    minibatch: int
    version: int
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Trace:
    """All spans of one schedule's run.

    Attributes:
        source: whether it was measured or simulated.
        layout: ranks of every stage.
        minibatches: how many units went through.
        spans: in any order.
        microbatches: units to a minibatch, where minibatches are cut.
    """

    __pydantic_config__ = STRICT
    FORMAT: ClassVar[str] = "pipedream-trace"
    VERSION: ClassVar[int] = 1

    source: Literal["measured", "simulated"]
    layout: tuple[tuple[int, ...], ...]
    minibatches: int
    spans: tuple[Span, ...]
    microbatches: Count = 1

    @property
    def units(self) -> str:
        """What went through, in words."""
        return "minibatches" if self.microbatches == 1 else "microbatches"

    @cached_property
    def stages_of(self) -> dict[int, tuple[int, ...]]:
        """The stages that each rank held, in order; ranks in the order of their first stage."""
        held: dict[int, tuple[int, ...]] = {}
        for stage, ranks in enumerate(self.layout):
            for rank in ranks:
                held[rank] = (*held.get(rank, ()), stage)
        return held

    def label(self, rank: int) -> str:
        """Such as `rank 1 (stage 1)`: what a picture calls the rank."""
        stages = self.stages_of[rank]
        return f"rank {rank} (stage{'s' if len(stages) > 1 else ''} {', '.join(map(str, stages))})"
