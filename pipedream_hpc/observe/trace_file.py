"""A Trace on disk: a Chrome trace, which Perfetto and chrome://tracing open as it is.

One file serves both: beside the events stand the format, the layout and the source, from which
`load_trace` makes the Trace again, exact to the nanosecond.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.files import STRICT, load, write_json
from pipedream_hpc.schedule.trace import Kind, Span, Trace

#: Chrome's reserved colour names, so that forward and backward are told apart at a glance.
_COLOURS = {"forward": "thread_state_running", "backward": "thread_state_iowait", "update": "grey"}
_LETTERS = {"forward": "F", "backward": "B"}


@dataclass(frozen=True)
class _ChromeTrace:
    """What `load` validates: the file as it is."""

    __pydantic_config__ = STRICT
    FORMAT: ClassVar[str] = Trace.FORMAT
    VERSION: ClassVar[int] = Trace.VERSION

    source: Literal["measured", "simulated"]
    layout: tuple[tuple[int, ...], ...]
    minibatches: int
    displayTimeUnit: str  # noqa: N815
    traceEvents: list[dict[str, Any]]  # noqa: N815


def save_trace(trace: Trace, path: str | Path) -> None:
    """Write `trace`, atomically. Times in the events are microseconds."""
    stage_of = {rank: stage for stage, ranks in enumerate(trace.layout) for rank in ranks}
    events: list[dict[str, Any]] = []
    for rank, stage in sorted(stage_of.items()):
        name = f"rank {rank} (stage {stage})"
        events.append({"ph": "M", "name": "thread_name", "pid": 0, "tid": rank, "args": {"name": name}})
        events.append({"ph": "M", "name": "thread_sort_index", "pid": 0, "tid": rank, "args": {"sort_index": rank}})
    for span in sorted(trace.spans, key=lambda span: span.start_s):
        event = {
            "ph": "X",
            "name": f"{_LETTERS[span.kind]}{span.minibatch}" if span.kind in _LETTERS else span.kind,
            "cat": span.kind,
            "pid": 0,
            "tid": span.rank,
            "ts": round(span.start_s * 1e6, 3),
            "dur": round((span.end_s - span.start_s) * 1e6, 3),
            "args": {"minibatch": span.minibatch, "version": span.version, "stage": stage_of[span.rank]},
        }
        if span.kind in _COLOURS:
            event["cname"] = _COLOURS[span.kind]
        events.append(event)
    head = {"format": Trace.FORMAT, "version": Trace.VERSION, "source": trace.source}
    body = {"layout": trace.layout, "minibatches": trace.minibatches, "displayTimeUnit": "ms", "traceEvents": events}
    write_json(path, {**head, **body})


def load_trace(path: str | Path) -> Trace:
    """Read a trace that `save_trace` wrote.

    Raises:
        PipedreamError: names the file and the field or event that is wrong.
    """
    document = load(_ChromeTrace, path)
    ranks = {rank for members in document.layout for rank in members}
    spans = []
    for index, event in enumerate(document.traceEvents):
        if event.get("ph") != "X":
            continue
        try:
            kind: Kind = event["cat"]
            start_s, duration_s = float(event["ts"]) * 1e-6, float(event["dur"]) * 1e-6
            span = Span(
                event["tid"], kind, event["args"]["minibatch"], event["args"]["version"], start_s, start_s + duration_s
            )
        except (KeyError, TypeError, ValueError) as error:
            raise PipedreamError(f"{path}: traceEvents[{index}]: {type(error).__name__}: {error}") from None
        if span.rank not in ranks or duration_s < 0:
            raise PipedreamError(
                f"{path}: traceEvents[{index}]: tid {span.rank} is no rank of the layout, or dur is negative"
            )
        spans.append(span)
    return Trace(document.source, document.layout, document.minibatches, tuple(spans))
