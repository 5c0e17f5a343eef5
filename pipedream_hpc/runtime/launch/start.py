"""Start: from what the user gave to workers that are ready to run.

::

    model ──► LayerGraph ──┐
    plan  ──► Plan as run ─┴──► Deployment ──► preflight ──► wiring ──► workers
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from pipedream_hpc.cluster.cores import Cores
from pipedream_hpc.cluster.device import Device, choose
from pipedream_hpc.cluster.heap import keep_freed_memory
from pipedream_hpc.cluster.memory import available_bytes
from pipedream_hpc.cluster.threads import bind_rank
from pipedream_hpc.cluster.world import World, join
from pipedream_hpc.config import RunConfig, ScheduleConfig
from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.model.arguments import bind_inputs
from pipedream_hpc.model.batch_dims import BatchDims
from pipedream_hpc.model.capture import capture
from pipedream_hpc.model.counting import count
from pipedream_hpc.model.cut_points import first_layers
from pipedream_hpc.model.graph import LayerGraph
from pipedream_hpc.model.materialize import materialized
from pipedream_hpc.model.precision import autocast
from pipedream_hpc.model.recipe import ModelFactory, require_values
from pipedream_hpc.model.record import is_list
from pipedream_hpc.planning.plan import Plan
from pipedream_hpc.planning.profile import Profile
from pipedream_hpc.planning.resolve import PlanRequest, check_cut_points, parse_plan, resolve_plan
from pipedream_hpc.planning.scale import scale_profile
from pipedream_hpc.runtime.comm.gpu_route import Route, choose_route
from pipedream_hpc.runtime.comm.handshake import exchange
from pipedream_hpc.runtime.execution.passes import PassRunner
from pipedream_hpc.runtime.execution.run_losses import RunLosses
from pipedream_hpc.runtime.execution.stage import Stage
from pipedream_hpc.runtime.execution.worker import Worker
from pipedream_hpc.runtime.launch.build import TrainSetup, build_running_stats, build_workers
from pipedream_hpc.runtime.launch.check_model import StageChecks, check_whole, why_not_whole
from pipedream_hpc.runtime.launch.deployment import Deployment, deploy
from pipedream_hpc.runtime.launch.evaluation import EvaluationChannels
from pipedream_hpc.runtime.launch.preflight import check_devices, check_launch, warn_of_empty_groups
from pipedream_hpc.runtime.launch.run_plan import RunSchedule, plan_as_run, run_schedule
from pipedream_hpc.runtime.launch.same_program import measure_orders, set_orders
from pipedream_hpc.runtime.launch.wiring import Wiring, local_wiring, mpi_wiring
from pipedream_hpc.runtime.weights.batchnorm import RunningStats


@dataclass(frozen=True)
class Run:
    """A run that is ready to train.

    Attributes:
        world: all ranks.
        devices: what every rank computes on.
        route: how boundary tensors travel between ranks.
        deployment: plan, model and schedule.
        setup: how stages are trained.
        wiring: channels and all-reduces.
        losses: of all microbatches.
        samples: of the example minibatch.
        workers: of this process, by rank.
        running_stats: what replicas average after a training pass.
        passes: runs passes on the workers.
        launch: a name that no other launch has, the same on all ranks.
    """

    world: World
    devices: tuple[Device, ...]
    route: Route
    deployment: Deployment
    setup: TrainSetup
    wiring: Wiring
    losses: RunLosses
    samples: int
    workers: list[Worker]
    running_stats: list[RunningStats]
    passes: PassRunner
    launch: str

    @property
    def stages(self) -> list[Stage]:
        """The replicas of stages in this process, by rank."""
        return [stage for worker in self.workers for stage in worker.stages.values()]


def plan_for(
    graph: LayerGraph,
    request: PlanRequest,
    name: str,
    schedule: RunSchedule,
    recompute: bool | None,
    cut_points: Sequence[str] = (),
) -> Plan:
    """Return the plan as it is run.

    Args:
        graph: the captured model.
        request: the plan that the user asked for.
        name: its name in messages.
        schedule: the run's.
        recompute: run forwards again; None for what the plan says.
        cut_points: names of the modules that stages begin with; none for a cut by costs.

    Raises:
        PipedreamError: there is no such plan, or it does not go with model or schedule.
    """

    def counted() -> Profile:
        profile = count(graph)  # the graph was captured with one microbatch
        return scale_profile(profile, minibatch=profile.minibatch * schedule.n_microbatches)

    cuts = first_layers(graph, cut_points)
    try:
        resolved = resolve_plan(request, counted, schedule.name, cuts)
    except PipedreamError as error:
        if why := _why_no_cut(graph):
            raise PipedreamError(f"{error}; {why}") from None
        raise
    return plan_as_run(resolved, name, schedule, recompute)


def _why_no_cut(graph: LayerGraph) -> str:
    """Return which modules with many others in them cannot be cut, and why."""
    if "" in graph.closed:
        reason = graph.closed[""]
        remedy = (
            ": put what does that into a module of its own" if reason.startswith(("its Python", "its forward")) else ""
        )
        return f"the model cannot be cut, because {reason}{remedy}"
    shared = [
        f"'{names[0]}' and '{names[-1]}' stay in one stage, because a forward changes {text}, and both use it"
        for text, names in graph.notes.sharing()
    ]
    closed = (
        f"'{name}' cannot be cut, because {reason}"
        for name, reason in graph.closed.items()
        if any(map(is_list, graph.module.get_submodule(name).modules()))
    )
    return "; ".join([*closed, *shared[:1]])


def start(
    model: nn.Module | ModelFactory,
    example_inputs: Any,
    plan: Plan | str | Path | int,
    cut_points: Sequence[str],
    schedule_config: ScheduleConfig,
    setup: TrainSetup,
    run_config: RunConfig,
    world: World | None = None,
) -> Run:
    """Start a run. Collective.

    Args:
        model: the user's, or a function that builds it.
        example_inputs: one minibatch of inputs.
        plan: what the user gave.
        cut_points: names of the modules that stages begin with; none for a cut by costs.
        schedule_config: which schedule runs it.
        setup: how stages are trained; the device is chosen here.
        run_config: where it computes.
        world: the ranks; all ranks of the job by default.

    Raises:
        PipedreamError: the plan does not fit the model or the ranks, or ranks do not run the same.
    """
    if setup.config.clip_grad_over == "model" and setup.config.clip_grad_norm is None:
        raise PipedreamError("clip_grad_over='model' clips nothing without a norm: give clip_grad_norm as well")
    world, limit_s = world or join(), run_config.stall_limit_s
    own = choose(run_config.device, world)
    devices = check_devices(world, own, limit_s=limit_s)
    route = choose_route(world, own, limit_s=limit_s)
    setup = TrainSetup(setup.loss_fn, setup.optimizer, setup.config, own.torch)
    request = parse_plan(plan)
    name = "the plan" if isinstance(plan, Plan) else str(plan) if isinstance(request, Plan) else f"plan {plan}"
    schedule = run_schedule(schedule_config, setup.config, request)
    check_cut_points(cut_points, request, schedule.name)
    if isinstance(model, nn.Module):
        require_values(model)
    graph = capture(
        model,
        example_inputs,
        setup.config.leaf_modules,
        setup.autocast,
        batch_dims=BatchDims(setup.config.batch_dims),
        n_microbatches=schedule.n_microbatches,
    )
    whole = bind_inputs(graph.module, example_inputs)
    microbatches = [part for part, _ in graph.batch_dims.split(whole, None, schedule.n_microbatches)]
    with ExitStack() as held:
        why_not = ""  # the whole model is not checked
        if setup.config.check_model:
            orders: list[Any] = []
            checksums: dict[str, int] = {}  # of the model that is checked, to be compared with the stages'
            if world.is_root and not (why_not := why_not_whole(graph, available_bytes(), limit_s)):
                held.enter_context(materialized(graph))
                checksums = graph.recipe.checksums if graph.recipe else {}
                orders = measure_orders(graph, microbatches[0], autocast(setup.config.precision))
            answer = exchange(world, {"orders": orders, "checksums": checksums, "why_not": why_not}, limit_s=limit_s)[0]
            why_not = answer["why_not"]
            if graph.recipe is not None:
                graph.recipe.checksums.update(answer["checksums"])
            if not why_not:
                set_orders(graph, answer["orders"])
        as_run = plan_for(graph, request, name, schedule, setup.config.recompute, cut_points)
        deployment = deploy(as_run, name, graph, schedule, world)
        training = deployment.example_training()
        if setup.config.compile_backend and any(training.splits(stage) for stage in range(len(training.layout))):
            raise PipedreamError(
                f"compiled stages run backwards whole, but {schedule.name} splits them: choose another schedule, or "
                "leave compile_backend out"
            )
        if setup.config.check_model and not why_not and world.is_root:
            check_whole(deployment, whole, microbatches, setup.config)
    launch = check_launch(world, deployment, setup.config, limit_s=limit_s)
    cores = bind_rank(world, deployment.ranks) if deployment.ranks > 1 or world.size > 1 else Cores()
    wiring = (
        mpi_wiring(
            world,
            training,
            deployment.edge_tensors,
            limit_s,
            ordered=setup.config.deterministic,
            route=route,
            cores=cores,
        )
        if world.size > 1
        else local_wiring(training, deployment.edge_tensors, own.torch)
    )
    losses = RunLosses(wiring.losses, training.layout[-1])
    trivial = len(deployment.plan.stages) == len(microbatches) == 1 and not graph.notes.random_functions
    stage_checks = StageChecks(deployment, microbatches[0], setup) if why_not and not trivial else None
    workers = build_workers(deployment, training, wiring, losses, setup, stage_checks)
    if stage_checks is not None:
        stage_checks.report(world, why_not, limit_s)
    if own.torch.type == "cpu":
        keep_freed_memory()
    stages = [stage for worker in workers for stage in worker.stages.values()]
    warn_of_empty_groups(world, [stage.stash for stage in stages], limit_s=limit_s)
    running_stats = build_running_stats(stages, training.layout, wiring)
    passes = PassRunner(
        world,
        workers,
        running_stats,
        losses,
        EvaluationChannels(world, deployment, wiring, workers, limit_s).fit,
        limit_s,
        wiring.common_epoch_ns,
        wiring.set_position,
    )
    samples = graph.batch_dims.n_samples(whole)
    return Run(
        world, devices, route, deployment, setup, wiring, losses, samples, workers, running_stats, passes, launch
    )
