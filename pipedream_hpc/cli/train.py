"""pipedream train"""

from __future__ import annotations

from pathlib import Path
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
    out: Annotated[Path, typer.Option(help="Folder for trace.json, timeline.png and summary.json.")] = Path("out"),
    epochs: Annotated[Optional[int], typer.Option(help="Instead of the job's own number.", min=1)] = None,  # noqa: UP045
    until_accuracy: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Stop when the test accuracy stands at this, between 0 and 1.", min=0, max=1),
    ] = None,
    seed: Annotated[int, typer.Option(help="Order of the data and dropout masks depend on it alone.")] = 0,
    stall_limit: Annotated[
        float, typer.Option(help="Seconds a rank waits for another before it says for whom, and stops.", min=0.1)
    ] = 300.0,
    schedule: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Instead of the plan's: 1f1b, vertical-sync, 2bw, 1f1b-flush, gpipe, interleaved, ..."),
    ] = None,
    microbatches: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="To a minibatch, for the schedules that cut it: 1f1b-flush, gpipe, 2bw, interleaved.", min=1),
    ] = None,
    chunks: Annotated[int, typer.Option(help="Stages per rank, for interleaved.", min=1)] = 1,
    split_backward: Annotated[
        bool,
        typer.Option(help="1f1b-flush, gpipe: send a stage's input gradient before those of its weights are computed."),
    ] = False,
    zero_bubble: Annotated[
        bool,
        typer.Option(
            help="1f1b-flush: do so, with twice as many microbatches in flight, so that no stage waits at an update."
        ),
    ] = False,
    precision: Annotated[Optional[str], typer.Option(help="bf16 or fp16: forwards under autocast.")] = None,  # noqa: UP045
    master_weights: Annotated[bool, typer.Option(help="Keep a float32 master of every bfloat16 weight.")] = False,
    compiler: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="A backend of torch.compile, such as inductor, to compile every stage with."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU where there is one.")] = "auto",
    checkpoints: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder, seen by all ranks, for a checkpoint after every epoch."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest whole checkpoint.")] = False,
    trace: Annotated[bool, typer.Option(help="Note down what ran when, and write trace.json and timeline.png.")] = True,
) -> None:
    """Train: 1F1B with weight stashing, or any other schedule, one replica of a stage per rank.

    Started by itself it runs all ranks in one process, with the same numbers, only slower.

        mpirun -n 4 pipedream train examples/classifier.py --plan plan.json

        srun --mpi=pmix -n 4 pipedream train examples/classifier.py --plan plan.json

    Next: pipedream trace out/trace.json
    """
    from pipedream_hpc.cluster.world import join
    from pipedream_hpc.errors import PipedreamError
    from pipedream_hpc.job import load
    from pipedream_hpc.observe.session import Session
    from pipedream_hpc.runtime.pipeline import Pipeline, length_of

    if resume and checkpoints is None:
        raise PipedreamError("--resume needs to know from where: give --checkpoints FOLDER")
    join()  # first: from here on a rank that fails stops the others
    job = load(target, args or [])
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
        compiler=compiler,
        device=device,
        seed=seed,
        stall_limit_s=stall_limit,
        trace=trace,
        checkpoints=checkpoints,
    )
    minibatches = length_of(job.train)
    first, last = pipeline.resume() if resume else 0, epochs or job.epochs
    session = Session(pipeline.plan, out, pipeline.world)
    session.devices(pipeline.devices, pipeline.route)
    if resume:
        session.resumed(first, last)
    if first >= last:
        pipeline.close()
        return
    for epoch in range(first, last):
        with session.epoch(epoch, minibatches) as on_minibatch:
            loss = pipeline.fit(job.train, on_minibatch)
        accuracy = pipeline.evaluate(job.test, job.metric) if job.test is not None else None
        session.say(epoch, loss, accuracy)
        if until_accuracy is not None and accuracy is not None and accuracy >= until_accuracy:
            break
    session.finish(pipeline.last_trace() if trace else None, pipeline.footprints())
    pipeline.close()


def stages(plan: str) -> str | int:
    """`--plan` as Pipeline takes it: the number of stages, or the file as it was given.

    Raises:
        PipedreamError: the number is 0.
    """
    from pipedream_hpc.errors import PipedreamError

    if not plan.isdecimal():
        return plan
    if int(plan) < 1:
        raise PipedreamError(f"--plan {plan}: a pipeline needs at least one stage: give a plan file or a number from 1")
    return int(plan)
