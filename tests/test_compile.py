"""Stages under torch.compile train the same way, and a change of weight versions compiles nothing."""

from __future__ import annotations

from typing import Any

import chains
import pytest
import torch
import torch._dynamo
from torch import nn

from pipedream_hpc import Pipeline, TrainConfig
from pipedream_hpc.errors import PipedreamError


def train(model: nn.Module, epochs: Any, config: TrainConfig) -> tuple[list[float], dict[str, Any]]:
    """Train the epochs in three stages; return the mean losses and the weights."""
    with Pipeline(
        model,
        loss_fn=nn.CrossEntropyLoss(),
        optimizer=chains.OPTIMIZERS["sgd"],
        example_inputs=chains.example(),
        plan="1-1-1",
        train_config=config,
    ) as pipeline:
        return [pipeline.fit(batches) for batches in epochs], pipeline.state_dict()


@pytest.mark.parametrize("name", ["plain", "rich"])
def test_compiled_stages_train_the_same_way(name: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    epochs = [chains.minibatches(7, last=5)] * 2
    results = [
        train(chains.MODELS[name](), epochs, TrainConfig(seed=3, compile_backend=backend))
        for backend in (None, "aot_eager")
    ]
    for expected, found in zip(*(weights.values() for _, weights in results), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    if name == "plain":
        # Three stages and two sizes of minibatches, however many weight versions (three, two and one).
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3 * 2


def test_an_unknown_compile_backend() -> None:
    with pytest.raises(PipedreamError, match=r"compile_backend should be one of .*inductor.*, not 'gcc'"):
        TrainConfig(compile_backend="gcc")
