"""Trace files: Perfetto opens them, and times are exact to the nanosecond."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pictures
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.observe.trace_file import load_trace, save_trace
from pipedream_hpc.schedule.trace import Span, Trace

TWO_RANKS = """
    rank 0  F0 S0 R0 R0 B0 U
    rank 1  .  .  F0 B0 U  .
    """

#: Nanoseconds of a run of up to eleven days.
NANOSECONDS = st.integers(0, 10**15)
SPANS = st.builds(
    lambda rank, kind, minibatch, version, start_ns, length_ns: Span(
        rank, rank, kind, minibatch, version, start_ns / 1e9, (start_ns + length_ns) / 1e9
    ),
    st.sampled_from([0, 1]),
    st.sampled_from(list(pictures.KINDS.values())),
    st.integers(-1, 10**6),
    st.integers(-1, 10**6),
    NANOSECONDS,
    NANOSECONDS,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(spans=st.lists(SPANS, max_size=5))
def test_times_are_exact_to_the_nanosecond(tmp_path: Path, spans: list[Span]) -> None:
    trace = Trace("simulated", ((0,), (1,)), 8, tuple(spans), n_microbatches=4)
    save_trace(trace, tmp_path / "trace.json")
    again = load_trace(tmp_path / "trace.json")

    def in_ns(spans: tuple[Span, ...]) -> list[tuple[object, ...]]:
        return sorted(
            (s.rank, round(s.start_s * 1e9), round(s.end_s * 1e9), s.kind, s.microbatch, s.version) for s in spans
        )

    assert in_ns(again.spans) == in_ns(trace.spans)
    assert (again.source, again.layout, again.total_microbatches) == ("simulated", ((0,), (1,)), 8)
    assert again.n_microbatches == 4


def test_is_a_chrome_trace(tmp_path: Path) -> None:
    save_trace(pictures.trace(TWO_RANKS), tmp_path / "trace.json")
    content = json.loads((tmp_path / "trace.json").read_text())
    events = content["traceEvents"]
    assert content["displayTimeUnit"] == "ms"
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert names == {0: "rank 0 (stage 0)", 1: "rank 1 (stage 1)"}
    backward = next(e for e in events if e["name"] == "B0" and e["tid"] == 0)
    assert (backward["ph"], backward["cat"], backward["ts"], backward["dur"]) == ("X", "backward", 4000.0, 1000.0)
    assert backward["args"] == {"microbatch": 0, "version": 0, "stage": 0}


def with_value(content: dict[str, Any], *path: Any, value: Any) -> dict[str, Any]:
    """Return `content` with the value at `path` replaced."""
    inner: Any = content
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    return content


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (("format",), "pipedream-plan", "field 'format' should be 'pipedream-trace' but is 'pipedream-plan'"),
        (("version",), 1, "field 'version' is 1"),
        (("source",), "dreamt", "field 'source'"),
        (("layout",), [[0], ["1"]], "field 'layout[1][0]'"),
        (("author",), "me", "unknown field 'author'"),
        (("traceEvents",), {}, "field 'traceEvents' should be a list but is dict"),
        (("traceEvents", -1), 3, "should be a complete event"),
        (("traceEvents", -1, "ph"), "B", "should be a complete event"),
        (("traceEvents", -1, "tid"), 7, "an event has tid 7, but the layout has no such rank"),
        (("traceEvents", -1, "cat"), "nap", "kind'"),
        (("traceEvents", -1, "args"), None, "stage'"),
        (
            ("traceEvents", -1, "args", "stage"),
            0,
            "an event of rank 1 is of stage 0, which other ranks of the layout hold",
        ),
        (("traceEvents", -1, "args", "version"), "newest", "version'"),
        (("traceEvents", -1, "ts"), "noon", ".ts: should be a number of microseconds but is 'noon'"),
        (("traceEvents", -1, "ts"), float("nan"), ".ts: should be a number of microseconds but is nan"),
        (("traceEvents", -1, "dur"), -1.0, ".dur: should not be negative but is -1.0"),
    ],
)
def test_an_invalid_file_is_refused_in_one_sentence(
    tmp_path: Path, path: tuple[Any, ...], value: Any, complaint: str
) -> None:
    file = tmp_path / "trace.json"
    save_trace(pictures.trace(TWO_RANKS), file)
    file.write_text(json.dumps(with_value(json.loads(file.read_text()), *path, value=value)))
    with pytest.raises(PipedreamError) as caught:
        load_trace(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)
