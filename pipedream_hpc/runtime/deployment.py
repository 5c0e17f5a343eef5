"""Deployment: a plan held against the model and the ranks it is to run on."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipedream_hpc.cluster.world import World
from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.files import load
from pipedream_hpc.model.cut import Cut
from pipedream_hpc.model.graph import LayerGraph
from pipedream_hpc.model.profiler import count
from pipedream_hpc.planning.even import even, replicas_of
from pipedream_hpc.planning.memory import MemoryParts, MemoryRule
from pipedream_hpc.planning.plan import COUNTED, Plan, StagePlan
from pipedream_hpc.planning.solver import Request, solve
from pipedream_hpc.planning.topology import Level, Topology
from pipedream_hpc.runtime.transport import Boundary
from pipedream_hpc.schedule import kinds
from pipedream_hpc.schedule.actions import Layout, Links, Schedule
from pipedream_hpc.schedule.interleaved import folded


@dataclass(frozen=True)
class Manner:
    """In which manner a plan is run.

    Attributes:
        schedule: one of schedule.kinds.NAMES; None for the plan's.
        microbatches: to a minibatch; None for the plan's.
        chunks: stages per rank, for the interleaved schedule.
        accumulate: minibatches per replica to an update.
        agree: whether all stages agree about gradients before they update.
        split: whether backwards are split.
    """

    schedule: str | None = None
    microbatches: int | None = None
    chunks: int = 1
    accumulate: int = 1
    agree: bool = False
    split: bool = False

    def pieces(self, wanted: Plan | tuple[int, ...] | int) -> int:
        """Units that a minibatch is cut into."""
        planned = wanted if isinstance(wanted, Plan) else None
        schedule = self.schedule or (planned.schedule if planned else "1f1b")
        if not kinds.takes_microbatches(schedule):
            if self.microbatches not in (None, 1):
                kinds.make(schedule, ((0,),), 0, microbatches=self.microbatches)  # says what is wrong
            return 1
        if self.microbatches is not None:
            return self.microbatches
        return planned.microbatches if planned and self.schedule is None else 1


def given(plan: Plan | str | Path | int) -> Plan | tuple[int, ...] | int:
    """What a user asks for: a plan (read, if it is a file), the replicas of even stages, or their number."""
    if isinstance(plan, str) and (replicas := replicas_of(plan)) is not None:
        return replicas
    if isinstance(plan, str) and re.fullmatch(r"[\dxX,:-]+", plan) and not Path(plan).exists():
        raise PipedreamError(
            f"plan '{plan}' is neither a file, nor replicas of stages such as 2-1-1, nor a number of them"
        )
    return load(Plan, plan) if isinstance(plan, str | Path) else plan


def resolve(wanted: Plan | tuple[int, ...] | int, name: str, graph: LayerGraph, manner: Manner) -> Plan:
    """The plan itself, or an even cut into stages, as it is run in this manner.

    Raises:
        PipedreamError: the plan's figures are of another schedule than its own.
        ScheduleError: the schedule does not go with its layout or microbatches.
    """
    if isinstance(wanted, int):
        flat = Topology((Level("node", wanted, 0.0, 1e9),), device="counted")
        plan = solve(count(graph), flat, Request(straight=True))
    else:
        plan = wanted if isinstance(wanted, Plan) else even(count(graph), wanted)
    if not isinstance(wanted, Plan):
        plan = dataclasses.replace(plan, notes=(*plan.notes, COUNTED))
    if manner.schedule is None:
        _check_in_flight(plan, name, _schedule(plan, plan.schedule, plan.microbatches, manner, split=False))
    kind, pieces = manner.schedule or plan.schedule, manner.pieces(wanted)
    schedule = _schedule(plan, kind, pieces, manner, split=manner.split)
    return dataclasses.replace(
        plan,
        schedule=kind,
        microbatches=pieces,
        stages=tuple(_as_run(stage, index, plan, schedule, pieces) for index, stage in enumerate(plan.stages)),
    )


def _schedule(plan: Plan, kind: str, pieces: int, manner: Manner, *, split: bool) -> kinds.AnySchedule:
    """Of no minibatches: what it says of its stages."""
    return kinds.make(
        kind, _layout(plan, kind, manner), 0, microbatches=pieces, accumulate=manner.accumulate, split=split
    )


def _layout(plan: Plan, kind: str, manner: Manner) -> Layout:
    return folded(plan.layout, manner.chunks) if kind == "interleaved" else plan.layout


def _as_run(stage: StagePlan, index: int, planned: Plan, schedule: kinds.AnySchedule, pieces: int) -> StagePlan:
    """A stage of a plan that is run in another way than it was planned for: what is in flight then, and its memory.

    Args:
        stage: as planned.
        index: its number.
        planned: the plan it is of.
        schedule: that is run.
        pieces: that minibatches are cut into.
    """
    units, lag, was = schedule.in_flight(index), schedule.lag(index), stage.memory
    if was is None:
        return dataclasses.replace(stage, in_flight=units)
    sent = stage.output_bytes if index + 1 < len(planned.stages) else 0
    parts = MemoryRule(planned.optimizer, schedule.versions(index), pieces).parts(
        parameter_bytes=stage.parameter_bytes,
        stash_bytes=was.activations * planned.microbatches / (1 if stage.recompute else stage.in_flight),
        input_bytes=max(0, was.slots * planned.microbatches - 2 * sent) / (stage.in_flight + 1),
        output_bytes=sent,
        in_flight=units,
        recompute=stage.recompute,
        lag=lag,
        waiting_bytes=stage.waiting_bytes if schedule.splits(index) else 0,
    )
    parts["weights"] = schedule.versions(index) * stage.parameter_bytes  # as many slabs, used or not
    memory = MemoryParts(**{part: math.ceil(size) for part, size in parts.items()})
    return dataclasses.replace(stage, in_flight=units, memory=memory)


@dataclass(frozen=True)
class Deployment:
    """What every rank has to know.

    Attributes:
        plan: the plan, with the schedule and number of microbatches that are to be run.
        name: what it is called in messages.
        graph: the captured model.
        cut: the same in stages.
        layout: ranks of every stage.
        manner: in which manner it is run.
    """

    plan: Plan
    name: str
    graph: LayerGraph
    cut: Cut
    layout: Layout
    manner: Manner

    @property
    def pieces(self) -> int:
        """Units that a minibatch is cut into."""
        return self.plan.microbatches

    @property
    def shared(self) -> int:
        """Minibatches among which the losses of an update are shared out.

        1 where units are whole minibatches: there every stage averages over the units of its own rounds.
        """
        return self.manner.accumulate if self.cuts_minibatches else 1

    @property
    def cuts_minibatches(self) -> bool:
        """Whether units are microbatches."""
        return kinds.takes_microbatches(self.plan.schedule)

    @property
    def links(self) -> Links:
        """Stages that talk to each other."""
        return tuple(sorted(self.cut.links))

    @property
    def lines(self) -> dict[tuple[int, int], tuple[Boundary, ...]]:
        """What travels from which stage to which."""
        return {
            (source, target): tuple(
                Boundary(value.layer or value.name, source, value.shape, value.dtype, value.needs_gradient)
                for value in values
            )
            for (source, target), values in self.cut.links.items()
        }

    @property
    def ranks(self) -> int:
        """Ranks it runs on."""
        return len({rank for ranks in self.layout for rank in ranks})

    def training(self, minibatches: int) -> kinds.AnySchedule:
        """The schedule of an epoch.

        Raises:
            ScheduleError: the plan's schedule does not go with its layout or microbatches.
        """
        return kinds.make(
            self.plan.schedule,
            self.layout,
            minibatches * self.pieces,
            microbatches=self.plan.microbatches,
            links=self.links,
            accumulate=self.manner.accumulate,
            agree=self.manner.agree,
            split=self.manner.split,
        )

    def evaluation(self, minibatches: int) -> kinds.AnySchedule:
        """The schedule of an evaluation."""
        return kinds.make("forward-only", self.layout, minibatches * self.pieces, links=self.links)


def deploy(plan: Plan, name: str, graph: LayerGraph, manner: Manner, world: World) -> Deployment:
    """Hold a plan against model and ranks.

    Raises:
        PipedreamError: the plan's layers are not the model's, the workers cannot run it, or not on the
            ranks that were started.
    """
    if plan.schedule == "forward-only":
        raise PipedreamError("the forward-only schedule trains nothing: choose another, such as 1f1b")
    if manner.chunks > 1 and plan.schedule != "interleaved":
        raise PipedreamError(f"{plan.schedule} has one stage per rank, not {manner.chunks} chunks: use interleaved")
    stages = _layers_of(plan, graph, name)
    deployment = Deployment(plan, name, graph, Cut(graph, stages), _layout(plan, plan.schedule, manner), manner)
    deployment.training(0)  # says what is wrong
    if world.size not in (1, deployment.ranks):
        raise PipedreamError(
            f"{name} is for {deployment.ranks} ranks, but {world.size} were started: "
            f"start {deployment.ranks} (mpirun -n {deployment.ranks} ...) or plan for {world.size} "
            f"(pipedream partition --devices {world.size})"
        )
    return deployment


def _layers_of(plan: Plan, graph: LayerGraph, name: str) -> list[list[int]]:
    """Layer numbers of every stage."""
    remedy = "profile and partition this model again (pipedream profile, pipedream partition)"
    wrong = f"{name} was made for another model"
    number = {layer.name: index for index, layer in enumerate(graph.layers)}
    planned = [layer for stage in plan.stages for layer in stage.layers]
    for index, stage in enumerate(plan.stages):
        for layer in stage.layers:
            if layer not in number:
                raise PipedreamError(f"{wrong}: layer '{layer}' of stage {index} is not in the model: {remedy}")
    missing = [layer.name for layer in graph.layers if layer.name not in set(planned)]
    if missing or len(planned) != len(graph.layers):
        which = f", '{missing[0]}' among those it lacks" if missing else ""
        raise PipedreamError(f"{wrong}: it has {len(planned)} layers, the model {len(graph.layers)}{which}: {remedy}")
    stages = [sorted(number[layer] for layer in stage.layers) for stage in plan.stages]
    for index, (stage, layers) in enumerate(zip(plan.stages, stages, strict=True)):
        _check_stage(index, stage, graph, layers, wrong, remedy)
    return stages


def _check_stage(
    index: int,
    stage: StagePlan,
    graph: LayerGraph,
    layers: Sequence[int],
    wrong: str,
    remedy: str,
) -> None:
    parameter_bytes = sum(graph.layers[layer].parameter_bytes for layer in layers)
    if parameter_bytes != stage.parameter_bytes:
        raise PipedreamError(
            f"{wrong}: stage {index} ('{stage.layers[0]}' to '{stage.layers[-1]}') has {stage.parameter_bytes} bytes "
            f"of parameters in the plan and {parameter_bytes} in the model: {remedy}"
        )
    last = graph.layers[layers[-1]]
    if stage.output_shape is None or last.output_shape is None or stage.layers[-1] != last.name:
        return
    shape, dtype = last.output_shape, str(last.output_dtype).removeprefix("torch.")
    if (stage.output_shape[1:], stage.output_dtype) != (shape[1:], dtype):
        raise PipedreamError(
            f"{wrong}: layer '{stage.layers[-1]}' (stage {index}) puts out {stage.output_dtype} {stage.output_shape} "
            f"in the plan and {dtype} {shape} in the model: {remedy}, with the --precision of the training"
        )


def _check_in_flight(plan: Plan, name: str, schedule: Schedule) -> None:
    for index, stage in enumerate(plan.stages):
        if stage.in_flight != schedule.in_flight(index):
            raise PipedreamError(
                f"{name}: field 'stages[{index}].in_flight' is {stage.in_flight}, but {plan.schedule} on {plan.ranks} "
                f"ranks keeps {schedule.in_flight(index)} minibatches in flight there: make the plan anew with "
                "pipedream partition"
            )
