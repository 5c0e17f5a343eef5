"""What a trace says: how long each stage takes, and where its time goes."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from dataclasses import dataclass

from pipedream_hpc.schedule.trace import Kind, Span, Trace

KINDS: tuple[Kind, ...] = (
    "forward",
    "backward",
    "weight-gradient",
    "receive",
    "send",
    "reduce",
    "agree",
    "update",
)
#: What has to be done whatever the schedule; the rest of a rank's time is bubble or messages.
_WORK: tuple[Kind, ...] = ("forward", "backward", "weight-gradient", "reduce", "update")


@dataclass(frozen=True)
class RankSplit:
    """Where the time of one rank went, in seconds.

    Attributes:
        rank: the rank.
        stages: the stages it worked on; more than one if the schedule is interleaved.
        forward_s: median forward of one minibatch, or microbatch.
        backward_s: likewise of backward, both parts where it is split.
        seconds: total by kind of action; `receive` is waiting for messages, `agree` for all ranks, `idle`
            the time with no action at all, such as before the first minibatch arrives.
        span_s: from the first action of any rank to the last: the same for all ranks of a trace.
    """

    rank: int
    stages: tuple[int, ...]
    forward_s: float
    backward_s: float
    seconds: dict[str, float]
    span_s: float

    @property
    def busy(self) -> float:
        """Fraction of the span spent in forward, backward, weight gradients, reductions and updates."""
        return sum(self.seconds[kind] for kind in _WORK) / self.span_s if self.span_s else 0.0


def split(trace: Trace) -> list[RankSplit]:
    """The split of every rank, in rank order."""
    by_rank: dict[int, list[Span]] = defaultdict(list)
    for span in trace.spans:
        by_rank[span.rank].append(span)
    began_s, ended_s = extent(trace)
    splits = []
    for rank, stages in trace.stages_of.items():
        lengths: dict[str, list[float]] = {kind: [] for kind in KINDS}
        backwards: dict[tuple[int, int], float] = defaultdict(float)  # both parts of those that were split
        for span in by_rank[rank]:
            lengths[span.kind].append(span.end_s - span.start_s)
            if span.kind in ("backward", "weight-gradient"):
                backwards[span.stage, span.minibatch] += span.end_s - span.start_s
        seconds = {kind: sum(values) for kind, values in lengths.items()}
        seconds["idle"] = max(0.0, ended_s - began_s - sum(seconds.values()))
        forward_s, backward_s = (
            statistics.median(taken or [0.0]) for taken in (lengths["forward"], list(backwards.values()))
        )
        splits.append(RankSplit(rank, stages, forward_s, backward_s, seconds, ended_s - began_s))
    return sorted(splits, key=lambda each: each.rank)


def extent(trace: Trace) -> tuple[float, float]:
    """When the first action of any rank began and the last one ended, in seconds; (0, 0) if none ran."""
    began_s = min((span.start_s for span in trace.spans), default=0.0)
    return began_s, max((span.end_s for span in trace.spans), default=0.0)


def bubble(splits: list[RankSplit]) -> float:
    """Fraction of all ranks' time in which they did no work, start-up and drain included."""
    return 1 - statistics.fmean(each.busy for each in splits) if splits else 0.0


def left_at(trace: Trace) -> list[float]:
    """When each minibatch left the pipeline: the ends of backward in the input stage, sorted, in seconds."""
    return sorted(s.end_s for s in trace.spans if s.kind == "backward" and s.stage == 0)


def minibatch_s(trace: Trace) -> float:
    """Seconds per minibatch in the steady state.

    Median interval between minibatches that leave the pipeline, leaving out as many at either end
    as there are ranks: start-up, and drain, where backwards have no new forwards beside them. The R
    replicas of an input stage may finish together and then all be busy, so the interval taken is
    that over R minibatches. Where what went through were microbatches, it is that over a whole
    minibatch, whose flush comes once in it. A trace too short for all this is taken whole, and one
    of a single minibatch gives the time that took.
    """
    microbatches = trace.microbatches
    ends = left_at(trace)
    ranks, together = len(trace.stages_of), math.lcm(len(trace.layout[0]), microbatches)
    steady = ends[ranks:-ranks] if len(ends) > 2 * ranks + together else ends
    minibatches = together / microbatches
    gaps = [(after - before) / minibatches for before, after in zip(steady, steady[together:], strict=False)]
    if gaps:
        return statistics.median(gaps)
    began_s, ended_s = extent(trace)
    return (ended_s - began_s) / max(1.0, trace.minibatches / microbatches)
