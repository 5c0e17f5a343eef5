"""pipedream profile"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

if TYPE_CHECKING:
    from pipedream_hpc.job import Job


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
    minibatch: Annotated[int, typer.Option(help="With --import: samples per minibatch it was made with.")] = 1,
) -> None:
    """Measure every layer of a model on this device.

    Runs some minibatches through each layer and keeps the median forward and backward time, the
    bytes of its output, of its parameters, and of what autograd stashes. The loss is counted with the
    last layer; what it takes to read the data is noted beside. Needs no MPI; set OMP_NUM_THREADS to what
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
    if imported is not None:
        from pipedream_hpc.planning.importer import import_profile

        measured = import_profile(imported, minibatch=minibatch)
    else:
        import torch

        from pipedream_hpc.cluster.threads import threads_per_rank
        from pipedream_hpc.cluster.world import join
        from pipedream_hpc.job import load
        from pipedream_hpc.model.capture import capture
        from pipedream_hpc.model.materialize import whole
        from pipedream_hpc.model.precision import autocast
        from pipedream_hpc.model.profiler import averaged, measure, one_minibatch
        from pipedream_hpc.runtime.update_cost import with_updates

        assert target is not None
        world = join()
        torch.set_num_threads(threads_per_rank(world.local_size))
        job = load(target, args or [])
        forwards = autocast(precision)
        graph, target_of_one = capture(whole(job.model), job.example, job.leaves, forwards), first_target(job)
        loss = None if target_of_one is None else lambda output: job.loss(output, target_of_one)
        if world.comm is not None:
            world.comm.Barrier()
        measured = measure(
            graph, job.example, minibatches=minibatches, model=Path(target).stem, loss=loss, precision=forwards
        )
        between = one_minibatch(graph, job.example, loss, forwards)
        measured = with_updates(measured, graph, job.optimizer, between=between)
        measured = dataclasses.replace(measured, read_s=reading_s(job, minibatches, between))
        if world.comm is not None and world.size > 1:
            measured = averaged(world.comm.allgather(measured))
            if not world.is_root:
                return
    save(measured, output)
    console = terminal.console()
    console.print(profile_table(measured))
    console.print(f"written to {output}")


def first_target(job: Job) -> Any:
    """The target of the job's first minibatch, if it is as large as the example; the loss is measured with it."""
    import torch

    with torch.random.fork_rng(devices=[]):
        pair = next(iter(job.train), None)
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        return None
    shapes = [tensor.shape[0] for tensor in (job.example, pair[1]) if isinstance(tensor, torch.Tensor) and tensor.dim()]
    return pair[1] if len(shapes) == 2 and shapes[0] == shapes[1] else None


def reading_s(job: Job, minibatches: int, between: Callable[[], None]) -> float:
    """Median seconds to read a minibatch of the job, with `between` done before each.

    A loader with processes of its own reads beside the computation: that takes no time.
    """
    import statistics
    import time

    import torch

    if getattr(job.train, "num_workers", 0) > 0:
        return 0.0
    taken = []
    with torch.random.fork_rng(devices=[]):
        pairs = iter(job.train)
        for _ in range(minibatches + 1):
            between()
            began_s = time.perf_counter()
            pair = next(pairs, None)
            if pair is None:
                break
            taken.append(time.perf_counter() - began_s)
    return statistics.median(taken[1:]) if len(taken) > 1 else 0.0
