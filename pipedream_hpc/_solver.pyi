"""The inner loop of the partition solver (C++, csrc/reach.hpp); planning/solver/search.py is its only user."""

from collections.abc import Sequence
from typing import final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

@final
class Reach:
    """On how few devices a pipeline keeps within a given time per minibatch.

    With N cuts, M devices in the row, and P rows in every table (row (d - 1) mod P is for stages that
    end on device d - 1, column m - 1 for m replicas):

    Args:
        round_s: (P, M), one synchronisation of no bytes, in seconds.
        round_s_per_byte: (P, M), and of every byte of parameters more.
        parameter_bytes: (N,), of all layers before each cut.
        copies: rows side by side.
        straight: one replica per stage.
        overlap: whether the larger of compute and synchronisation counts, not their sum.
        first_output_free: whether the input stage is charged nothing for its output.
        levels: per level of links (into, out_of, transfer_s): shares (P, M) and seconds (N,).
        modes: ways to run a stage, (time_s, memory): compute before each cut (N,), and three triples
            (before, entering, leaving) of bytes (N,) for 1, 2 and 3 minibatches in flight, or none.
        memory_bytes: limit for those.
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
        """(last cut, replicas) of every stage of the pipeline on the fewest devices; None if there is none."""
