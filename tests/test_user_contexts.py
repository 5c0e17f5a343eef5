"""b: contexts in a forward: no_grad, detach and the like."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from user_programs import LOSS, SGD, Decorated, Detached, Net, NoGrad, assert_trained_alike, minibatches, pipeline_of


class ModulesWithout(Net):
    """Calls modules alone in the block; `block` makes its context."""

    def __init__(self, block: Callable[[], Any]) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> Any:
        with self.block():
            h = self.b(self.a(x))
        return self.c(h.clone().tanh())


class FunctionsWithout(Net):
    """Calls a function of a weight in the block."""

    def forward(self, x: torch.Tensor) -> Any:
        h = self.a(x)
        with torch.no_grad():
            scale = nn.functional.linear(h, self.b.weight)
        return self.c((h + scale).tanh())


class FullPrecision(Net):
    def forward(self, x: torch.Tensor) -> Any:
        h = self.a(x)
        with torch.autocast("cpu", enabled=False):
            h = self.b(h.float())
        assert h.dtype is torch.float32
        return self.c(h.tanh())


WITHOUT = [torch.no_grad, torch.inference_mode, partial(torch.set_grad_enabled, False)]


@pytest.mark.parametrize("plan", [1, 2, 3])
@pytest.mark.parametrize(
    "build", [NoGrad, Decorated, Detached, FunctionsWithout, *(partial(ModulesWithout, each) for each in WITHOUT)]
)
def test_gradients_stop_where_the_forward_stops_them(build: Callable[[], nn.Module], plan: int) -> None:
    assert_trained_alike(build, plan)


@pytest.mark.parametrize("plan", [1, 2, 3])
def test_a_block_without_autocast_has_full_precision(plan: int) -> None:
    batches = minibatches()
    pipeline = pipeline_of(FullPrecision(), plan, batches, precision="bf16")
    pipeline.fit(batches)
    model = FullPrecision()
    steps = SGD(model.parameters())
    for x, target in batches:
        steps.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = LOSS(model(x), target)
        loss.backward()
        steps.step()
    torch.testing.assert_close(pipeline.state_dict(), dict(model.state_dict()), rtol=0, atol=0)
