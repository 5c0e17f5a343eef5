"""Solver: cut a model into stages and give each its replicas (paper, section 3.2).

A(j, m) is the time of the slowest stage of the best pipeline that runs layers 1..j on m machines::

                    ┌ T(1..j, m)                                            one replicated stage
    A(j, m) = min ──┤
                    └ min over i < j, 1 <= m' < m of                        a pipeline, and then
                        max( A(i, m - m'),  2 C_i,  T(i+1..j, m') )         layers i+1..j on m'

For one j all i, m and m' are weighed at once in numpy: O(N² M²) numbers altogether.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.planning.chain import Chain, chain_of
from pipedream_hpc.planning.cost import Cost, formula
from pipedream_hpc.planning.plan import Plan, StagePlan, warm_up
from pipedream_hpc.planning.profile import Profile
from pipedream_hpc.planning.topology import Topology

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Piece:
    """A stage: positions of a Chain and how many replicas."""

    first: int
    last: int
    replicas: int


def solve(profile: Profile, topology: Topology, *, cost: str = "paper2018", straight: bool = False) -> Plan:
    """The plan whose slowest stage or boundary is as fast as can be.

    All devices are used. Every link is taken to be as slow as the topology's slowest level. Of
    several plans equally fast the one is kept that has fewer stages, then cuts earlier.

    Args:
        cost: name of the cost formula (planning.cost).
        straight: one replica per stage, as many stages as devices.

    Raises:
        PipedreamError: more stages are asked for than the model can be cut into.
    """
    chain, prices, machines = chain_of(profile), formula(cost), topology.devices
    if straight and machines > len(chain):
        raise PipedreamError(
            f"{machines} stages were asked for, but '{profile.model}' can be cut into {len(chain)} at most: "
            f"use {len(chain)} devices or fewer, or allow replicas (without --straight)"
        )
    pieces = (
        _straight(chain, prices, machines, topology) if straight else _replicated(chain, prices, machines, topology)
    )
    return _plan(profile, topology, chain, prices, pieces)


def _replicated(chain: Chain, prices: Cost, machines: int, topology: Topology) -> list[_Piece]:
    """The recurrence above."""
    bandwidth, positions = topology.bandwidth, len(chain.ends)
    replicas = np.arange(1, machines + 1)
    boundary_s = np.asarray(prices.boundary_s(chain.output_bytes, bandwidth))
    best = np.full((positions, machines + 1), np.inf)  # A(j, m)
    stages = np.zeros((positions, machines + 1), int)  # of that pipeline, to prefer few
    came_from: dict[tuple[int, int], tuple[int, int]] = {}  # (j, m) -> (i, m')
    for j in range(1, positions):
        # Rows: i from 0 to j - 1; columns: replicas m' of the stage i..j.
        stage_s = _stage_s(chain, prices, slice(0, j), j, replicas, bandwidth)
        for m in range(1, machines + 1):
            best[j, m], stages[j, m], came_from[j, m] = stage_s[0, m - 1], 1, (0, m)
            if j == 1 or m == 1:
                continue
            split = np.maximum(np.maximum(best[1:j, m - 1 : 0 : -1], boundary_s[1:j, None]), stage_s[1:, : m - 1])
            fewest = stages[1:j, m - 1 : 0 : -1] + 1
            time_s = split.min()
            candidates = np.where(split == time_s, fewest, np.iinfo(int).max)
            if time_s < best[j, m]:
                row, column = divmod(int(candidates.argmin()), candidates.shape[1])
                best[j, m], stages[j, m] = time_s, candidates[row, column]
                came_from[j, m] = (row + 1, column + 1)
    pieces, j, m = [], positions - 1, machines
    while j > 0:
        i, m_last = came_from[j, m]
        pieces.append(_Piece(i, j, m_last))
        j, m = i, m - m_last
    return pieces[::-1]


def _straight(chain: Chain, prices: Cost, machines: int, topology: Topology) -> list[_Piece]:
    """The recurrence with m' = 1 throughout."""
    bandwidth, positions = topology.bandwidth, len(chain.ends)
    boundary_s = np.asarray(prices.boundary_s(chain.output_bytes, bandwidth))
    one = np.ones(1, int)
    stage_s = np.full((positions, positions), np.inf)  # of the stage i..j
    for j in range(1, positions):
        stage_s[:j, j] = _stage_s(chain, prices, slice(0, j), j, one, bandwidth)[:, 0]
    best = np.full(positions, np.inf)
    best[0] = 0.0
    came_from = np.zeros((machines + 1, positions), int)
    for stage in range(1, machines + 1):
        reach = np.maximum(best, boundary_s)[:, None]  # up to i, and over the cut there
        candidates = np.maximum(reach, stage_s)
        came_from[stage] = candidates.argmin(axis=0)
        best = candidates.min(axis=0)
        best[0] = np.inf
    pieces, j = [], positions - 1
    for stage in range(machines, 0, -1):
        i = int(came_from[stage, j])
        pieces.append(_Piece(i, j, 1))
        j = i
    return pieces[::-1]


def _stage_s(
    chain: Chain, prices: Cost, first: slice, last: int, replicas: npt.NDArray[np.int64], bandwidth: float
) -> Floats:
    """Stage times (first, replicas) of stages from each of `first` to `last`."""
    total_s = (chain.time_s[last] - chain.time_s[first])[:, None]
    parameter_bytes = (chain.parameter_bytes[last] - chain.parameter_bytes[first])[:, None]
    compute_s = prices.compute_s(total_s, replicas)
    return np.asarray(prices.stage_s(compute_s, prices.sync_s(parameter_bytes, replicas, bandwidth)))


def _plan(profile: Profile, topology: Topology, chain: Chain, prices: Cost, pieces: list[_Piece]) -> Plan:
    stages, rank = [], 0
    for index, piece in enumerate(pieces):
        layers = chain.layers[chain.ends[piece.first] : chain.ends[piece.last]]
        forward_s, backward_s = sum(x.forward_s for x in layers), sum(x.backward_s for x in layers)
        parameter_bytes = sum(x.parameter_bytes for x in layers)
        compute_s = float(prices.compute_s(forward_s + backward_s, piece.replicas))
        sync_s = float(prices.sync_s(parameter_bytes, piece.replicas, topology.bandwidth))
        boundary_s = float(prices.boundary_s(chain.output_bytes[piece.last], topology.bandwidth))
        figures = {"compute": compute_s, "sync": sync_s, "boundary": boundary_s}
        stages.append(
            StagePlan(
                layers=tuple(layer.name for layer in layers),
                ranks=tuple(range(rank, rank + piece.replicas)),
                forward_s=forward_s,
                backward_s=backward_s,
                compute_s=compute_s,
                sync_s=sync_s,
                boundary_s=boundary_s,
                in_flight=warm_up([each.replicas for each in pieces], index) + 1,
                parameter_bytes=parameter_bytes,
                output_bytes=layers[-1].output_bytes,
                output_shape=layers[-1].output_shape,
                output_dtype=layers[-1].output_dtype,
                limit=max(figures, key=lambda part: figures[part]),
            )
        )
        rank += piece.replicas
    return Plan(
        model=profile.model,
        minibatch=profile.minibatch,
        schedule="1f1b" if len(pieces) == topology.devices else "1f1b-rr",
        cost=prices.name,
        stages=tuple(stages),
        bottleneck_s=max(
            max(float(prices.stage_s(stage.compute_s, stage.sync_s)), stage.boundary_s) for stage in stages
        ),
        single_device_s=profile.total_s,
    )
