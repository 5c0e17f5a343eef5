"""Small sequential models, data and optimizers for several tests."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import torch
from torch import nn

SAMPLES, FEATURES, CLASSES = 8, 12, 5

OPTIMIZERS: dict[str, Any] = {
    "sgd": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": partial(torch.optim.Adam, lr=0.01),
}


def plain_model() -> nn.Sequential:
    """Create four linear layers, which can be divided evenly into up to four stages."""
    torch.manual_seed(1)
    widths = (FEATURES, 16, 16, 16, CLASSES)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def rich_model() -> nn.Sequential:
    """Create a model with convolutions, BatchNorm, dropout, in-place ReLU and reshapes."""
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Unflatten(1, (1, 3, 4)),
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.ReLU(inplace=True),
        nn.Linear(48, 24),
        nn.Dropout(0.2),
        nn.Linear(24, CLASSES),
    )


class Cast(nn.Module):
    """Converts its input to a dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.dtype)


def half_model() -> nn.Sequential:
    """Create the plain model with weights and boundary tensors in bfloat16."""
    return nn.Sequential(Cast(torch.bfloat16), *plain_model().bfloat16(), Cast(torch.float32))


class Functional(nn.Module):
    """Dropout as a function; tests keep this module whole (leaf_modules)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x, 0.3, self.training)


def attentive_model() -> nn.Sequential:
    """Create a model with dropout inside of attention and as a function, where no Dropout module is called."""
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Unflatten(1, (3, 4)),
        nn.TransformerEncoderLayer(4, 2, 8, dropout=0.2, batch_first=True),
        nn.TransformerEncoderLayer(4, 2, 8, dropout=0.2, batch_first=True),
        nn.Flatten(),
        nn.Linear(12, 12),
        Functional(),
        nn.Linear(12, CLASSES),
    )


MODELS = {"attentive": attentive_model, "half": half_model, "plain": plain_model, "rich": rich_model}


def minibatches(count: int, last: int = SAMPLES) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return `count` minibatches of random inputs and labels; the last one has `last` samples."""
    generator = torch.Generator().manual_seed(3)
    sizes = [SAMPLES] * (count - 1) + [last] * (count > 0)
    return [
        (
            torch.randn(size, FEATURES, generator=generator),
            torch.randint(0, CLASSES, (size,), generator=generator),
        )
        for size in sizes
    ]


def example() -> torch.Tensor:
    """Return example inputs: a minibatch of zeros."""
    return torch.zeros(SAMPLES, FEATURES)
