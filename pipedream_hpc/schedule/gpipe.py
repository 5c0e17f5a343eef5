"""GPipe: all forwards of a minibatch's microbatches, then all backwards (Huang et al., 2019).

Three stages, minibatches of four microbatches::

    stage 0   F0 F1 F2 F3             B0 B1 B2 B3 U F4 F5 ...
    stage 1      F0 F1 F2 F3       B0 B1 B2 B3 U       F4 ...
    stage 2         F0 F1 F2 F3 B0 B1 B2 B3 U
                                                    time ──►

Backwards run in the order of the forwards, so that gradients add up in the order of 1F1B with
flush, and both train to the same bits where backwards are whole. A stage holds all m microbatches; the bubble is
(p - 1) / (m + p - 1) of the time with p stages.

`gpipe-split` splits backwards (see `flushed`): a stage splits twice as many as there are stages before it, and the
pipeline is empty (p - 1) W sooner. Two stages, F, B and W of equal length::

    whole   stage 0   F0 F1 F2 F3 .  .  .  BW BW BW BW BW BW BW BW U
            stage 1      F0 F1 F2 F3 BW BW BW BW BW BW BW BW U

    split   stage 0   F0 F1 F2 F3 .  .  BW BW BW BW BW BW BW BW U
            stage 1      F0 F1 F2 F3 B0 B1 BW BW BW BW W0 W1 U

Half as many would do if all stages took equally long. The other half is a lead for a stage that takes longer than those
before it, or is delayed now and then. With replicas, where all backwards are split, the lead gains next to nothing, and
the lag is as many as there are ranks before the stage.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipedream_hpc.schedule.flushed import Flushed


@dataclass(frozen=True)
class GPipe(Flushed):
    """All forwards of every minibatch, all its backwards, one optimizer step."""

    def in_flight(self, stage: int) -> int:
        """All microbatches of a minibatch that a replica gets."""
        return self._most_local(stage)

    def lag(self, stage: int) -> int:
        """Twice as many microbatches as there are stages before it; where stages have replicas, as there are ranks."""
        if not self.splits(stage):
            return 0
        return min((1 if self._replicated else 2) * self._before(stage), self._most_local(stage))

    def _ahead(self, stage: int, count: int) -> int:
        return max(0, count - 1)

    def _tail(self, stage: int) -> int:
        return 0  # upstream, which takes as long for each, is not done yet with the one before


@dataclass(frozen=True)
class GPipeSplit(GPipe):
    """GPipe with split backwards."""

    split_backward = True
