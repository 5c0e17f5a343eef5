"""Stages under torch.compile: the same training, and no compilation for a change of weight versions."""

from __future__ import annotations

from typing import Any

import chains
import pytest
import torch
import torch._dynamo
from torch import nn

from pipedream_hpc import Pipeline
from pipedream_hpc.errors import PipedreamError


def trained(model: nn.Module, example: Any, epochs: Any, loss: Any, **more: Any) -> tuple[list[float], dict[str, Any]]:
    pipeline = Pipeline(
        model, loss=loss, optimizer=chains.OPTIMIZERS["sgd"], example=example, plan="1-1-1", seed=3, **more
    )
    return [pipeline.fit(batches) for batches in epochs], pipeline.state_dict()


@pytest.mark.parametrize("name", ["plain", "rich"])
def test_the_same_training(name: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    epochs = [chains.minibatches(7, last=5)] * 2
    results = [
        trained(chains.MODELS[name](), chains.example(), epochs, nn.CrossEntropyLoss(), compiler=compiler)
        for compiler in (None, "aot_eager")
    ]
    for expected, found in zip(*(weights.values() for _, weights in results), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    if name == "plain":
        # Three stages, two sizes of minibatches; three, two and one weight versions.
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3 * 2


def test_an_unknown_compiler() -> None:
    with pytest.raises(PipedreamError, match=r"there is no compiler 'gcc': choose from .*inductor"):
        trained(chains.plain_model(), chains.example(), [], nn.CrossEntropyLoss(), compiler="gcc")
