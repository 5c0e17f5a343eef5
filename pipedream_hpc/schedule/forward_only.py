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
    """Every microbatch passes all stages once; replicas take turns as in 1F1B-RR."""

    training = False

    def in_flight(self, stage: int) -> int:
        """One: a rank is done with a microbatch when it has sent its activation."""
        return 1

    def versions(self, stage: int) -> int:
        """One: nothing is updated."""
        return 1

    def actions(self, rank: int) -> Iterator[Action]:
        """The actions of `rank`, in order.

        A rank that holds several stages runs as many microbatches as there are ranks through one stage, then
        the same microbatches through the next, as the interleaved schedule does.
        """
        stages = self.stages_of[rank]
        own = self._own(stages[0], rank)
        group = max(1, len(self.layout) // len(stages))
        for first in range(0, len(own), group):
            for stage in stages:
                for microbatch in own[first : first + group]:
                    yield from self._forward(stage, microbatch, version=0)
