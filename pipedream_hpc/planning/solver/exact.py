"""Exact solver: the optimal pipeline along a row of devices, by dynamic programming (paper, section 3.2).

best(u, d) is the time of the slowest stage of the optimal pipeline that runs all layers after cut u on
devices d, d + 1, ... to the end of the row::

    devices   0 ........ d ..... d+m ......... last
    layers       before u │ u to v │ after v
                          └─ m replicas

    best(u, d) = min over v after u and m of  max( stage_cost(u, v, d, m), best(v, d + m) )

Unlike the paper's recurrence it runs from the end to the front, because a stage's memory depends on the
later stages: it has ceil(later devices / m) + 1 minibatches in flight. For one u and d, numpy evaluates
all v and m at once: O(N² M²) numbers in total for N cuts and M devices.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pipedream_hpc.planning.solver.problem import Bools, Floats, Ints, PlacedStage, Problem

#: Number of cuts of a first, coarse pass, whose result bounds the optimum from above.
_COARSE = 48

_StageCosts = Callable[[int, Ints, int, int], tuple[Floats, Bools]]


def pipeline(problem: Problem) -> list[PlacedStage] | None:
    """Return the pipeline that minimises the slowest stage or boundary; None if no pipeline is allowed.

    Among equally fast pipelines it prefers the fewest stages, then the earliest cuts; with `fewer`, the
    fewest devices.
    """
    coarse = problem.thinned(_COARSE)
    bound_s = np.inf if len(coarse.cuts) == len(problem.cuts) else _best(coarse, coarse.stage_times)[0]
    return _best(problem, problem.stage_times, bound_s)[1]


def least_memory(problem: Problem) -> int | None:
    """Return the smallest memory per device, in bytes, for which a pipeline exists; None if there is none."""

    def stage_costs(first: int, ends: Ints, device: int, most: int) -> tuple[Floats, Bools]:
        replicas = np.arange(1, most + 1)
        later_devices = problem.row.devices - device - replicas
        modes = {"never": (False,), "always": (True,), "auto": (False, True)}[problem.recompute]
        needed = [problem.bytes(first, ends, later_devices, replicas, recompute=mode) for mode in modes]
        return np.minimum.reduce(needed), np.zeros(needed[0].shape, bool)

    smallest = _best(problem, stage_costs)[0]
    return None if np.isinf(smallest) else int(np.ceil(smallest))


def _best(problem: Problem, stage_costs: _StageCosts, bound: float = np.inf) -> tuple[float, list[PlacedStage] | None]:
    """Evaluate the recurrence for any cost of a stage; solutions that cost more than `bound` may be skipped."""
    count, devices = len(problem.cuts), problem.row.devices
    time_s = problem.cuts.time_s
    # A device of every row has this much compute time within the bound: states with too few devices after (or
    # before) their cut exceed it.
    device_s = bound * problem.row.copies * (1 + 1e-9)
    best = np.full((count, devices + 1), np.inf)
    best[-1, devices] = 0.0
    n_stages = np.zeros((count, devices + 1), np.int64)
    chosen: dict[tuple[int, int], PlacedStage] = {}
    most = 1 if problem.straight else devices
    for first in reversed(range(count - 1)):
        all_ends = None
        begins = range(1, devices) if first else range(devices) if problem.fewer else range(1)
        for device in begins:
            if time_s[-1] - time_s[first] > device_s * (devices - device) or time_s[first] > device_s * device:
                continue
            if all_ends is None:
                all_ends = problem.ends(first)
            replicas = min(most, devices - device)
            ends = all_ends[time_s[all_ends] - time_s[first] <= device_s * replicas]
            rest = best[ends, device + 1 : device + 1 + replicas]
            if np.isinf(rest).all():
                continue
            cost, recompute = stage_costs(first, ends, device, replicas)
            slowest = np.maximum(cost, rest)
            least = slowest.min()
            if np.isinf(least):
                continue
            following = n_stages[ends, device + 1 : device + 1 + replicas] + 1
            choice = int(np.where(slowest == least, following, np.iinfo(np.int64).max).argmin())
            row, column = divmod(choice, replicas)
            best[first, device], n_stages[first, device] = least, following[row, column]
            chosen[first, device] = PlacedStage(first, int(ends[row]), device, column + 1, bool(recompute[row, column]))
    device = int(devices - 1 - best[0, :devices][::-1].argmin())  # among equally fast ones, the fewest devices
    if np.isinf(best[0, device]):
        return np.inf, None
    stages, cut, first_device = [], 0, device
    while cut < count - 1:
        stages.append(chosen[cut, device])
        cut, device = stages[-1].last, device + stages[-1].replicas
    return float(best[0, first_device]), stages
