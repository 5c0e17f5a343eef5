"""Flushed: what schedules have in common whose pipe is empty at every update, and backwards in two parts.

A backward computes the gradient of the stage's input, B, for which the stage before waits, and those of its weights,
W, for which nobody waits before the update (Qi et al., Zero Bubble Pipeline Parallelism, ICLR 2024). Where it is split,
B goes first, and W falls into what was idle. Two stages, four microbatches, F, B and W of equal length::

    whole   stage 0   F0 F1 .  .  BW BW F2 BW BW F3 BW BW .  BW BW U
            stage 1      F0 BW BW F1 BW BW F2 BW BW F3 BW BW       U

    split   stage 0   F0 F1 .  BW BW F2 BW BW F3 BW BW BW BW U
            stage 1      F0 B0 F1 BW BW F2 BW BW F3 B3 W0 W3 U

To split a backward has its price, since what W needs has left the caches when its turn comes. So only those are split
that somebody gains by: of every minibatch the first few of a stage (`lag`), whose gradients come upstream so much
sooner, a lead that all that follow keep; and the last few, when upstream has no forwards left to do meanwhile. No more
than `lag` units wait for their W while another's backward runs; the oldest comes first. With stages of equal length,
and W no longer than B, nothing would be done any sooner if all were split. Where stages have replicas all are, since
upstream then waits for now the one and now the other. The input stage's never are: nobody waits for them.

Gradients of weights add up in the order in which units are done with: after BW1 BW2 W0 W3 they are g1 + g2 + g0 + g3.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from pipedream_hpc.schedule.actions import Action, WeightGradient
from pipedream_hpc.schedule.routed import Microbatched, alternate


@dataclass(frozen=True)
class Flushed(Microbatched, ABC):
    """Every replica runs ahead by some forwards, then alternates; one update per minibatch of `microbatches` units.

    Attributes:
        split: whether backwards are split, where that gains anything.
    """

    split: bool = False
    synchronous = True

    def splits(self, stage: int) -> bool:
        """Where another stage is sent the gradient."""
        return self.split and bool(self.sources(stage))

    def waiting(self, stage: int) -> int:
        """One more than the lag, unless no unit is split after those that wait all the time."""
        count = self._most_local(stage)
        return min(self.lag(stage) + 1, sum(self._puts_off(stage, turn, count) for turn in range(count)))

    def puts_off(self, stage: int, unit: int) -> bool:
        """The first and the last of a replica's in every minibatch."""
        if not self.splits(stage):
            return False
        turn, count = self._place(stage, unit)
        return self._puts_off(stage, turn, count)

    def last_of_round(self, stage: int, unit: int) -> bool:
        """The last one, unless that is done with before the first whose weights' gradients wait until the end."""
        if not self.splits(stage):
            return super().last_of_round(stage, unit)
        turn, count = self._place(stage, unit)
        return turn == (count if self._puts_off(stage, count - 1, count) else self.lag(stage)) - 1

    def actions(self, rank: int) -> Iterator[Action]:
        """The actions of `rank`, in order."""
        stage = self._only_stage(rank)
        lag = self.lag(stage)
        for number, own in self._flushes(stage, rank):
            waiting: deque[int] = deque()
            for forward, turn in alternate(len(own), self._ahead(stage, len(own))):
                step = self._forward if forward else self._backward
                yield from step(stage, own[turn], version=number)
                if not forward and self._puts_off(stage, turn, len(own)):
                    waiting.append(own[turn])
                    if len(waiting) > lag:
                        yield WeightGradient(stage, waiting.popleft(), number)
            for unit in waiting:
                yield WeightGradient(stage, unit, number)
            yield from self._update(stage, number)

    def _puts_off(self, stage: int, turn: int, count: int) -> bool:
        """Whether a replica splits backward `turn` of its `count` of a minibatch."""
        if not self.splits(stage):
            return False
        return self._replicated or turn < self.lag(stage) or turn >= count - self._tail(stage)

    @cached_property
    def _replicated(self) -> bool:
        return any(len(ranks) > 1 for ranks in self.layout)

    def _place(self, stage: int, unit: int) -> tuple[int, int]:
        """Which of its replica's units of the minibatch `unit` is, and how many these are."""
        replicas, first = len(self.layout[stage]), unit // self.microbatches * self.microbatches
        turn, last = (unit - first) // replicas, min(first + self.microbatches, self.minibatches) - 1
        return turn, turn + 1 + (last - unit) // replicas

    def _before(self, stage: int) -> int:
        """Ranks before the stage by its replicas, rounded up, as the warm-up is of those behind it."""
        return -(-sum(map(len, self.layout[:stage])) // len(self.layout[stage]))

    @abstractmethod
    def _ahead(self, stage: int, count: int) -> int:
        """Forwards before the first backward, of `count`."""

    @abstractmethod
    def _tail(self, stage: int) -> int:
        """Units at the end of every minibatch whose backward a replica splits, where it splits any."""
