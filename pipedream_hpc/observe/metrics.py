"""Metrics of a trace: how long each stage takes, and where the time of each rank goes."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from dataclasses import dataclass
from typing import get_args

from pipedream_hpc.schedule.trace import Kind, Span, Trace

KINDS: tuple[Kind, ...] = get_args(Kind)
_BACKWARD: tuple[Kind, ...] = ("backward", "backward-input", "backward-weight")
#: Kinds of work that any schedule has to do; the rest of a rank's time is bubble or messages.
_WORK: tuple[Kind, ...] = ("forward", *_BACKWARD, "reduce-gradients", "optimizer-step")


@dataclass(frozen=True)
class RankSplit:
    """How one rank spent its time, in seconds.

    Attributes:
        rank: the rank.
        stages: the stages it holds; more than one if the schedule is interleaved.
        forward_s: median time of a forward.
        backward_s: median time of a backward, both parts where it is split.
        seconds: total by kind of action. `recv` is waiting for messages, `all-reduce-grad-norm` waiting for all
            ranks, `idle` the time without any action, such as before the first microbatch arrives.
        span_s: time from the first action of any rank to the last: the same for all ranks of a trace.
    """

    rank: int
    stages: tuple[int, ...]
    forward_s: float
    backward_s: float
    seconds: dict[str, float]
    span_s: float

    @property
    def busy(self) -> float:
        """Fraction of the span spent in forwards, backwards, gradient reductions and optimizer steps."""
        return sum(self.seconds[kind] for kind in _WORK) / self.span_s if self.span_s else 0.0


def split(trace: Trace) -> list[RankSplit]:
    """Return the split of every rank, in rank order."""
    by_rank: dict[int, list[Span]] = defaultdict(list)
    for span in trace.spans:
        by_rank[span.rank].append(span)
    began_s, ended_s = extent(trace)
    splits = []
    for rank, stages in trace.stages_of.items():
        lengths: dict[str, list[float]] = {kind: [] for kind in KINDS}
        backwards: dict[tuple[int, int], float] = defaultdict(float)  # both parts of split ones together
        for span in by_rank[rank]:
            lengths[span.kind].append(span.end_s - span.start_s)
            if span.kind in _BACKWARD:
                backwards[span.stage, span.microbatch] += span.end_s - span.start_s
        seconds = {kind: sum(values) for kind, values in lengths.items()}
        seconds["idle"] = max(0.0, ended_s - began_s - sum(seconds.values()))
        forward_s, backward_s = (
            statistics.median(taken or [0.0]) for taken in (lengths["forward"], list(backwards.values()))
        )
        splits.append(RankSplit(rank, stages, forward_s, backward_s, seconds, ended_s - began_s))
    return sorted(splits, key=lambda each: each.rank)


def extent(trace: Trace) -> tuple[float, float]:
    """Return when the first action of any rank began and the last one ended, in seconds; (0, 0) if none ran."""
    began_s = min((span.start_s for span in trace.spans), default=0.0)
    return began_s, max((span.end_s for span in trace.spans), default=0.0)


def bubble(splits: list[RankSplit]) -> float:
    """Return the fraction of all ranks' time in which they did no work, start-up and drain included."""
    return 1 - statistics.fmean(each.busy for each in splits) if splits else 0.0


def left_at(trace: Trace) -> list[float]:
    """Return when each microbatch left the pipeline: the ends of backwards in the input stage, sorted, in seconds."""
    return sorted(s.end_s for s in trace.spans if s.stage == 0 and s.kind in ("backward", "backward-weight"))


def minibatch_s(trace: Trace) -> float:
    """Return the seconds per minibatch in the steady state.

    This is the mean interval between minibatches that leave the pipeline, without a quarter of them at either end, or
    as many as there are ranks if that is more: start-up, where slow links have not filled yet, and drain, where
    backwards have no forwards between them. (Not the median: intervals alternate where ranks wait for every other
    minibatch.) The R replicas of an input stage may finish together and then all be busy, so the interval is taken
    over R minibatches; where minibatches are cut, over a whole one, which contains one flush; and where there are
    enough, over a multiple of the number of ranks, in which a pattern repeats itself. A trace too short for this is
    taken whole, and one of a single minibatch gives the time that minibatch took.
    """
    n_microbatches = trace.n_microbatches
    ends = left_at(trace)
    ranks, together = len(trace.stages_of), math.lcm(len(trace.layout[0]), n_microbatches)
    skipped = max(ranks, len(ends) // 4)
    steady = ends[skipped:-skipped] if len(ends) > 2 * skipped + together else ends
    repeated = math.lcm(together, ranks)
    steady = steady[-1 - (len(steady) - 1) // repeated * repeated :] if len(steady) > repeated else steady
    minibatches = together / n_microbatches
    gaps = [(after - before) / minibatches for before, after in zip(steady, steady[together:], strict=False)]
    if gaps:
        return statistics.fmean(gaps)
    began_s, ended_s = extent(trace)
    return (ended_s - began_s) / max(1.0, trace.total_microbatches / n_microbatches)
