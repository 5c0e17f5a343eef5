"""Simulator: predict the Trace of a schedule before anything runs.

Compute takes what the plan measured, times what a straggler is slower by. Messages cross links of the
α-β model, which ranks share as they share network adapters. With two nodes of two ranks::

    rank 0 ═╗ port of the rank                       A message crosses the innermost level that holds
            ╠═ level 0, the node ═╗                  both ranks. It needs the sender's outgoing port and
    rank 1 ═╝                     ║ port of the node the receiver's incoming port: a rank's own at
                                  ╠═ level 1         level 0, further out that of all ranks below. A
    rank 2 ═╗                     ║                  port carries one message at a time, for bytes / β
            ╠═ level 0, the node ═╝                  seconds; it arrives α later. Ports are full duplex
    rank 3 ═╝                                        and serve in order of time.

An all-reduce goes level by level in rings, 2 (n_k - 1) steps of α_k + bytes / (n_k β_k) where n_k
components of a component of level k take part; it does not wait for ports.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from pipedream_hpc.garbage import no_collection
from pipedream_hpc.planning.plan import Plan
from pipedream_hpc.planning.topology import Topology
from pipedream_hpc.schedule.actions import (
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    OptimizerStep,
    ReduceGradients,
    Schedule,
    ScheduleError,
)
from pipedream_hpc.schedule.memory import Memory, memory_over_time
from pipedream_hpc.schedule.replay import Compute, NicPort, Transfer, replay
from pipedream_hpc.schedule.trace import KIND_OF, Span, Trace


@dataclass(frozen=True)
class Simulation:
    """The predicted run of a schedule.

    Attributes:
        trace: predicted times of all actions.
        parameter_bytes: bytes of one weight version, by stage.
        stash_bytes: bytes that a microbatch in flight holds, by stage.
        waiting_bytes: bytes that it holds in addition between the two parts of its backward, by stage.
    """

    trace: Trace
    parameter_bytes: tuple[int, ...]
    stash_bytes: tuple[int, ...]
    waiting_bytes: tuple[int, ...]

    @cached_property
    def memory(self) -> Memory:
        """Bytes of weights and activations on every rank over time."""
        return memory_over_time(self.trace, self.parameter_bytes, self.stash_bytes, self.waiting_bytes)


class PlanCosts:
    """The cost model of a plan on a topology; times and bytes of the plan are divided by `n_microbatches`."""

    def __init__(
        self,
        schedule: Schedule,
        plan: Plan,
        topology: Topology,
        slow: Mapping[int, float],
        n_microbatches: int,
    ) -> None:
        self._layout, self._topology, self._slow = schedule.layout, topology, slow
        backwards = [(stage.backward_s + stage.forward_s * stage.recompute) / n_microbatches for stage in plan.stages]
        weights = [stage.weight_gradient_s / n_microbatches for stage in plan.stages]
        self._times: dict[type[Compute], list[float]] = {
            Forward: [(stage.forward_s + stage.read_s) / n_microbatches + stage.overhead_s for stage in plan.stages],
            Backward: backwards,
            BackwardInput: [backward - weight for backward, weight in zip(backwards, weights, strict=True)],
            BackwardWeight: weights,
            OptimizerStep: [stage.update_s for stage in plan.stages],
        }
        self._sent = [stage.output_bytes / n_microbatches for stage in plan.stages]
        self._parameters = [stage.parameter_bytes for stage in plan.stages]
        self._ports: dict[tuple[str, int, int], NicPort] = {}
        self._reduce_s: dict[int, float] = {}

    def compute(self, rank: int, action: Compute) -> float:
        """Return the plan's time of the stage; a straggler takes `slow` times as long."""
        seconds = self._times[type(action)][action.stage]
        return seconds * self._slow[rank] if rank in self._slow else seconds

    def transfer(self, source: int, target: int, boundary: int) -> Transfer:
        """Return ports and times of the level between the two; a gradient is as large as its activation."""
        if source == target:
            return Transfer((), 0.0, 0.0)
        index = self._topology.level_between(source, target)
        below = 1
        for inner in self._topology.levels[:index]:
            below *= inner.count
        level = self._topology.levels[index]
        ports = self._port("out", index, source // below), self._port("in", index, target // below)
        return Transfer(ports, self._sent[boundary] / level.bandwidth, level.latency_s)

    def reduce(self, action: ReduceGradients) -> float:
        """Return the time of rings within the components of every level that the stage's ranks belong to."""
        if action.stage not in self._reduce_s:
            self._reduce_s[action.stage] = self._ring_s(self._layout[action.stage], self._parameters[action.stage])
        return self._reduce_s[action.stage]

    def _port(self, direction: str, level: int, component: int) -> NicPort:
        return self._ports.setdefault((direction, level, component), NicPort())

    def _ring_s(self, ranks: Sequence[int], size: int) -> float:
        total_s, below = 0.0, 1
        for level in self._topology.levels:
            used: dict[int, set[int]] = {}
            for rank in ranks:
                used.setdefault(rank // (below * level.count), set()).add(rank // below)
            width = max(map(len, used.values()))
            total_s += 2 * (width - 1) * (level.latency_s + size / width / level.bandwidth)
            below *= level.count
        return total_s


def simulate(
    schedule: Schedule,
    plan: Plan,
    topology: Topology,
    *,
    slow: Mapping[int, float] | None = None,
    n_microbatches: int = 1,
    stash_bytes: Sequence[int] | None = None,
) -> Simulation:
    """Predict the run of `schedule` with the stages of `plan` on `topology`.

    Sends cost the sending rank no time beyond waiting for a free slot.

    Args:
        schedule: a schedule with as many stages as the plan.
        plan: seconds and bytes per minibatch.
        topology: links between ranks, which are numbered node by node.
        slow: how many times as long a rank takes to compute; 1 where not given.
        n_microbatches: microbatches per minibatch, which share its seconds and bytes evenly.
        stash_bytes: bytes that a whole minibatch in flight holds, by stage, instead of the plan's; where neither
            is known, the stage's output counts.

    Raises:
        ScheduleError: the schedule deadlocks or has another number of stages than the plan, the topology is too
            small, or a straggler is not one of the ranks.
    """
    ranks = {rank for members in schedule.layout for rank in members}
    if len(schedule.layout) != len(plan.stages):
        raise ScheduleError(f"the schedule has {len(schedule.layout)} stages, but the plan has {len(plan.stages)}")
    if max(ranks) >= topology.devices:
        raise ScheduleError(
            f"rank {max(ranks)} has no device: the topology has {topology.devices} devices; "
            "use a plan for that many, or the topology of more devices"
        )
    for rank, times in (slow or {}).items():
        if rank not in ranks or not 0 < times <= 1e9:
            raise ScheduleError(
                f"rank {rank} cannot be {times:g} times as slow: name ranks 0 to {max(ranks)}, times from 0 to 1e9"
            )
    costs = PlanCosts(schedule, plan, topology, slow or {}, n_microbatches)
    with no_collection():
        spans = [
            Span(
                rank,
                action.stage,
                KIND_OF[type(action)],
                getattr(action, "microbatch", -1),
                getattr(action, "version", -1),
                start_s,
                end_s,
            )
            for rank, action, start_s, end_s in replay(schedule, costs)
        ]
    held = stash_bytes or [stage.stash_bytes or stage.output_bytes for stage in plan.stages]
    return Simulation(
        Trace("simulated", schedule.layout, schedule.total_microbatches, tuple(spans), n_microbatches),
        tuple(stage.parameter_bytes for stage in plan.stages),
        tuple(size // n_microbatches for size in held),
        tuple(stage.waiting_bytes // n_microbatches for stage in plan.stages),
    )
