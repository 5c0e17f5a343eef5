"""Small models of every kind, with data: images, sentences of changing length, skips, branches, tied weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipedream_hpc import models
from pipedream_hpc.model.randomness import seed_for

SAMPLES = 4


def words(count: int, length: int) -> torch.Tensor:
    return torch.randint(1, 20, (count, length))


def of_words(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())


def sentences(samples: int, number: int) -> tuple[Any, torch.Tensor]:
    """Source, its lengths and target so far; every minibatch is of another length."""
    source, length = 7 - number % 3, 5 - number % 2
    lengths = torch.randint(1, source + 1, (samples,))
    return (words(samples, source), lengths, words(samples, length)), words(samples, length)


def images(side: int, channels: int) -> Callable[[int, int], tuple[Any, torch.Tensor]]:
    return lambda samples, number: (torch.randn(samples, channels, side, side), torch.randint(0, 10, (samples,)))


@dataclass(frozen=True)
class Specimen:
    """A model, its loss, and how a minibatch of so many samples is drawn: (samples, number) -> (inputs, target)."""

    build: Callable[[], nn.Module]
    loss: Any
    draw: Callable[[int, int], tuple[Any, torch.Tensor]]

    def model(self) -> nn.Module:
        torch.manual_seed(5)
        return self.build()

    def example(self) -> Any:
        torch.manual_seed(6)
        return self.draw(SAMPLES, 0)[0]

    def minibatches(self, count: int, last: int) -> list[tuple[Any, torch.Tensor]]:
        torch.manual_seed(7)
        return [self.draw(last if number + 1 == count else SAMPLES, number) for number in range(count)]


ZOO = {
    "vgg, BatchNorm and dropout": Specimen(lambda: models.vgg_small(channels=1), nn.CrossEntropyLoss(), images(8, 1)),
    "resnet": Specimen(lambda: models.resnet_tiny(channels=1), nn.CrossEntropyLoss(), images(8, 1)),
    "inception": Specimen(lambda: models.inception_tiny(channels=1), nn.CrossEntropyLoss(), images(8, 1)),
    "gpt, tied": Specimen(
        lambda: models.gpt(2, 8, 2, 20, 16, dropout=0.1),
        of_words,
        lambda samples, number: (words(samples, 6 - number % 2), words(samples, 6 - number % 2)),
    ),
    "gnmt, sentences of changing length": Specimen(lambda: models.gnmt(8, 20, 8), of_words, sentences),
    "s2vt": Specimen(
        lambda: models.s2vt(20, 12, 6, 8),
        of_words,
        lambda samples, number: ((torch.randn(samples, 4, 12), words(samples, 5)), words(samples, 5)),
    ),
    "awd_lm": Specimen(
        lambda: models.awd_lm(3, 20, 6, 8), of_words, lambda samples, number: (words(samples, 5), words(samples, 5))
    ),
}


def seed_masks(model: nn.Module, unit: int) -> None:
    """Let the dropout layers of a whole model draw what those of its stages draw for this unit."""
    for name, module in model.named_modules():
        number = getattr(module, "dropout", None)
        if isinstance(module, nn.modules.dropout._DropoutNd) or (isinstance(number, float) and number > 0):
            module._forward_pre_hooks.clear()
            module.register_forward_pre_hook(_seeding(name, unit))


def _seeding(name: str, unit: int) -> Callable[[nn.Module, Any], Any]:
    def seed(_: nn.Module, inputs: Any) -> Any:
        torch.manual_seed(seed_for(0, unit, name))
        # Which element gets which number depends on how they lie in memory.
        return tuple(each.contiguous() if isinstance(each, torch.Tensor) else each for each in inputs)

    return seed
