"""Whole minibatches with a clock between the layers: modules that take so many seconds of a clock of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pipedream_hpc.model.capture import capture
from pipedream_hpc.model.clock import HostClock
from pipedream_hpc.model.clocked import Clocked
from pipedream_hpc.model.profiler import one_minibatch


class Clock:
    """Stands still but when somebody works."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Work(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, clock: Clock, seconds: tuple[float, float], *values: torch.Tensor) -> torch.Tensor:
        clock.now += seconds[0]
        context.clock, context.seconds, context.count = clock, seconds[1], len(values)
        return sum(values) * 1.0  # type: ignore[return-value]

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        context.clock.now += context.seconds
        return None, None, *[gradient] * context.count


class Takes(nn.Module):
    """So many seconds forwards and backwards; has a weight, that there is a backward."""

    def __init__(self, clock: Clock, forward_s: float, backward_s: float) -> None:
        super().__init__()
        self.clock, self.seconds = clock, (forward_s, backward_s)
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        return Work.apply(self.clock, self.seconds, *(value * self.weight for value in values))


def clocked(model: nn.Module, clock: Clock, loss: Any = None) -> tuple[list[float], list[float]]:
    example = torch.ones(2, 3)
    found = Clocked(capture(model, example, leaves=[Takes]), loss, clock=HostClock(clock))
    for _ in range(2):
        found.run((example,))
    return found.forward_s, found.backward_s


def test_a_chain() -> None:
    clock = Clock()
    chain = nn.Sequential(Takes(clock, 1, 2), Takes(clock, 3, 5), Takes(clock, 4, 7))
    assert clocked(chain, clock) == ([1, 3, 4], [2, 5, 7])


def test_the_loss_counts_with_the_last_layer() -> None:
    clock = Clock()
    chain = nn.Sequential(Takes(clock, 1, 2), Takes(clock, 3, 5))

    def loss(output: torch.Tensor) -> torch.Tensor:
        return Work.apply(clock, (10, 20), output).sum()

    assert clocked(chain, clock, loss) == ([1, 13], [2, 25])


class Around(nn.Module):
    """first ──► inner ──► last, and from first straight to last."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.first, self.inner, self.last = Takes(clock, 1, 2), Takes(clock, 3, 5), Takes(clock, 4, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.last(x, self.inner(x))


def test_a_skip_connection() -> None:
    clock = Clock()
    assert clocked(Around(clock), clock) == ([1, 3, 4], [2, 5, 7])


def test_a_layer_without_backward_takes_none() -> None:
    clock = Clock()
    model = nn.Sequential(Takes(clock, 1, 2), Takes(clock, 3, 5))
    model[0].weight.requires_grad_(False)
    assert clocked(model, clock) == ([1, 3], [0, 5])


@pytest.mark.parametrize("rounds", [1, 3])
def test_a_minibatch_in_between_leaves_the_model_as_it_was(rounds: int) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))
    before, rng = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    example = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    run = one_minibatch(capture(model, example), example)
    for _ in range(rounds):
        run()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(parameter.grad is None for parameter in model.parameters())
