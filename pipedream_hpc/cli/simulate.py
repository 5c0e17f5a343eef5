"""pipedream simulate"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from pipedream_hpc.cli.options import Given, with_options
from pipedream_hpc.config import ScheduleConfig, TrainConfig


@with_options(schedule=ScheduleConfig, train_config=(TrainConfig, ("gradient_accumulation_steps",)))
def run(
    plan: Annotated[Path, typer.Argument(help="A plan that `pipedream partition` wrote.")],
    schedule: Given,
    train_config: Given,
    topology: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--topology", "-t", help="Links between ranks; without it messages take no time."),
    ] = None,
    minibatches: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="How many pass through the pipeline; by default 20 or, with a file, about 20.", min=1),
    ] = None,
    slow: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="RANK=TIMES: this rank takes so many times as long to compute. May be repeated."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="File for the predicted trace.")] = Path(
        "predicted.json"
    ),
    png: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="File for a picture of the trace."),
    ] = None,
    memory_png: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--memory-png", help="File for a picture of every rank's memory over time."),
    ] = None,
    text: Annotated[
        bool, typer.Option("--text", help="Print the schedule as text, which can be edited, and simulate nothing.")
    ] = False,
) -> None:
    """Predict the timeline of a plan, and prove that its schedule cannot hang.

    Nothing is run: the schedule is replayed with the plan's measured times, every send blocking and
    every buffer bounded. Messages of ranks that share a network adapter take turns.

        pipedream simulate plan.json --topology topology.json --png predicted.png

        pipedream simulate plan.json --schedule gpipe --n-microbatches 8 --slow 3=1.5

        pipedream simulate plan.json --minibatches 4 --text > my.schedule

        pipedream simulate plan.json --schedule my.schedule

    Next: pipedream train TARGET --plan plan.json, then compare the measured timeline with the predicted one:
    pipedream trace out/trace.json --compare predicted.json --png both.png
    """
    import sys

    from pipedream_hpc.files import load
    from pipedream_hpc.observe import terminal
    from pipedream_hpc.observe.metrics import bubble, minibatch_s, split
    from pipedream_hpc.observe.tables import human_bytes, human_seconds, split_table
    from pipedream_hpc.observe.timeline import draw, draw_memory
    from pipedream_hpc.observe.trace_file import save_trace
    from pipedream_hpc.planning.plan import Plan
    from pipedream_hpc.planning.topology import Level, Topology
    from pipedream_hpc.runtime.launch.run_plan import run_schedule
    from pipedream_hpc.schedule.memory import peak
    from pipedream_hpc.schedule.simulator import simulate
    from pipedream_hpc.schedule.text import format_schedule
    from pipedream_hpc.schedule.verifier import verify

    planned = load(Plan, plan)
    stragglers = _stragglers(slow or [])
    config, training = schedule.applied_to(ScheduleConfig()), train_config.applied_to(TrainConfig())
    to_run = run_schedule(config, training, planned)
    if minibatches is None:
        described = 1 if to_run.written is None else to_run.written.minibatches
        minibatches = max(20 // described, 1) * described
    layout = to_run.layout(planned) if to_run.written is None else to_run.written.layout
    chosen, microbatches = to_run.of(layout, minibatches), to_run.n_microbatches
    if text:
        sys.stdout.write(format_schedule(chosen, microbatches))
        return
    proof = verify(chosen)
    instant = Topology((Level("instant", planned.ranks, 0.0, float(1 << 62)),), device="")
    links = load(Topology, topology) if topology else instant
    simulation = simulate(chosen, planned, links, slow=stragglers, n_microbatches=microbatches)
    trace = simulation.trace
    save_trace(trace, output)
    console = terminal.console()
    splits = split(trace)
    console.print(split_table(splits))
    versions = ", ".join(map(str, proof.versions))
    peaks = {rank: peak(memory) for rank, memory in simulation.memory.items()}
    groups = dict.fromkeys(chosen.layout)  # the ranks of every stage, or of several
    most = ", ".join(human_bytes(max(peaks[rank] for rank in ranks)) for ranks in groups)
    console.print(
        f"{human_seconds(minibatch_s(trace))} per minibatch in the steady state, "
        f"bubble {bubble(splits):.1%}\n"
        f"no deadlock in {proof.actions} actions; weight versions per stage: {versions}\n"
        f"most memory of weights and activations per {'stage' if len(groups) == len(chosen.layout) else 'rank'}: "
        f"{most}\n"
        f"written to {output}"
    )
    if png is not None:
        draw(trace, png)
        console.print(f"drawn to {png}")
    if memory_png is not None:
        draw_memory(trace, simulation.memory, memory_png)
        console.print(f"memory drawn to {memory_png}")


def _stragglers(words: list[str]) -> dict[int, float]:
    """Return the ranks and factors of `--slow RANK=TIMES`.

    Raises:
        PipedreamError: a word has another form.
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
