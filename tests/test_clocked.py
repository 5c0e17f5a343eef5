"""The time of every layer in a whole minibatch, with modules that advance a fake clock by given seconds."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

from pipedream_hpc.model.capture import capture
from pipedream_hpc.model.clock import HostClock
from pipedream_hpc.profiling.clocked import ClockedModel
from pipedream_hpc.profiling.profiler import one_minibatch


class FakeClock:
    """A clock that only Work advances; what a thread has is not taken for the model's state, and put back."""

    def __init__(self) -> None:
        self._of_thread = threading.local()
        self._of_thread.now = 0.0

    def __call__(self) -> float:
        return self._of_thread.now  # type: ignore[no-any-return]

    def advance(self, seconds: float) -> None:
        self._of_thread.now += seconds


class Work(torch.autograd.Function):
    """Adds its inputs, and advances the clock in forward and in backward."""

    @staticmethod
    def forward(context: Any, clock: FakeClock, seconds: tuple[float, float], *values: torch.Tensor) -> torch.Tensor:
        clock.advance(seconds[0])
        context.clock, context.seconds, context.count = clock, seconds[1], len(values)
        return sum(values) * 1.0  # type: ignore[return-value]

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        context.clock.advance(context.seconds)
        return None, None, *[gradient] * context.count


class TimedModule(nn.Module):
    """A module whose forward and backward take given seconds; its weight gives it a backward."""

    def __init__(self, clock: FakeClock, forward_s: float, backward_s: float) -> None:
        super().__init__()
        self.clock, self.seconds = clock, (forward_s, backward_s)
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        return Work.apply(self.clock, self.seconds, *(value * self.weight for value in values))


def measured(model: nn.Module, clock: FakeClock, loss: Any = None) -> tuple[list[float], list[float]]:
    example = torch.ones(2, 3)
    graph = capture(model, example, leaf_modules=[TimedModule])
    clocked = ClockedModel(graph, loss, clock=HostClock(clock))
    for _ in range(2):
        clocked.run(graph.inputs.like(example))
    return clocked.forward_s, clocked.backward_s


def test_a_chain() -> None:
    clock = FakeClock()
    chain = nn.Sequential(TimedModule(clock, 1, 2), TimedModule(clock, 3, 5), TimedModule(clock, 4, 7))
    assert measured(chain, clock) == ([1, 3, 4], [2, 5, 7])


def test_the_loss_is_counted_with_the_last_layer() -> None:
    clock = FakeClock()
    chain = nn.Sequential(TimedModule(clock, 1, 2), TimedModule(clock, 3, 5))

    def loss(output: torch.Tensor) -> torch.Tensor:
        return Work.apply(clock, (10, 20), output).sum()

    assert measured(chain, clock, loss) == ([1, 13], [2, 25])


class Skipping(nn.Module):
    """first ──► inner ──► last, and a skip connection from first to last."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__()
        self.first, self.inner, self.last = TimedModule(clock, 1, 2), TimedModule(clock, 3, 5), TimedModule(clock, 4, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.last(x, self.inner(x))


def test_a_skip_connection() -> None:
    clock = FakeClock()
    assert measured(Skipping(clock), clock) == ([1, 3, 4], [2, 5, 7])


def test_a_layer_without_backward_has_no_backward_time() -> None:
    clock = FakeClock()
    model = nn.Sequential(TimedModule(clock, 1, 2), TimedModule(clock, 3, 5))
    model[0].weight.requires_grad_(False)
    assert measured(model, clock) == ([1, 3], [0, 5])


@pytest.mark.parametrize("rounds", [1, 3])
def test_one_minibatch_leaves_the_model_unchanged(rounds: int) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))
    before, rng = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    example = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    run = one_minibatch(capture(model, example), example)
    for _ in range(rounds):
        run()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(parameter.grad is None for parameter in model.parameters())
