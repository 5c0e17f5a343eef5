"""pipedream partition"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer


def run(
    profile: Annotated[Path, typer.Argument(help="A profile that `pipedream profile` wrote.")],
    topology: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--topology", "-t", help="A topology that `pipedream probe` wrote."),
    ] = None,
    devices: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Instead of --topology: number of devices.", min=1),
    ] = None,
    bandwidth: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Instead of --topology: bytes per second between two devices."),
    ] = None,
    straight: Annotated[
        bool, typer.Option("--straight", help="One replica per stage: what `pipedream train` runs today.")
    ] = False,
    cost: Annotated[str, typer.Option(help="Cost formula: paper2018 or ring.")] = "paper2018",
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the plan.")] = Path("plan.json"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan file instead of the table.")] = False,
) -> None:
    """Cut a model into stages, so that the slowest stage is as fast as can be.

    The partitioner of the PipeDream paper: from the measured layers and links it decides which
    layers make a stage and how many replicas each stage gets.

        pipedream partition profile.json --topology topology.json --straight -o plan.json

        pipedream partition vgg16.json --devices 8 --bandwidth 1.25e9

    Next: pipedream simulate plan.json (predict the timeline), pipedream train ... --plan plan.json
    """
    from pipedream_hpc.errors import PipedreamError
    from pipedream_hpc.files import load, save
    from pipedream_hpc.observe import terminal
    from pipedream_hpc.observe.tables import human_seconds, plan_table, speed_up
    from pipedream_hpc.planning.profile import Profile
    from pipedream_hpc.planning.solver import solve
    from pipedream_hpc.planning.topology import Level, Topology

    layers = load(Profile, profile)
    if topology is not None and devices is None and bandwidth is None:
        links = load(Topology, topology)
    elif topology is None and devices is not None and bandwidth is not None:
        if bandwidth <= 0:
            raise PipedreamError(f"--bandwidth should be positive bytes per second, not {bandwidth:g}")
        links = Topology((Level("network", devices, 0.0, bandwidth),), device=layers.device)
    else:
        raise PipedreamError("say what to plan for: either --topology FILE, or both --devices and --bandwidth")
    plan = solve(layers, links, cost=cost, straight=straight)
    save(plan, output)
    if as_json:
        typer.echo(output.read_text(), nl=False)
        return
    console = terminal.console()
    console.print(plan_table(plan))
    console.print(
        f"{human_seconds(plan.bottleneck_s)} per minibatch predicted, "
        f"{speed_up(plan):.2f}x one device; written to {output}"
    )
