"""Forward only: evaluation through the pipeline, on one set of weights.

::

    stage 0   F0 F1 F2 F3 ...
    stage 1      F0 F1 F2 F3 ...
    stage 2         F0 F1 F2 F3 ...          time ──►
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipedream_hpc.schedule.actions import Action, Forward, Layout, Receive, Send


@dataclass(frozen=True)
class ForwardOnly:
    """Every minibatch once through all stages; replicas take turns as in 1F1B-RR."""

    layout: Layout
    minibatches: int
    training = False

    def in_flight(self, stage: int) -> int:
        """A rank is done with a minibatch when it has sent it on."""
        return 1

    def actions(self, rank: int) -> Iterator[Action]:
        """The actions of `rank`, in order."""
        stage = next(index for index, ranks in enumerate(self.layout) if rank in ranks)
        replicas = self.layout[stage]
        for minibatch in range(replicas.index(rank), self.minibatches, len(replicas)):
            if stage > 0:
                upstream = self.layout[stage - 1]
                yield Receive(minibatch, "activation", upstream[minibatch % len(upstream)])
            yield Forward(minibatch, 0)
            if stage + 1 < len(self.layout):
                downstream = self.layout[stage + 1]
                yield Send(minibatch, "activation", downstream[minibatch % len(downstream)])
