"""Timeline: a trace as a picture, one lane per rank, time from left to right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipedream_hpc.files import atomic_write
from pipedream_hpc.schedule.trace import Trace

# Blue and orange stay apart for colour-blind readers, and in grey: one is dark, the other light.
_FORWARD, _BACKWARD, _UPDATE, _REDUCE = "#1f5fa8", "#f5a742", "#3c3c3c", "#8a5aa8"
_INK = {"forward": "white", "backward": "black"}


def draw(traces: Trace | Sequence[Trace], path: str | Path, *, minibatches: int = 14) -> None:
    """Draw one trace, or several over each other on one time axis, as PNG.

    Forward and backward carry the minibatch's number; updates are thin marks; waiting is left
    white. Drawn is the time until the input stage has done the backward of `minibatches`
    minibatches: start-up and the steady state behind it.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    shown = [traces] if isinstance(traces, Trace) else list(traces)
    ends = [_window_s(trace, minibatches) for trace in shown]
    window_s = max(ends)
    unit, scale = ("ms", 1e3) if window_s < 10 else ("s", 1.0)
    lanes = max(sum(len(ranks) for ranks in trace.layout) for trace in shown)
    figure, axes = plt.subplots(
        len(shown), 1, figsize=(15, 1.1 + len(shown) * (0.55 * lanes + 0.6)), squeeze=False, sharex=True
    )
    for axis, trace in zip(axes[:, 0], shown, strict=True):
        _lanes(axis, trace, window_s, scale)
        partly = min(trace.minibatches, minibatches) < trace.minibatches
        what = f"the first {minibatches} of {trace.minibatches}" if partly else f"all {trace.minibatches}"
        axis.set_title(f"{trace.source}: {what} minibatches", loc="left", fontsize=11)
    axes[-1, 0].set_xlabel(f"time ({unit})")
    handles = [Patch(color=_FORWARD, label="forward"), Patch(color=_BACKWARD, label="backward")]
    handles.append(Patch(color=_UPDATE, label="update"))
    if any(span.kind == "reduce" for trace in shown for span in trace.spans):
        handles.append(Patch(color=_REDUCE, label="reduce"))
    figure.legend(handles=handles, loc="upper right", ncols=len(handles), frameon=False)
    figure.tight_layout()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=130)
    plt.close(figure)


def _window_s(trace: Trace, minibatches: int) -> float:
    backwards = sorted(s.end_s for s in trace.spans if s.kind == "backward" and s.rank in trace.layout[0])
    whole = max((span.end_s for span in trace.spans), default=1.0)
    return backwards[minibatches - 1] if len(backwards) > minibatches else whole


def _lanes(axis: object, trace: Trace, window_s: float, scale: float) -> None:
    from matplotlib.axes import Axes

    assert isinstance(axis, Axes)
    order = [(rank, stage) for stage, ranks in enumerate(trace.layout) for rank in ranks]
    lane = {rank: index for index, (rank, _) in enumerate(order)}
    colours = {"forward": _FORWARD, "backward": _BACKWARD, "reduce": _REDUCE}
    points_per_s = 900 / window_s  # about the width of the lanes, in points
    for span in trace.spans:
        if span.start_s >= window_s:
            continue
        y, length_s = lane[span.rank], span.end_s - span.start_s
        if span.kind in colours:
            axis.barh(
                y, length_s * scale, left=span.start_s * scale, height=0.84, color=colours[span.kind],
                edgecolor="white", linewidth=0.4,
            )  # fmt: skip
            middle_s = (span.start_s + span.end_s) / 2
            if length_s * points_per_s > 7 * len(str(span.minibatch)) and span.minibatch >= 0 and middle_s < window_s:
                axis.text(
                    middle_s * scale, y, str(span.minibatch), ha="center", va="center", fontsize=8,
                    color=_INK.get(span.kind, "white"), clip_on=True,
                )  # fmt: skip
        elif span.kind == "update":
            # At least a hair wide, so that it can be seen at all.
            width_s = max(length_s, window_s / 1500)
            axis.barh(y, width_s * scale, left=span.start_s * scale, height=0.84, color=_UPDATE, linewidth=0)
    axis.set_yticks(range(len(order)), [f"rank {rank} (stage {stage})" for rank, stage in order])
    axis.set_ylim(len(order) - 0.5, -0.5)
    axis.set_xlim(0, window_s * scale)
    axis.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
