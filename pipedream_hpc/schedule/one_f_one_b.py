"""1F1B and 1F1B-RR: one forward, one backward, replicas in round robin (paper, section 3.2).

Four stages, one rank each; F and B are drawn equally long, U is an optimizer step::

    stage 0   F0 F1 F2 F3          B0 F4 B1 F5 B2 F6 B3 ...
    stage 1      F0 F1 F2       B0 F3 B1 F4 B2 F5 B3 F6 ...
    stage 2         F0 F1    B0 F2 B1 F3 B2 F4 B3 F5 B4 ...
    stage 3            F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 ...
              start-up        steady state                  time ──►

Two replicas, then one (2-1): minibatch k goes to replica k mod R of every stage, and its backward
to where its forward was. Every replica takes one optimizer step per round of R minibatches::

    stage 0 a   F0 F2 B0 (reduce, U) F4 B2 (reduce, U) ...
    stage 0 b   F1 F3 B1 (reduce, U) F5 B3 (reduce, U) ...
    stage 1     F0 B0 U F1 B1 U F2 B2 U F3 B3 U ...

The order on every rank is fixed in advance: no rank ever asks another what to do next.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipedream_hpc.schedule.actions import Action
from pipedream_hpc.schedule.routed import Routed, alternate


@dataclass(frozen=True)
class OneFOneB(Routed):
    """1F1B-RR; 1F1B where every stage has one replica."""

    newest = True

    def in_flight(self, stage: int) -> int:
        """W + 1: those of the warm-up and the current one."""
        return self._warm_ups[stage] + 1

    def versions(self, stage: int) -> int:
        """W + 1: every minibatch in flight may hold a version of its own."""
        return self._warm_ups[stage] + 1

    def actions(self, rank: int) -> Iterator[Action]:
        """The actions of `rank`, in order."""
        stage = self._only_stage(rank)
        own, done, steps = self._own(stage, rank), 0, self.gradient_accumulation_steps
        count = len(own)
        for forward, turn in alternate(count, self._warm_ups[stage]):
            microbatch = own[turn]
            if forward:
                yield from self._forward(stage, microbatch, self._version(stage, microbatch))
                continue
            last = (turn + 1) % steps == 0 or turn + 1 == count
            yield from self._backward(stage, microbatch, self._backward_version(stage, microbatch), last=last)
            if last:
                yield from self._update(stage, done)
                done += 1
        if done < self._rounds(stage):
            # The last round is short and has no minibatch for this replica; it takes part all the
            # same, so that all replicas continue with the same weights.
            yield from self._update(stage, done)

    def _version(self, stage: int, microbatch: int) -> int:
        """The newest at its forward: there was a backward for every turn but the last W."""
        return max(0, microbatch // len(self.layout[stage]) - self._warm_ups[stage]) // self.gradient_accumulation_steps

    def _backward_version(self, stage: int, microbatch: int) -> int:
        """The version of its forward, which is stashed."""
        return self._version(stage, microbatch)
