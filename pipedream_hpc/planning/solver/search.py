"""Search: pipelines for problems too large for exact.py, by bisection on the time per minibatch.

For one time τ ask: how few devices do the layers behind each cut need if no stage or boundary may
be slower than τ? A stage that ends on a given device needs at least

    m  >=  compute / τ,   sync(m) / τ,   m boundary(m) / τ,   devices behind / (in flight that fit - 1)

and no right side falls as m grows, so that the fewest replicas come from putting m in again and
again until it stays. One pass over the cuts from the end to the front gives the fewest devices for
τ, O(N²) numbers instead of O(N² M²).

On one level of links, with devices left over or with some stage that can take them, this is exact.
Otherwise it is a plan and, beside it, a bound that no plan can beat.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipedream_hpc.core import load_solver
from pipedream_hpc.planning.solver.placement import Row
from pipedream_hpc.planning.solver.problem import Floats, Piece, Problem
from pipedream_hpc.planning.topology import Level, Topology

#: Bisection ends when what is possible and what is not are this close.
_RELATIVE = 1e-9
#: Layers may take no time at all, or figures so small that halving them leads nowhere. Seconds.
_NO_TIME_S = 1e-15
#: So many of the cuts are searched first.
_COARSE = 100


@dataclass(frozen=True)
class Found:
    """A pipeline, its slowest stage or boundary, and what none can be faster than, in seconds."""

    pieces: list[Piece]
    time_s: float
    bound_s: float


def pipeline(problem: Problem, below: float = np.inf) -> Found | None:
    """The best pipeline that can be found fast; None if none was, or none faster than `below` seconds."""
    possible = _bisect(problem, below)
    if possible is None:
        return None
    pieces, least_s = possible
    if not problem.fewer:
        spread = _on_all_devices(problem, pieces)
        if spread is None:
            return None
        pieces = spread
    time_s = problem.price_of(pieces)
    if len(problem.row.topology.levels) > 1:
        least_s = min(_relaxed_s(problem), time_s)
    return Found(pieces, time_s, min(least_s, time_s))


def _bisect(problem: Problem, below: float = np.inf, relative: float = _RELATIVE) -> tuple[list[Piece], float] | None:
    """The fastest pipeline on any number of devices, and a time that is too short for any.

    None if there is none, or none faster than `below`.
    """
    coarse = problem.thinned(_COARSE)
    if len(coarse.cuts) < len(problem.cuts) and (rough := _bisect(coarse, below, 1e-3)) is not None:
        below = min(below, coarse.price_of(rough[0]) * (1 + 2 * _RELATIVE))
    reach = _Reach(problem)
    low = float(problem.cuts.time_s[-1]) / (problem.row.devices * problem.row.copies)
    pieces = reach.within(min(below * (1 - _RELATIVE), reach.slowest_s))
    if pieces is None:
        return None
    high = problem.price_of(pieces)
    # Most plans come close to an even share of the work: look there first.
    step = max(1e-3 * (low or high), _NO_TIME_S)
    while high - low > max(relative * high, _NO_TIME_S):
        middle = min(low + step, (low + high) / 2)
        better = reach.within(middle)
        if better is None:
            low, step = middle, 4 * step
            continue
        pieces, high, step = better, problem.price_of(better), np.inf
        assert high <= middle * (1 + _RELATIVE), "the inner loop and Problem.price_of disagree"
        # A plan's own price is often the optimum: then nothing is just below it.
        if relative == _RELATIVE and reach.within(high * (1 - relative)) is None:
            return pieces, high * (1 - relative)
    return pieces, low


class _Reach:
    """Which pipelines keep within a time: the tables for the inner loop (csrc/reach.hpp) and its answers."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        row, levels, formula = problem.row, problem.row.topology.levels, problem.formula
        crossing = problem.crossing_bytes
        # A stage that ends a whole number of components further uses the same links.
        period = math.prod([level.count for level in levels[:-1]]) if row.copies == 1 else row.devices
        period = min(period, row.devices)
        replicas = np.arange(1, row.devices + 1)
        ends = row.devices - (row.devices - 1 - np.arange(period)) % period
        shape = period, row.devices
        links = problem.links_of(ends[:, None] - replicas, np.broadcast_to(ends[:, None], shape))
        # The row's last device has nobody behind it: what a stage sends is that of one a period before.
        inner = np.where((ends == row.devices) & (period < row.devices), ends - period, ends)
        out_of = row.shares(inner[:, None] - replicas, np.broadcast_to(inner[:, None], shape), output=True)
        part = 1 / row.copies if formula.routed else 1.0

        def charge(shares: Floats, level: Level) -> Floats:
            # The formula is linear in what crosses, so a byte's charge over a bare link is the share.
            bare = Level(level.name, 1, 0.0, 2.0)
            return np.asarray(formula.boundary_s(1.0, [shares], [bare]), float) * part

        self._reach = load_solver().Reach(
            round_s=links.round_s,
            round_s_per_byte=links.round_s_per_byte,
            parameter_bytes=problem.cuts.parameter_bytes,
            copies=float(row.copies),
            straight=problem.straight,
            overlap=formula.overlap,
            first_output_free=formula.first_output_free,
            levels=[
                (charge(entering, level), charge(leaving, level), formula.boundary_s(crossing, [1.0], [level]))
                for level, entering, leaving in zip(levels, links.into, out_of, strict=True)
            ],
            modes=self._modes(),
            memory_bytes=float(problem.memory_bytes or 0),
            begins=self._begins(),
        )
        moved = 4 * (float(problem.cuts.parameter_bytes[-1]) + float(crossing.max()))
        sync_s = sum(level.count * level.latency_s + moved / level.bandwidth for level in levels)
        reduce_s = sum((level.reduce_latency_s or 0.0) + moved / (level.reduce_bandwidth or np.inf) for level in levels)
        #: Longer than any stage or boundary can take.
        self.slowest_s = 2 * float(problem.cuts.time_s[-1]) + 4 * (sync_s + reduce_s) + 1e-9

    def within(self, time_s: float) -> list[Piece] | None:
        """The pipeline on the fewest devices whose stages and boundaries all keep within `time_s`."""
        stages = self._reach.within(time_s)
        if stages is None:
            return None
        problem = self._problem
        device, first, pieces = problem.row.devices - sum(replicas for _, replicas in stages), 0, []
        for last, replicas in stages:
            _, recompute = problem.prices(first, np.array([last]), device, replicas)
            pieces.append(Piece(first, last, device, replicas, bool(recompute[0, -1])))
            device, first = device + replicas, last
        return pieces

    def _begins(self) -> list[list[int]]:
        begins: list[list[int]] = [[] for _ in range(len(self._problem.cuts))]
        for first in range(len(begins) - 1):
            for last in self._problem.ends(first).tolist():
                begins[last].append(first)
        return begins

    def _modes(self) -> list[tuple[Floats, list[tuple[Floats, Floats, Floats]]]]:
        """Compute and memory of every way in which stages may be run."""
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


def _on_all_devices(problem: Problem, pieces: list[Piece]) -> list[Piece] | None:
    """The same stages on all devices of the row: those left over go where they slow nothing down."""
    spare = problem.row.devices - sum(piece.replicas for piece in pieces)
    if spare == 0:
        return pieces
    if problem.straight:
        return None
    one_by_one = [piece.replicas for piece in pieces]
    work = [problem.cuts.time_s[piece.last] - problem.cuts.time_s[piece.first] for piece in pieces]
    for _ in range(spare):
        busiest = max(range(len(pieces)), key=lambda index: work[index] / one_by_one[index])
        one_by_one[busiest] += 1
    candidates = [one_by_one]
    for index in range(len(pieces)):
        all_here = [piece.replicas for piece in pieces]
        all_here[index] += spare
        candidates.append(all_here)
    placed = [_placed(pieces, replicas) for replicas in candidates]
    return min(placed, key=problem.price_of)


def _placed(pieces: list[Piece], replicas: list[int]) -> list[Piece]:
    """The stages with so many replicas, side by side from device 0."""
    placed, device = [], 0
    for piece, count in zip(pieces, replicas, strict=True):
        placed.append(dataclasses.replace(piece, first_device=device, replicas=count))
        device += count
    return placed


def _relaxed_s(problem: Problem) -> float:
    """No pipeline is faster: the best one if every link were as fast as the fastest, without latency."""
    row = problem.row
    fastest = max(max(level.bandwidth, level.reduce_bandwidth or 0.0) for level in row.topology.levels)
    count = row.devices * row.copies
    flat = Row(Topology((Level("fastest", count, 0.0, fastest),), row.topology.device), count, 1)
    relaxed = dataclasses.replace(problem, row=flat, fewer=True, straight=False)
    possible = _bisect(relaxed, relative=1e-3)
    return 0.0 if possible is None else possible[1]
