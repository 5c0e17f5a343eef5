"""Timeline: draw a trace with one lane per rank, time from left to right.

The paper's figure 8, drawn from a trace::

            start-up      ┊ steady state              ┊ drain
    rank 0  0 1 2 3 .     ┊ [ 0 ]4[ 1 ]5[ 2 ]6[ 3 ]7  ┊ [ 4 ] [ 5 ] ...
    rank 1    0 1 2 . . [ 0 ]3[ 1 ]4[ 2 ]5[ 3 ]6      ┊
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.files import atomic_write
from pipedream_hpc.observe.metrics import extent, left_at
from pipedream_hpc.schedule.memory import Memory
from pipedream_hpc.schedule.trace import Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colour-blind readers can tell blue and orange apart, also in grey: one is dark, the other light.
_COLOURS = {
    "forward": "#1f5fa8",
    "backward": "#f5a742",
    "backward-input": "#fad7a3",
    "backward-weight": "#b9d58a",
    "reduce-gradients": "#8a5aa8",
    "optimizer-step": "#3c3c3c",
}
_INK = {"forward": "white", "backward": "black", "backward-input": "black", "backward-weight": "black"}
_QUIET = "#666666"

_WIDTH_IN, _LANE_IN, _DPI = 15.0, 0.55, 130
_LEFT_IN, _RIGHT_IN = 1.45, 0.3
_FONT_PT = 8.5
#: Width of a digit relative to the font size, and the smallest font size; smaller numbers are omitted.
_DIGIT_PT, _SMALLEST_PT = 0.62, 5.0


def draw(traces: Trace | Sequence[Trace], path: str | Path, *, minibatches: int = 12) -> None:
    """Draw one trace, or several above each other on one time axis, as PNG.

    Forwards and backwards carry the number of the microbatch; optimizer steps are thin marks; waiting is left
    white. The picture ends when `minibatches` (where they are cut, so many microbatches) have left the pipeline of the
    slowest trace: start-up and the beginning of the steady state, which then repeats itself.

    Raises:
        PipedreamError: a trace holds no actions.
    """
    shown = [traces] if isinstance(traces, Trace) else list(traces)
    if not shown or not all(trace.spans for trace in shown):
        raise PipedreamError("there is nothing to draw: the trace holds no actions (no minibatch was run)")

    # pyplot would look for a display; a figure made here needs none and leaves no state behind.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    window_s = max(_window_s(trace, minibatches) for trace in shown)
    unit, scale = next((u, k) for u, k in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)) if window_s * k >= 2 or u == "µs")
    lanes = [len(trace.stages_of) for trace in shown]
    # Inches from the top: legend, then per trace a title, its lanes and room for the axis.
    head, title, foot = 0.3, 0.62, 0.5
    height = head + sum(title + foot + _LANE_IN * count for count in lanes)
    figure = Figure(figsize=(_WIDTH_IN, height), facecolor="white")
    FigureCanvasAgg(figure)
    top = height - head
    for trace, count in zip(shown, lanes, strict=True):
        top -= title + _LANE_IN * count
        box = (_LEFT_IN, top, _WIDTH_IN - _LEFT_IN - _RIGHT_IN, _LANE_IN * count)
        axis = figure.add_axes((box[0] / _WIDTH_IN, box[1] / height, box[2] / _WIDTH_IN, box[3] / height))
        top -= foot
        _lanes(axis, trace, window_s, scale)
        _phases(axis, trace, window_s, scale)
        axis.set_title(_title(trace, window_s), loc="left", fontsize=11.5, fontweight="bold", pad=20)
    axis.set_xlabel(f"time ({unit})")
    kinds = [kind for kind in _COLOURS if any(span.kind == kind for trace in shown for span in trace.spans)]
    figure.legend(
        handles=[*(Patch(color=_COLOURS[kind], label=kind.replace("-", " ")) for kind in kinds),
                 Patch(facecolor="white", edgecolor="#bbbbbb", label="waiting")],
        loc="upper right", bbox_to_anchor=(1 - _RIGHT_IN / _WIDTH_IN, 1), ncols=len(kinds) + 1,
        frameon=False, handlelength=1.4, columnspacing=1.4,
    )  # fmt: skip
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=_DPI)


def draw_memory(trace: Trace, memory: Memory, path: str | Path) -> None:
    """Plot the bytes of weights and activations on every rank of `trace` over time, as PNG.

    Raises:
        PipedreamError: the trace holds no actions.
    """
    if not trace.spans:
        raise PipedreamError("there is nothing to draw: the trace holds no actions (no minibatch was run)")

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH_IN, 5.0), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    _, ended_s = extent(trace)
    most = max(size for points in memory.values() for _, size in points)
    size_unit, size_scale = next(
        (u, k) for u, k in (("GB", 1e-9), ("MB", 1e-6), ("kB", 1e-3)) if most * k >= 1 or u == "kB"
    )
    for index, (rank, points) in enumerate(memory.items()):
        times = [when_s for when_s, _ in points] + [ended_s]
        sizes = [size * size_scale for _, size in points] + [points[-1][1] * size_scale]
        axis.step(times, sizes, where="post", linewidth=1.2, label=trace.label(rank), color=f"C{index % 10}")
    axis.set_xlabel("time (s)")
    axis.set_ylabel(f"weights and activations ({size_unit})")
    axis.set_ylim(bottom=0)
    if len(memory) <= 16:  # more lines could not be told apart
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=_DPI)


def _window_s(trace: Trace, minibatches: int) -> float:
    """Return how many seconds from the trace's first action on are drawn."""
    began_s, ended_s = extent(trace)
    left = left_at(trace)
    return (left[minibatches - 1] if len(left) > minibatches else ended_s) - began_s


def _title(trace: Trace, window_s: float) -> str:
    began_s, ended_s = extent(trace)
    if ended_s - began_s <= window_s:
        return f"{trace.source}: all {trace.total_microbatches} {trace.items}"
    done = sum(end_s - began_s <= window_s for end_s in left_at(trace))
    return f"{trace.source}: the first {done} of {trace.total_microbatches} {trace.items}"


def _lanes(axis: Axes, trace: Trace, window_s: float, scale: float) -> None:
    """Draw the bars of every rank and their numbers."""
    began_s, _ = extent(trace)
    lane = {rank: index for index, rank in enumerate(trace.stages_of)}
    points_per_s = (_WIDTH_IN - _LEFT_IN - _RIGHT_IN) * 72 / window_s
    bars: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for span in trace.spans:
        start_s, end_s = span.start_s - began_s, min(span.end_s - began_s, window_s)
        if start_s >= window_s or span.kind not in _COLOURS:
            continue
        length_s = end_s - start_s
        if span.kind == "optimizer-step":
            # At least a hair wide, so that it can be seen.
            length_s = max(length_s, window_s / 1500)
        bars.setdefault((lane[span.rank], span.kind), []).append((start_s * scale, length_s * scale))
        # A bar that the end of the axis cuts keeps its number only if enough of the bar is left.
        room_pt = length_s * points_per_s - 2
        size_pt = min(_FONT_PT, room_pt / (_DIGIT_PT * len(str(span.microbatch))))
        if span.kind in _INK and size_pt >= _SMALLEST_PT:
            axis.text(
                (start_s + length_s / 2) * scale, lane[span.rank], str(span.microbatch),
                ha="center", va="center_baseline", fontsize=size_pt, color=_INK[span.kind],
            )  # fmt: skip
    for (y, kind), intervals in bars.items():
        edge = 0.0 if kind == "optimizer-step" else 0.5
        axis.broken_barh(intervals, (y - 0.41, 0.82), facecolor=_COLOURS[kind], edgecolor="white", linewidth=edge)
    axis.set_yticks(range(len(lane)), [trace.label(rank) for rank in lane])
    axis.set_ylim(len(lane) - 0.5, -0.5)
    axis.set_xlim(0, window_s * scale)
    axis.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def _phases(axis: Axes, trace: Trace, window_s: float, scale: float) -> None:
    """Mark start-up until the input stage's first backward, and drain after its last forward."""
    began_s, ended_s = extent(trace)
    first_stage = [span for span in trace.spans if span.stage == 0]
    backwards = [span.start_s for span in first_stage if span.kind in ("backward", "backward-input")]
    if not backwards:
        return
    steady_s = min(backwards) - began_s
    drain_s = max(max(s.end_s for s in first_stage if s.kind == "forward") - began_s, steady_s)
    phases = (
        ("start-up", 0.0, steady_s),
        ("steady state", steady_s, drain_s),
        ("drain", drain_s, ended_s - began_s),
    )
    for name, start_s, end_s in phases:
        end_s = min(end_s, window_s)
        if end_s - start_s < window_s / 25:  # no room for the word
            continue
        axis.annotate(
            name, ((start_s + end_s) / 2 * scale, 1), xycoords=("data", "axes fraction"), xytext=(0, 6),
            textcoords="offset points", ha="center", fontsize=9, color=_QUIET, annotation_clip=False,
        )  # fmt: skip
        if start_s > 0:
            axis.axvline(start_s * scale, color=_QUIET, linewidth=1, linestyle=(0, (3, 3)), zorder=0.5)
