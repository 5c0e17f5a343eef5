"""pipedream train"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from pipedream_hpc.cli.options import Given, schedule_of, with_options
from pipedream_hpc.config import RunConfig, ScheduleConfig, TrainConfig

TARGET = typer.Argument(help="Python file or module with a function job(args) that returns a pipedream_hpc.Job.")
PLAN = typer.Option(help="A plan file, a number of stages to cut evenly, or their replicas as in 2-1-1.")
CUT_POINTS = typer.Option(
    help="Modules A,B,... that stages begin with, one fewer than stages; the plan says the replicas."
)


def names_of(cut_points: str | None) -> list[str] | None:
    """Return the names that `--cut-points` lists; None if it was not given."""
    return None if cut_points is None else [name.strip() for name in cut_points.split(",") if name.strip()]


@with_options(schedule=ScheduleConfig, train_config=TrainConfig, run_config=RunConfig)
def run(
    target: Annotated[str, TARGET],
    schedule: Given,
    train_config: Given,
    run_config: Given,
    args: Annotated[Optional[list[str]], typer.Argument(help="Passed on to job(args), after --.")] = None,  # noqa: UP045
    plan: Annotated[str, PLAN] = "plan.json",
    cut_points: Annotated[Optional[str], CUT_POINTS] = None,  # noqa: UP045
    out: Annotated[Path, typer.Option(help="Folder for trace.json, timeline.png and summary.json.")] = Path("out"),
    epochs: Annotated[Optional[int], typer.Option(help="Instead of the job's own number.", min=1)] = None,  # noqa: UP045
    until_accuracy: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Stop when the metric 'accuracy' reaches this, between 0 and 1.", min=0, max=1),
    ] = None,
    weights: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="Weights to begin with: a safetensors file, the index of several, or their folder, as "
            "save_pretrained writes it. Each rank reads those of its own stages.",
        ),
    ] = None,
    checkpoints: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder, seen by all ranks, for a checkpoint after every epoch."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest complete checkpoint.")] = False,
) -> None:
    """Train: 1F1B with weight stashing, or any other schedule, one replica of a stage per rank.

    Started by itself it runs all ranks in one process, with the same numbers, only slower. Options of the schedule,
    of training and of where it runs replace what the job says.

        mpirun -n 4 pipedream train examples/classifier.py --plan plan.json

        srun --mpi=pmix -n 4 pipedream train examples/classifier.py --plan plan.json

    Next: pipedream trace out/trace.json
    """
    from pipedream_hpc.cluster.world import join
    from pipedream_hpc.errors import PipedreamError
    from pipedream_hpc.job import load
    from pipedream_hpc.observe.run_reporter import RunReporter
    from pipedream_hpc.runtime.pipeline import Pipeline

    if resume and checkpoints is None:
        raise PipedreamError("--resume needs to know from where: give --checkpoints FOLDER")
    join()  # first: from here on a rank that fails stops the others
    job = load(target, args or [])
    if until_accuracy is not None and (job.test_loader is None or "accuracy" not in job.metrics):
        raise PipedreamError(
            "--until-accuracy needs a test accuracy: give the Job a test_loader, and 'accuracy' among its metrics"
        )
    recording = Given({"trace": True, **run_config.values})
    pipeline = Pipeline.from_job(
        job,
        plan=plan,
        cut_points=names_of(cut_points),
        schedule=schedule_of(schedule, job.schedule),
        train_config=train_config.applied_to(job.train_config),
        run_config=recording.applied_to(job.run_config),
    )
    if weights is not None:
        pipeline.load_state_dict(weights)
    first, last = pipeline.resume(checkpoints) if resume and checkpoints else 0, epochs or job.epochs
    if checkpoints is not None:
        pipeline.prepare_checkpoints(checkpoints)
    reporter = RunReporter(pipeline.plan, out, pipeline.world)
    reporter.report_devices(pipeline.devices, pipeline.route)
    if resume:
        reporter.report_resume(first, last)
    if first >= last:
        pipeline.close()
        return
    for epoch in range(first, last):
        with reporter.epoch_progress(epoch, job.train_loader) as on_step:
            loss = pipeline.fit(job.train_loader, on_step=on_step)
        scores = pipeline.evaluate(job.test_loader, job.metrics) if job.test_loader is not None else {}
        if checkpoints is not None:
            pipeline.save_checkpoint(checkpoints)
        reporter.report_epoch(epoch, loss, scores)
        if until_accuracy is not None and scores["accuracy"] >= until_accuracy:
            break
    reporter.finish(pipeline.last_trace() if pipeline.run_config.trace else None, pipeline.memory_reports())
    pipeline.close()
