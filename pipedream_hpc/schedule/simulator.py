"""Simulator: predict the Trace of a plan before anything runs."""

from __future__ import annotations

from dataclasses import dataclass

from pipedream_hpc.planning.plan import Plan
from pipedream_hpc.planning.topology import Topology
from pipedream_hpc.schedule.actions import Backward, Forward, Reduce, Schedule, Send, Update
from pipedream_hpc.schedule.play import play
from pipedream_hpc.schedule.trace import Kind, Span, Trace


@dataclass(frozen=True)
class PlannedDurations:
    """Durations as the plan has them: measured compute, α + n/β per message.

    A reduction of n bytes over R replicas is a ring: 2 (R - 1) messages of n / R bytes.
    """

    plan: Plan
    latency_s: float
    bandwidth: float

    def compute(self, rank: int, stage: int, action: Forward | Backward | Update) -> float:
        if isinstance(action, Forward):
            return self.plan.stages[stage].forward_s
        return self.plan.stages[stage].backward_s if isinstance(action, Backward) else 0.0

    def transfer(self, source: int, target: int, stage: int, action: Send) -> float:
        # A gradient has the size of the activation that crossed the same cut.
        cut = stage if action.payload == "activation" else stage - 1
        return self.latency_s + self.plan.stages[cut].output_bytes / self.bandwidth

    def reduce(self, stage: int, action: Reduce) -> float:
        replicas, size = self.plan.stages[stage].replicas, self.plan.stages[stage].parameter_bytes
        return 2 * (replicas - 1) * (self.latency_s + size / replicas / self.bandwidth)


def simulate(schedule: Schedule, plan: Plan, topology: Topology) -> Trace:
    """The Trace that `schedule` should leave under `plan` on `topology`.

    Links are taken to be those of the topology's slowest level, one per pair of ranks and
    direction; sends cost the sending rank no time.
    """
    spans = []
    for step in play(schedule, PlannedDurations(plan, topology.latency_s, topology.bandwidth)):
        kind: Kind = type(step.action).__name__.lower()  # type: ignore[assignment]
        minibatch, version = getattr(step.action, "minibatch", -1), getattr(step.action, "version", -1)
        spans.append(Span(step.rank, kind, minibatch, version, step.start_s, step.end_s))
    return Trace("simulated", schedule.layout, schedule.minibatches, tuple(spans))
