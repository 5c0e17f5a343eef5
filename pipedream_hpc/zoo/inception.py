"""Inception-v3 (Szegedy et al. 2016, arXiv 1512.00567): blocks of parallel branches, so a graph and not a chain.

The branches of a block read the same tensor, and their outputs are concatenated along the channels::

        ┌── 1x1 ───────────────┐
        ├── 1x1 ── 5x5 ────────┤
    x ──┤                      ├── concat ──►
        ├── 1x1 ── 3x3 ── 3x3 ─┤
        └── average ── 1x1 ────┘
"""

from __future__ import annotations

import torch
from torch import nn

from pipedream_hpc.zoo import initial


class Branches(nn.Module):
    """Parallel branches over one tensor, float (batch, channels, height, width)."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the concatenated outputs: (batch, sum of the branches' channels, height, width)."""
        return torch.cat([branch(x) for branch in self.branches], dim=1)


def _convolution(
    inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1, *, same: bool = True
) -> nn.Sequential:
    """Create convolution, BatchNorm and ReLU; with `same`, padding keeps the size of the image at stride 1."""
    height, width = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    padding = (height // 2, width // 2) if same else (0, 0)
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, (height, width), stride=stride, padding=padding, bias=False),
        nn.BatchNorm2d(outputs, eps=1e-3),
        nn.ReLU(),
    )


def _average(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.AvgPool2d(3, stride=1, padding=1), _convolution(inputs, outputs, 1))


def _wide(inputs: int, pooled: int) -> Branches:
    """Create a block for 35 x 35 pixels with 224 + `pooled` output channels."""
    return Branches(
        _convolution(inputs, 64, 1),
        nn.Sequential(_convolution(inputs, 48, 1), _convolution(48, 64, 5)),
        nn.Sequential(_convolution(inputs, 64, 1), _convolution(64, 96, 3), _convolution(96, 96, 3)),
        _average(inputs, pooled),
    )


def _wide_to_middle(inputs: int) -> Branches:
    """Create a block from 35 x 35 to 17 x 17 pixels that adds 480 channels."""
    return Branches(
        _convolution(inputs, 384, 3, stride=2, same=False),
        nn.Sequential(
            _convolution(inputs, 64, 1), _convolution(64, 96, 3), _convolution(96, 96, 3, stride=2, same=False)
        ),
        nn.MaxPool2d(3, stride=2),
    )


def _middle(inputs: int, inner: int) -> Branches:
    """Create a block for 17 x 17 pixels with 768 output channels; 7x7 convolutions are split into 1x7 and 7x1."""
    row, column = (1, 7), (7, 1)
    return Branches(
        _convolution(inputs, 192, 1),
        nn.Sequential(
            _convolution(inputs, inner, 1), _convolution(inner, inner, row), _convolution(inner, 192, column)
        ),
        nn.Sequential(
            _convolution(inputs, inner, 1),
            _convolution(inner, inner, column),
            _convolution(inner, inner, row),
            _convolution(inner, inner, column),
            _convolution(inner, 192, row),
        ),
        _average(inputs, 192),
    )


def _middle_to_narrow(inputs: int) -> Branches:
    """Create a block from 17 x 17 to 8 x 8 pixels that adds 512 channels."""
    return Branches(
        nn.Sequential(_convolution(inputs, 192, 1), _convolution(192, 320, 3, stride=2, same=False)),
        nn.Sequential(
            _convolution(inputs, 192, 1),
            _convolution(192, 192, (1, 7)),
            _convolution(192, 192, (7, 1)),
            _convolution(192, 192, 3, stride=2, same=False),
        ),
        nn.MaxPool2d(3, stride=2),
    )


def _narrow(inputs: int) -> Branches:
    """Create a block for 8 x 8 pixels with 2048 output channels, some of whose branches fork again."""

    def fork(channels: int) -> Branches:
        return Branches(_convolution(channels, 384, (1, 3)), _convolution(channels, 384, (3, 1)))

    return Branches(
        _convolution(inputs, 320, 1),
        nn.Sequential(_convolution(inputs, 384, 1), fork(384)),
        nn.Sequential(_convolution(inputs, 448, 1), _convolution(448, 384, 3), fork(384)),
        _average(inputs, 192),
    )


class Inception(nn.Module):
    """Inception: takes images, float (batch, channels, height, width); returns logits, float (batch, classes).

    In training with an auxiliary head it returns (logits, auxiliary logits), both (batch, classes); the paper adds
    the second loss with a small weight.

    Args:
        lower: blocks from the images to the input of the auxiliary head.
        upper: blocks from there to the last block.
        width: output channels of the last block.
        classes: number of classes.
        auxiliary: the auxiliary head, or None.
        dropout: dropout probability before the classifier.
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
        """Return logits (batch, classes); in training with an auxiliary head, (logits, auxiliary logits)."""
        x = self.lower(images)
        logits: torch.Tensor = self.classifier(self.dropout(self.flatten(self.pool(self.upper(x)))))
        if self.training and self.auxiliary is not None:
            return logits, self.auxiliary(x)
        return logits


def inception_v3(classes: int = 1000, auxiliary: bool = True) -> Inception:
    """Create an Inception-v3 for images of 3 x 299 x 299.

    With 1000 classes it has 27,161,264 parameters; 23,834,568 without the auxiliary head.
    """
    lower = nn.Sequential(
        _convolution(3, 32, 3, stride=2, same=False),  # 299 ──► 149
        _convolution(32, 32, 3, same=False),
        _convolution(32, 64, 3),
        nn.MaxPool2d(3, stride=2),  # 147 ──► 73
        _convolution(64, 80, 1),
        _convolution(80, 192, 3, same=False),
        nn.MaxPool2d(3, stride=2),  # 71 ──► 35
        _wide(192, pooled=32),
        _wide(256, pooled=64),
        _wide(288, pooled=64),
        _wide_to_middle(288),
        *(_middle(768, inner) for inner in (128, 160, 160, 192)),
    )
    head = nn.Sequential(
        nn.AvgPool2d(5, stride=3),  # 17 ──► 5
        _convolution(768, 128, 1),
        _convolution(128, 768, 5, same=False),
        nn.Flatten(),
        nn.Linear(768, classes),
    )
    upper = nn.Sequential(_middle_to_narrow(768), _narrow(1280), _narrow(2048))
    return Inception(lower, upper, 2048, classes, head if auxiliary else None)


def inception_tiny(classes: int = 10, channels: int = 3, auxiliary: bool = False) -> Inception:
    """Create three blocks of branches, one with a fork, for images from 8 x 8 to 32 x 32."""
    fork = Branches(_convolution(4, 4, (1, 3)), _convolution(4, 4, (3, 1)))
    block = Branches(_convolution(8, 4, 1), nn.Sequential(_convolution(8, 4, 1), fork), _average(8, 4))
    lower = nn.Sequential(_convolution(channels, 8, 3), block)
    upper = nn.Sequential(
        Branches(_convolution(16, 16, 3, stride=2, same=False), nn.MaxPool2d(3, stride=2)),
        Branches(_convolution(32, 16, 1), nn.Sequential(_convolution(32, 8, 1), _convolution(8, 16, 3))),
    )
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes))
    return Inception(lower, upper, 32, classes, head if auxiliary else None)
