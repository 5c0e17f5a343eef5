"""Model parallel without pipelining: one minibatch at a time, forth and back.

What the paper's figure 3 begins with, to compare with; of p stages one works at a time::

    stage 0   F0             B0 U F1             B1 U
    stage 1      F0       B0 U       F1       B1 U
    stage 2         F0 B0 U             F1 B1 U          time ──►

A stage holds one minibatch and one weight version: training is plain SGD. With replicas the next
minibatch goes to the next replica, as in 1F1B-RR, and every replica has one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipedream_hpc.schedule.actions import Action
from pipedream_hpc.schedule.routed import Routed


@dataclass(frozen=True)
class ModelParallel(Routed):
    """Forward, backward and update of one minibatch before the next one's forward."""

    newest = True
    synchronous = True

    def in_flight(self, stage: int) -> int:
        """One."""
        return 1

    def versions(self, stage: int) -> int:
        """One."""
        return 1

    def actions(self, rank: int) -> Iterator[Action]:
        """The actions of `rank`, in order."""
        stage = self._only_stage(rank)
        own, done = self._own(stage, rank), 0
        for turn, minibatch in enumerate(own, start=1):
            yield from self._forward(stage, minibatch, version=done)
            yield from self._backward(stage, minibatch, version=done)
            if turn % self.accumulate == 0 or turn == len(own):
                yield from self._update(stage, done)
                done += 1
        if done < self.updates(stage):
            yield from self._update(stage, done)  # the short last round
