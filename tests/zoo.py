"""Small models of every kind with data: images, sentences of varying length, skips, branches, tied weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipedream_hpc import zoo
from pipedream_hpc.model.randomness import seed_for

SAMPLES = 4


def words(count: int, length: int) -> torch.Tensor:
    """Draw `count` sentences of `length` words."""
    return torch.randint(1, 20, (count, length))


def words_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy over all words."""
    return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())


def sentences(samples: int, number: int) -> tuple[Any, torch.Tensor]:
    """Draw (source, its lengths, target without its last word) and target words; lengths vary between minibatches."""
    source, length = 7 - number % 3, 5 - number % 2
    lengths = torch.randint(1, source + 1, (samples,))
    return (words(samples, source), lengths, words(samples, length)), words(samples, length)


def images(side: int, channels: int) -> Callable[[int, int], tuple[Any, torch.Tensor]]:
    """Return a function that draws (images, labels)."""
    return lambda samples, number: (torch.randn(samples, channels, side, side), torch.randint(0, 10, (samples,)))


@dataclass(frozen=True)
class ZooCase:
    """A model with its loss and data.

    Attributes:
        build: builds the model.
        loss: mean loss from (output, target).
        draw: draws a minibatch: (samples, number of the minibatch) -> (inputs, target).
    """

    build: Callable[[], nn.Module]
    loss: Any
    draw: Callable[[int, int], tuple[Any, torch.Tensor]]

    def model(self) -> nn.Module:
        """Build the model, always with the same weights."""
        torch.manual_seed(5)
        return self.build()

    def example(self) -> Any:
        """Return a minibatch of inputs."""
        torch.manual_seed(6)
        return self.draw(SAMPLES, 0)[0]

    def minibatches(self, count: int, last: int) -> list[tuple[Any, torch.Tensor]]:
        """Return `count` minibatches, always the same; the last one has `last` samples."""
        torch.manual_seed(7)
        return [self.draw(last if number + 1 == count else SAMPLES, number) for number in range(count)]


ZOO = {
    "vgg, BatchNorm and dropout": ZooCase(lambda: zoo.vgg_small(channels=1), nn.CrossEntropyLoss(), images(8, 1)),
    "resnet": ZooCase(lambda: zoo.resnet_tiny(channels=1), nn.CrossEntropyLoss(), images(8, 1)),
    "inception": ZooCase(lambda: zoo.inception_tiny(channels=1), nn.CrossEntropyLoss(), images(8, 1)),
    "gpt, tied": ZooCase(
        lambda: zoo.gpt(2, 8, 2, 20, 16, dropout=0.1),
        words_loss,
        lambda samples, number: (words(samples, 6 - number % 2), words(samples, 6 - number % 2)),
    ),
    "gnmt, sentences of changing length": ZooCase(lambda: zoo.gnmt(8, 20, 8), words_loss, sentences),
    "s2vt": ZooCase(
        lambda: zoo.s2vt(20, 12, 6, 8),
        words_loss,
        lambda samples, number: ((torch.randn(samples, 4, 12), words(samples, 5)), words(samples, 5)),
    ),
    "awd_lm": ZooCase(
        lambda: zoo.awd_lm(3, 20, 6, 8), words_loss, lambda samples, number: (words(samples, 5), words(samples, 5))
    ),
}


@contextmanager
def masks_seeded(model: nn.Module, microbatch: int) -> Iterator[None]:
    """Make the dropout layers of a whole model draw the same masks as those of its stages for this microbatch."""
    for name, module in model.named_modules():
        number = getattr(module, "dropout", None)
        if isinstance(module, nn.modules.dropout._DropoutNd) or (isinstance(number, float) and number > 0):
            module._forward_pre_hooks.clear()
            module.register_forward_pre_hook(_seed_hook(name, microbatch))
    yield


def _seed_hook(name: str, microbatch: int) -> Callable[[nn.Module, Any], None]:
    calls = 0

    def seed(_: nn.Module, inputs: Any) -> None:
        nonlocal calls
        torch.manual_seed(seed_for(0, microbatch, f"{name}@{calls}" if calls else name))
        calls += 1

    return seed
