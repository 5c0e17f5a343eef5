"""pipedream simulate"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer


def run(
    plan: Annotated[Path, typer.Argument(help="A plan that `pipedream partition` wrote.")],
    topology: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--topology", "-t", help="Links; without it messages take no time."),
    ] = None,
    minibatches: Annotated[int, typer.Option(help="How many to send through.", min=1)] = 20,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the predicted trace.")] = Path(
        "predicted.json"
    ),
    png: Annotated[Optional[Path], typer.Option(help="Draw it as well.")] = None,  # noqa: UP045
) -> None:
    """Predict the timeline of a plan, and prove that its schedule cannot hang.

    Nothing is run: the schedule is played with the plan's measured times, every send blocking and
    every buffer bounded.

        pipedream simulate plan.json --topology topology.json --png predicted.png

    Next: pipedream train TARGET --plan plan.json, and lay the measured timeline beside this one:
    pipedream trace out/trace.json --compare predicted.json --png both.png
    """
    from pipedream_hpc.files import load
    from pipedream_hpc.observe import terminal
    from pipedream_hpc.observe.metrics import bubble, minibatch_s, split
    from pipedream_hpc.observe.tables import human_seconds, split_table
    from pipedream_hpc.observe.timeline import draw
    from pipedream_hpc.observe.trace_file import save_trace
    from pipedream_hpc.planning.plan import Plan
    from pipedream_hpc.planning.topology import Level, Topology
    from pipedream_hpc.schedule.one_f_one_b import OneFOneB
    from pipedream_hpc.schedule.simulator import simulate
    from pipedream_hpc.schedule.verifier import verify

    planned = load(Plan, plan)
    instant = Topology((Level("instant", planned.ranks, 0.0, float(1 << 62)),), device="")
    schedule = OneFOneB(planned.layout, minibatches)
    proof = verify(schedule)
    trace = simulate(schedule, planned, load(Topology, topology) if topology else instant)
    save_trace(trace, output)
    console = terminal.console()
    splits = split(trace)
    console.print(split_table(splits))
    versions = ", ".join(map(str, proof.versions))
    console.print(
        f"{human_seconds(minibatch_s(trace))} per minibatch in the steady state, "
        f"bubble {bubble(splits):.1%}\n"
        f"no deadlock in {proof.actions} actions; weight versions per stage: {versions}\n"
        f"written to {output}"
    )
    if png is not None:
        draw(trace, png)
        console.print(f"drawn to {png}")
