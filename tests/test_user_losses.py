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
        pytest.param(chain(), lambda output, target: LOSS(output.detach(), target), id="detached"),
        pytest.param(chain(), lambda output, target: torch.zeros(()), id="constant"),
    ],
)
def test_a_loss_that_trains_nothing_is_refused(model: nn.Module, loss_fn: Any, plan: int) -> None:
    with pytest.raises(PipedreamError, match="the loss depends on no weight that requires a gradient"):
        pipeline_of(model, plan, minibatches(), loss_fn).fit(minibatches())


@pytest.mark.parametrize("plan", [1, 2, 3])
def test_training_with_all_weights_frozen_since_is_refused(plan: int) -> None:
    model, batches = chain(), minibatches()
    pipeline = pipeline_of(model, plan, batches)
    pipeline.fit(batches)
    model.requires_grad_(False)
    with pytest.raises(PipedreamError, match=r"no weight of the model requires a gradient, so nothing would be train"):
        pipeline.fit(batches)
    model[4].requires_grad_(True)
    before = pipeline.state_dict()["4.weight"].clone()
    pipeline.fit(batches)
    assert not torch.equal(pipeline.state_dict()["4.weight"], before)


@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("plan", [1, 2, 3])
def test_a_loss_that_reads_what_a_hook_kept_is_right_or_refused(plan: int, detached: bool) -> None:
    """With plan 1 the feature is there; otherwise the output stage, in which the loss runs, does not have it."""

    def build(kept: list[torch.Tensor]) -> nn.Module:
        model = chain()
        model[0].register_forward_hook(
            lambda module, inputs, output: kept.__setitem__(slice(None), [output.detach() if detached else output])
        )
        return model

    def loss_of(kept: list[torch.Tensor]) -> Any:
        return lambda output, target: LOSS(output, target) * (1 + kept[0].square().mean())

    batches, kept, other = minibatches(), list[torch.Tensor](), list[torch.Tensor]()
    pipeline = pipeline_of(build(kept), plan, batches, loss_of(kept))
    if plan > 1:
        with pytest.raises(PipedreamError, match=r"reads a tensor that a hook .* the loss runs on the output stage"):
            pipeline.fit(batches)
        return
    pipeline.fit(batches)
    expected = plain(build(other), batches, loss_of(other))
    assert all(torch.equal(pipeline.state_dict()[name], value) for name, value in expected.items())


@pytest.mark.parametrize("plan", [1, 2])
def test_an_optimizer_of_other_parameters_is_refused(plan: int) -> None:
    """Those of all stages are others than those of one."""
    other, model = chain(), chain()
    before = list(model.parameters())
    for of in (other.parameters, before.copy, *([model.parameters] if plan > 1 else [])):
        with pytest.raises(PipedreamError, match=r"returned a SGD of other parameters than the \d of this stage"):
            pipeline_of(model, plan, minibatches(), optimizer=lambda _, of=of: SGD(of()))


def test_an_optimizer_of_the_models_parameters_is_that_of_its_only_stage() -> None:
    model, batches = chain(), minibatches()
    pipeline = pipeline_of(model, 1, batches, optimizer=lambda _: SGD(model.parameters()))
    pipeline.fit(batches)
    expected = plain(chain(), batches, LOSS)
    assert all(torch.equal(pipeline.state_dict()[name], value) for name, value in expected.items())
