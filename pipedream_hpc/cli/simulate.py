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
    schedule: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="1f1b, vertical-sync, 1f1b-flush, gpipe, 2bw, interleaved, data-parallel, model-parallel or "
            "forward-only; without it the plan's."
        ),
    ] = None,
    microbatches: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            help="To a minibatch, for the schedules that cut it: 1f1b-flush, gpipe, 2bw, interleaved; without it "
            "the plan's.",
            min=1,
        ),
    ] = None,
    chunks: Annotated[int, typer.Option(help="Stages per rank, for interleaved.", min=1)] = 1,
    split_backward: Annotated[
        bool, typer.Option(help="As in training: 1f1b-flush or gpipe with split backwards.")
    ] = False,
    zero_bubble: Annotated[
        bool, typer.Option(help="As in training: 1f1b-flush with twice as many microbatches in flight.")
    ] = False,
    slow: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="RANK=TIMES: this rank takes so many times as long to compute. May be repeated."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the predicted trace.")] = Path(
        "predicted.json"
    ),
    png: Annotated[Optional[Path], typer.Option(help="Draw it as well.")] = None,  # noqa: UP045
    memory_png: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--memory-png", help="Draw the memory of every rank over time."),
    ] = None,
) -> None:
    """Predict the timeline of a plan, and prove that its schedule cannot hang.

    Nothing is run: the schedule is played with the plan's measured times, every send blocking and
    every buffer bounded. Messages of ranks that share a network adapter take turns.

        pipedream simulate plan.json --topology topology.json --png predicted.png

        pipedream simulate plan.json --schedule gpipe --microbatches 8 --slow 3=1.5

    Next: pipedream train TARGET --plan plan.json, and lay the measured timeline beside this one:
    pipedream trace out/trace.json --compare predicted.json --png both.png
    """
    from pipedream_hpc.files import load
    from pipedream_hpc.observe import terminal
    from pipedream_hpc.observe.metrics import bubble, minibatch_s, split
    from pipedream_hpc.observe.tables import human_bytes, human_seconds, split_table
    from pipedream_hpc.observe.timeline import draw, draw_memory
    from pipedream_hpc.observe.trace_file import save_trace
    from pipedream_hpc.planning.plan import Plan
    from pipedream_hpc.planning.topology import Level, Topology
    from pipedream_hpc.schedule import kinds
    from pipedream_hpc.schedule.interleaved import folded
    from pipedream_hpc.schedule.memory import peak
    from pipedream_hpc.schedule.simulator import simulate
    from pipedream_hpc.schedule.verifier import verify

    planned = load(Plan, plan)
    instant = Topology((Level("instant", planned.ranks, 0.0, float(1 << 62)),), device="")
    stragglers = _stragglers(slow or [])
    layout = folded(planned.layout, chunks) if chunks > 1 else planned.layout
    kind = schedule or planned.schedule
    pieces = microbatches or (planned.microbatches if schedule in (None, planned.schedule) else 1)
    chosen = kinds.make(
        kind, layout, minibatches * pieces, microbatches=pieces, split=split_backward, zero_bubble=zero_bubble
    )
    proof = verify(chosen)
    links = load(Topology, topology) if topology else instant
    simulation = simulate(chosen, planned, links, slow=stragglers, microbatches=pieces)
    trace = simulation.trace
    save_trace(trace, output)
    console = terminal.console()
    splits = split(trace)
    console.print(split_table(splits))
    versions = ", ".join(map(str, proof.versions))
    peaks = {rank: peak(memory) for rank, memory in simulation.memory.items()}
    most = ", ".join(human_bytes(max(peaks[rank] for rank in ranks)) for ranks in layout[: len(layout) // chunks])
    console.print(
        f"{human_seconds(minibatch_s(trace))} per minibatch in the steady state, "
        f"bubble {bubble(splits):.1%}\n"
        f"no deadlock in {proof.actions} actions; weight versions per stage: {versions}\n"
        f"most memory of weights and activations per {'rank' if chunks > 1 else 'stage'}: {most}\n"
        f"written to {output}"
    )
    if png is not None:
        draw(trace, png)
        console.print(f"drawn to {png}")
    if memory_png is not None:
        draw_memory(trace, simulation.memory, memory_png)
        console.print(f"memory drawn to {memory_png}")


def _stragglers(words: list[str]) -> dict[int, float]:
    """The ranks and factors of `--slow RANK=TIMES`.

    Raises:
        PipedreamError: a word is not of that form.
    """
    from pipedream_hpc.errors import PipedreamError

    found = {}
    for word in words:
        rank, _, times = word.partition("=")
        try:
            found[int(rank)] = float(times)
        except ValueError:
            raise PipedreamError(f"--slow should be RANK=TIMES, such as 3=1.5, not '{word}'") from None
    return found
