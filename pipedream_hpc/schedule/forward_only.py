"""Forward only: evaluation through the pipeline, on one set of weights.

::

    stage 0   F0 F1 F2 F3 ...
    stage 1      F0 F1 F2 F3 ...
    stage 2         F0 F1 F2 F3 ...          time ──►
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipedream_hpc.schedule.actions import Action
from pipedream_hpc.schedule.routed import Routed


@dataclass(frozen=True)
class ForwardOnly(Routed):
    """Every minibatch once through all stages; replicas take turns as in 1F1B-RR."""

    training = False

    def in_flight(self, stage: int) -> int:
        """One: a rank is done with a minibatch when it has sent it on."""
        return 1

    def versions(self, stage: int) -> int:
        """One: nothing is updated."""
        return 1

    def actions(self, rank: int) -> Iterator[Action]:
        """The actions of `rank`, in order.

        A rank of several stages runs as many units as there are ranks in turn through one stage, then
        the same through the next, as the interleaved schedule does.
        """
        stages = self.stages_of[rank]
        own = self._own(stages[0], rank)
        group = max(1, len(self.layout) // len(stages))
        for first in range(0, len(own), group):
            for stage in stages:
                for minibatch in own[first : first + group]:
                    yield from self._forward(stage, minibatch, version=0)
