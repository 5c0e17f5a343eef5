"""Fit: α and β of a link from measured message times.

Links with a token bucket (traffic-shaped and cloud networks), sockets with deep buffers and messages
that fit in a cache transfer the first bytes faster. Training sends long messages back to back, so the
sustained rate matters, which only the largest messages show::

    seconds │                 ╱ ·          β from the slope of the largest sizes
            │              ╱  ╱
            │            ·  ╱
            │         ╱   ╱                ·  burst: faster than the sustained β
            │       ·   ╱
            │ · ·  ╱                       α from the smallest
            └──────────────── bytes
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

#: There is a burst if the largest sizes are slower than the fit through all sizes by this factor.
_BURST = 1.3
#: The largest sizes are those of at least the largest size divided by this: three, if sizes double.
_TAIL = 4


def fit(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Return the least-squares α in seconds and β in bytes per second of seconds = α + size / β.

    Errors are relative to the time, so that small messages count as much as large ones. If there is a
    burst, β is the median slope (Theil-Sen) of the three largest sizes and α the shortest time.

    Args:
        sizes: message sizes in bytes, ascending, at least two.
        seconds: time of each message, above 0.
    """
    size, second = np.asarray(sizes, float), np.asarray(seconds, float)
    (latency, per_byte), *_ = np.linalg.lstsq(
        np.stack([1 / second, size / second], axis=1), np.ones(len(size)), rcond=None
    )
    sustained = _tail_slope(size, second)
    if sustained > _BURST * max(per_byte, 0):
        # The transfer time of the smallest message is negligible compared with α.
        latency, per_byte = second.min(), sustained
    if latency < 0 or per_byte <= 0:
        # Noise must not yield a link that takes no time: take α from the shortest time and β from the
        # largest message.
        latency, per_byte = second.min(), second[-1] / size[-1]
    return float(latency), 1 / float(per_byte)


def _tail_slope(size: np.ndarray, second: np.ndarray) -> float:
    """Return the median seconds per byte between any two of the largest sizes; 0 if there are fewer than three."""
    tail = np.flatnonzero(size * _TAIL >= size[-1])
    if len(tail) < 3:
        return 0.0
    return float(np.median([(second[b] - second[a]) / (size[b] - size[a]) for a, b in combinations(tail, 2)]))
