"""GPipe: all forwards of a minibatch's microbatches, then all backwards (Huang et al., 2019).

Three stages, minibatches of four microbatches::

    stage 0   F0 F1 F2 F3             B0 B1 B2 B3 U F4 F5 ...
    stage 1      F0 F1 F2 F3       B0 B1 B2 B3 U       F4 ...
    stage 2         F0 F1 F2 F3 B0 B1 B2 B3 U
                                                    time ──►

Backwards run in the order of the forwards, so that gradients add up in the order of 1F1B with
flush, and both leave the same bits. A stage holds all m microbatches; the bubble is
(p - 1) / (m + p - 1) of the time with p stages.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipedream_hpc.schedule.actions import Action
from pipedream_hpc.schedule.routed import Microbatched


@dataclass(frozen=True)
class GPipe(Microbatched):
    """All forwards of every minibatch of `microbatches` units, all its backwards, one update."""

    synchronous = True

    def in_flight(self, stage: int) -> int:
        """All microbatches that a replica gets of a minibatch."""
        return self._most_local(stage)

    def actions(self, rank: int) -> Iterator[Action]:
        """The actions of `rank`, in order."""
        stage = self._only_stage(rank)
        for number, own in self._flushes(stage, rank):
            for unit in own:
                yield from self._forward(stage, unit, version=number)
            for unit in own:
                yield from self._backward(stage, unit, version=number)
            yield from self._update(stage, number)
