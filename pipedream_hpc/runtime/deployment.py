"""Deployment: a plan held against the model and the ranks it is to run on."""

from __future__ import annotations

from pathlib import Path

from pipedream_hpc.cluster.world import World
from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.files import load
from pipedream_hpc.model.capture import LayerGraph
from pipedream_hpc.model.profiler import count
from pipedream_hpc.planning.plan import Plan, StagePlan
from pipedream_hpc.planning.solver import Request, solve
from pipedream_hpc.planning.topology import Level, Topology
from pipedream_hpc.runtime.transport import Boundary
from pipedream_hpc.schedule.one_f_one_b import OneFOneB


def resolve(plan: Plan | str | Path | int, graph: LayerGraph) -> Plan:
    """The plan itself, the one in a file, or an even cut into so many stages."""
    if isinstance(plan, Plan):
        return plan
    if isinstance(plan, str | Path):
        return load(Plan, plan)
    flat = Topology((Level("node", plan, 0.0, 1e9),), device="counted")
    return solve(count(graph), flat, Request(straight=True))


def cuts_of(plan: Plan, graph: LayerGraph, name: str) -> list[tuple[int, int]]:
    """Layer range of every stage.

    Raises:
        PipedreamError: the plan's layers are not the model's.
    """
    remedy = "profile and partition this model again (pipedream profile, pipedream partition)"
    planned = [(layer, index) for index, stage in enumerate(plan.stages) for layer in stage.layers]
    for position, (layer, stage) in enumerate(planned):
        if position >= len(graph.layers):
            break
        if layer != graph.layers[position].name:
            raise PipedreamError(
                f"{name} was made for another model: layer {position} (stage {stage}) is '{layer}' in the plan "
                f"and '{graph.layers[position].name}' in the model: {remedy}"
            )
    if len(planned) != len(graph.layers):
        raise PipedreamError(
            f"{name} was made for another model: it has {len(planned)} layers, the model {len(graph.layers)}: {remedy}"
        )
    cuts, first = [], 0
    for index, planned_stage in enumerate(plan.stages):
        last = first + len(planned_stage.layers)
        _check_stage(index, planned_stage, graph, first, last, f"{name} was made for another model", remedy)
        cuts.append((first, last))
        first = last
    return cuts


def _check_stage(
    index: int, stage: StagePlan, graph: LayerGraph, first: int, last: int, wrong: str, remedy: str
) -> None:
    layers = graph.layers[first:last]
    parameter_bytes = sum(layer.parameter_bytes for layer in layers)
    if parameter_bytes != stage.parameter_bytes:
        raise PipedreamError(
            f"{wrong}: stage {index} ('{stage.layers[0]}' to '{stage.layers[-1]}') has {stage.parameter_bytes} bytes "
            f"of parameters in the plan and {parameter_bytes} in the model: {remedy}"
        )
    shape, dtype = layers[-1].output_shape, str(layers[-1].output_dtype).removeprefix("torch.")
    if stage.output_shape is not None and (stage.output_shape[1:], stage.output_dtype) != (shape[1:], dtype):
        raise PipedreamError(
            f"{wrong}: layer '{stage.layers[-1]}' (stage {index}) puts out {stage.output_dtype} {stage.output_shape} "
            f"in the plan and {dtype} {shape} in the model: {remedy}"
        )


def check_runnable(plan: Plan, name: str, world: World) -> None:
    """Refuse a plan that the workers cannot run, or not on the ranks that were started.

    Raises:
        PipedreamError: says what the plan asks for, and what to do instead.
    """
    if not plan.straight:
        raise PipedreamError(
            f"{name} replicates stages ({plan.config}), which the workers cannot run yet: "
            "plan with `pipedream partition --straight`"
        )
    if plan.schedule != "1f1b":
        raise PipedreamError(f"{name}: field 'schedule' is '{plan.schedule}', but the workers run '1f1b' only")
    schedule = OneFOneB(plan.layout, minibatches=0)
    for index, stage in enumerate(plan.stages):
        if stage.in_flight != schedule.in_flight(index):
            raise PipedreamError(
                f"{name}: field 'stages[{index}].in_flight' is {stage.in_flight}, but 1f1b on {plan.ranks} ranks keeps "
                f"{schedule.in_flight(index)} minibatches in flight there: make the plan anew with pipedream partition"
            )
    if world.size not in (1, plan.ranks):
        raise PipedreamError(
            f"{name} is for {plan.ranks} ranks, but {world.size} were started: "
            f"start {plan.ranks} (mpirun -n {plan.ranks} ...) or plan for {world.size} "
            f"(pipedream partition --devices {world.size})"
        )


def boundaries_of(graph: LayerGraph, cuts: list[tuple[int, int]]) -> list[Boundary]:
    """What crosses the cut behind each stage but the last."""
    ends = [graph.layers[last - 1] for _, last in cuts[:-1]]
    return [Boundary(end.name, stage, end.output_shape, end.output_dtype) for stage, end in enumerate(ends)]
