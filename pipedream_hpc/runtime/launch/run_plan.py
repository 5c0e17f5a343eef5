"""The plan as it is run: a plan with the schedule, the microbatches, and the memory of this run.

::

    what the user gave ──► planning.resolve ──► Plan ──┐
    ScheduleConfig, TrainConfig ───────────────────────┴──► the plan as it is run ──► Deployment
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

from pipedream_hpc.config import ScheduleConfig, TrainConfig
from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.planning.memory import MemoryParts, MemoryRule
from pipedream_hpc.planning.plan import Edge, Plan, StagePlan
from pipedream_hpc.planning.resolve import PlanRequest
from pipedream_hpc.schedule import registry
from pipedream_hpc.schedule.actions import Layout, Schedule, ScheduleError
from pipedream_hpc.schedule.interleaved import folded
from pipedream_hpc.schedule.replay import channels
from pipedream_hpc.schedule.text import format_schedule, read_schedule
from pipedream_hpc.schedule.written import Written


@dataclass(frozen=True)
class RunSchedule:
    """The schedule of a run, for any number of minibatches.

    Attributes:
        name: in the registry, or the file's name.
        n_microbatches: microbatches per minibatch.
        chunks: stages per rank.
        gradient_accumulation_steps: minibatches per replica that an optimizer step learns from.
        all_reduce_grad_norm: all stages exchange their gradients' norm before a step.
        written: read from a file, instead of the registry's.
    """

    name: str
    n_microbatches: int = 1
    chunks: int = 1
    gradient_accumulation_steps: int = 1
    all_reduce_grad_norm: bool = False
    written: Written | None = None

    @property
    def cuts_minibatches(self) -> bool:
        """Whether stages run microbatches that are parts of a minibatch."""
        return registry.cuts_minibatches(self.name) if self.written is None else self.written.n_microbatches > 1

    @property
    def fewest_minibatches(self) -> int:
        """The fewest minibatches for which its schedule shows what stages need: 0, or those of a written schedule."""
        return 0 if self.written is None else self.written.minibatches

    @property
    def fingerprint(self) -> str:
        """A checksum of the written schedule, the same in every process; empty for one of the registry."""
        return "" if self.written is None else f"{zlib.crc32(format_schedule(self.written).encode()):08x}"

    def layout(self, plan: Plan) -> Layout:
        """Return the ranks of every stage of `plan`.

        Raises:
            ScheduleError: its stages cannot be dealt out in chunks.
        """
        if self.chunks > 1 and self.name != "interleaved":
            raise ScheduleError(f"{self.name} has one stage per rank, not {self.chunks} chunks: use interleaved")
        return folded(plan.layout, self.chunks) if self.name == "interleaved" else plan.layout

    def of(
        self, layout: Layout, minibatches: int, edges: tuple[Edge, ...] | None = None
    ) -> registry.AnySchedule | Written:
        """Return the schedule of so many minibatches.

        Raises:
            ScheduleError: it does not go with the layout or with this number of minibatches.
        """
        if self.written is not None:
            return self.written.for_minibatches(minibatches)
        return registry.make(
            self.name,
            layout,
            minibatches * self.n_microbatches,
            n_microbatches=self.n_microbatches,
            edges=edges,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            all_reduce_grad_norm=self.all_reduce_grad_norm,
        )


def run_schedule(config: ScheduleConfig, train_config: TrainConfig, request: PlanRequest) -> RunSchedule:
    """Return the schedule that the user asked for, or else the plan's.

    Raises:
        PipedreamError: there is no such schedule or file, or the schedule does not cut minibatches.
    """
    planned = request if isinstance(request, Plan) else None
    name = config.name or (planned.schedule if planned is not None else "1f1b")
    steps, exchange = train_config.gradient_accumulation_steps, train_config.needs_global_grad_norm
    if name not in registry.NAMES and Path(name).is_file():
        return _written(name, config, steps, exchange)
    if name not in registry.NAMES:
        raise ScheduleError(
            f"there is no schedule '{name}': choose from {', '.join(registry.TRAINING_NAMES)}, or give the file of a "
            "written one"
        )
    if not registry.cuts_minibatches(name):
        if config.n_microbatches not in (None, 1):
            registry.make(name, ((0,),), 0, n_microbatches=config.n_microbatches)  # raises: it sends whole minibatches
        return RunSchedule(name, 1, config.chunks, steps, exchange)
    n_microbatches = config.n_microbatches
    if n_microbatches is None:
        n_microbatches = planned.n_microbatches if planned is not None and name == planned.schedule else 1
    return RunSchedule(name, n_microbatches, config.chunks, steps, exchange)


def _written(name: str, config: ScheduleConfig, steps: int, exchange: bool) -> RunSchedule:
    written = read_schedule(name)
    if config.n_microbatches not in (None, written.n_microbatches):
        raise ScheduleError(
            f"{name} is for {written.n_microbatches} microbatches per minibatch, not {config.n_microbatches}: "
            "leave n_microbatches out"
        )
    if config.chunks != 1:
        raise ScheduleError(f"{name} says itself which stages a rank holds: leave chunks out")
    if steps != 1:
        raise ScheduleError(
            f"{name} says itself how many minibatches a step learns from: leave gradient_accumulation_steps out"
        )
    if exchange and not written.all_reduce_grad_norm:
        raise ScheduleError(
            f"{name} has no NORM action, which fp16 and clipping over the model need: add one before every step, or "
            "use bf16 and clip_grad_over='stage'"
        )
    return RunSchedule(name, written.n_microbatches, config.chunks, 1, written.all_reduce_grad_norm, written)


def plan_as_run(plan: Plan, name: str, schedule: RunSchedule, recompute: bool | None) -> Plan:
    """Return `plan` with the schedule, microbatches in flight and memory of the run.

    Args:
        plan: as planned.
        name: the plan's name in messages.
        schedule: the run's.
        recompute: run forwards again; None for what the plan says of each stage.

    Raises:
        PipedreamError: the plan's figures do not belong to its own schedule.
        ScheduleError: the schedule does not go with the plan's layout or microbatches.
    """
    if schedule.name == plan.schedule:
        # As it was planned: the run may cut minibatches into another number of microbatches.
        own = RunSchedule(plan.schedule, plan.n_microbatches, schedule.chunks)
        _check_in_flight(plan, name, own.of(own.layout(plan), 0))
    run = schedule.of(schedule.layout(plan), schedule.fewest_minibatches)
    stages = (_as_run(stage, index, plan, run, schedule, recompute) for index, stage in enumerate(plan.stages))
    return dataclasses.replace(
        plan, schedule=schedule.name, n_microbatches=schedule.n_microbatches, stages=tuple(stages)
    )


def _as_run(
    stage: StagePlan, index: int, planned: Plan, run: Schedule, schedule: RunSchedule, recompute: bool | None
) -> StagePlan:
    """Return a planned stage with what it has in flight in this run, and its memory.

    Args:
        stage: as planned.
        index: its number.
        planned: the whole plan.
        run: the run's schedule.
        schedule: the same, for any number of minibatches.
        recompute: run forwards again; None as planned.
    """
    again = stage.recompute if recompute is None else recompute
    in_flight, was = run.in_flight(index), stage.memory
    if was is None:
        return dataclasses.replace(stage, in_flight=in_flight, recompute=again)
    sent = stage.output_bytes if index + 1 < len(planned.stages) else 0
    received = max(0, was.slots * planned.n_microbatches - 2 * sent) / (stage.in_flight + 1)
    parts = MemoryRule(planned.optimizer, run.versions(index), schedule.n_microbatches).parts(
        parameter_bytes=stage.parameter_bytes,
        stash_bytes=was.activations * planned.n_microbatches / (1 if stage.recompute else stage.in_flight),
        input_bytes=received * _peers(run.layout, index, index - 1),
        output_bytes=sent * _peers(run.layout, index, index + 1),
        in_flight=in_flight,
        recompute=again,
        lag=run.lag(index),
        waiting=run.waiting(index),
        waiting_bytes=stage.waiting_bytes,
        unsplit_bytes=stage.unsplit_bytes,
    )
    parts["weights"] = run.versions(index) * stage.parameter_bytes  # all slabs, used or not
    memory = MemoryParts(**{part: math.ceil(size) for part, size in parts.items()})
    return dataclasses.replace(stage, in_flight=in_flight, memory=memory, recompute=again)


def _peers(layout: Layout, stage: int, peer_stage: int) -> int:
    """Return how many ranks of `peer_stage` a rank of `stage` has a channel with."""
    if not 0 <= peer_stage < len(layout):
        return 0
    return len(channels(layout, stage, peer_stage)) // len(layout[stage])


def _check_in_flight(plan: Plan, name: str, schedule: Schedule) -> None:
    for index, stage in enumerate(plan.stages):
        if stage.in_flight != schedule.in_flight(index):
            raise PipedreamError(
                f"{name}: field 'stages[{index}].in_flight' is {stage.in_flight}, but {plan.schedule} on {plan.ranks} "
                f"ranks keeps {schedule.in_flight(index)} in flight there: make the plan anew with pipedream partition"
            )
