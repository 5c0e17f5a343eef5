"""Tally: what the output stage's units scored."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class Tally:
    """Scores of the output stage's units: (unit, mean over its samples, samples)."""

    parts: list[tuple[int, torch.Tensor, int]] = field(default_factory=list)

    def add(self, unit: int, mean: torch.Tensor, samples: int) -> None:
        # Read out only at the end of the epoch: reading a number waits for the device.
        self.parts.append((unit, mean, samples))

    def read(self) -> list[tuple[int, float, int]]:
        if not self.parts:
            return []
        units, means, samples = zip(*self.parts, strict=True)
        return list(zip(units, torch.stack(means).tolist(), samples, strict=True))
