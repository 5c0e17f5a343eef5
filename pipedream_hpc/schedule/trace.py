"""Trace: what ran, when, on which rank. Measured by workers or predicted by the simulator."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

from pipedream_hpc.files import STRICT
from pipedream_hpc.planning.profile import Count
from pipedream_hpc.schedule.actions import (
    AllReduceGradNorm,
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    OptimizerStep,
    Recv,
    ReduceGradients,
    Send,
)

Kind = Literal[
    "forward",
    "backward",
    "backward-input",
    "backward-weight",
    "recv",
    "send",
    "reduce-gradients",
    "all-reduce-grad-norm",
    "optimizer-step",
]

#: The kind of span that an action leaves.
KIND_OF: dict[type, Kind] = {
    Forward: "forward",
    Backward: "backward",
    BackwardInput: "backward-input",
    BackwardWeight: "backward-weight",
    Recv: "recv",
    Send: "send",
    ReduceGradients: "reduce-gradients",
    AllReduceGradNorm: "all-reduce-grad-norm",
    OptimizerStep: "optimizer-step",
}


@dataclass(slots=True, unsafe_hash=True)
class Span:
    """One action that ran. Not frozen, though nobody may change it, for the reason actions are not.

    Attributes:
        rank: rank that ran it.
        stage: stage of that rank.
        kind: kind of action.
        microbatch: number of the microbatch within the trace; -1 for optimizer steps and all-reduces.
        version: weight version used or made; -1 for messages and all-reduces.
        start_s: seconds since the begin of the trace, on one clock for all ranks.
        end_s: seconds since the begin of the trace, on one clock for all ranks.
    """

    __pydantic_config__ = STRICT

    rank: int
    stage: int
    kind: Kind
    microbatch: int
    version: int
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Trace:
    """All spans of one run of a schedule.

    Attributes:
        source: whether it was measured or simulated.
        layout: ranks of every stage.
        total_microbatches: microbatches that passed through the pipeline.
        spans: in any order.
        n_microbatches: microbatches per minibatch; 1 where minibatches are whole.
    """

    __pydantic_config__ = STRICT
    FORMAT: ClassVar[str] = "pipedream-trace"
    VERSION: ClassVar[int] = 2

    source: Literal["measured", "simulated"]
    layout: tuple[tuple[int, ...], ...]
    total_microbatches: int
    spans: tuple[Span, ...]
    n_microbatches: Count = 1

    @property
    def items(self) -> str:
        """The word for what passed through: `minibatches` or `microbatches`."""
        return "minibatches" if self.n_microbatches == 1 else "microbatches"

    @cached_property
    def stages_of(self) -> dict[int, tuple[int, ...]]:
        """The stages that each rank held, in order; ranks in the order of their first stage."""
        held: dict[int, tuple[int, ...]] = {}
        for stage, ranks in enumerate(self.layout):
            for rank in ranks:
                held[rank] = (*held.get(rank, ()), stage)
        return held

    def label(self, rank: int) -> str:
        """Return the rank's name in pictures, such as `rank 1 (stage 1)`."""
        stages = self.stages_of[rank]
        return f"rank {rank} (stage{'s' if len(stages) > 1 else ''} {', '.join(map(str, stages))})"
