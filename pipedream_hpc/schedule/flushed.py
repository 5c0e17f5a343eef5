"""Flushed: what schedules have in common whose pipe is empty at every update, and backwards in two parts.

A backward computes the gradient of the stage's input, B, for which the stage before waits, and those of its weights,
W, for which nobody waits before the update (Qi et al., Zero Bubble Pipeline Parallelism, ICLR 2024). Where it is split,
B goes first, and W falls into what was idle. Two stages, four microbatches, F, B and W of equal length::

    whole   stage 0   F0 F1 .  .  BW BW F2 BW BW F3 BW BW .  BW BW U
            stage 1      F0 BW BW F1 BW BW F2 BW BW F3 BW BW       U

    lag 0   stage 0   F0 F1 .  .  BW BW F2 BW BW F3 BW BW BW BW U         W right behind B: the drain is shorter
            stage 1      F0 B0 W0 F1 B1 W1 F2 B2 W2 F3 B3 W3    U

    lag 1   stage 0   F0 F1 .  BW BW F2 BW BW F3 BW BW BW BW U            W one B later: so is the start
            stage 1      F0 B0 F1 B1 W0 F2 B2 W1 F3 B3 W2 W3 U

Weights' gradients add up in the order of the microbatches, as ever: the bits are those of whole backwards. The
input stage's backwards are not split, since nobody waits for them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from pipedream_hpc.schedule.actions import Action, WeightGradient
from pipedream_hpc.schedule.routed import Microbatched, alternate


@dataclass(frozen=True)
class Flushed(Microbatched, ABC):
    """Every replica runs ahead by some forwards, then alternates; one update per minibatch of `microbatches` units.

    Attributes:
        split: whether backwards are split.
    """

    split: bool = False
    synchronous = True

    def splits(self, stage: int) -> bool:
        """Where another stage waits for the gradient."""
        return self.split and bool(self.sources(stage))

    def actions(self, rank: int) -> Iterator[Action]:
        """The actions of `rank`, in order."""
        stage = self._only_stage(rank)
        splits, lag = self.splits(stage), self.lag(stage)
        for number, own in self._flushes(stage, rank):
            weights = [WeightGradient(stage, unit, number) for unit in own] if splits else []
            for forward, turn in alternate(len(own), self._ahead(stage, len(own))):
                step = self._forward if forward else self._backward
                yield from step(stage, own[turn], version=number)
                if not forward and turn >= lag:
                    yield from weights[turn - lag : turn - lag + 1]
            yield from weights[max(0, len(own) - lag) :]
            yield from self._update(stage, number)

    @abstractmethod
    def _ahead(self, stage: int, count: int) -> int:
        """Forwards before the first backward, of `count`."""
