"""BSP data parallel: the whole model on every rank, gradients averaged after every minibatch.

Three ranks; A is the all-reduce, for which all wait::

    rank 0   F0 B0 A U F3 B3 A U F6 B6 A U
    rank 1   F1 B1 A U F4 B4 A U       A U     there are no minibatches 7 and 8: the last round is
    rank 2   F2 B2 A U F5 B5 A U       A U     short, and all ranks end with the same weights

A round has as many minibatches as there are ranks (the paper's baseline, section 2.1).
"""

from __future__ import annotations

from dataclasses import dataclass

from pipedream_hpc.schedule.actions import ScheduleError
from pipedream_hpc.schedule.model_parallel import ModelParallel


@dataclass(frozen=True)
class DataParallel(ModelParallel):
    """One minibatch at a time on every replica of a single stage.

    Raises:
        ScheduleError: the layout has more than one stage.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.layout) != 1:
            raise ScheduleError(
                f"data-parallel runs the whole model on every rank, but the plan has {len(self.layout)} stages: "
                "use a plan of one stage, or another schedule"
            )
