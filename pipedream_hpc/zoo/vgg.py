"""VGG (Simonyan and Zisserman 2015, arXiv 1409.1556), the network with PipeDream's largest speedup.

The convolutions have 11 % of VGG16's weights and nearly all of its arithmetic, the classifier the reverse. So a plan
replicates the convolutions, and puts the classifier in a stage of its own::

    images ──► 13 convolutions ──────► flatten ──► 3 linear layers ──► logits
               14.7 M weights                      123.6 M weights
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from pipedream_hpc.zoo import initial


class VGG(nn.Module):
    """VGG: groups of 3x3 convolutions, each followed by a pooling that halves the image, and a classifier.

    Takes images, float (batch, channels, height, width), height and width at least 2**len(groups); returns logits,
    float (batch, classes).

    Args:
        groups: output channels of the convolutions of every group.
        classes: number of classes.
        channels: channels of the images.
        batch_norm: insert BatchNorm after every convolution.
        grid: height and width of the classifier's input; other sizes are averaged to it.
        hidden: width of the classifier's two hidden layers.
        dropout: dropout probability after each hidden layer.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[int]],
        classes: int,
        *,
        channels: int = 3,
        batch_norm: bool = False,
        grid: int = 7,
        hidden: int = 4096,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        features: list[nn.Module] = []
        for widths in groups:
            for width in widths:
                features.append(nn.Conv2d(channels, width, 3, padding=1))
                if batch_norm:
                    features.append(nn.BatchNorm2d(width))
                # Not in place: a cut may be right before it, and a tensor must not change after it was sent.
                features.append(nn.ReLU())
                channels = width
            features.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*features)
        self.pool = nn.AdaptiveAvgPool2d(grid)
        self.flatten = nn.Flatten()
        self.classifier = nn.Sequential(
            nn.Linear(channels * grid * grid, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, classes),
        )
        initial.he(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits (batch, classes) for images (batch, channels, height, width)."""
        logits: torch.Tensor = self.classifier(self.flatten(self.pool(self.features(images))))
        return logits


def vgg16(classes: int = 1000, batch_norm: bool = False) -> VGG:
    """Create a VGG16, configuration D of the paper, for images of 3 x 224 x 224.

    With 1000 classes it has 138,357,544 parameters; 138,365,992 with BatchNorm.
    """
    groups = [[64] * 2, [128] * 2, [256] * 3, [512] * 3, [512] * 3]
    return VGG(groups, classes, batch_norm=batch_norm)


def vgg_small(
    classes: int = 10, channels: int = 3, widths: Sequence[int] = (16, 32, 64), hidden: int = 64, dropout: float = 0.5
) -> VGG:
    """Create a VGG with BatchNorm that a CPU trains in seconds, for images of 32 x 32, 28 x 28 or 8 x 8.

    There are two convolutions per group. The classifier reads the average of each channel, so images may have any
    height and width of at least 2**len(widths).
    """
    groups = [[width] * 2 for width in widths]
    return VGG(groups, classes, channels=channels, batch_norm=True, grid=1, hidden=hidden, dropout=dropout)
