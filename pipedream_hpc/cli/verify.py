"""pipedream verify"""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from pipedream_hpc.cli.options import Given, schedule_of, with_options
from pipedream_hpc.cli.train import CUT_POINTS, PLAN, TARGET, names_of
from pipedream_hpc.config import RunConfig, ScheduleConfig, TrainConfig


@with_options(schedule=ScheduleConfig, train_config=TrainConfig, run_config=(RunConfig, ("device", "stall_limit_s")))
def run(
    target: Annotated[str, TARGET],
    schedule: Given,
    train_config: Given,
    run_config: Given,
    args: Annotated[Optional[list[str]], typer.Argument(help="Passed on to job(args), after --.")] = None,  # noqa: UP045
    plan: Annotated[str, PLAN] = "plan.json",
    cut_points: Annotated[Optional[str], CUT_POINTS] = None,  # noqa: UP045
    minibatches: Annotated[int, typer.Option(help="Minibatches of each epoch, from the first.", min=1)] = 8,
    epochs: Annotated[int, typer.Option(help="Epochs to run.", min=1)] = 2,
    tolerance: Annotated[
        float,
        typer.Option(help="Largest difference that passes, as a part of the tensor's largest number; 0: none."),
    ] = 1e-4,
) -> None:
    """Prove that pipelined training computes what it should: run some minibatches both ways and compare.

    One way is the workers', as in training. The other is plain autograd on one process, on the weight
    versions that the schedule's equation names. Losses, gradients and weights are compared bit for bit.
    They are the same, except for the order in which gradients of a tensor with several uses are summed.

        mpirun -n 4 pipedream verify examples/classifier.py --plan plan.json

        pipedream verify train.py --plan 2-1-1 --schedule vertical-sync --tolerance 0

    Next: pipedream train with the same plan.
    """
    import os

    # On a GPU, cuBLAS computes the same thing the same way only in a workspace of one size, set before it starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

    from pipedream_hpc.cluster.world import join
    from pipedream_hpc.errors import PipedreamError
    from pipedream_hpc.job import load
    from pipedream_hpc.model.recipe import copy_model
    from pipedream_hpc.observe import terminal
    from pipedream_hpc.observe.tables import verdict_table
    from pipedream_hpc.runtime.pipeline import Pipeline
    from pipedream_hpc.verification.comparison import (
        compare,
        deterministic_algorithms,
        draws_in_one_stage,
        first_minibatches,
        pipeline_events,
        reference_config_of,
        reference_events,
    )
    from pipedream_hpc.verification.draws import merged, plan_problem, problems_of

    if not tolerance >= 0:
        raise PipedreamError(f"--tolerance should be 0 or more, not {tolerance:g}")
    world = join()
    job = load(target, args or [])
    model = copy_model(job.model) if world.is_root else None
    pipeline = Pipeline.from_job(
        job,
        plan=plan,
        cut_points=names_of(cut_points),
        schedule=schedule_of(schedule, job.schedule),
        train_config=train_config.applied_to(job.train_config),
        run_config=run_config.applied_to(job.run_config),
    )
    config = reference_config_of(pipeline)
    data = first_minibatches(job, minibatches, epochs, pipeline.train_config.seed)
    with deterministic_algorithms():
        parts = [pipeline_events(pipeline, data)]
    if world.comm is not None and world.size > 1:
        parts = world.comm.gather(parts[0], root=0) or []
    events = [event for part, _ in parts for event in part]
    problem = None
    if model is not None:
        console = terminal.console()
        draws, problems = merged(forwards for _, forwards in parts)
        problems += problems_of(draws)
        if any(draws.values()):
            alone = draws_in_one_stage(pipeline, job, copy_model(model), data[0][:2])
            problems += [each for each in [plan_problem(draws, alone)] if each]
        if problems:
            problem = f"random numbers are wrong: {problems[0]}"
        else:
            console.print(f"random numbers: {sum(map(len, draws.values()))} draws, no two alike")
            with deterministic_algorithms():
                expected = reference_events(pipeline, job, model, config, data, draws)
            verdict = compare(events, expected, pipeline.n_microbatches)
            console.print(verdict_table(verdict))
            if verdict.exact:
                console.print("exact: every bit of the pipelined training is that of the reference")
            else:
                console.print(f"first difference: {verdict.differences[0]}", highlight=False)
            if not verdict.within(tolerance):
                worst = next(each for each in verdict.differences if each.relative > tolerance)
                problem = f"pipelined training differs from the reference: {worst}; the tolerance is {tolerance:g}"
    pipeline.close()
    if problem is not None:
        raise PipedreamError(problem)
