"""Traces drawn as text, one column per millisecond, and plans to go with them."""

from __future__ import annotations

from itertools import groupby

from pipedream_hpc.planning.plan import Plan, StagePlan
from pipedream_hpc.schedule.trace import Kind, Span, Trace

KINDS: dict[str, Kind] = {
    "F": "forward",
    "B": "backward",
    "W": "weight-gradient",
    "R": "receive",
    "S": "send",
    "A": "reduce",
    "G": "agree",
    "U": "update",
}


def trace(picture: str, layout: tuple[tuple[int, ...], ...] | None = None) -> Trace:
    """A Trace from lines such as `rank 1  .  F0 B0 B0 U`.

    A cell is what the rank does in that millisecond: F, B, W(eight gradient), R(eceive), S(end) with the minibatch, A
    (all-reduce), G (agreeing) and U(pdate) without, `.` for nothing; equal neighbours are one action. Without a
    layout there is one rank per stage.
    """
    spans: list[Span] = []
    ranks: list[int] = []
    found = None if layout is None else {rank: stage for stage, members in enumerate(layout) for rank in members}
    for line in picture.strip().splitlines():
        _, rank, *cells = line.split()
        ranks.append(int(rank))
        column = 0
        for cell, same in groupby(cells):
            width = len(list(same))
            if cell != ".":
                number = int(cell[1:]) if cell[1:] else -1
                start, end = column * 1e-3, (column + width) * 1e-3
                stage = len(ranks) - 1 if found is None else found[int(rank)]
                spans.append(Span(int(rank), stage, KINDS[cell[0]], number, 0, start, end))
            column += width
    minibatches = 1 + max(span.minibatch for span in spans)
    return Trace("measured", layout or tuple((rank,) for rank in ranks), minibatches, tuple(spans))


def plan(*replicas: int, forward_s: float = 1e-3, backward_s: float = 2e-3) -> Plan:
    """A plan of equal stages with so many replicas each."""
    stages, rank = [], 0
    for index, count in enumerate(replicas):
        downstream = sum(replicas[index + 1 :])
        stages.append(
            StagePlan(
                layers=(f"block{index}[a]", f"block{index}[b]"),
                ranks=tuple(range(rank, rank + count)),
                forward_s=forward_s,
                backward_s=backward_s,
                compute_s=(forward_s + backward_s) / count,
                sync_s=0.0,
                boundary_s=1e-5,
                in_flight=-(-downstream // count) + 1,
                parameter_bytes=4_000_000,
                output_bytes=250_000,
                output_shape=(32, 100),
                output_dtype="float32",
                limit="compute",
            )
        )
        rank += count
    total_s = (forward_s + backward_s) * len(replicas)
    slowest_s = max(stage.compute_s for stage in stages)
    return Plan("net", 32, "1f1b", "paper2018", tuple(stages), slowest_s, total_s)


def timeline(trace: Trace) -> list[str]:
    """A simulated trace of whole seconds as lanes: what each rank computes in every second.

    A rank's second stage is written in small letters; updates and reductions take no time here.
    """
    lanes = []
    for rank, stages in sorted(trace.stages_of.items()):
        cells: dict[int, str] = {}
        for span in trace.spans:
            if span.rank == rank and span.kind in ("forward", "backward", "weight-gradient"):
                letter = span.kind[0].upper() if span.stage == stages[0] else span.kind[0]
                for second in range(round(span.start_s), round(span.end_s)):
                    assert second not in cells, "one thing at a time"
                    cells[second] = f"{letter}{span.minibatch}"
        lanes.append(" ".join(cells.get(second, ". ") for second in range(1 + max(cells, default=-1))))
    return lanes
