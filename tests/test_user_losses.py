"""g: losses with weights, over weights of others, and over none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from user_programs import LOSS, SGD, chain, minibatches, pipeline_of, plain

from pipedream_hpc import PipedreamError


class Arc(nn.Module):
    """A loss with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.weight = nn.Parameter(torch.randn(3, 3))

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return LOSS(output @ self.weight, target)


@pytest.mark.parametrize("plan", [1, 2])
def test_a_loss_with_weights_is_trained(plan: int) -> None:
    batches, loss, own = minibatches(), Arc(), Arc()
    pipeline = pipeline_of(chain(), plan, batches, loss)
    pipeline.fit(batches)
    reference = chain()
    expected = plain(reference, batches, own, lambda weights: SGD([*weights, *own.parameters()]))
    assert all(torch.equal(pipeline.state_dict()[name], value) for name, value in expected.items())
    assert torch.equal(loss.weight, own.weight)


def test_a_penalty_over_weights_of_other_stages_is_refused() -> None:
    model, batches = chain(), minibatches()

    def loss_fn(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return LOSS(output, target) + 0.1 * sum(each.square().sum() for each in model.parameters())

    with pytest.raises(PipedreamError, match=r"the loss or a metric reads '0.weight', which another stage has"):
        pipeline_of(model, 2, batches, loss_fn).fit(batches)


@pytest.mark.parametrize("plan", [1, 2])
@pytest.mark.parametrize(
    ("model", "loss_fn"),
    [
        pytest.param(chain().requires_grad_(False), LOSS, id="frozen"),
        pytest.param(chain(), lambda output, target: torch.zeros(()), id="constant"),
    ],
)
def test_a_loss_that_trains_nothing_is_refused(model: nn.Module, loss_fn: Any, plan: int) -> None:
    with pytest.raises(PipedreamError, match="the loss depends on no weight that requires a gradient"):
        pipeline_of(model, plan, minibatches(), loss_fn).fit(minibatches())
