"""The inner loop of the partition solver (C++: csrc/solver/min_devices.hpp), used by planning/solver/search.py only."""

from collections.abc import Sequence
from typing import final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

@final
class MinDevices:
    """The fewest devices on which a pipeline keeps within a given time per microbatch.

    With N cuts, M devices in the row, and P rows in every table. Row (d - 1) mod P is for stages that end on device
    d - 1, column m - 1 for m replicas.

    Args:
        round_s: (P, M), time of a synchronisation of 0 bytes, in seconds.
        round_s_per_byte: (P, M), additional time per byte of parameters.
        parameter_bytes: (N,), of all layers before each cut.
        copies: number of parallel rows.
        straight: one replica per stage.
        overlap: whether compute and synchronisation overlap: the larger counts, not the sum.
        first_output_free: whether the first stage's output costs nothing.
        levels: per level of links (into, out_of, transfer_s): shares (P, M) and seconds (N,).
        modes: how a stage can run, (time_s, memory): compute before each cut (N,), and three triples
            (before, entering, leaving) of bytes (N,) for 1, 2 and 3 microbatches in flight, or none.
        memory_bytes: limit of these bytes.
        begins: by last cut, the first cuts of allowed stages.

    Raises:
        ValueError: the shapes do not agree.
    """

    def __init__(
        self,
        *,
        round_s: Floats,
        round_s_per_byte: Floats,
        parameter_bytes: Floats,
        copies: float,
        straight: bool,
        overlap: bool,
        first_output_free: bool,
        levels: Sequence[tuple[Floats, Floats, Floats]],
        modes: Sequence[tuple[Floats, Sequence[tuple[Floats, Floats, Floats]]]],
        memory_bytes: float,
        begins: Sequence[Sequence[int]],
    ) -> None: ...
    def within(self, time_s: float) -> list[tuple[int, int]] | None:
        """Return (last cut, replicas) of each stage of the pipeline on the fewest devices; None if there is none."""
