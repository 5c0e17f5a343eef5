"""Memory over time: bytes of weights and microbatches in flight on every rank of a trace.

::

    in flight         1  2  3  3  3  3 ...  2  1  0       from its forward to the end of its backward
    weight versions   1  1  1  2  3  3 ...  3  2  1       from the oldest still to be used to the newest
                      F0 F1 F2 B0 B1 B2     ...     time ──►

Counted are parameters and what a microbatch in flight holds; optimizer state, gradients and message
slots come on top and do not change over time. A microbatch with a split backward is in flight until the gradients of
the weights have been computed, and holds more between the two parts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from pipedream_hpc.schedule.trace import Span, Trace

_COUNTED = ("forward", "backward", "backward-input", "backward-weight", "optimizer-step")

#: By rank: (seconds, bytes from then on), in order of time.
Memory = dict[int, list[tuple[float, int]]]


def memory_over_time(
    trace: Trace, parameter_bytes: Sequence[int], stash_bytes: Sequence[int], waiting_bytes: Sequence[int]
) -> Memory:
    """Return the bytes on every rank of `trace`, measured or simulated.

    Args:
        trace: what ran.
        parameter_bytes: bytes of one weight version, by stage.
        stash_bytes: bytes that a microbatch in flight holds, by stage.
        waiting_bytes: bytes that it holds in addition between the two parts of its backward, by stage.
    """
    by_place: dict[tuple[int, int], list[Span]] = defaultdict(list)
    for span in trace.spans:
        if span.kind in _COUNTED:
            by_place[span.rank, span.stage].append(span)
    changes: dict[int, list[tuple[float, int]]] = defaultdict(list)  # by rank: (when, bytes more)
    for stage, ranks in enumerate(trace.layout):
        for rank in ranks:
            spans = sorted(by_place[rank, stage], key=lambda span: (span.start_s, span.end_s))
            changes[rank].append((0.0, parameter_bytes[stage]))
            changes[rank].extend(_changes(spans, parameter_bytes[stage], stash_bytes[stage], waiting_bytes[stage]))
    return {rank: _added_up(changes[rank]) for rank in sorted(changes)}


def peak(memory: list[tuple[float, int]]) -> int:
    """Return the most bytes at once."""
    return max(size for _, size in memory)


def _changes(spans: list[Span], version_bytes: int, stash_bytes: int, waiting_bytes: int) -> list[tuple[float, int]]:
    """Return (when, bytes more) on one replica of one stage, from its spans in order."""
    training = any(span.kind in ("backward", "backward-weight") for span in spans)
    forwards = [span.version for span in spans if span.kind == "forward"]
    held: dict[int, int] = {}  # microbatch -> version, oldest first
    changes, ran, newest, alive = [], 0, 0, 1
    for span in spans:
        when_s, microbatches, waiting = span.end_s, 0, 0
        if span.kind == "forward":
            ran += 1
            if training:
                held[span.microbatch] = span.version
                when_s, microbatches = span.start_s, 1
        elif span.kind == "backward-input":
            when_s, waiting = span.start_s, 1
        elif span.kind in ("backward", "backward-weight"):
            held.pop(span.microbatch, None)
            microbatches, waiting = -1, -1 if span.kind == "backward-weight" else 0
        else:
            newest, when_s = span.version, span.start_s
        # Versions still needed by microbatches in flight, or by the next forward.
        oldest = min([newest, *list(held.values())[:1], *forwards[ran : ran + 1]])
        versions = newest - oldest + 1
        if microbatches or waiting or versions != alive:
            more = microbatches * stash_bytes + waiting * waiting_bytes + (versions - alive) * version_bytes
            changes.append((when_s, more))
            alive = versions
    return changes


def _added_up(changes: list[tuple[float, int]]) -> list[tuple[float, int]]:
    total, points = 0, []
    for when_s, more in sorted(changes, key=lambda change: change[0]):
        total += more
        points.append((when_s, total))
    return points
