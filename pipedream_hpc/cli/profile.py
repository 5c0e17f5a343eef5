"""pipedream profile"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer


def run(
    context: typer.Context,
    target: Annotated[
        Optional[str],  # noqa: UP045 - typer reads it at run time
        typer.Argument(help="Python file or module with a function job(args) that returns a pipedream_hpc.Job."),
    ] = None,
    args: Annotated[Optional[list[str]], typer.Argument(help="Passed on to job(args), after --.")] = None,  # noqa: UP045
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the profile.")] = Path("profile.json"),
    minibatches: Annotated[int, typer.Option(help="Minibatches to measure; medians are kept.")] = 20,
    imported: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--import", help="Instead of measuring, read a profile in PipeDream's published text format."),
    ] = None,
    precision: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="bf16 or fp16: forwards under autocast, as in training."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU where there is one.")] = "auto",
    minibatch: Annotated[int, typer.Option(help="With --import: samples per minibatch it was made with.", min=1)] = 1,
) -> None:
    """Measure every layer of a model on this device.

    Runs some minibatches through each layer and keeps the median forward and backward time, the
    bytes of its output, of its parameters, and of what autograd stashes. The loss is counted with the
    last layer; what it takes to read the data is noted beside. Then some minibatches are trained, so that
    the sums are those of training. Needs no MPI; set OMP_NUM_THREADS to what
    one rank will have. Under mpirun or srun all ranks of a node measure at the same time, sharing caches
    and memory as they will in training, and the mean is kept.

        pipedream profile examples/classifier.py -o profile.json

        mpirun -n 4 pipedream profile examples/classifier.py -o profile.json

        pipedream profile --import vgg16.txt --minibatch 128 -o vgg16.json

    Next: pipedream probe (measure the links), pipedream partition (make a plan).
    """
    from pipedream_hpc.errors import PipedreamError
    from pipedream_hpc.files import save
    from pipedream_hpc.observe import terminal
    from pipedream_hpc.observe.tables import profile_table

    if (target is None) == (imported is None):
        raise PipedreamError("give either a TARGET to measure or --import FILE, not both or neither")
    if imported is not None and precision is not None:
        raise PipedreamError("--precision is of a measurement: leave it away with --import")
    if imported is not None:
        from pipedream_hpc.planning.importer import import_profile

        measured = import_profile(imported, minibatch=minibatch)
    else:
        from pipedream_hpc.cluster.device import choose
        from pipedream_hpc.cluster.threads import take_cores
        from pipedream_hpc.cluster.world import join
        from pipedream_hpc.job import load
        from pipedream_hpc.runtime.agreement import agree_on_devices
        from pipedream_hpc.runtime.measuring import profile_of

        assert target is not None
        world = join()
        own = choose(device, world)
        agree_on_devices(world, own, limit_s=300.0)
        take_cores(world, world.local_size)
        job = load(target, args or [])
        measured = profile_of(
            job, world, minibatches=minibatches, model=Path(target).stem, precision=precision, device=own
        )
        if not world.is_root:
            return
    save(measured, output)
    console = terminal.console()
    console.print(profile_table(measured))
    console.print(f"written to {output}")
