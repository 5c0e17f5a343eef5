"""Forms of inputs: what minibatches and example_inputs may be, and what an evaluation may leave out.

The reference is plain torch.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from pipedream_hpc import PipedreamError, Pipeline, ScheduleConfig

SGD = partial(torch.optim.SGD, lr=0.1)


class Labelled(nn.Module):
    """As a model of transformers: it computes its own loss if it is given labels."""

    def __init__(self, *, uses_early: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.uses_early = uses_early

    def forward(
        self, x: torch.Tensor | None = None, labels: torch.Tensor | None = None, scale: torch.Tensor | None = None
    ) -> SimpleNamespace:
        if self.uses_early and labels is None:
            raise ValueError("give labels")
        assert x is not None
        logits = self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))
        if scale is not None:
            logits = logits * scale
        loss = None if labels is None else functional.cross_entropy(logits, labels)
        return SimpleNamespace(logits=logits, loss=loss)


def labelled(samples: int, seed: int, *without: str) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    made = {
        "labels": torch.randint(0, 3, (samples,), generator=draw),
        "x": torch.randn(samples, 6, generator=draw),
        "scale": torch.rand(samples, 1, generator=draw),
    }
    return {name: value for name, value in made.items() if name not in without}


def own_loss(output: Any, _: Any) -> torch.Tensor:
    loss: torch.Tensor = output.loss
    return loss


def size(output: Any, _: Any) -> torch.Tensor:
    return output.logits.square().mean()  # type: ignore[no-any-return]


def pipeline_of(model: nn.Module, plan: Any = 3, n_microbatches: int = 1) -> Pipeline:
    return Pipeline(
        model,
        loss_fn=own_loss,
        optimizer=SGD,
        example_inputs=labelled(4, 0),
        plan=plan,
        schedule=ScheduleConfig("gpipe", n_microbatches),
    )


@pytest.mark.parametrize("samples", [4, 8], ids=["as the example", "larger"])
@pytest.mark.parametrize("without", [("labels",), ("labels", "scale")], ids=" and ".join)
@pytest.mark.parametrize(("plan", "n_microbatches"), [(1, 1), (3, 1), (3, 2), ("1-2", 1)])
def test_an_evaluation_without_labels(plan: Any, n_microbatches: int, without: Any, samples: int) -> None:
    test = [labelled(samples, seed, *without) for seed in range(1, 4)]
    net = Labelled().eval()
    with torch.no_grad():
        expected = sum(float(size(net(**batch), batch)) for batch in test) / 3
    with pipeline_of(Labelled(), plan, n_microbatches) as pipeline:
        assert pipeline.evaluate(test, {"size": size})["size"] == pytest.approx(expected, rel=1e-6)
        pipeline.fit([labelled(4, 9)])
        assert pipeline.evaluate([labelled(4, 9)], {"loss": own_loss})["loss"] > 0


def test_an_evaluation_that_needs_what_is_missing() -> None:
    words = "the metric 'loss' is None: .* minibatches without the labels"
    with pipeline_of(Labelled()) as pipeline, pytest.raises(PipedreamError, match=words):
        pipeline.evaluate([labelled(4, 1, "labels")], {"loss": own_loss})
    with pipeline_of(Labelled(uses_early=True)) as pipeline:
        words = "does not accept the first minibatch of the evaluation without labels, which example_inputs has: give"
        with pytest.raises(PipedreamError, match=words):
            pipeline.evaluate([labelled(8, 1, "labels")], {"size": size})


def test_training_needs_all_inputs() -> None:
    with pipeline_of(Labelled()) as pipeline, pytest.raises(PipedreamError, match="have no 'labels', which the model"):
        pipeline.fit([labelled(4, 1, "labels")])
