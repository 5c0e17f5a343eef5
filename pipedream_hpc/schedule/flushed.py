"""Flushed: the base of schedules that drain the pipeline before every optimizer step. Backwards may be split in two.

A backward computes the gradient of the stage's input, B, for which the stage before waits, and those of its weights,
W, for which nobody waits before the optimizer step (Qi et al., Zero Bubble Pipeline Parallelism, ICLR 2024). Where it
is split, B goes first, and W fills what was idle. Two stages, four microbatches, F, B and W of equal length::

    whole   stage 0   F0 F1 .  .  BW BW F2 BW BW F3 BW BW .  BW BW U
            stage 1      F0 BW BW F1 BW BW F2 BW BW F3 BW BW       U

    split   stage 0   F0 F1 .  BW BW F2 BW BW F3 BW BW BW BW U
            stage 1      F0 B0 F1 BW BW F2 BW BW F3 B3 W0 W3 U

A split backward costs time, since what W needs has left the caches when its turn comes. So only those backwards are
split that shorten the critical path: of every minibatch the first few of a stage (`lag`), whose gradients reach
upstream so much sooner, a lead that all that follow keep; and the last few, when upstream has no forwards left to run
meanwhile. At most `lag` microbatches wait for their W while another's backward runs; the oldest comes first. With
stages of equal length, and W no longer than B, splitting all would end no sooner. Where stages have replicas all are
split, since upstream then waits for a different replica each time. The input stage's never are: nobody waits for them.

Gradients of weights add up in the order in which backwards end: after BW1 BW2 W0 W3 they are g1 + g2 + g0 + g3.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from pipedream_hpc.schedule.actions import Action, BackwardWeight
from pipedream_hpc.schedule.routed import Microbatched, alternate


@dataclass(frozen=True)
class Flushed(Microbatched, ABC):
    """Every replica runs ahead by some forwards, then alternates; one optimizer step per round."""

    #: Whether backwards are split, where that gains anything.
    split_backward = False
    synchronous = True

    def splits(self, stage: int) -> bool:
        """Whether another stage waits for the gradient of this one's input."""
        return self.split_backward and bool(self.sources(stage))

    def waiting(self, stage: int) -> int:
        """One more than the lag, unless no backward is split after those that wait all the time."""
        count = self._most_local(stage)
        return min(self.lag(stage) + 1, sum(self._is_split(stage, turn, count) for turn in range(count)))

    def actions(self, rank: int) -> Iterator[Action]:
        """The actions of `rank`, in order."""
        stage = self._only_stage(rank)
        lag = self.lag(stage)
        for round, own in self._flushes(stage, rank):
            count = len(own)
            is_split = [self._is_split(stage, turn, count) for turn in range(count)]
            waiting: deque[int] = deque()
            for forward, turn in alternate(count, self._ahead(stage, count)):
                split = is_split[turn]
                if forward:
                    yield from self._forward(stage, own[turn], round, split=split)
                    continue
                is_last = turn == count - 1
                yield from self._backward(stage, own[turn], round, last=is_last and not waiting, split=split)
                if split:
                    waiting.append(own[turn])
                    if len(waiting) > lag:
                        microbatch = waiting.popleft()
                        yield BackwardWeight(stage, microbatch, round, is_last and not waiting)
            while waiting:
                microbatch = waiting.popleft()
                yield BackwardWeight(stage, microbatch, round, not waiting)
            yield from self._update(stage, round)

    def _is_split(self, stage: int, turn: int, count: int) -> bool:
        """Whether a replica splits backward `turn` of its `count` of a round."""
        if not self.splits(stage):
            return False
        return self._replicated or turn < self.lag(stage) or turn >= count - self._tail(stage)

    @cached_property
    def _replicated(self) -> bool:
        return any(len(ranks) > 1 for ranks in self.layout)

    def _before(self, stage: int) -> int:
        """Ranks before the stage divided by its replicas, rounded up; the warm-up is that of the ranks behind it."""
        return -(-self._ranks_before[stage] // len(self.layout[stage]))

    @cached_property
    def _ranks_before(self) -> tuple[int, ...]:
        return tuple(accumulate((len(ranks) for ranks in self.layout[:-1]), initial=0))

    @abstractmethod
    def _ahead(self, stage: int, count: int) -> int:
        """Forwards before the first backward, of `count`."""

    @abstractmethod
    def _tail(self, stage: int) -> int:
        """Microbatches at the end of every round that are split, where a stage splits any."""
