"""pipedream trace"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer


def run(
    trace: Annotated[Path, typer.Argument(help="A trace written by `pipedream train` or `pipedream simulate`.")],
    png: Annotated[Optional[Path], typer.Option(help="Draw the timeline to this PNG file.")] = None,  # noqa: UP045
    compare: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Second trace, drawn above the first, such as the predicted one."),
    ] = None,
    minibatches: Annotated[
        int, typer.Option(help="Minibatches to draw; microbatches, where minibatches are cut.", min=1)
    ] = 12,
) -> None:
    """Show how each rank spent its time, and draw the timeline.

    Perfetto (ui.perfetto.dev) opens the trace file directly.

        pipedream trace demo-out/trace.json --png timeline.png

        pipedream trace demo-out/trace.json --compare predicted.json --png both.png

    Next: if a stage waits longer than it computes, profile and partition again without other load.
    """
    from pipedream_hpc.observe import terminal
    from pipedream_hpc.observe.metrics import bubble, minibatch_s, split
    from pipedream_hpc.observe.tables import human_seconds, split_table
    from pipedream_hpc.observe.timeline import draw
    from pipedream_hpc.observe.trace_file import load_trace

    shown = [load_trace(path) for path in (compare, trace) if path is not None]
    console = terminal.console()
    for each in shown:
        splits = split(each)
        console.print(split_table(splits))
        console.print(
            f"{each.source}: {human_seconds(minibatch_s(each))} per minibatch in the steady state, "
            f"bubble {bubble(splits):.1%}"
        )
    if png is not None:
        draw(shown, png, minibatches=minibatches)
        console.print(f"drawn to {png}")
