"""Trace files: a Trace on disk is a Chrome trace, which https://ui.perfetto.dev opens.

::

    {"format": "pipedream-trace", "version": 2, "source": "measured", "layout": [[0], [1]], ...
     "traceEvents": [
       {"ph": "M", "name": "thread_name", "pid": 1, "tid": 1, "args": {"name": "rank 1 (stage 1)"}},
       {"ph": "X", "name": "F3", "cat": "forward", "pid": 1, "tid": 1, "ts": 8125.25, "dur": 912.004,
        "args": {"microbatch": 3, "version": 2, "stage": 1}}, ...]}

Times are microseconds with three decimals, so that they are exact to the nanosecond.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.files import parse, read_document, write_json
from pipedream_hpc.schedule.trace import Span, Trace

#: Perfetto draws each process in a group of its own: a measured and a simulated trace in one file stay apart.
_PROCESS = {"measured": 1, "simulated": 2}
_LETTER = {"forward": "F", "backward": "B", "backward-input": "I", "backward-weight": "W"}
#: Colour names of the old Chrome viewer; Perfetto chooses its own colours.
_COLOUR = {
    "forward": "rail_response",
    "backward": "rail_animation",
    "backward-input": "rail_animation",
    "backward-weight": "rail_idle",
    "optimizer-step": "grey",
    "reduce-gradients": "olive",
}


def save_trace(trace: Trace, path: str | Path) -> None:
    """Write `trace` to `path`, atomically."""
    header = {
        "format": trace.FORMAT,
        "version": trace.VERSION,
        "source": trace.source,
        "layout": trace.layout,
        "total_microbatches": trace.total_microbatches,
        "n_microbatches": trace.n_microbatches,
        "displayTimeUnit": "ms",
    }
    spans = sorted(trace.spans, key=lambda span: (span.rank, span.start_s, span.end_s))
    events = [*_names(trace), *(_event(trace, span) for span in spans)]
    write_json(path, {**header, "traceEvents": events})


def load_trace(path: str | Path) -> Trace:
    """Read a Trace from `path`; its spans are sorted by rank, then by time.

    Raises:
        PipedreamError: the file is missing, is not JSON, is no trace or one of another version, or
            has an event that `save_trace` does not write.
    """
    body = read_document(Trace, path)
    body.pop("displayTimeUnit", None)
    events = body.pop("traceEvents", None)
    if not isinstance(events, list):
        raise PipedreamError(f"{path}: field 'traceEvents' should be a list but is {type(events).__name__}")
    spans = [
        _span(path, index, event)
        for index, event in enumerate(events)
        if not (isinstance(event, dict) and event.get("ph") == "M")
    ]
    trace = parse(Trace, {**body, "spans": spans}, path)
    places = trace.stages_of
    for span in trace.spans:
        if span.rank not in places:
            raise PipedreamError(f"{path}: an event has tid {span.rank}, but the layout has no such rank")
        if span.stage not in places[span.rank]:
            raise PipedreamError(
                f"{path}: an event of rank {span.rank} is of stage {span.stage}, which other ranks of the layout hold"
            )
    return trace


def _names(trace: Trace) -> list[dict[str, Any]]:
    """Return the metadata events: names of the process and its threads, and the order of the threads."""
    process = _PROCESS[trace.source]
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": process, "args": {"name": f"pipeline, {trace.source}"}}
    ]
    for rank in trace.stages_of:
        thread = {"ph": "M", "pid": process, "tid": rank}
        events.append({**thread, "name": "thread_name", "args": {"name": trace.label(rank)}})
        events.append({**thread, "name": "thread_sort_index", "args": {"sort_index": rank}})
    return events


def _event(trace: Trace, span: Span) -> dict[str, Any]:
    start_ns, end_ns = round(span.start_s * 1e9), round(span.end_s * 1e9)
    name: str = span.kind
    if span.microbatch >= 0:
        name = f"{_LETTER.get(span.kind, span.kind + ' ')}{span.microbatch}"
    elif span.kind == "optimizer-step":
        name = f"optimizer step to v{span.version}"
    event: dict[str, Any] = {
        "ph": "X",
        "name": name,
        "cat": span.kind,
        "pid": _PROCESS[trace.source],
        "tid": span.rank,
        "ts": start_ns / 1000,
        "dur": (end_ns - start_ns) / 1000,
        "args": {"microbatch": span.microbatch, "version": span.version, "stage": span.stage},
    }
    if span.kind in _COLOUR:
        event["cname"] = _COLOUR[span.kind]
    return event


def _span(path: str | Path, index: int, event: Any) -> dict[str, Any]:
    """Return the fields of a Span from a complete event; only the times have been checked."""
    where = f"{path}: traceEvents[{index}]"
    if not isinstance(event, dict) or event.get("ph") != "X":
        raise PipedreamError(f"{where}: should be a complete event ('ph': 'X') as `pipedream` writes it")
    args = event.get("args")
    fields = {
        "rank": event.get("tid"),
        "stage": args.get("stage") if isinstance(args, dict) else None,
        "kind": event.get("cat"),
        "microbatch": args.get("microbatch") if isinstance(args, dict) else None,
        "version": args.get("version") if isinstance(args, dict) else None,
    }
    for name in ("ts", "dur"):
        value = event.get(name)
        # Python's json reads NaN and infinity, though JSON has no such numbers.
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise PipedreamError(f"{where}.{name}: should be a number of microseconds but is {value!r}")
    if event["dur"] < 0:
        raise PipedreamError(f"{where}.dur: should not be negative but is {event['dur']!r}")
    start_ns = round(event["ts"] * 1000)
    end_ns = start_ns + round(event["dur"] * 1000)
    return {**fields, "start_s": start_ns / 1e9, "end_s": end_ns / 1e9}
