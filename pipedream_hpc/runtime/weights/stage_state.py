"""Stage state: the part of a stage that outlives a pass over the data."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from pipedream_hpc.runtime.weights.optimizer_step import StageOptimizer
from pipedream_hpc.runtime.weights.stash import WeightStash


@dataclass(frozen=True)
class StageState:
    """Weights, buffers and optimizer of one replica of one stage.

    Attributes:
        index: number of the stage.
        replica: number among the stage's replicas.
        module: the stage's module, which has the buffers.
        stash: the weights and torch's optimizer.
        optimizer: the optimizer step, with learning-rate scheduler and loss scale.
    """

    index: int
    replica: int
    module: nn.Module
    stash: WeightStash
    optimizer: StageOptimizer
