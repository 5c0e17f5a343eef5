"""Memory over time: what weights and units in flight take on every rank of a trace.

::

    units in flight   1  2  3  3  3  3 ...  2  1  0       a unit counts from its forward to the end of its backward
    weight versions   1  1  1  2  3  3 ...  3  2  1       from the oldest still to be used to the newest
                      F0 F1 F2 B0 B1 B2     ...     time ──►

Counted are parameters and what a unit in flight holds; optimizer state, gradients and message
slots come on top and do not change over time. A unit whose backward is split is in flight until its weights' gradients
are there, and holds more from its backward on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from pipedream_hpc.schedule.trace import Span, Trace

#: By rank: (seconds, bytes from then on), in order of time.
Memory = dict[int, list[tuple[float, int]]]


def memory_over_time(
    trace: Trace, parameter_bytes: Sequence[int], stash_bytes: Sequence[int], waiting_bytes: Sequence[int]
) -> Memory:
    """Bytes on every rank of `trace`, measured or simulated.

    Args:
        trace: what ran.
        parameter_bytes: of one weight version, by stage.
        stash_bytes: that a unit in flight holds, by stage.
        waiting_bytes: that it holds as well between the two parts of its backward, by stage.
    """
    by_place: dict[tuple[int, int], list[Span]] = defaultdict(list)
    for span in trace.spans:
        if span.kind in ("forward", "backward", "weight-gradient", "update"):
            by_place[span.rank, span.stage].append(span)
    changes: dict[int, list[tuple[float, int]]] = defaultdict(list)  # by rank: (when, bytes more)
    for stage, ranks in enumerate(trace.layout):
        for rank in ranks:
            spans = sorted(by_place[rank, stage], key=lambda span: (span.start_s, span.end_s))
            changes[rank].append((0.0, parameter_bytes[stage]))
            changes[rank].extend(_changes(spans, parameter_bytes[stage], stash_bytes[stage], waiting_bytes[stage]))
    return {rank: _added_up(changes[rank]) for rank in sorted(changes)}


def peak(memory: list[tuple[float, int]]) -> int:
    """The most bytes at once."""
    return max(size for _, size in memory)


def _changes(spans: list[Span], version_bytes: int, unit_bytes: int, waiting_bytes: int) -> list[tuple[float, int]]:
    """(when, bytes more) on one replica of one stage, whose spans are in order."""
    training = any(span.kind == "backward" for span in spans)
    forwards = [span.version for span in spans if span.kind == "forward"]
    put_off = {span.minibatch for span in spans if span.kind == "weight-gradient"}
    held: dict[int, int] = {}  # unit -> version, oldest first
    changes, ran, newest, alive = [], 0, 0, 1
    for span in spans:
        when_s, units, waiting = span.end_s, 0, 0
        if span.kind == "forward":
            ran += 1
            if training:
                held[span.minibatch] = span.version
                when_s, units = span.start_s, 1
        elif span.kind == "backward" and span.minibatch in put_off:
            when_s, waiting = span.start_s, 1
        elif span.kind in ("backward", "weight-gradient"):
            held.pop(span.minibatch, None)
            units, waiting = -1, -1 if span.kind == "weight-gradient" else 0
        else:
            newest, when_s = span.version, span.start_s
        # What is still needed: by units in flight, or by the next forward.
        oldest = min([newest, *list(held.values())[:1], *forwards[ran : ran + 1]])
        versions = newest - oldest + 1
        if units or waiting or versions != alive:
            more = units * unit_bytes + waiting * waiting_bytes + (versions - alive) * version_bytes
            changes.append((when_s, more))
            alive = versions
    return changes


def _added_up(changes: list[tuple[float, int]]) -> list[tuple[float, int]]:
    total, points = 0, []
    for when_s, more in sorted(changes, key=lambda change: change[0]):
        total += more
        points.append((when_s, total))
    return points
