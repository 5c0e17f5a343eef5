"""Trace: what ran, when, on which rank. Measured by workers or predicted by the simulator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pipedream_hpc.files import STRICT

Kind = Literal["forward", "backward", "receive", "send", "reduce", "update"]


@dataclass(frozen=True, slots=True)
class Span:
    """One action that ran.

    Attributes:
        rank: who ran it.
        kind: which action.
        minibatch: number within the trace; -1 for updates and reductions.
        version: weight version used or made; -1 for messages.
        start_s: seconds since the trace's begin, on one clock for all ranks.
        end_s: likewise.
    """

    __pydantic_config__ = STRICT

    rank: int
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
        minibatches: how many went through.
        spans: in any order.
    """

    __pydantic_config__ = STRICT
    FORMAT: ClassVar[str] = "pipedream-trace"
    VERSION: ClassVar[int] = 1

    source: Literal["measured", "simulated"]
    layout: tuple[tuple[int, ...], ...]
    minibatches: int
    spans: tuple[Span, ...]
