"""Exact: the best pipeline along a row of devices, by dynamic programming (paper, section 3.2).

best(u, d) is the time of the slowest stage of the best pipeline that runs everything after cut u on
devices d, d + 1, ... to the end of the row::

    devices   0 ........ d ..... d+m ......... last
    layers       before u │ u to v │ after v
                          └─ m replicas

    best(u, d) = min over v after u and m of  max( price(u, v, d, m), best(v, d + m) )

From the end to the front, unlike the paper's recurrence, because memory asks for what is behind a
stage: its minibatches in flight are ceil(devices behind / m) + 1. For one u and d all v and m are
weighed at once in numpy: O(N² M²) numbers altogether for N cuts and M devices.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pipedream_hpc.planning.solver.problem import Bools, Floats, Ints, Piece, Problem

#: So many of the cuts are weighed first: no stage of the best pipeline is slower than theirs.
_COARSE = 48

_Prices = Callable[[int, Ints, int, int], tuple[Floats, Bools]]


def pipeline(problem: Problem) -> list[Piece] | None:
    """The pipeline whose slowest stage or boundary is as fast as can be; None if none is allowed.

    Of several equally fast ones it has the fewest stages, then the earliest cuts; with `fewer`, the
    fewest devices.
    """

    coarse = problem.thinned(_COARSE)
    bound_s = np.inf if len(coarse.cuts) == len(problem.cuts) else _best(coarse, coarse.prices)[0]
    return _best(problem, problem.prices, bound_s)[1]


def least_memory(problem: Problem) -> int | None:
    """The smallest memory per device, in bytes, with which there is a pipeline at all."""

    def prices(first: int, ends: Ints, device: int, most: int) -> tuple[Floats, Bools]:
        replicas = np.arange(1, most + 1)
        behind = problem.row.devices - device - replicas
        modes = {"never": (False,), "always": (True,), "auto": (False, True)}[problem.recompute]
        needed = [problem.bytes(first, ends, behind, replicas, recompute=mode) for mode in modes]
        return np.minimum.reduce(needed), np.zeros(needed[0].shape, bool)

    smallest = _best(problem, prices)[0]
    return None if np.isinf(smallest) else int(np.ceil(smallest))


def _best(problem: Problem, prices: _Prices, bound: float = np.inf) -> tuple[float, list[Piece] | None]:
    """The recurrence above, for any price of a stage; what costs more than `bound` may be passed over."""
    count, devices = len(problem.cuts), problem.row.devices
    time_s = problem.cuts.time_s
    # So much compute fits on one row's device: whoever has less devices than this behind (or before)
    # a cut cannot keep within the bound.
    device_s = bound * problem.row.copies * (1 + 1e-9)
    best = np.full((count, devices + 1), np.inf)
    best[-1, devices] = 0.0
    stages = np.zeros((count, devices + 1), np.int64)
    chosen: dict[tuple[int, int], Piece] = {}
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
            price, recompute = prices(first, ends, device, replicas)
            slowest = np.maximum(price, rest)
            least = slowest.min()
            if np.isinf(least):
                continue
            following = stages[ends, device + 1 : device + 1 + replicas] + 1
            choice = int(np.where(slowest == least, following, np.iinfo(np.int64).max).argmin())
            row, column = divmod(choice, replicas)
            best[first, device], stages[first, device] = least, following[row, column]
            chosen[first, device] = Piece(first, int(ends[row]), device, column + 1, bool(recompute[row, column]))
    device = int(devices - 1 - best[0, :devices][::-1].argmin())  # the fewest devices of equally fast ones
    if np.isinf(best[0, device]):
        return np.inf, None
    pieces, cut, first_device = [], 0, device
    while cut < count - 1:
        pieces.append(chosen[cut, device])
        cut, device = pieces[-1].last, device + pieces[-1].replicas
    return float(best[0, first_device]), pieces
