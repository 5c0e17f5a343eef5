"""Assemble: a solution as a Plan, with every figure a person may ask for."""

from __future__ import annotations

import numpy as np

from pipedream_hpc.planning.memory import MemoryParts
from pipedream_hpc.planning.plan import Alternatives, Plan, StagePlan
from pipedream_hpc.planning.profile import Profile
from pipedream_hpc.planning.solver.problem import Piece, Problem

#: Microbatches for the comparison with schedules that flush.
_MICROBATCHES = 8


def assemble(profile: Profile, problem: Problem, pieces: list[Piece], *, schedule: str, bound_s: float) -> Plan:
    """The Plan of `pieces`, a solution of `problem`.

    Args:
        schedule: name of the schedule that the plan is for.
        bound_s: no plan is faster, in seconds per minibatch.
    """
    stages = tuple(_stage(problem, pieces, index, profile) for index in range(len(pieces)))
    bottleneck_s = problem.price_of(pieces)
    straight = all(stage.replicas == 1 for stage in stages)
    m = problem.rule.microbatches
    flush = schedule in ("1f1b-flush", "gpipe")
    bubble = (m + len(pieces) - 1) / m if flush else 1.0
    return Plan(
        model=profile.model,
        minibatch=profile.minibatch,
        schedule="1f1b-rr" if schedule == "1f1b" and not straight else schedule,
        cost=problem.formula.name,
        stages=stages,
        bottleneck_s=bottleneck_s * bubble,
        single_device_s=profile.total_s,
        bound_s=min(bound_s, bottleneck_s) * bubble,
        microbatches=m,
        optimizer=problem.rule.optimizer,
        memory_bytes=problem.memory_bytes,
        alternatives=_alternatives(problem, pieces, stages, bottleneck_s),
        notes=_notes(problem, pieces),
    )


def _stage(problem: Problem, pieces: list[Piece], index: int, profile: Profile) -> StagePlan:
    cuts, formula, row = problem.cuts, problem.formula, problem.row
    piece = pieces[index]
    layers = [cuts.layers[layer] for layer in cuts.between(piece.first, piece.last)]
    forward_s, backward_s = sum(x.forward_s for x in layers), sum(x.backward_s for x in layers)
    parameter_bytes = sum(x.parameter_bytes for x in layers)
    replicas = piece.replicas * row.copies
    start, stop = piece.first_device, piece.first_device + piece.replicas
    update_s = sum(x.update_s for x in layers)
    compute_s = float(formula.compute_s(forward_s * (1 + piece.recompute) + backward_s + update_s, replicas))
    spans = row.spans(start, stop)
    sync_s = float(formula.sync_s(formula.round_s(float(parameter_bytes), spans, row.topology.levels), replicas))
    boundary_s = 0.0
    if index + 1 < len(pieces):
        sides = [_side_s(problem, pieces[index + 1], output=False)]
        if index > 0 or not formula.first_output_free:
            sides.append(_side_s(problem, piece, output=True))
        boundary_s = max(sides)
    in_flight = int(problem.rule.in_flight(piece.replicas, row.devices - stop))
    crossing = cuts.crossing[piece.last]
    single = cuts.layers[crossing[0]] if len(crossing) == 1 else None
    if index + 1 == len(pieces):
        single = layers[-1]
    parts = problem.rule.parts(
        parameter_bytes=parameter_bytes,
        stash_bytes=sum(x.stash_bytes for x in layers),
        input_bytes=float(problem.crossing_bytes[piece.first]),
        output_bytes=float(problem.crossing_bytes[piece.last]),
        in_flight=in_flight,
        recompute=piece.recompute,
    )
    stash_bytes = float(problem.crossing_bytes[piece.first]) if piece.recompute else sum(x.stash_bytes for x in layers)
    figures = {"compute": compute_s, "sync": sync_s, "boundary": boundary_s}
    return StagePlan(
        layers=tuple(layer.name for layer in layers),
        ranks=_ranks(problem, pieces, start, stop),
        forward_s=forward_s,
        backward_s=backward_s,
        weight_gradient_s=sum(x.weight_gradient_s for x in layers),
        waiting_bytes=sum(x.waiting_bytes for x in layers),
        outside_bytes=sum(x.outside_bytes for x in layers),
        update_s=update_s,
        read_s=profile.read_s if index in (0, len(pieces) - 1) else 0.0,
        beside_s=profile.beside_s,
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
        recompute=piece.recompute,
        stash_bytes=int(stash_bytes),
    )


def _side_s(problem: Problem, piece: Piece, *, output: bool) -> float:
    """What a boundary costs by the stage on one side of it."""
    row, formula = problem.row, problem.formula
    shares = row.shares(piece.first_device, piece.first_device + piece.replicas, output=output)
    crossing = float(problem.crossing_bytes[piece.last if output else piece.first])
    part = 1 / row.copies if formula.routed else 1.0
    return float(formula.boundary_s(crossing, shares, row.topology.levels)) * part


def _ranks(problem: Problem, pieces: list[Piece], start: int, stop: int) -> tuple[int, ...]:
    """Ranks of the devices start to stop - 1 of every row, numbered without those left unused.

    Unused devices are the first of every row. In one row of several nodes the ranks are then counted
    from its end, so that nodes filled one after the other by the launcher have the stages as planned.
    """
    row, unused = problem.row, pieces[0].first_device
    if unused == 0:
        return row.ranks(start, stop)
    used = row.devices - unused
    if row.copies == 1 and len(row.topology.levels) > 1:
        return tuple(row.devices - 1 - device for device in range(start, stop))
    return tuple(copy * used + device - unused for device in range(start, stop) for copy in range(row.copies))


def _alternatives(
    problem: Problem, pieces: list[Piece], stages: tuple[StagePlan, ...], bottleneck_s: float
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

    crossing = sum(2 * float(problem.crossing_bytes[piece.first]) for piece in pieces[1:])
    return Alternatives(
        data_parallel_s=float(formula.stage_s(formula.compute_s(whole_s, devices), sync_s)),
        data_parallel_bytes=round(float(memory)),
        model_parallel_s=sum(stage.compute_s * stage.replicas + stage.boundary_s for stage in stages),
        flush_s=bottleneck_s * (_MICROBATCHES + len(pieces) - 1) / _MICROBATCHES,
        microbatches=_MICROBATCHES,
        network_bytes=round(crossing + sum(reduced(stage.parameter_bytes, stage.replicas) for stage in stages)),
        data_parallel_network_bytes=round(reduced(weights, devices)),
    )


def _notes(problem: Problem, pieces: list[Piece]) -> tuple[str, ...]:
    notes, row, unused = [], problem.row, pieces[0].first_device
    if unused and row.copies > 1:
        used = row.devices - unused
        notes.append(
            f"uses {used} of every {row.devices} devices that stand together: start {used} rank"
            f"{'s' if used > 1 else ''} on each such group of devices (srun --ntasks-per-node, mpirun --map-by ppr)"
        )
    if problem.cuts.whole:
        notes.append(
            f"the model branches too much to weigh every cut: {problem.cuts.whole} layers in such places were cut "
            "only between whole branches, or in one order"
        )
    return tuple(notes)
