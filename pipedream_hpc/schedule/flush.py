"""1F1B with flush: microbatches in 1F1B order, an update when the pipe is empty (PipeDream-Flush).

Three stages, minibatches of four microbatches (PipeDream-2BW, ICML 2021, section 3.2.1)::

    stage 0   F0 F1 F2       B0 F3 B1    B2    B3 U F4 F5 F6 ...
    stage 1      F0 F1    B0 F2 B1 F3 B2    B3 U       F4 F5 ...
    stage 2         F0 B0 F1 B1 F2 B2 F3 B3 U             F4 ...
                                          drain             time ──►

One weight version, and the semantics of plain minibatch SGD, as GPipe; but a stage holds no more
than W + 1 microbatches, W of them from the warm-up, where GPipe holds all m. The bubble is the same:
(p - 1) / (m + p - 1) of the time with p stages.

While the pipe drains, backwards can be split: the gradient of a stage's input goes upstream before those of its weights
are computed, as in zero-bubble schedules (Qi et al., ICLR 2024). The pipe is then empty (p - 1) W sooner, since W
falls into what was waiting. With F, B and W of equal length::

    whole   stage 0   F0 F1 F2 .  .  .  .  BW BW F3 BW BW .  BW BW .  BW BW U
            stage 1      F0 F1 .  .  BW BW F2 BW BW F3 BW BW .  BW BW       U
            stage 2         F0 BW BW F1 BW BW F2 BW BW F3 BW BW             U

    split   stage 0   F0 F1 F2 .  .  .  .  BW BW F3 BW BW BW BW BW BW U
            stage 1      F0 F1 .  .  BW BW F2 BW BW F3 B2 W2 B3 W3    U
            stage 2         F0 BW BW F1 BW BW F2 BW BW F3 B3 W3       U

Backwards with a forward after them are not: nobody waits for them that has nothing else to do. Nor are the input
stage's, for which nobody waits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipedream_hpc.schedule.actions import Action
from pipedream_hpc.schedule.routed import Microbatched, alternate


@dataclass(frozen=True)
class Flush(Microbatched):
    """1F1B within every minibatch of `microbatches` units, then one update.

    Attributes:
        split: whether backwards are split while the pipe drains.
    """

    split: bool = False
    synchronous = True

    def splits(self, stage: int, unit: int) -> bool:
        """Where no forward follows on the same replica, and another stage waits for the gradient."""
        if not self.split:
            return False
        end = min((unit // self.microbatches + 1) * self.microbatches, self.minibatches)
        following = (end - 1 - unit) // len(self.layout[stage])
        return following <= self._warm_ups[stage] and bool(self.sources(stage))

    def in_flight(self, stage: int) -> int:
        """W + 1, or all of a minibatch if they are fewer."""
        return min(self._warm_ups[stage] + 1, self._most_local(stage))

    def actions(self, rank: int) -> Iterator[Action]:
        """The actions of `rank`, in order."""
        stage = self._only_stage(rank)
        for number, own in self._flushes(stage, rank):
            for forward, turn in alternate(len(own), self._warm_ups[stage]):
                step = self._forward if forward else self._backward
                yield from step(stage, own[turn], version=number)
            yield from self._update(stage, number)
