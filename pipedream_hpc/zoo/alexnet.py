"""AlexNet in its one-column form (Krizhevsky 2014, arXiv 1404.5997).

The network of 2012 had two columns, one per GPU, connected in some layers. This is the later network of one column,
which is the one usually benchmarked. As in VGG16, the linear layers have most of the weights and little of the
arithmetic::

    images ──► 5 convolutions ──────► flatten ──► 3 linear layers ──► logits
               2.5 M weights                      58.6 M weights
"""

from __future__ import annotations

import torch
from torch import nn

from pipedream_hpc.zoo import initial


class AlexNet(nn.Module):
    """AlexNet: takes images, float (batch, 3, 224, 224); returns logits, float (batch, classes).

    Args:
        classes: number of classes.
        dropout: dropout probability before each of the two hidden linear layers.
    """

    def __init__(self, classes: int = 1000, dropout: float = 0.5) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, stride=4, padding=2),  # 224 ──► 55
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2),  # overlapping windows; 55 ──► 27
            nn.Conv2d(64, 192, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2),  # 27 ──► 13
            nn.Conv2d(192, 384, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2),  # 13 ──► 6
        )
        self.pool = nn.AdaptiveAvgPool2d(6)
        self.flatten = nn.Flatten()
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(256 * 6 * 6, 4096),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(4096, 4096),
            nn.ReLU(),
            nn.Linear(4096, classes),
        )
        initial.he(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits (batch, classes) for images (batch, 3, 224, 224)."""
        logits: torch.Tensor = self.classifier(self.flatten(self.pool(self.features(images))))
        return logits


def alexnet(classes: int = 1000) -> AlexNet:
    """Create an AlexNet for images of 3 x 224 x 224; 61,100,840 parameters with 1000 classes."""
    return AlexNet(classes)
