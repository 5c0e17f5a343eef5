"""Residual networks (He et al. 2016, arXiv 1512.03385), which PipeDream's planner runs data parallel.

Two tensors are live inside a block, one tensor is live between blocks::

    x ──┬── convolutions ──┬── + ── ReLU ──►
        └──── shortcut ────┘
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from pipedream_hpc.zoo import initial


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Create a convolution and a BatchNorm, whose shift replaces the bias."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
    )


class Residual(nn.Module):
    """A path of convolutions added to its own input, float (batch, channels, height, width).

    The shortcut is the identity where the shapes allow it, else a 1x1 convolution.

    Args:
        path: computes the residual that is added to the input.
        inputs: input channels.
        outputs: output channels of `path`.
        stride: stride of `path`.
    """

    def __init__(self, path: nn.Sequential, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.path = path
        fits = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if fits else _convolution(inputs, outputs, 1, stride)
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return a tensor with the output channels of the path, smaller by its stride."""
        y: torch.Tensor = self.relu(self.path(x) + self.shortcut(x))
        return y


def basic(inputs: int, width: int, stride: int) -> Residual:
    """Create a block of two 3x3 convolutions of `width` channels, as in networks of up to 34 layers."""
    path = nn.Sequential(_convolution(inputs, width, 3, stride), nn.ReLU(), _convolution(width, width, 3))
    return Residual(path, inputs, width, stride)


def bottleneck(inputs: int, width: int, stride: int) -> Residual:
    """Create a block of 1x1, 3x3 and 1x1 convolutions of `width`, `width` and 4 * `width` channels.

    The 3x3 convolution has the stride, not the first 1x1 as in the paper, where three of four inputs are never read.
    This is the network known as version 1.5, which is the one usually measured.
    """
    path = nn.Sequential(
        _convolution(inputs, width, 1),
        nn.ReLU(),
        _convolution(width, width, 3, stride),
        nn.ReLU(),
        _convolution(width, 4 * width, 1),
    )
    return Residual(path, inputs, 4 * width, stride)


class ResNet(nn.Module):
    """ResNet: takes images, float (batch, channels, height, width); returns logits, float (batch, classes).

    Args:
        stem: layers from the images to the first block.
        blocks: the residual blocks, in order.
        width: output channels of the last block.
        classes: number of classes.
    """

    def __init__(self, stem: nn.Sequential, blocks: Sequence[Residual], width: int, classes: int) -> None:
        super().__init__()
        self.stem = stem
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(width, classes)
        initial.he(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits (batch, classes) for images (batch, channels, height, width)."""
        logits: torch.Tensor = self.classifier(self.flatten(self.pool(self.blocks(self.stem(images)))))
        return logits


def _image_net_stem() -> nn.Sequential:
    """Create the layers from 224 x 224 images to 56 x 56 pixels of 64 channels."""
    return nn.Sequential(_convolution(3, 64, 7, stride=2), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1))


def _strides(counts: Sequence[int]) -> list[list[int]]:
    """Return the strides of the blocks of every group: each group but the first begins with a stride of 2."""
    return [[1 if block or not group else 2 for block in range(count)] for group, count in enumerate(counts)]


def resnet18(classes: int = 1000) -> ResNet:
    """Create a ResNet-18 for images of 3 x 224 x 224; 11,689,512 parameters with 1000 classes."""
    blocks, inputs = [], 64
    for width, strides in zip((64, 128, 256, 512), _strides((2, 2, 2, 2)), strict=True):
        for stride in strides:
            blocks.append(basic(inputs, width, stride))
            inputs = width
    return ResNet(_image_net_stem(), blocks, inputs, classes)


def resnet50(classes: int = 1000) -> ResNet:
    """Create a ResNet-50 for images of 3 x 224 x 224; 25,557,032 parameters with 1000 classes."""
    blocks, inputs = [], 64
    for width, strides in zip((64, 128, 256, 512), _strides((3, 4, 6, 3)), strict=True):
        for stride in strides:
            blocks.append(bottleneck(inputs, width, stride))
            inputs = 4 * width
    return ResNet(_image_net_stem(), blocks, inputs, classes)


def resnet_tiny(classes: int = 10, channels: int = 3, widths: Sequence[int] = (8, 16, 32)) -> ResNet:
    """Create one basic block per width, with identity and 1x1 shortcuts, for images from 8 x 8 to 32 x 32."""
    stem = nn.Sequential(_convolution(channels, widths[0], 3), nn.ReLU())
    blocks, inputs = [], widths[0]
    for width, (stride,) in zip(widths, _strides([1] * len(widths)), strict=True):
        blocks.append(basic(inputs, width, stride))
        inputs = width
    return ResNet(stem, blocks, inputs, classes)
