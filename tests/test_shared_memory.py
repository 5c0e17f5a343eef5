"""Tensors that share memory where nobody expects it; the reference is the user's own module in plain torch."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from pipedream_hpc import Pipeline, RunConfig, TrainConfig

SGD = partial(torch.optim.SGD, lr=0.1)


class Doubled(nn.Module):
    """Writes into its input, not idempotently."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.mul_(2)
        return self.linear(x)


class Offset(nn.Module):
    """A loss plus a weight of one number that only views lie between: its gradient is the loss's initial gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.offset = nn.Linear(4, 4), nn.Parameter(torch.tensor([0.5]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).mean() + self.offset.squeeze()


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [(torch.randn(3, 4, generator=generator), torch.zeros(3, 4)) for _ in range(count)]


@pytest.mark.parametrize("recompute", [False, True])
def test_a_stage_that_writes_into_its_input(recompute: bool) -> None:
    """model-parallel on two stages: one minibatch at a time, which is plain SGD.

    plain     x ──► linear ──► * 2 in place ──► linear
    stages         stage 0  │  stage 1: runs twice with recompute, on the same receive slot
    """
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(4, 4), Doubled()), batches(4)
    plain = nn.Sequential(nn.Linear(4, 4), Doubled())
    plain.load_state_dict(model.state_dict())
    optimizer = SGD(plain.parameters())
    for x, y in data:
        optimizer.zero_grad()
        nn.functional.mse_loss(plain(x), y).backward()
        optimizer.step()
    with Pipeline(
        model,
        loss_fn=nn.functional.mse_loss,
        optimizer=SGD,
        example_inputs=data[0][0],
        plan=2,
        schedule="model-parallel",
        train_config=TrainConfig(recompute=recompute),
        run_config=RunConfig(device="cpu"),
    ) as pipeline:
        pipeline.fit(data)
        weights = pipeline.state_dict()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("clip", [None, 0.25])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_gradient_that_is_the_initial_gradient_of_the_loss(steps: int, clip: float | None) -> None:
    """Gradients are summed and scaled in place, which must not change what later backwards start with."""
    torch.manual_seed(0)
    model, data = Offset(), batches(9)
    plain = Offset()
    plain.load_state_dict(model.state_dict())
    optimizer = SGD(plain.parameters())
    for first in range(0, 9, steps):
        optimizer.zero_grad()
        for x, _ in data[first : first + steps]:
            (plain(x) / steps).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(plain.parameters(), clip)
        optimizer.step()
    with Pipeline(
        model,
        loss_fn=lambda output, _: output,
        optimizer=SGD,
        example_inputs=data[0][0],
        plan=1,
        train_config=TrainConfig(gradient_accumulation_steps=steps, clip_grad_norm=clip),
        run_config=RunConfig(device="cpu"),
    ) as pipeline:
        pipeline.fit(data)
        weights = pipeline.state_dict()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-6)
