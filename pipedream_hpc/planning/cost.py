"""Every cost formula, in one place. The solver and the plan's figures come from here.

Symbols: T the forward and backward time of a stage on one device in seconds, |w| its parameter
bytes, m its replicas, a the bytes of the activations at a cut, B bandwidth in bytes per second.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pipedream_hpc.errors import PipedreamError

#: A number, or an array of them: the solver asks for many stages at once.
Amount = float | npt.NDArray[Any]


class Cost(Protocol):
    """A named way to price stages and boundaries, in seconds per minibatch."""

    @property
    def name(self) -> str: ...

    def compute_s(self, total_s: Amount, replicas: Amount) -> Amount:
        """Compute of a stage: each replica takes every m-th minibatch, so T / m."""
        ...

    def sync_s(self, parameter_bytes: Amount, replicas: Amount, bandwidth: float) -> Amount:
        """Gradient synchronisation of a stage's replicas, once per m minibatches."""
        ...

    def stage_s(self, compute_s: Amount, sync_s: Amount) -> Amount:
        """Stage time from its compute and its synchronisation."""
        ...

    def boundary_s(self, activation_bytes: Amount, bandwidth: float) -> Amount:
        """Activations forth and gradients back."""
        ...


@dataclass(frozen=True)
class Paper2018:
    """arXiv 1806.03377, section 3.2: T(i→j, m) = max(Σ T_l, Σ W_l^m) / m and boundaries 2 C_l.

    W_l^m = 4 (m - 1) |w_l| / (m B): a parameter server spread over the m replicas. Synchronisation
    overlaps with backward, so the larger of the two counts.
    """

    name: str = "paper2018"

    def compute_s(self, total_s: Amount, replicas: Amount) -> Amount:
        return total_s / replicas

    def sync_s(self, parameter_bytes: Amount, replicas: Amount, bandwidth: float) -> Amount:
        return 4 * (replicas - 1) * parameter_bytes / (replicas * bandwidth) / replicas

    def stage_s(self, compute_s: Amount, sync_s: Amount) -> Amount:
        return np.maximum(compute_s, sync_s)

    def boundary_s(self, activation_bytes: Amount, bandwidth: float) -> Amount:
        return 2 * activation_bytes / bandwidth


@dataclass(frozen=True)
class Ring(Paper2018):
    """The same with a ring all-reduce (SOSP 2019, section 3.1): W^m = 2 (m - 1) |w| / (m B)."""

    name: str = "ring"

    def sync_s(self, parameter_bytes: Amount, replicas: Amount, bandwidth: float) -> Amount:
        return 2 * (replicas - 1) * parameter_bytes / (replicas * bandwidth) / replicas


_FORMULAS: dict[str, Cost] = {cost.name: cost for cost in (Paper2018(), Ring())}
NAMES = tuple(_FORMULAS)


def formula(name: str) -> Cost:
    """The cost formula of this name.

    Raises:
        PipedreamError: there is none.
    """
    if name not in _FORMULAS:
        raise PipedreamError(f"there is no cost formula '{name}': choose one of {', '.join(NAMES)}")
    return _FORMULAS[name]
