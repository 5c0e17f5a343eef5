"""What a trace says: how long each stage takes, and where its time goes."""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import dataclass

from pipedream_hpc.schedule.trace import Kind, Span, Trace


@dataclass(frozen=True)
class RankSplit:
    """Where the time of one rank went, in seconds.

    Attributes:
        rank: the rank.
        stage: the stage it worked on.
        forward_s: median forward of one minibatch.
        backward_s: median backward of one minibatch.
        seconds: total by kind of action; `receive` is waiting for messages, `idle` the rest.
        span_s: from the first action to the last.
    """

    rank: int
    stage: int
    forward_s: float
    backward_s: float
    seconds: dict[str, float]
    span_s: float

    @property
    def busy(self) -> float:
        """Fraction of the span spent in forward, backward, reductions and updates."""
        work = sum(self.seconds[kind] for kind in ("forward", "backward", "reduce", "update"))
        return work / self.span_s if self.span_s else 0.0


def split(trace: Trace) -> list[RankSplit]:
    """The split of every rank, in rank order."""
    by_rank: dict[int, list[Span]] = defaultdict(list)
    for span in trace.spans:
        by_rank[span.rank].append(span)
    splits = []
    for stage, ranks in enumerate(trace.layout):
        for rank in ranks:
            spans = by_rank[rank]
            kinds: tuple[Kind, ...] = ("forward", "backward", "receive", "send", "reduce", "update")
            lengths = {kind: [s.end_s - s.start_s for s in spans if s.kind == kind] for kind in kinds}
            span_s = max((s.end_s for s in spans), default=0.0) - min((s.start_s for s in spans), default=0.0)
            seconds: dict[str, float] = {kind: sum(values) for kind, values in lengths.items()}
            seconds["idle"] = max(0.0, span_s - sum(seconds.values()))
            forward_s, backward_s = (statistics.median(lengths[kind] or [0.0]) for kind in ("forward", "backward"))
            splits.append(RankSplit(rank, stage, forward_s, backward_s, seconds, span_s))
    return sorted(splits, key=lambda each: each.rank)


def minibatch_s(trace: Trace) -> float:
    """Seconds per minibatch in the steady state.

    Median interval between successive ends of backward in the input stage, where a minibatch
    leaves the pipeline; start-up (before the first) and drain (the last `ranks` minibatches, which
    have no new forwards beside them) do not count when there are enough others.
    """
    ends = sorted(s.end_s for s in trace.spans if s.kind == "backward" and s.rank in trace.layout[0])
    ranks = sum(len(members) for members in trace.layout)
    steady = ends[: len(ends) - ranks] if len(ends) > 2 * ranks else ends
    gaps = [later - earlier for earlier, later in zip(steady, steady[1:], strict=False)]
    if gaps:
        return statistics.median(gaps)
    return max((s.end_s for s in trace.spans), default=0.0) / max(1, trace.minibatches)
