"""h: modules that are used twice, and random numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from user_programs import LOSS, Masks, Noisy, assert_trained_alike, minibatches, pipeline_of, plain

from pipedream_hpc.model.capture import capture


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU())
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.head(self.trunk(x) - self.trunk(y))


@pytest.mark.parametrize("plan", [1, 2])
def test_batchnorm_that_is_used_twice_counts_twice(plan: int) -> None:
    batches = [((x, x.flip(0) + 2), y) for x, y in minibatches()]
    pipeline = assert_trained_alike(Siamese, plan, batches)
    assert pipeline.state_dict()["trunk.1.num_batches_tracked"] == 2 * len(batches)


@pytest.mark.parametrize("plan", [1, 2, 3, 5])
def test_two_calls_of_one_dropout_draw_two_masks(plan: int) -> None:
    seen = []

    def loss_fn(output: Any, target: torch.Tensor) -> torch.Tensor:
        seen.append((bool(torch.equal(output[1], output[2])), float((output[1] == 0).float().mean())))
        return LOSS(output[0], target)

    batches = minibatches(20)
    pipeline_of(Masks(), plan, batches, loss_fn).fit(batches)
    assert not any(equal for equal, _ in seen)
    assert 0.4 < sum(rate for _, rate in seen) / len(seen) < 0.6


@pytest.mark.parametrize("how", ["", "gumbel", "normal", "bernoulli_", "rand", "dropout"])
def test_what_is_drawn_does_not_depend_on_the_plan(how: str) -> None:
    batches = minibatches()
    weights = []
    for plan in (1, 2, 3):
        pipeline = pipeline_of(Noisy(how), plan, batches)
        pipeline.fit(batches)
        weights.append(pipeline.state_dict())
    for other in weights[1:]:
        assert all(torch.equal(value, other[name]) for name, value in weights[0].items())
    without = Noisy(how)
    without.how, without.drop = "", nn.Identity()
    expected = plain(without, batches)
    assert any(not torch.equal(value, expected[name]) for name, value in weights[0].items()), "something is drawn"


class AsksWithValues(nn.Module):
    """A forward that is recorded with values, and asks for shapes after earlier stages have run a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(6, 16), nn.Linear(16, 3)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Tanh()) for _ in range(4))

    def forward(self, x: torch.Tensor) -> Any:
        x = self.first(x)
        positive = torch.masked_select(x, x > 0)
        for block in self.blocks:
            x = x + block(x) * torch.full((x.shape[0], 1), 0.5)
        return self.head(x) + positive.mean()


@pytest.mark.parametrize("plan", [2, 3])
def test_a_question_leaves_what_autograd_has_saved(plan: int) -> None:
    batches = minibatches()
    pipeline = pipeline_of(AsksWithValues(), plan, batches)
    pipeline.fit(batches)
    expected = plain(AsksWithValues(), batches)
    torch.testing.assert_close(pipeline.state_dict(), expected, rtol=0, atol=1e-5)


class Twice(nn.Module):
    """Calls one BatchNorm early and late."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.norm = nn.BatchNorm1d(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.norm(self.b(self.norm(self.a(x)).relu())))  # type: ignore[no-any-return]


@pytest.mark.parametrize("plan", [1, 2, 3])
def test_all_calls_of_a_batchnorm_are_in_one_stage(plan: int) -> None:
    assert_trained_alike(Twice, plan)
    layers = capture(Twice(), minibatches()[0][0]).layers
    assert [sum(call.name == "norm" for call in layer.calls) for layer in layers] == [0, 2, 0]
