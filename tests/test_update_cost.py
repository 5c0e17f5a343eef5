"""What an update costs, shared out to layers by tensors and bytes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from pipedream_hpc.model.capture import capture
from pipedream_hpc.model.profiler import count
from pipedream_hpc.runtime import update_cost

SGD = partial(torch.optim.SGD, lr=0.1)


class Shared(nn.Module):
    """A weight of 64 numbers at both ends, a ReLU and a weight of 256 in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = (nn.Linear(*size, bias=False) for size in ((8, 8), (8, 32), (8, 8)))
        self.last.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.inner(self.first(x)))[:, :8])


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Instead of the clock: a second per tensor and one per number; the sizes that were asked for."""
    asked: list[int] = []

    def update_s(weights: list[torch.Tensor], *_: object) -> float:
        asked.append(sum(each.numel() for each in weights))
        return len(weights) + float(asked[-1])

    monkeypatch.setattr(update_cost, "update_s", update_s)
    return asked


def test_by_tensors_and_bytes_and_once_for_a_weight_of_two_layers(sizes: list[int]) -> None:
    graph = capture(Shared(), torch.zeros(2, 8))
    profile = update_cost.with_updates(count(graph), graph, SGD)
    assert sizes == [2, 64 + 256]
    # A number per tensor takes 2 + 2 seconds, the rest 318 seconds for 320 numbers.
    expected = {"first": 2 + 64 * 318 / 320, "inner": 2 + 256 * 318 / 320}
    for layer in profile.layers:
        assert layer.update_s == pytest.approx(expected.get(layer.name, 0.0)), layer.name


def test_a_model_without_trained_weights_has_no_updates() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).requires_grad_(False)
    graph = capture(model, torch.zeros(2, 8))
    assert update_cost.with_updates(count(graph), graph, SGD) == count(graph)


def test_what_is_measured_is_an_update_and_the_model_is_left_alone() -> None:
    graph = capture(Shared(), torch.zeros(2, 8))
    before, done = {name: value.clone() for name, value in graph.module.state_dict().items()}, []
    profile = update_cost.with_updates(count(graph), graph, SGD, updates=3, between=lambda: done.append(1))
    assert len(done) == 2 * (3 + 2)
    assert sum(layer.update_s for layer in profile.layers) > 0
    assert all(torch.equal(value, before[name]) for name, value in graph.module.state_dict().items())
