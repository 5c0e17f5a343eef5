"""pipedream probe"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def run(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the topology.")] = Path(
        "topology.json"
    ),
    repeats: Annotated[
        int, typer.Option(help="Maximum rounds per message size; long rounds are repeated less often.", min=1)
    ] = 20,
) -> None:
    """Measure latency and bandwidth of the links between ranks, within nodes and between nodes.

    Pairs of ranks exchange messages of 1 KiB to 64 MiB in host memory. Then the ranks of a node, and
    all ranks, run ring all-reduces. This takes seconds; over slow links up to half a minute per level.

    Start it like the training, with the same number of ranks on the same nodes:

        mpirun -n 4 pipedream probe -o topology.json

        srun --mpi=pmix --ntasks-per-node=4 pipedream probe -o topology.json

    Next: pipedream partition PROFILE --topology topology.json
    """
    from pipedream_hpc.cluster.probe import measure
    from pipedream_hpc.cluster.world import join
    from pipedream_hpc.files import save
    from pipedream_hpc.observe import terminal
    from pipedream_hpc.observe.tables import topology_table

    world = join()
    topology = measure(world, repeats=repeats)
    if world.is_root:
        save(topology, output)
        console = terminal.console()
        console.print(topology_table(topology))
        console.print(f"written to {output}")
