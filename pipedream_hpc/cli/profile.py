"""pipedream profile"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from pipedream_hpc.cli.options import Given, with_options
from pipedream_hpc.config import RunConfig, TrainConfig


@with_options(train_config=(TrainConfig, ("precision",)), run_config=(RunConfig, ("device", "stall_limit_s")))
def run(
    train_config: Given,
    run_config: Given,
    target: Annotated[
        Optional[str],  # noqa: UP045 - typer reads it at run time
        typer.Argument(help="Python file or module with a function job(args) that returns a pipedream_hpc.Job."),
    ] = None,
    args: Annotated[Optional[list[str]], typer.Argument(help="Passed on to job(args), after --.")] = None,  # noqa: UP045
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the profile.")] = Path("profile.json"),
    minibatches: Annotated[int, typer.Option(help="Number of minibatches to measure; medians are kept.")] = 20,
    imported: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--import", help="Read a profile in PipeDream's published text format instead of measuring."),
    ] = None,
    minibatch: Annotated[
        int, typer.Option(help="With --import: samples per minibatch of the imported profile.", min=1)
    ] = 1,
) -> None:
    """Measure every layer of a model on this device.

    Runs some minibatches and keeps, for every layer, the median forward and backward time and the bytes of its
    output, its parameters and its stash. The loss is counted with the last layer; the time to read the data is
    measured too. Then some minibatches are trained, and the times are scaled to those of training.

    Needs no MPI; set OMP_NUM_THREADS to the threads that one rank will have. Under mpirun or srun all ranks of a node
    measure at the same time, sharing caches and memory as in training, and the mean is kept.

        pipedream profile examples/classifier.py -o profile.json

        mpirun -n 4 pipedream profile examples/classifier.py -o profile.json

        pipedream profile --import vgg16.txt --minibatch 128 -o vgg16.json

    Next: pipedream probe (measure the links), pipedream partition (make a plan).
    """
    import dataclasses

    from pipedream_hpc.errors import PipedreamError
    from pipedream_hpc.files import save
    from pipedream_hpc.observe import terminal
    from pipedream_hpc.observe.tables import profile_table

    if (target is None) == (imported is None):
        raise PipedreamError("give either a TARGET to measure or --import FILE, not both or neither")
    if imported is not None and (train_config.values or run_config.values):
        raise PipedreamError(
            "--precision, --device and --stall-limit-s apply to a measurement: omit them with --import"
        )
    if imported is not None:
        from pipedream_hpc.planning.importer import import_profile

        measured = import_profile(imported, minibatch=minibatch)
    else:
        from pipedream_hpc.cluster.device import choose
        from pipedream_hpc.cluster.threads import bind_rank
        from pipedream_hpc.cluster.world import join
        from pipedream_hpc.job import load
        from pipedream_hpc.profiling.measure_job import measure_job
        from pipedream_hpc.runtime.launch.preflight import check_devices

        assert target is not None
        world = join()
        job = load(target, args or [])
        config = run_config.applied_to(job.run_config)
        own = choose(config.device, world)
        check_devices(world, own, limit_s=config.stall_limit_s)
        bind_rank(world, world.local_size)
        job = dataclasses.replace(job, train_config=train_config.applied_to(job.train_config))
        measured = measure_job(job, world, minibatches=minibatches, model=Path(target).stem, device=own)
        if not world.is_root:
            return
    save(measured, output)
    console = terminal.console()
    console.print(profile_table(measured))
    console.print(f"written to {output}")
