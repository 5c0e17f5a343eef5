"""Assemble: turn a solution of the solver into a Plan, with all its predictions."""

from __future__ import annotations

import numpy as np

from pipedream_hpc.planning.memory import MemoryParts
from pipedream_hpc.planning.plan import Alternatives, Plan, StagePlan
from pipedream_hpc.planning.profile import Profile
from pipedream_hpc.planning.solver.problem import PlacedStage, Problem

#: Microbatches per minibatch in the comparison with schedules that flush.
_MICROBATCHES = 8


def assemble(profile: Profile, problem: Problem, stages: list[PlacedStage], *, schedule: str, bound_s: float) -> Plan:
    """Return the Plan for `stages`, a solution of `problem`.

    Args:
        profile: the profile that the problem was made from.
        problem: the problem.
        stages: the solution, input stage first.
        schedule: name of the schedule that the plan is for.
        bound_s: lower bound on the time of any plan, in seconds per minibatch.
    """
    planned = tuple(_stage(problem, stages, index, profile) for index in range(len(stages)))
    bottleneck_s = problem.bottleneck_s(stages)
    straight = all(stage.replicas == 1 for stage in planned)
    m = problem.rule.n_microbatches
    flush = schedule in ("1f1b-flush", "gpipe")
    bubble = (m + len(stages) - 1) / m if flush else 1.0
    return Plan(
        model=profile.model,
        minibatch=profile.minibatch,
        schedule="1f1b-rr" if schedule == "1f1b" and not straight else schedule,
        cost=problem.formula.name,
        stages=planned,
        bottleneck_s=bottleneck_s * bubble,
        single_device_s=profile.total_s,
        bound_s=min(bound_s, bottleneck_s) * bubble,
        n_microbatches=m,
        optimizer=problem.rule.optimizer,
        memory_bytes=problem.memory_bytes,
        alternatives=_alternatives(problem, stages, planned, bottleneck_s),
        notes=_notes(problem, stages),
    )


def _stage(problem: Problem, stages: list[PlacedStage], index: int, profile: Profile) -> StagePlan:
    cuts, formula, row = problem.cuts, problem.formula, problem.row
    stage = stages[index]
    layers = [cuts.layers[layer] for layer in cuts.between(stage.first, stage.last)]
    forward_s, backward_s = sum(x.forward_s for x in layers), sum(x.backward_s for x in layers)
    parameter_bytes = sum(x.parameter_bytes for x in layers)
    replicas = stage.replicas * row.copies
    start, stop = stage.first_device, stage.first_device + stage.replicas
    update_s = sum(x.update_s for x in layers)
    compute_s = float(formula.compute_s(forward_s * (1 + stage.recompute) + backward_s + update_s, replicas))
    spans = row.spans(start, stop)
    sync_s = float(formula.sync_s(formula.round_s(float(parameter_bytes), spans, row.topology.levels), replicas))
    boundary_s = 0.0
    if index + 1 < len(stages):
        sides = [_side_s(problem, stages[index + 1], output=False)]
        if index > 0 or not formula.first_output_free:
            sides.append(_side_s(problem, stage, output=True))
        boundary_s = max(sides)
    in_flight = int(problem.rule.in_flight(stage.replicas, row.devices - stop))
    crossing = cuts.crossing[stage.last]
    single = cuts.layers[crossing[0]] if len(crossing) == 1 else None
    if index + 1 == len(stages):
        single = layers[-1]
    parts = problem.rule.parts(
        parameter_bytes=parameter_bytes,
        stash_bytes=sum(x.stash_bytes for x in layers),
        input_bytes=float(problem.crossing_bytes[stage.first]),
        output_bytes=float(problem.crossing_bytes[stage.last]),
        in_flight=in_flight,
        recompute=stage.recompute,
    )
    stash_bytes = float(problem.crossing_bytes[stage.first]) if stage.recompute else sum(x.stash_bytes for x in layers)
    figures = {"compute": compute_s, "sync": sync_s, "boundary": boundary_s}
    return StagePlan(
        layers=tuple(layer.name for layer in layers),
        ranks=_ranks(problem, stages, start, stop),
        forward_s=forward_s,
        backward_s=backward_s,
        weight_gradient_s=sum(x.weight_gradient_s for x in layers),
        waiting_bytes=sum(x.waiting_bytes for x in layers),
        unsplit_bytes=sum(x.unsplit_bytes for x in layers),
        update_s=update_s,
        read_s=profile.read_s if index in (0, len(stages) - 1) else 0.0,
        overhead_s=profile.overhead_s,
        compute_s=compute_s,
        sync_s=sync_s,
        boundary_s=boundary_s,
        in_flight=in_flight,
        parameter_bytes=parameter_bytes,
        output_bytes=sum(cuts.layers[x].output_bytes for x in crossing) if single is None else single.output_bytes,
        output_shape=None if single is None else single.output_shape,
        output_dtype=None if single is None else single.output_dtype,
        limit=max(figures, key=lambda part: figures[part]),
        memory=MemoryParts(**{part: int(np.ceil(float(size))) for part, size in parts.items()}),
        recompute=stage.recompute,
        stash_bytes=int(stash_bytes),
    )


def _side_s(problem: Problem, stage: PlacedStage, *, output: bool) -> float:
    """Return the time of a boundary over the links of the stage on one side of it."""
    row, formula = problem.row, problem.formula
    shares = row.shares(stage.first_device, stage.first_device + stage.replicas, output=output)
    crossing = float(problem.crossing_bytes[stage.last if output else stage.first])
    part = 1 / row.copies if formula.routed else 1.0
    return float(formula.boundary_s(crossing, shares, row.topology.levels)) * part


def _ranks(problem: Problem, stages: list[PlacedStage], start: int, stop: int) -> tuple[int, ...]:
    """Return the ranks on devices start to stop - 1 of every row, numbered without the unused devices.

    Unused devices are the first ones of every row. In a single row of several nodes, ranks are then counted
    from the row's end: a launcher that fills one node after the other thus reproduces the planned placement.
    """
    row, unused = problem.row, stages[0].first_device
    if unused == 0:
        return row.ranks(start, stop)
    used = row.devices - unused
    if row.copies == 1 and len(row.topology.levels) > 1:
        return tuple(row.devices - 1 - device for device in range(start, stop))
    return tuple(copy * used + device - unused for device in range(start, stop) for copy in range(row.copies))


def _alternatives(
    problem: Problem, stages: list[PlacedStage], planned: tuple[StagePlan, ...], bottleneck_s: float
) -> Alternatives:
    cuts, row, formula = problem.cuts, problem.row, problem.formula
    devices = row.devices * row.copies
    spans = row.spans(0, row.devices)
    whole_s, weights = float(cuts.time_s[-1]), float(cuts.parameter_bytes[-1])
    sync_s = formula.sync_s(formula.round_s(weights, spans, row.topology.levels), devices)
    memory = problem.rule.total(
        parameter_bytes=weights,
        stash_bytes=float(cuts.stash_bytes[-1]),
        input_bytes=0.0,
        output_bytes=0.0,
        in_flight=1,
        recompute=False,
    )

    def reduced(size: float, replicas: int) -> float:
        return formula.sync_factor * (replicas - 1) / replicas * size

    crossing = sum(2 * float(problem.crossing_bytes[stage.first]) for stage in stages[1:])
    return Alternatives(
        data_parallel_s=float(formula.stage_s(formula.compute_s(whole_s, devices), sync_s)),
        data_parallel_bytes=round(float(memory)),
        model_parallel_s=sum(stage.compute_s * stage.replicas + stage.boundary_s for stage in planned),
        flush_s=bottleneck_s * (_MICROBATCHES + len(stages) - 1) / _MICROBATCHES,
        n_microbatches=_MICROBATCHES,
        network_bytes=round(crossing + sum(reduced(stage.parameter_bytes, stage.replicas) for stage in planned)),
        data_parallel_network_bytes=round(reduced(weights, devices)),
    )


def _notes(problem: Problem, stages: list[PlacedStage]) -> tuple[str, ...]:
    notes, row, unused = [], problem.row, stages[0].first_device
    if unused and row.copies > 1:
        used = row.devices - unused
        notes.append(
            f"uses {used} of every {row.devices} neighbouring devices: start {used} rank{'s' if used > 1 else ''} on "
            "each such group of devices (srun --ntasks-per-node, mpirun --map-by ppr)"
        )
    if problem.cuts.uncut_layers:
        notes.append(
            f"the model branches too much to consider every cut: {problem.cuts.uncut_layers} layers were cut only "
            "between whole branches, or in one fixed order"
        )
    return tuple(notes)
