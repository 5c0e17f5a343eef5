"""Traces drawn as text, one column per millisecond, and plans to go with them."""

from __future__ import annotations

from itertools import groupby

from pipedream_hpc.planning.plan import Plan, StagePlan
from pipedream_hpc.schedule.trace import Kind, Span, Trace

KINDS: dict[str, Kind] = {
    "F": "forward",
    "B": "backward",
    "I": "backward-input",
    "W": "backward-weight",
    "R": "recv",
    "S": "send",
    "A": "reduce-gradients",
    "G": "all-reduce-grad-norm",
    "U": "optimizer-step",
}


def trace(picture: str, layout: tuple[tuple[int, ...], ...] | None = None) -> Trace:
    """Return the Trace of lines such as `rank 1  .  F0 B0 B0 U`.

    A cell is what the rank does in that millisecond: F(orward), B(ackward), I and W (backward for input and weights),
    R(eceive) and S(end) with the microbatch, A (reduction of gradients), G (gradient norm) and U (optimizer step)
    without, `.` for nothing; equal neighbours are one action. Without a layout there is one rank per stage.
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
    microbatches = 1 + max(span.microbatch for span in spans)
    return Trace("measured", layout or tuple((rank,) for rank in ranks), microbatches, tuple(spans))


def plan(*replicas: int, forward_s: float = 1e-3, backward_s: float = 2e-3) -> Plan:
    """Return a plan of equal stages with these numbers of replicas."""
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
    """Return a simulated trace as lanes: what each rank computes in every second.

    Both kinds of backward are B; a rank's second stage is written in small letters. Optimizer steps and reductions take
    no time here.
    """
    letters = {"forward": "F", "backward": "B", "backward-input": "B", "backward-weight": "W"}
    lanes = []
    for rank, stages in sorted(trace.stages_of.items()):
        cells: dict[int, str] = {}
        for span in trace.spans:
            if span.rank == rank and span.kind in letters:
                letter = letters[span.kind] if span.stage == stages[0] else letters[span.kind].lower()
                for second in range(round(span.start_s), round(span.end_s)):
                    assert second not in cells, "one thing at a time"
                    cells[second] = f"{letter}{span.microbatch}"
        lanes.append(" ".join(cells.get(second, ". ") for second in range(1 + max(cells, default=-1))))
    return lanes
