"""Naive pipelining: 1F1B with a single weight version, to show what weight stashing is for.

The order is that of 1F1B, but an optimizer step overwrites the weights that minibatches in flight began
with. Two stages; vN is the version that stage 0 runs on::

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
    """1F1B-RR in which every backward runs on the newest version."""

    stashes = False

    def versions(self, stage: int) -> int:
        """One, overwritten by every optimizer step."""
        return 1

    def _backward_version(self, stage: int, microbatch: int) -> int:
        """The newest: there was a step for every `gradient_accumulation_steps` backwards before this one."""
        return microbatch // len(self.layout[stage]) // self.gradient_accumulation_steps
