"""2BW: 1F1B without flush and with two weight versions (PipeDream-2BW, ICML 2021, section 3.1).

Three stages, minibatches of two microbatches (0 1, 2 3, ...); minibatch t runs on version t - 1,
the first two on version 0, so the pipeline never drains::

    stage 0   F0 F1 F2       B0 F3 B1 U F4 B2 F5 B3 U F6 ...
    stage 1      F0 F1    B0 F2 B1 U F3 B2 F4 B3 U F5 ...
    stage 2         F0 B0 F1 B1 U F2 B2 F3 B3 U F4 B4 ...
                    v0 ······················   v1 ··    time ──►

All stages and replicas learn by W(t+1) = W(t) - ν·∇f(W(t-1)). Two slabs suffice: minibatch t needs
version t - 1, and while it is in flight no version beyond t is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipedream_hpc.schedule.actions import Action, ScheduleError
from pipedream_hpc.schedule.routed import Microbatched, alternate


@dataclass(frozen=True)
class TwoBW(Microbatched):
    """1F1B over all microbatches, an optimizer step after the last backward of every minibatch.

    Raises:
        ScheduleError: minibatches are so small that a forward would come before the optimizer step that
            makes its version. That step follows the last backward of minibatch t - 2, and the
            first forward of minibatch t follows the backward W + 1 turns before it: every replica
            needs at least W microbatches of minibatch t - 1, and so a minibatch at least R·W.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.layout) == 1:
            return
        least = max(len(ranks) * ahead for ranks, ahead in zip(self.layout, self._warm_ups, strict=True))
        if self.n_microbatches < least:
            raise ScheduleError(
                f"2bw needs at least {least} microbatches per minibatch on {self._config} ranks, not "
                f"{self.n_microbatches}: with fewer, a forward would come before the optimizer step that makes its "
                "version"
            )

    def in_flight(self, stage: int) -> int:
        """W + 1, as in 1F1B."""
        return self._warm_ups[stage] + 1

    def versions(self, stage: int) -> int:
        """Two: the current one and its shadow."""
        return 2

    def actions(self, rank: int) -> Iterator[Action]:
        """The actions of `rank`, in order."""
        stage = self._only_stage(rank)
        own, rounds = self._own(stage, rank), self._rounds(stage)
        # A replica without a microbatch in some round takes part in its reduction before the next forward.
        upcoming = [microbatch // self.n_microbatches for microbatch in own] + [rounds]
        for round in range(upcoming[0]):
            yield from self._update(stage, round)
        for forward, turn in alternate(len(own), self._warm_ups[stage]):
            number = upcoming[turn]
            version = max(0, number - 1)
            if forward:
                yield from self._forward(stage, own[turn], version)
                continue
            yield from self._backward(stage, own[turn], version, last=upcoming[turn + 1] > number)
            for round in range(number, upcoming[turn + 1]):
                yield from self._update(stage, round)
