"""Fit: α and β of a link from how long messages took.

Links with a token bucket (limited cloud and traffic-shaped networks), sockets with deep buffers and
messages that fit in a cache all have a fast beginning. Training sends long messages back to back, so
what counts is the rate that lasts, which only the largest messages show::

    seconds │                 ╱ ·          β from the slope of the largest sizes
            │              ╱  ╱
            │            ·  ╱
            │         ╱   ╱                ·  burst: faster than a lasting β allows
            │       ·   ╱
            │ · ·  ╱                       α from the smallest
            └──────────────── bytes
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

#: How much slower the largest sizes must be than the fit through all before this is called a burst.
_BURST = 1.3
#: The largest sizes are those from the largest over this: three, if they double.
_TAIL = 4


def fit(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Least-squares α in seconds and β in bytes per second of seconds = α + size / β.

    Errors are taken relative to the time, so that small messages count as much as large ones. If
    there is a burst, β is the median slope (Theil-Sen) of the three largest sizes and α the shortest time.

    Args:
        sizes: bytes, ascending, at least two.
        seconds: what each took, above 0.
    """
    size, second = np.asarray(sizes, float), np.asarray(seconds, float)
    (latency, per_byte), *_ = np.linalg.lstsq(
        np.stack([1 / second, size / second], axis=1), np.ones(len(size)), rcond=None
    )
    lasting = _tail_slope(size, second)
    if lasting > _BURST * max(per_byte, 0):
        # What the smallest message still sends at the faster rate is nothing beside α.
        latency, per_byte = second.min(), lasting
    if latency < 0 or per_byte <= 0:
        # Noise must not make a link that takes no time: each then comes from the messages that
        # show it best.
        latency, per_byte = second.min(), second[-1] / size[-1]
    return float(latency), 1 / float(per_byte)


def _tail_slope(size: np.ndarray, second: np.ndarray) -> float:
    """Median seconds per byte between any two of the largest sizes; 0 if there are too few to tell."""
    tail = np.flatnonzero(size * _TAIL >= size[-1])
    if len(tail) < 3:
        return 0.0
    return float(np.median([(second[b] - second[a]) / (size[b] - size[a]) for a, b in combinations(tail, 2)]))
