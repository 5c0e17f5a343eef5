"""Loss meter: the scores of the output stage's microbatches."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class LossMeter:
    """Records the scores of microbatches: the loss in training, one or more metrics in an evaluation.

    Attributes:
        entries: (microbatch, scores, samples); scores are means over the samples, in a tensor without dimensions or
            of shape (k,), the same for all entries.
    """

    entries: list[tuple[int, torch.Tensor, int]] = field(default_factory=list)

    def add(self, microbatch: int, scores: torch.Tensor, samples: int) -> None:
        """Record the scores of a microbatch."""
        # Read only at the end of a pass: reading a number waits for the device.
        self.entries.append((microbatch, scores, samples))

    @property
    def last(self) -> tuple[int, torch.Tensor, int]:
        """The newest entry."""
        return self.entries[-1]

    def read(self) -> list[tuple[int, list[float], int]]:
        """Return (microbatch, scores, samples) of all microbatches, the scores as a list of k numbers."""
        if not self.entries:
            return []
        microbatches, scores, samples = zip(*self.entries, strict=True)
        values = torch.stack(scores).view(len(scores), -1).tolist()
        return list(zip(microbatches, values, samples, strict=True))
