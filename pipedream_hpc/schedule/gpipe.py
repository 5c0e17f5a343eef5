"""GPipe: all forwards of a minibatch's microbatches, then all backwards (Huang et al., 2019).

Three stages, minibatches of four microbatches::

    stage 0   F0 F1 F2 F3             B0 B1 B2 B3 U F4 F5 ...
    stage 1      F0 F1 F2 F3       B0 B1 B2 B3 U       F4 ...
    stage 2         F0 F1 F2 F3 B0 B1 B2 B3 U
                                                    time ──►

Backwards run in the order of the forwards, so that gradients add up in the order of 1F1B with
flush, and both leave the same bits. A stage holds all m microbatches; the bubble is
(p - 1) / (m + p - 1) of the time with p stages.

Where backwards are split (see `flushed`) the pipe is empty (p - 1) W sooner. Weights' gradients follow the input's at
once: to put them off for longer gains nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipedream_hpc.schedule.flushed import Flushed


@dataclass(frozen=True)
class GPipe(Flushed):
    """All forwards of every minibatch of `microbatches` units, all its backwards, one update."""

    def in_flight(self, stage: int) -> int:
        """All microbatches that a replica gets of a minibatch."""
        return self._most_local(stage)

    def _ahead(self, stage: int, count: int) -> int:
        return max(0, count - 1)
