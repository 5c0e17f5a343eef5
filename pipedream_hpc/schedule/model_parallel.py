"""Model parallel without pipelining: one minibatch at a time, forward and backward.

The baseline of the paper's figure 3; of p stages one works at a time::

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
    """Forward, backward and optimizer step of one minibatch before the next one's forward."""

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
        for turn, microbatch in enumerate(own, start=1):
            last = turn % self.gradient_accumulation_steps == 0 or turn == len(own)
            yield from self._forward(stage, microbatch, version=done)
            yield from self._backward(stage, microbatch, version=done, last=last)
            if last:
                yield from self._update(stage, done)
                done += 1
        if done < self._rounds(stage):
            yield from self._update(stage, done)  # a short last round, without a microbatch for this replica
