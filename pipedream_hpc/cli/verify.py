"""pipedream verify"""

from __future__ import annotations

from typing import Annotated, Optional

import typer


def run(
    target: Annotated[
        str,
        typer.Argument(help="Python file or module with a function job(args) that returns a pipedream_hpc.Job."),
    ],
    args: Annotated[Optional[list[str]], typer.Argument(help="Passed on to job(args), after --.")] = None,  # noqa: UP045
    plan: Annotated[
        str, typer.Option(help="A plan file, a number of stages to cut evenly, or their replicas as in 2-1-1.")
    ] = "plan.json",
    minibatches: Annotated[int, typer.Option(help="Of each epoch, the first so many.", min=1)] = 8,
    epochs: Annotated[int, typer.Option(help="How many to run.", min=1)] = 2,
    schedule: Annotated[Optional[str], typer.Option(help="Instead of the plan's.")] = None,  # noqa: UP045
    microbatches: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="To a minibatch, for the schedules that cut it.", min=1),
    ] = None,
    chunks: Annotated[int, typer.Option(help="Stages per rank, for interleaved.", min=1)] = 1,
    split_backward: Annotated[
        bool, typer.Option(help="As in training: 1f1b-flush or gpipe with split backwards.")
    ] = False,
    zero_bubble: Annotated[
        bool, typer.Option(help="As in training: 1f1b-flush with twice as many microbatches in flight.")
    ] = False,
    precision: Annotated[Optional[str], typer.Option(help="bf16: forwards under autocast.")] = None,  # noqa: UP045
    master_weights: Annotated[bool, typer.Option(help="Keep a float32 master of every bfloat16 weight.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU where there is one.")] = "auto",
    seed: Annotated[int, typer.Option(help="Order of the data and dropout masks depend on it alone.")] = 0,
    tolerance: Annotated[
        float,
        typer.Option(help="Largest difference that still passes, as a part of the tensor's largest number; 0: none."),
    ] = 1e-4,
) -> None:
    """Prove that pipelined training computes what it should: run some minibatches both ways and compare.

    One way is the workers', as in training; the other is plain autograd on one process, on the weight
    versions that the schedule's equation names. Losses, gradients and weights are compared bit for bit.
    They are the same, but for the order in which gradients of a tensor with several users are added up.

        mpirun -n 4 pipedream verify examples/classifier.py --plan plan.json

        pipedream verify train.py --plan 2-1-1 --schedule vertical-sync --tolerance 0

    Next: pipedream train with the same plan.
    """
    import os

    # On a GPU, cuBLAS computes the same thing the same way only in a workspace of one size, set before it starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

    from pipedream_hpc.cli.train import stages
    from pipedream_hpc.cluster.world import join
    from pipedream_hpc.errors import PipedreamError
    from pipedream_hpc.job import load
    from pipedream_hpc.model.materialize import another
    from pipedream_hpc.observe import terminal
    from pipedream_hpc.observe.tables import verdict_table
    from pipedream_hpc.runtime.pipeline import Pipeline
    from pipedream_hpc.verification.comparison import (
        by_reference,
        by_workers,
        compare,
        first_minibatches,
        repeatable,
        way_of,
    )

    if not tolerance >= 0:
        raise PipedreamError(f"--tolerance should be 0 or more, not {tolerance:g}")
    world = join()
    job = load(target, args or [])
    model = another(job.model) if world.is_root else None
    pipeline = Pipeline.of(
        job,
        plan=stages(plan),
        schedule=schedule,
        microbatches=microbatches,
        chunks=chunks,
        split_backward=split_backward,
        zero_bubble=zero_bubble,
        precision=precision,
        master_weights=master_weights,
        device=device,
        seed=seed,
    )
    way = way_of(pipeline, job)
    data = first_minibatches(job, minibatches, epochs, seed)
    with repeatable():
        events = by_workers(pipeline, data)
    if world.comm is not None and world.size > 1:
        parts = world.comm.gather(events, root=0)
        events = [event for part in parts or () for event in part]
    problem = None
    if model is not None:
        with repeatable():
            expected = by_reference(pipeline, job, model, way, data)
        verdict = compare(events, expected)
        console = terminal.console()
        console.print(verdict_table(verdict))
        if verdict.exact:
            console.print("exact: every bit of the pipelined training is that of the reference")
        else:
            console.print(f"first to differ: {verdict.differences[0]}", highlight=False)
        if not verdict.within(tolerance):
            worst = next(each for each in verdict.differences if each.relative > tolerance)
            problem = f"pipelined training is not the reference's: {worst}; the tolerance is {tolerance:g}"
    pipeline.close()
    if problem is not None:
        raise PipedreamError(problem)
