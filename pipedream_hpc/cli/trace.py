"""pipedream trace"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer


def run(
    trace: Annotated[Path, typer.Argument(help="A trace that `pipedream train` or `pipedream simulate` wrote.")],
    png: Annotated[Optional[Path], typer.Option(help="Draw the timeline.")] = None,  # noqa: UP045
    compare: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Another trace to draw above it, such as the predicted one."),
    ] = None,
    minibatches: Annotated[int, typer.Option(help="Minibatches to draw.", min=1)] = 12,
) -> None:
    """Say where the time of a run went, and draw its timeline.

    The trace file itself opens in Perfetto (ui.perfetto.dev) as it is.

        pipedream trace demo-out/trace.json --png timeline.png

        pipedream trace demo-out/trace.json --compare predicted.json --png both.png

    Next: where a stage waits more than it works, profile and partition again on quiet ranks.
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
