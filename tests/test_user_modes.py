"""a: what differs between training and evaluation, in a forward and in train()."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from user_programs import (
    LOSS,
    SGD,
    Auxiliary,
    Net,
    Residual,
    assert_trained_alike,
    auxiliary_loss,
    minibatches,
    pipeline_of,
    plain,
)

from pipedream_hpc import Pipeline, ScheduleConfig


class Remembers(Net):
    """Returns in evaluation what it computed in the middle, and uses it once more."""

    def forward(self, x: torch.Tensor) -> Any:
        h = self.a(x).relu()
        memory = None if self.training else h[:, :3].detach() * 2
        out = self.c(self.b(h).tanh())
        return out if memory is None else (out + memory, memory)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 16)

    def forward(self, x: torch.Tensor) -> Any:
        h = self.a(x)
        return (h, None) if self.training else (h, h[:, :3] * 2)


class RemembersInABlock(Net):
    def __init__(self) -> None:
        super().__init__()
        self.a = Block()  # type: ignore[assignment]

    def forward(self, x: torch.Tensor) -> Any:
        h, memory = self.a(x)
        out = self.c(self.b(h).tanh())
        return out if memory is None else (out + memory, memory)


def remembering_loss(output: Any, target: torch.Tensor) -> torch.Tensor:
    out, memory = output if isinstance(output, tuple) else (output, torch.zeros(()))
    return LOSS(out, target) + memory.mean()


@pytest.mark.parametrize("plan", [1, 2, 3])
@pytest.mark.parametrize("build", [Remembers, RemembersInABlock])
@pytest.mark.parametrize("whole", [(), (Block,)])
def test_more_is_passed_on_in_evaluation(build: Callable[[], nn.Module], plan: int, whole: Any) -> None:
    batches = minibatches()
    pipeline = assert_trained_alike(build, plan, batches, remembering_loss, leaf_modules=(*whole,))
    model = build()
    model.load_state_dict(pipeline.state_dict())
    model.eval()
    with torch.no_grad():
        expected = sum(float(remembering_loss(model(x), target)) for x, target in batches) / len(batches)
    assert pipeline.evaluate(batches)["loss"] == pytest.approx(expected, rel=1e-6)
    pipeline.fit(batches)


class DropPath(nn.Module):
    """Its forward calls functions between blocks in training only, which evaluation numbers otherwise."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.blocks, self.head = nn.Linear(6, 16), nn.ModuleList(map(Residual, range(4))), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + (block(x) - x) * 0.8 if self.training else block(x)
        out: torch.Tensor = self.head(x)
        return out


@pytest.mark.parametrize("cut_points", [["blocks.2"], ["blocks.1.linear", "blocks.2.linear"]])
def test_each_mode_may_number_functions_otherwise(cut_points: list[str]) -> None:
    batches = minibatches()
    pipeline = Pipeline(
        DropPath(),
        loss_fn=LOSS,
        optimizer=SGD,
        example_inputs=batches[0][0],
        plan=len(cut_points) + 1,
        schedule=ScheduleConfig("1f1b-flush", 1),
        cut_points=cut_points,
    )
    pipeline.fit(batches)
    model = DropPath()
    expected = plain(model, batches)
    # The gradient of x is a sum of more than two, which stages add up in another order.
    torch.testing.assert_close(pipeline.state_dict(), expected, rtol=0, atol=1e-6)
    model.eval()
    with torch.no_grad():
        losses = [LOSS(model(inputs), target).item() for inputs, target in batches]
    assert pipeline.evaluate(batches)["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.mark.parametrize("plan", [1, 2, 3])
def test_an_auxiliary_head_exists_in_training_only(plan: int) -> None:
    pipeline = assert_trained_alike(Auxiliary, plan, loss_fn=auxiliary_loss)
    model, batches = Auxiliary(), minibatches()
    model.load_state_dict(pipeline.state_dict())
    model.eval()
    with torch.no_grad():
        expected = sum(float(LOSS(model(x), y)) for x, y in batches) / len(batches)
    assert pipeline.evaluate(batches, {"loss": LOSS})["loss"] == pytest.approx(expected, abs=1e-6)


class FrozenNorm(nn.Module):
    """BatchNorm that an overridden train() keeps in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def train(self, mode: bool = True) -> FrozenNorm:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.norm(self.a(x)))


@pytest.mark.parametrize("plan", [1, 2, 3])
def test_an_overridden_train_is_respected(plan: int) -> None:
    pipeline = assert_trained_alike(FrozenNorm, plan)
    assert pipeline.state_dict()["norm.num_batches_tracked"] == 0


class SetByHand(FrozenNorm):
    """As FrozenNorm, but its user sets the normalization to evaluation before training, with norm.eval()."""

    train = nn.Module.train


@pytest.mark.parametrize("plan", [1, 2, 3])
def test_modules_that_the_user_has_set_to_evaluation_stay_so(plan: int) -> None:
    model, batches = SetByHand(), minibatches()
    model.norm.eval()
    pipeline = pipeline_of(model, plan, batches)
    pipeline.fit(batches)
    pipeline.evaluate(batches)
    pipeline.fit(batches)
    expected = plain(FrozenNorm(), [*batches, *batches])
    assert all(torch.equal(pipeline.state_dict()[name], value) for name, value in expected.items())
