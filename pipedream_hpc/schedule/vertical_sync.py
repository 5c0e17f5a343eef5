"""1F1B with vertical sync: a minibatch uses the same weight version at every stage (paper, section 3.3).

The order is that of 1F1B; the versions differ. A minibatch uses on every stage the version that the
input stage used for it. Three stages, vN above the forwards that use it::

              v0 v0 v0          v1    v2    v3
    stage 0   F0 F1 F2       B0 F3 B1 F4 B2 F5 B3 ...
    stage 1      F0 F1    B0 F2 B1 F3 B2 F4 B3 ...        F3 on v1, though v2 is there
    stage 2         F0 B0 F1 B1 F2 B2 F3 B3 ...           F3 on v1, though v3 is there
                                                   time ──►

The gradient applied is ∇f(w_1^(t-n+1), ..., w_n^(t-n+1)): stale, but of one point. The price is
memory: every stage keeps as many versions as the input stage, W_0 + 1, and not just W_s + 1.

Where stages have different numbers of replicas, they update at different rates: version v of the input
stage has learnt from R_0·v minibatches, and stage s uses floor(R_0·v / R_s), the newest version that has
learnt from no more than those.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipedream_hpc.schedule.one_f_one_b import OneFOneB


@dataclass(frozen=True)
class VerticalSync(OneFOneB):
    """1F1B-RR in which the input stage chooses the version for all stages."""

    newest = False

    def versions(self, stage: int) -> int:
        """W_0 + 1 where all stages have the same number of replicas.

        In general ceil((R_0·W_0 + R_0 - g) / R_s) + 1 with g = gcd(R_0, R_s): when stage s has made
        version j, the next it needs is for a minibatch k >= j·R_s, hence floor(R_0·v / R_s) with
        R_0·v >= k - (k mod R_0) - R_0·W_0, and k mod R_0 is R_0 - g at most where k = j·R_s.
        """
        first, own = len(self.layout[0]), len(self.layout[stage])
        reach = first * self._warm_ups[0] + first - math.gcd(first, own)
        return -(-reach // own) + 1

    def _version(self, stage: int, microbatch: int) -> int:
        first, own = len(self.layout[0]), len(self.layout[stage])
        # The input stage's version.
        version = max(0, microbatch // first - self._warm_ups[0]) // self.gradient_accumulation_steps
        return first * version // own
