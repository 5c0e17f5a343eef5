"""1F1B with flush: microbatches in 1F1B order, an optimizer step when the pipeline is empty (PipeDream-Flush).

Three stages, minibatches of four microbatches (PipeDream-2BW, ICML 2021, section 3.2.1)::

    stage 0   F0 F1 F2       B0 F3 B1    B2    B3 U F4 F5 F6 ...
    stage 1      F0 F1    B0 F2 B1 F3 B2    B3 U       F4 F5 ...
    stage 2         F0 B0 F1 B1 F2 B2 F3 B3 U             F4 ...
                                          drain             time ──►

One weight version, and the semantics of plain minibatch SGD, as in GPipe; but a stage holds no more
than W + 1 microbatches, W of them from the warm-up, where GPipe holds all m. The bubble is the same:
(p - 1) / (m + p - 1) of the time with p stages.

ZB-H1 splits backwards (see `flushed`): a stage begins by splitting as many as there are stages before it. Upstream
gets its gradients as if backwards were nothing but B. The schedule is as short as ZB-H1 of Qi et al. (ICLR 2024,
section 2.2), 2 (p - 1) W shorter than with whole backwards, and every stage holds what the first one does, p
microbatches. With F, B and W of equal length::

    1F1B    stage 0   F0 F1 F2 .  .  .  .  BW BW F3 BW BW .  BW BW .  BW BW U
            stage 1      F0 F1 .  .  BW BW F2 BW BW F3 BW BW .  BW BW       U
            stage 2         F0 BW BW F1 BW BW F2 BW BW F3 BW BW             U

    ZB-H1   stage 0   F0 F1 F2 .  .  BW BW F3 BW BW BW BW BW BW U
            stage 1      F0 F1 .  B0 F2 BW BW F3 B2 W0 B3 W2 W3 U
            stage 2         F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3 U

ZB-H2 has twice the warm-up and twice the lag. Once the pipeline is full no stage waits for another, not even around
optimizer steps: the next minibatch comes in while the gradients of this one's weights are computed. Every stage has
2p - 1 microbatches in flight. Two stages, minibatches of four::

    ZB-H2   stage 0   F0 F1 F2 BW BW F3 BW BW BW BW BW BW U F4 F5 F6 BW BW F7 ...
            stage 1      F0 B0 F1 B1 F2 BW BW F3 B3 W0 W1 W3 U F4 B4 F5 B5 F6 ...
"""

from __future__ import annotations

from dataclasses import dataclass

from pipedream_hpc.schedule.flushed import Flushed


@dataclass(frozen=True)
class Flush(Flushed):
    """1F1B within every minibatch, then one optimizer step."""

    #: Warm-up and lag are so many times those of 1F1B.
    _times = 1

    def lag(self, stage: int) -> int:
        """As many microbatches as there are stages before it; with ZB-H2 twice as many."""
        return min(self._times * self._before(stage), self._most_local(stage)) if self.splits(stage) else 0

    def in_flight(self, stage: int) -> int:
        """Warm-up, lag and one, or all of a minibatch if they are fewer."""
        return min(self._times * self._warm_ups[stage] + 1 + self.lag(stage), self._most_local(stage))

    def _ahead(self, stage: int, count: int) -> int:
        return self._times * self._warm_ups[stage]

    def _tail(self, stage: int) -> int:
        # While the pipeline drains; with ZB-H2, which goes on without a bubble, from the output to the input stage.
        return self._times * (self._warm_ups[stage] + self._before(stage)) - self._times + 1


@dataclass(frozen=True)
class ZBH1(Flush):
    """1F1B with flush and split backwards."""

    split_backward = True


@dataclass(frozen=True)
class ZBH2(Flush):
    """ZB-H1 with twice the warm-up and twice the lag: no bubble once the pipeline is full."""

    split_backward = True
    _times = 2
