"""Search: pipelines for problems that are too large for exact.py, by bisection on the time per minibatch.

For a time τ, the inner loop finds the fewest devices that the layers after each cut need if no stage or
boundary may take longer than τ. A stage that ends on a given device needs at least

    m  >=  compute / τ,   sync(m) / τ,   m boundary(m) / τ,   later devices / (in flight that fit - 1)

replicas. No right-hand side decreases with m, so fixed-point iteration on m yields the fewest replicas.
One pass over the cuts from the end to the front yields the fewest devices for τ: O(N²) numbers instead
of O(N² M²).

On a single level of links the result is exact if devices may be left over, or if some stage can use
the remaining ones. Otherwise the result is a plan and a lower bound on the time of any plan.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipedream_hpc.core import load_solver
from pipedream_hpc.planning.solver.placement import DeviceRow
from pipedream_hpc.planning.solver.problem import Floats, PlacedStage, Problem
from pipedream_hpc.planning.topology import Level, Topology

#: Bisection ends when the feasible and the infeasible time are relatively this close.
_RELATIVE = 1e-9
#: Bisection also ends at this absolute distance in seconds: layers may take no time at all.
_NO_TIME_S = 1e-15
#: Number of cuts of a first, coarse search.
_COARSE = 100


@dataclass(frozen=True)
class Found:
    """A pipeline, the time of its slowest stage or boundary, and a lower bound for all pipelines, in seconds."""

    stages: list[PlacedStage]
    time_s: float
    bound_s: float


def pipeline(problem: Problem, below: float = np.inf) -> Found | None:
    """Return a fast pipeline and a lower bound; None if the search finds none faster than `below` seconds."""
    possible = _bisect(problem, below)
    if possible is None:
        return None
    stages, least_s = possible
    if not problem.fewer:
        spread = _on_all_devices(problem, stages)
        if spread is None:
            return None
        stages = spread
    time_s = problem.bottleneck_s(stages)
    if len(problem.row.topology.levels) > 1:
        least_s = min(_relaxed_s(problem), time_s)
    return Found(stages, time_s, min(least_s, time_s))


def _bisect(
    problem: Problem, below: float = np.inf, relative: float = _RELATIVE
) -> tuple[list[PlacedStage], float] | None:
    """Return the fastest pipeline on any number of devices, and a time that no pipeline reaches.

    Returns None if there is no pipeline faster than `below`.
    """
    coarse = problem.thinned(_COARSE)
    if len(coarse.cuts) < len(problem.cuts) and (rough := _bisect(coarse, below, 1e-3)) is not None:
        below = min(below, coarse.bottleneck_s(rough[0]) * (1 + 2 * _RELATIVE))
    reach = _Reach(problem)
    low = float(problem.cuts.time_s[-1]) / (problem.row.devices * problem.row.copies)
    stages = reach.within(min(below * (1 - _RELATIVE), reach.slowest_s))
    if stages is None:
        return None
    high = problem.bottleneck_s(stages)
    # The optimum is usually close to an even division of the work: search there first.
    step = max(1e-3 * (low or high), _NO_TIME_S)
    while high - low > max(relative * high, _NO_TIME_S):
        middle = min(low + step, (low + high) / 2)
        better = reach.within(middle)
        if better is None:
            low, step = middle, 4 * step
            continue
        stages, high, step = better, problem.bottleneck_s(better), np.inf
        assert high <= middle * (1 + _RELATIVE), "the inner loop and Problem.bottleneck_s disagree"
        # The time of a plan found is often the optimum: then no plan is slightly faster.
        if relative == _RELATIVE and reach.within(high * (1 - relative)) is None:
            return stages, high * (1 - relative)
    return stages, low


class _Reach:
    """Finds pipelines within a time limit: prepares the tables of the C++ inner loop and converts its results."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        row, levels, formula = problem.row, problem.row.topology.levels, problem.formula
        crossing = problem.crossing_bytes
        # Stages whose ends differ by a whole number of components use the same links.
        period = math.prod([level.count for level in levels[:-1]]) if row.copies == 1 else row.devices
        period = min(period, row.devices)
        replicas = np.arange(1, row.devices + 1)
        ends = row.devices - (row.devices - 1 - np.arange(period)) % period
        shape = period, row.devices
        links = problem.link_use(ends[:, None] - replicas, np.broadcast_to(ends[:, None], shape))
        # No stage follows the row's last device: take the output shares one period earlier.
        inner = np.where((ends == row.devices) & (period < row.devices), ends - period, ends)
        out_of = row.shares(inner[:, None] - replicas, np.broadcast_to(inner[:, None], shape), output=True)
        part = 1 / row.copies if formula.routed else 1.0

        def charge(shares: Floats, level: Level) -> Floats:
            # The formula is linear in the crossing bytes, so the time of one byte over a unit link is the share.
            bare = Level(level.name, 1, 0.0, 2.0)
            return np.asarray(formula.boundary_s(1.0, [shares], [bare]), float) * part

        self._reach = load_solver().MinDevices(
            round_s=links.round_s,
            round_s_per_byte=links.round_s_per_byte,
            parameter_bytes=problem.cuts.parameter_bytes,
            copies=float(row.copies),
            straight=problem.straight,
            overlap=formula.overlap,
            first_output_free=formula.first_output_free,
            levels=[
                (charge(entering, level), charge(leaving, level), formula.boundary_s(crossing, [1.0], [level]))
                for level, entering, leaving in zip(levels, links.input_shares, out_of, strict=True)
            ],
            modes=self._modes(),
            memory_bytes=float(problem.memory_bytes or 0),
            begins=self._begins(),
        )
        moved = 4 * (float(problem.cuts.parameter_bytes[-1]) + float(crossing.max()))
        sync_s = sum(level.count * level.latency_s + moved / level.bandwidth for level in levels)
        reduce_s = sum((level.reduce_latency_s or 0.0) + moved / (level.reduce_bandwidth or np.inf) for level in levels)
        #: Upper bound on the time of any stage or boundary, in seconds.
        self.slowest_s = 2 * float(problem.cuts.time_s[-1]) + 4 * (sync_s + reduce_s) + 1e-9

    def within(self, time_s: float) -> list[PlacedStage] | None:
        """Return the pipeline on the fewest devices whose stages and boundaries take at most `time_s`, or None."""
        found = self._reach.within(time_s)
        if found is None:
            return None
        problem, stages = self._problem, []
        device, first = problem.row.devices - sum(replicas for _, replicas in found), 0
        for last, replicas in found:
            _, recompute = problem.stage_times(first, np.array([last]), device, replicas)
            stages.append(PlacedStage(first, last, device, replicas, bool(recompute[0, -1])))
            device, first = device + replicas, last
        return stages

    def _begins(self) -> list[list[int]]:
        begins: list[list[int]] = [[] for _ in range(len(self._problem.cuts))]
        for first in range(len(begins) - 1):
            for last in self._problem.ends(first).tolist():
                begins[last].append(first)
        return begins

    def _modes(self) -> list[tuple[Floats, list[tuple[Floats, Floats, Floats]]]]:
        """Return compute and memory tables of every allowed mode: without recompute, with it, or both."""
        problem, cuts = self._problem, self._problem.cuts
        allowed = {"never": (False,), "always": (True,), "auto": (False, True)}[problem.recompute]

        def part(
            in_flight: int, recompute: bool, *, layers: float = 0.0, entering: Any = 0.0, leaving: Any = 0.0
        ) -> Floats:
            sizes = problem.rule.total(
                parameter_bytes=layers * cuts.parameter_bytes,
                stash_bytes=layers * cuts.stash_bytes,
                input_bytes=entering,
                output_bytes=leaving,
                in_flight=in_flight,
                recompute=recompute,
            )
            return np.asarray(sizes, float)

        modes = []
        for recompute in allowed:
            memory = [
                (
                    part(n, recompute, layers=1.0),
                    part(n, recompute, entering=problem.crossing_bytes),
                    part(n, recompute, leaving=problem.crossing_bytes),
                )
                for n in (1, 2, 3)
                if problem.memory_bytes is not None
            ]
            modes.append((cuts.time_s + cuts.forward_s if recompute else cuts.time_s, memory))
        return modes


def _on_all_devices(problem: Problem, stages: list[PlacedStage]) -> list[PlacedStage] | None:
    """Spread the stages over all devices of the row, and place the remaining devices where they cost least."""
    remaining = problem.row.devices - sum(stage.replicas for stage in stages)
    if remaining == 0:
        return stages
    if problem.straight:
        return None
    one_by_one = [stage.replicas for stage in stages]
    work = [problem.cuts.time_s[stage.last] - problem.cuts.time_s[stage.first] for stage in stages]
    for _ in range(remaining):
        busiest = max(range(len(stages)), key=lambda index: work[index] / one_by_one[index])
        one_by_one[busiest] += 1
    candidates = [one_by_one]
    for index in range(len(stages)):
        all_here = [stage.replicas for stage in stages]
        all_here[index] += remaining
        candidates.append(all_here)
    placed = [_placed(stages, replicas) for replicas in candidates]
    return min(placed, key=problem.bottleneck_s)


def _placed(stages: list[PlacedStage], replicas: list[int]) -> list[PlacedStage]:
    """Return the stages with these numbers of replicas, on consecutive devices from device 0."""
    placed, device = [], 0
    for stage, count in zip(stages, replicas, strict=True):
        placed.append(dataclasses.replace(stage, first_device=device, replicas=count))
        device += count
    return placed


def _relaxed_s(problem: Problem) -> float:
    """Return a lower bound: the optimum if every link were as fast as the fastest one and had no latency."""
    row = problem.row
    fastest = max(max(level.bandwidth, level.reduce_bandwidth or 0.0) for level in row.topology.levels)
    count = row.devices * row.copies
    flat = DeviceRow(Topology((Level("fastest", count, 0.0, fastest),), row.topology.device), count, 1)
    relaxed = dataclasses.replace(problem, row=flat, fewer=True, straight=False)
    possible = _bisect(relaxed, relative=1e-3)
    return 0.0 if possible is None else possible[1]
