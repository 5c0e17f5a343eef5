"""Inception-v3 (Szegedy et al. 2016, arXiv 1512.00567): blocks of parallel branches, a graph and not a chain.

The branches of a block read the same tensor, and their outputs are stacked along the channels::

        ┌── 1x1 ───────────────┐
        ├── 1x1 ── 5x5 ────────┤
    x ──┤                      ├── stack ──►
        ├── 1x1 ── 3x3 ── 3x3 ─┤
        └── average ── 1x1 ────┘
"""

from __future__ import annotations

import torch
from torch import nn

from pipedream_hpc.models import initial


class Branches(nn.Module):
    """Several paths from one tensor, float (batch, channels, height, width), stacked along the channels."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The branches' outputs side by side: (batch, sum of their channels, height, width)."""
        return torch.cat([branch(x) for branch in self.branches], dim=1)


def _unit(
    inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1, *, same: bool = True
) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU; `same` pads so that only the stride changes the image's size."""
    height, width = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    padding = (height // 2, width // 2) if same else (0, 0)
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, (height, width), stride=stride, padding=padding, bias=False),
        nn.BatchNorm2d(outputs, eps=1e-3),
        nn.ReLU(),
    )


def _average(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.AvgPool2d(3, stride=1, padding=1), _unit(inputs, outputs, 1))


def _wide(inputs: int, pooled: int) -> Branches:
    """35 x 35 pixels; 224 + `pooled` channels."""
    return Branches(
        _unit(inputs, 64, 1),
        nn.Sequential(_unit(inputs, 48, 1), _unit(48, 64, 5)),
        nn.Sequential(_unit(inputs, 64, 1), _unit(64, 96, 3), _unit(96, 96, 3)),
        _average(inputs, pooled),
    )


def _wide_to_middle(inputs: int) -> Branches:
    """35 x 35 to 17 x 17 pixels; 480 channels more."""
    return Branches(
        _unit(inputs, 384, 3, stride=2, same=False),
        nn.Sequential(_unit(inputs, 64, 1), _unit(64, 96, 3), _unit(96, 96, 3, stride=2, same=False)),
        nn.MaxPool2d(3, stride=2),
    )


def _middle(inputs: int, inner: int) -> Branches:
    """17 x 17 pixels, 7x7 convolutions as a row and a column of `inner` channels; 768 channels."""
    row, column = (1, 7), (7, 1)
    return Branches(
        _unit(inputs, 192, 1),
        nn.Sequential(_unit(inputs, inner, 1), _unit(inner, inner, row), _unit(inner, 192, column)),
        nn.Sequential(
            _unit(inputs, inner, 1),
            _unit(inner, inner, column),
            _unit(inner, inner, row),
            _unit(inner, inner, column),
            _unit(inner, 192, row),
        ),
        _average(inputs, 192),
    )


def _middle_to_narrow(inputs: int) -> Branches:
    """17 x 17 to 8 x 8 pixels; 512 channels more."""
    return Branches(
        nn.Sequential(_unit(inputs, 192, 1), _unit(192, 320, 3, stride=2, same=False)),
        nn.Sequential(
            _unit(inputs, 192, 1),
            _unit(192, 192, (1, 7)),
            _unit(192, 192, (7, 1)),
            _unit(192, 192, 3, stride=2, same=False),
        ),
        nn.MaxPool2d(3, stride=2),
    )


def _narrow(inputs: int) -> Branches:
    """8 x 8 pixels, branches that branch again; 2048 channels."""

    def fork(channels: int) -> Branches:
        return Branches(_unit(channels, 384, (1, 3)), _unit(channels, 384, (3, 1)))

    return Branches(
        _unit(inputs, 320, 1),
        nn.Sequential(_unit(inputs, 384, 1), fork(384)),
        nn.Sequential(_unit(inputs, 448, 1), _unit(448, 384, 3), fork(384)),
        _average(inputs, 192),
    )


class Inception(nn.Module):
    """Takes images, float (batch, channels, height, width), and returns logits, float (batch, classes).

    With an auxiliary head, training returns (logits, auxiliary logits), both (batch, classes); the
    paper adds the second loss with a small weight. torch.fx records the mode the network is in, and a
    pipeline ends in one tensor: to train in a pipeline, build it without the auxiliary head.

    Args:
        lower: from the images to where the auxiliary head reads.
        upper: from there to the last block.
        width: channels of the last block.
        classes: size of the output.
        auxiliary: the auxiliary head, or None.
        dropout: probability, before the classifier.
    """

    def __init__(
        self,
        lower: nn.Sequential,
        upper: nn.Sequential,
        width: int,
        classes: int,
        auxiliary: nn.Sequential | None = None,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.lower = lower
        self.auxiliary = auxiliary
        self.upper = upper
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(width, classes)
        initial.he(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Logits (batch, classes); in training with an auxiliary head, those and the auxiliary ones."""
        x = self.lower(images)
        logits: torch.Tensor = self.classifier(self.dropout(self.flatten(self.pool(self.upper(x)))))
        if self.training and self.auxiliary is not None:
            return logits, self.auxiliary(x)
        return logits


def inception_v3(classes: int = 1000, auxiliary: bool = True) -> Inception:
    """Inception-v3 for images of 3 x 299 x 299.

    With 1000 classes it has 27,161,264 parameters, without the auxiliary head 23,834,568.
    """
    lower = nn.Sequential(
        _unit(3, 32, 3, stride=2, same=False),  # 299 ──► 149
        _unit(32, 32, 3, same=False),
        _unit(32, 64, 3),
        nn.MaxPool2d(3, stride=2),  # 147 ──► 73
        _unit(64, 80, 1),
        _unit(80, 192, 3, same=False),
        nn.MaxPool2d(3, stride=2),  # 71 ──► 35
        _wide(192, pooled=32),
        _wide(256, pooled=64),
        _wide(288, pooled=64),
        _wide_to_middle(288),
        *(_middle(768, inner) for inner in (128, 160, 160, 192)),
    )
    head = nn.Sequential(
        nn.AvgPool2d(5, stride=3),  # 17 ──► 5
        _unit(768, 128, 1),
        _unit(128, 768, 5, same=False),
        nn.Flatten(),
        nn.Linear(768, classes),
    )
    upper = nn.Sequential(_middle_to_narrow(768), _narrow(1280), _narrow(2048))
    return Inception(lower, upper, 2048, classes, head if auxiliary else None)


def inception_tiny(classes: int = 10, channels: int = 3, auxiliary: bool = False) -> Inception:
    """Three blocks of branches, one that forks again, for images of 32 x 32 down to 8 x 8."""
    fork = Branches(_unit(4, 4, (1, 3)), _unit(4, 4, (3, 1)))
    block = Branches(_unit(8, 4, 1), nn.Sequential(_unit(8, 4, 1), fork), _average(8, 4))
    lower = nn.Sequential(_unit(channels, 8, 3), block)
    upper = nn.Sequential(
        Branches(_unit(16, 16, 3, stride=2, same=False), nn.MaxPool2d(3, stride=2)),
        Branches(_unit(32, 16, 1), nn.Sequential(_unit(32, 8, 1), _unit(8, 16, 3))),
    )
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes))
    return Inception(lower, upper, 32, classes, head if auxiliary else None)
