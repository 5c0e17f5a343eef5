"""The time of an update is divided among the layers by tensors and bytes."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from pipedream_hpc.model.capture import capture
from pipedream_hpc.model.counting import count
from pipedream_hpc.profiling import update_cost

SGD = partial(torch.optim.SGD, lr=0.1)


class Shared(nn.Module):
    """A shared weight of 64 elements in the first and last layer; a weight of 256 and a ReLU in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = (nn.Linear(*size, bias=False) for size in ((8, 8), (8, 32), (8, 8)))
        self.last.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.inner(self.first(x)))[:, :8])


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Replace the measurement: a second per tensor and one per element; return the list of measured sizes."""
    measured: list[int] = []

    def measure_update(weights: list[torch.Tensor], *_: object) -> tuple[float, int]:
        measured.append(sum(each.numel() for each in weights))
        return len(weights) + float(measured[-1]), 0

    monkeypatch.setattr(update_cost, "measure_update", measure_update)
    return measured


def test_times_go_by_tensors_and_bytes_and_a_shared_weight_counts_once(sizes: list[int]) -> None:
    graph = capture(Shared(), torch.zeros(2, 8))
    profile = update_cost.add_update_times(count(graph), graph, SGD)
    assert sizes == [2, 64 + 256]
    # One element per tensor takes 2 + 2 seconds; the 320 elements take 318 seconds more.
    expected = {"first": 2 + 64 * 318 / 320, "inner": 2 + 256 * 318 / 320}
    for layer in profile.layers:
        assert layer.update_s == pytest.approx(expected.get(layer.name, 0.0)), layer.name


def test_a_model_without_trained_weights_has_no_update_times() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).requires_grad_(False)
    graph = capture(model, torch.zeros(2, 8))
    assert update_cost.add_update_times(count(graph), graph, SGD) == count(graph)


def test_a_real_update_is_measured_and_the_model_is_unchanged() -> None:
    graph = capture(Shared(), torch.zeros(2, 8))
    before, calls = {name: value.clone() for name, value in graph.module.state_dict().items()}, []
    profile = update_cost.add_update_times(count(graph), graph, SGD, updates=3, between=lambda: calls.append(1))
    assert len(calls) == 2 * (3 + 2)
    assert sum(layer.update_s for layer in profile.layers) > 0
    assert all(torch.equal(value, before[name]) for name, value in graph.module.state_dict().items())


@pytest.mark.parametrize(
    ("optimizer", "master_weights", "kind"),
    [
        (SGD, False, "sgd"),
        (partial(torch.optim.SGD, lr=0.1, momentum=0.9), False, "momentum"),
        (torch.optim.AdamW, False, "adam"),
        (torch.optim.AdamW, True, "adam-bf16"),
        (torch.optim.Adagrad, False, "momentum"),
        (torch.optim.Adafactor, False, "momentum"),
        (partial(torch.optim.Adam, amsgrad=True), False, None),
    ],
)
def test_the_kind_of_the_optimizer_is_that_of_its_state(optimizer: Any, master_weights: bool, kind: str | None) -> None:
    graph = capture(Shared(), torch.zeros(2, 8))
    profile = update_cost.add_update_times(count(graph), graph, optimizer, updates=1, master_weights=master_weights)
    assert profile.optimizer == kind
