"""Cost formulas: all formulas that the solver, plans and the simulator use.

Symbols: T is the forward and backward time of a stage on one device in seconds, |w| its parameter
bytes, m its number of replicas, and a the bytes that cross a cut. Level k of the topology has latency
α_k and bandwidth β_k in bytes per second; a stage spans n_k of its components.

A plan records the name of its formula:

=================  ====================================  ============  ==========================
name               synchronisation of a round, W         stage, 1/m ·  boundary
=================  ====================================  ============  ==========================
`ring`             Σ 2 (n_k - 1) (α_k + |w| / (n_k β_k))  max(T, W)    max 2 (α_k + a / β_k) s_k
`ring-no-overlap`  the same                              T + W         the same
`paper2018`        Σ 4 (n_k - 1) (α_k + |w| / (n_k β_k))  max(T, W)    max 2 (α_k + a / β_k)
`reference_code`   as paper2018                          T + W         as ring, but the input
                                                                       stage's output is free
=================  ====================================  ============  ==========================

A round is one minibatch on each of the m replicas. `ring` is a ring all-reduce within components and
then between them (SOSP 2019, section 3.1; a level with a measured all-reduce uses its own α and β).
`paper2018` is a parameter server distributed over the replicas (arXiv 1806.03377, section 3.2). A
boundary carries activations forwards and gradients backwards, hence the factor 2. s_k is the share of
a stage's traffic that goes through its busiest link of level k (planning.solver.placement), because
each replica transfers only its own minibatches; `paper2018` charges all of it to one link.
`reference_code` is the formula of PipeDream's published optimiser. `reference_code` and `paper2018`
count the bytes that cross a cut as that optimiser does (Cuts.antichain_bytes).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.planning.topology import Level

#: A number, or an array of numbers: the solver evaluates many stages at once.
Amount = float | npt.NDArray[Any]


@dataclass(frozen=True)
class Formula:
    """One line of the table above.

    Attributes:
        name: name that plans record.
        sync_factor: bytes per parameter byte that an all-reduce over very many replicas sends through a link.
        overlap: whether synchronisation overlaps with compute, so that the larger of the two counts.
        routed: whether replicas share the traffic of a boundary.
        first_output_free: whether the input stage's output costs nothing.
        antichains: whether crossing bytes are counted as in PipeDream's published optimiser (Cuts).
    """

    name: str
    sync_factor: Literal[2, 4] = 2
    overlap: bool = True
    routed: bool = True
    first_output_free: bool = False
    antichains: bool = False

    def compute_s(self, time_s: Amount, replicas: Amount) -> Amount:
        """Return a stage's compute time per minibatch: each replica takes every m-th minibatch."""
        return time_s / replicas

    def round_s(self, parameter_bytes: Amount, spans: Sequence[Amount], levels: Sequence[Level]) -> Amount:
        """Return the time of one synchronisation of a stage's replicas, in seconds.

        Args:
            parameter_bytes: |w|.
            spans: n_k of every level.
            levels: the topology's levels.
        """
        total: Amount = np.zeros(np.broadcast_shapes(np.shape(parameter_bytes), *(np.shape(n) for n in spans)))
        replicas: Amount = 1
        for level, n in zip(levels, spans, strict=True):
            replicas = replicas * n
            if self.sync_factor == 2 and level.reduce_bandwidth is not None:
                # Measured among all devices of this level, so it includes the levels below.
                moved = 2 * (replicas - 1) / replicas * parameter_bytes
                measured = (level.reduce_latency_s or 0.0) + moved / level.reduce_bandwidth
                total = np.where(np.asarray(n) > 1, measured, total)
            else:
                total = total + self.sync_factor * (n - 1) * (level.latency_s + parameter_bytes / (n * level.bandwidth))
        return total

    def sync_s(self, round_s: Amount, replicas: Amount) -> Amount:
        """Return the synchronisation time per minibatch: m minibatches share a round."""
        return round_s / replicas

    def stage_s(self, compute_s: Amount, sync_s: Amount) -> Amount:
        """Return a stage's time per minibatch, given its compute and synchronisation times."""
        return np.maximum(compute_s, sync_s) if self.overlap else compute_s + sync_s

    def boundary_s(self, crossing_bytes: Amount, shares: Sequence[Amount], levels: Sequence[Level]) -> Amount:
        """Return the time per minibatch of sending activations and gradients over the busiest link.

        Args:
            crossing_bytes: a.
            shares: s_k of every level; 0 for a level that the traffic does not use.
            levels: the topology's levels.
        """
        total: Amount = np.zeros(np.broadcast_shapes(np.shape(crossing_bytes), *(np.shape(s) for s in shares)))
        for level, share in zip(levels, shares, strict=True):
            used = share if self.routed else np.asarray(share) > 0
            total = np.maximum(total, 2 * transfer_s(crossing_bytes, level) * used)
        return np.where(np.asarray(crossing_bytes) > 0, total, 0.0)


def transfer_s(message_bytes: Amount, level: Level) -> Amount:
    """Return the time of one message over one link: α + n / β."""
    return level.latency_s + message_bytes / level.bandwidth


_FORMULAS = {
    formula.name: formula
    for formula in (
        Formula("ring"),
        Formula("ring-no-overlap", overlap=False),
        Formula("paper2018", sync_factor=4, routed=False, antichains=True),
        Formula("reference_code", sync_factor=4, overlap=False, first_output_free=True, antichains=True),
    )
}
NAMES = tuple(_FORMULAS)
DEFAULT = "ring"


def formula(name: str) -> Formula:
    """Return the cost formula called `name`.

    Raises:
        PipedreamError: there is no such formula.
    """
    if name not in _FORMULAS:
        raise PipedreamError(f"there is no cost formula '{name}': choose one of {', '.join(NAMES)}")
    return _FORMULAS[name]
