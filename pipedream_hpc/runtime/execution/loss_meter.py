"""Loss meter: the scores of the output stage's microbatches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from pipedream_hpc.runtime.execution.score import Score, require_count


@dataclass
class LossMeter:
    """Records the scores of microbatches: the loss in training, one or more metrics in an evaluation.

    Attributes:
        entries: (microbatch, means, weights); means have no dimensions or the shape (k,), the same for all entries, and
            so have weights, unless all are the number of samples.
    """

    entries: list[tuple[int, torch.Tensor, int | torch.Tensor]] = field(default_factory=list)

    def add(self, microbatch: int, scores: Sequence[Score], samples: int) -> None:
        """Record the scores of a microbatch."""
        # Read only at the end of a pass: reading a number waits for the device.
        means = scores[0].mean.detach() if len(scores) == 1 else torch.stack([each.mean.double() for each in scores])
        if all(each.count is None for each in scores):
            self.entries.append((microbatch, means, samples))
            return
        counts = [samples if each.count is None else each.count for each in scores]
        weights = torch.stack([torch.as_tensor(each, dtype=torch.float64, device=means.device) for each in counts])
        self.entries.append((microbatch, means, weights))

    def read(self) -> list[tuple[int, list[float], list[float]]]:
        """Return (microbatch, means, weights) of all microbatches, k of each.

        Raises:
            PipedreamError: a count on a GPU was negative.
        """
        if not self.entries:
            return []
        microbatches, means, weights = zip(*self.entries, strict=True)
        values = torch.stack(means).view(len(means), -1).tolist()
        for weight in weights:
            for each in weight.tolist() if isinstance(weight, torch.Tensor) else ():
                require_count(each, "a loss or metric")
        return [
            (microbatch, own, weight.tolist() if isinstance(weight, torch.Tensor) else [weight] * len(own))
            for microbatch, own, weight in zip(microbatches, values, weights, strict=True)
        ]
