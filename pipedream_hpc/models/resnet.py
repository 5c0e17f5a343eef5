"""Residual networks (He et al. 2016, arXiv 1512.03385): the network that PipeDream leaves data parallel.

A block cannot be cut, for two tensors are alive inside it; between blocks one is::

    x ──┬── convolutions ──┬── + ── ReLU ──►
        └──── shortcut ────┘
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from pipedream_hpc.models import initial


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """A convolution and its BatchNorm, whose shift makes a bias superfluous."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
    )


class Residual(nn.Module):
    """A path of convolutions added to its own input, float (batch, channels, height, width).

    The shortcut is the identity where the shapes allow it, else a 1x1 convolution.

    Args:
        path: what the block computes before the sum.
        inputs: channels that come in.
        outputs: channels that `path` puts out.
        stride: by which `path` shrinks the image.
    """

    def __init__(self, path: nn.Sequential, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.path = path
        fits = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if fits else _convolution(inputs, outputs, 1, stride)
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A tensor with the channels of the path, smaller by its stride."""
        y: torch.Tensor = self.relu(self.path(x) + self.shortcut(x))
        return y


def basic(inputs: int, width: int, stride: int) -> Residual:
    """Two 3x3 convolutions of `width` channels: the block of the networks up to 34 layers."""
    path = nn.Sequential(_convolution(inputs, width, 3, stride), nn.ReLU(), _convolution(width, width, 3))
    return Residual(path, inputs, width, stride)


def bottleneck(inputs: int, width: int, stride: int) -> Residual:
    """1x1, 3x3, 1x1, the inner ones of `width` channels, the last of four times as many.

    The stride is with the 3x3 convolution, not the first 1x1 as in the paper: otherwise three of four
    inputs were never read. This is the network known as version 1.5, and the one generally measured.
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
    """Takes images, float (batch, channels, height, width), and returns logits, float (batch, classes).

    Args:
        stem: from the images to the first block.
        blocks: the residual blocks, in order.
        width: channels of the last block.
        classes: size of the output.
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
        """Logits (batch, classes) for images (batch, channels, height, width)."""
        logits: torch.Tensor = self.classifier(self.flatten(self.pool(self.blocks(self.stem(images)))))
        return logits


def _image_net_stem() -> nn.Sequential:
    """224 x 224 pixels to 56 x 56 of 64 channels."""
    return nn.Sequential(_convolution(3, 64, 7, stride=2), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1))


def _strides(counts: Sequence[int]) -> list[list[int]]:
    """Per stage the strides of its blocks: the first block of every stage but the first halves the image."""
    return [[1 if block or not stage else 2 for block in range(count)] for stage, count in enumerate(counts)]


def resnet18(classes: int = 1000) -> ResNet:
    """ResNet-18 for images of 3 x 224 x 224; 11,689,512 parameters with 1000 classes."""
    blocks, inputs = [], 64
    for width, strides in zip((64, 128, 256, 512), _strides((2, 2, 2, 2)), strict=True):
        for stride in strides:
            blocks.append(basic(inputs, width, stride))
            inputs = width
    return ResNet(_image_net_stem(), blocks, inputs, classes)


def resnet50(classes: int = 1000) -> ResNet:
    """ResNet-50 for images of 3 x 224 x 224; 25,557,032 parameters with 1000 classes."""
    blocks, inputs = [], 64
    for width, strides in zip((64, 128, 256, 512), _strides((3, 4, 6, 3)), strict=True):
        for stride in strides:
            blocks.append(bottleneck(inputs, width, stride))
            inputs = 4 * width
    return ResNet(_image_net_stem(), blocks, inputs, classes)


def resnet_tiny(classes: int = 10, channels: int = 3, widths: Sequence[int] = (8, 16, 32)) -> ResNet:
    """One basic block per width, for images of 32 x 32 down to 8 x 8: identity and 1x1 shortcuts both occur."""
    stem = nn.Sequential(_convolution(channels, widths[0], 3), nn.ReLU())
    blocks, inputs = [], widths[0]
    for width, (stride,) in zip(widths, _strides([1] * len(widths)), strict=True):
        blocks.append(basic(inputs, width, stride))
        inputs = width
    return ResNet(stem, blocks, inputs, classes)
