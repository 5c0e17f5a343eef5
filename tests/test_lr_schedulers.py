"""A learning-rate scheduler that ends before the run is refused before the pass that would go on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ChainedScheduler, LambdaLR, LRScheduler, OneCycleLR, SequentialLR, StepLR

from pipedream_hpc import Pipeline, TrainConfig
from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.runtime.weights.optimizer_step import steps_left

DATA = [(torch.randn(4, 6), torch.randint(0, 3, (4,))) for _ in range(6)]


def one_cycle(optimizer: Any, total_steps: int) -> OneCycleLR:
    return OneCycleLR(optimizer, 0.1, total_steps=total_steps)


def pipeline_of(lr_scheduler: Any, plan: str = "2") -> Pipeline:
    return Pipeline(
        nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)),
        loss_fn=nn.CrossEntropyLoss(),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        example_inputs=DATA[0][0],
        plan=plan,
        train_config=TrainConfig(lr_scheduler=lr_scheduler),
    )


@pytest.mark.parametrize("plan", ["2", "2-1"])
def test_a_schedule_that_ends_is_refused_before_the_pass(plan: str) -> None:
    with pipeline_of(partial(one_cycle, total_steps=15), plan) as pipeline:
        with pytest.raises(PipedreamError, match="OneCycleLR end after 15 more minibatches, but 18 are to be trained"):
            pipeline.fit(DATA, epochs=3)
        pipeline.fit(DATA, epochs=2)
        weights = pipeline.state_dict()
        with pytest.raises(PipedreamError, match="OneCycleLR end after 3 more minibatches, but 6 are to be trained"):
            list(pipeline.train(DATA))
        assert all(torch.equal(weights[name], each) for name, each in pipeline.state_dict().items())
        assert len(list(pipeline.train(DATA, steps=3))) == 3


class Ending(LRScheduler):
    """Raises after two steps, which nobody can know."""

    def get_lr(self) -> list[float | torch.Tensor]:
        if self.last_epoch > 2:
            raise ValueError("no more")
        return [0.1]


def test_any_other_scheduler_that_raises() -> None:
    words = r"stage 1\) at epoch 0, round 2.*Ending takes no step after 2: no more: create lr_scheduler for as many"
    with pipeline_of(Ending) as pipeline, pytest.raises(PipedreamError, match=words):
        pipeline.fit(DATA)


@pytest.mark.parametrize("made", [None, 0.1])
def test_a_function_that_makes_no_scheduler_is_refused(made: Any) -> None:
    with pytest.raises(PipedreamError, match=rf"lr_scheduler\(optimizer\) returned {type(made).__name__}; it should"):
        pipeline_of(lambda _: made)


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "one cycle": partial(one_cycle, total_steps=5),
    "step": partial(StepLR, step_size=1),
    "lambda": partial(LambdaLR, lr_lambda=lambda step: 0.5**step),
    "chained": lambda own: ChainedScheduler([StepLR(own, 1), one_cycle(own, 4)]),
    "last": lambda own: SequentialLR(own, [StepLR(own, 1), one_cycle(own, 5)], [3]),
    "first": lambda own: SequentialLR(own, [one_cycle(own, 5), StepLR(own, 1)], [9]),
    "replaced in time": lambda own: SequentialLR(own, [one_cycle(own, 5), StepLR(own, 1)], [6]),
    "replaced too late": lambda own: SequentialLR(own, [one_cycle(own, 5), StepLR(own, 1)], [7]),
}


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_steps_left_are_those_that_torch_takes(name: str) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = SCHEDULERS[name](optimizer)
    scheduler.step()
    expected, taken = steps_left(scheduler), 0
    try:
        for _ in range(40):
            scheduler.step()
            taken += 1
    except ValueError:
        assert taken == expected
    else:
        assert expected == float("inf")


def test_a_function_that_returns_no_scheduler() -> None:
    with pytest.raises(
        PipedreamError, match=r"lr_scheduler\(optimizer\) returned NoneType; it should return a scheduler"
    ):
        pipeline_of(lambda optimizer: None)
