"""Naive pipelining: 1F1B with a single weight version, to see what weight stashing is for.

The order is that of 1F1B, but an update overwrites the weights that minibatches in flight began
with. Two stages, vN what stage 0 runs on::

              v0 v0 v0 v1 v1 v2
    stage 0   F0 F1 B0 F2 B1 F3 ...         B1 on v1, though F1 ran on v0
    stage 1      F0 B0 F1 B1 F2 ...                             time ──►

The gradient of such a backward is that of no function: its activations are of one version, its
weights of another (paper, section 3.3). For ablations only.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipedream_hpc.schedule.one_f_one_b import OneFOneB


@dataclass(frozen=True)
class Naive(OneFOneB):
    """1F1B-RR whose backwards run on whatever the newest version is."""

    stashes = False

    def versions(self, stage: int) -> int:
        """One, overwritten by every update."""
        return 1

    def _backward_version(self, stage: int, minibatch: int) -> int:
        """As many as there were updates: one for every `accumulate` backwards before it."""
        return minibatch // len(self.layout[stage]) // self.accumulate
