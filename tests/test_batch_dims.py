"""What is not along the first dimension of a tensor, where minibatches are cut: lists, nested inputs, other dimensions.

The reference is plain torch on the whole minibatch.
"""

from __future__ import annotations

from collections import UserDict
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional

from pipedream_hpc import PipedreamError, Pipeline, ScheduleConfig, TrainConfig
from pipedream_hpc.model.arguments import Arguments
from pipedream_hpc.model.batch_dims import BatchDims
from pipedream_hpc.verification.reference import _split

SAMPLES, TIME = 4, 3
SGD = partial(torch.optim.SGD, lr=0.5)


class Net(nn.Module):
    """Takes the first value of a nested `batch` by time, and scales of it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, batch: Any) -> torch.Tensor:
        x, scale = batch["states"][0], batch["scale"]
        return self.second(torch.tanh(self.first(x)) * scale).transpose(0, 1).flatten(1)


def batches(count: int = 3) -> list[tuple[dict[str, Any], torch.Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [
        (
            {
                "states": (torch.randn(TIME, SAMPLES, 6, generator=draw), torch.randn(SAMPLES, 2, generator=draw)),
                "scale": torch.rand(TIME, 1, 1, generator=draw),
            },
            torch.randn(SAMPLES, TIME * 3, generator=draw),
        )
        for _ in range(count)
    ]


def plain(data: list[Any], loss_fn: Any) -> dict[str, torch.Tensor]:
    net = Net()
    steps = SGD(net.parameters())
    for inputs, target in data:
        steps.zero_grad()
        loss_fn(net(inputs), target).backward()
        steps.step()
    return dict(net.state_dict())


def trained(data: list[Any], loss_fn: Any, dims: Any) -> dict[str, torch.Tensor]:
    with Pipeline(
        Net(),
        loss_fn=loss_fn,
        optimizer=SGD,
        example_inputs=data[0][0],
        plan=2,
        schedule=ScheduleConfig("gpipe", 2),
        train_config=TrainConfig(batch_dims=dims),
    ) as pipeline:
        pipeline.fit(data)
        return pipeline.state_dict()


@pytest.mark.parametrize("scale", ["scale", "batch.scale"], ids=["key", "path"])
def test_nested_inputs_are_named_by_keys_and_paths(scale: str) -> None:
    expected = plain(batches(), functional.mse_loss)
    for name, value in trained(batches(), functional.mse_loss, {"batch.states.0": 1, scale: None}).items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize("keep", [list, tuple], ids=["list", "tuple"])
def test_lists_with_an_item_for_each_sample_are_cut(keep: Any) -> None:
    """Numbers, and tensors that have no dimension of samples."""
    data = [(inputs, {"weights": keep([0.5, 2.0, 1.0, 3.0]), "of": keep(target)}) for inputs, target in batches()]

    def loss_fn(output: torch.Tensor, target: Any) -> torch.Tensor:
        assert len(output) == len(target["weights"]) == len(target["of"])
        terms = [w * (o - t).square().mean() for w, o, t in zip(target["weights"], output, target["of"], strict=True)]
        return torch.stack(terms).mean()

    dims = {"batch.states.0": 1, "scale": None, "target.weights": 0, "target.of": 0}
    expected = plain(data, loss_fn)
    for name, value in trained(data, loss_fn, dims).items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize(
    "value",
    [
        [1.0, 2.0, 3.0, 4.0],
        (1.0, 2.0, 3.0, 4.0),
        ["a", "b", "c", "d"],
        [torch.tensor(float(n)) for n in range(4)],
        {1, 2, 3, 4},
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("dims", [{}, {"x": 0}], ids=["none", "some"])
def test_as_many_values_as_samples_are_refused_if_nothing_is_said_of_them(value: Any, dims: Any) -> None:
    batch = Arguments((torch.zeros(4, 2),), {}, ("x",))
    with pytest.raises(PipedreamError, match=r"4 values, as many as there.*batch_dims=\{'target.scale': 0\}"):
        BatchDims(dims).split(batch, {"scale": value}, 2)
    whole = BatchDims({**dims, "target.scale": None}).split(batch, {"scale": value}, 2)
    assert [target["scale"] for _, target in whole] == [value, value]


class Target(NamedTuple):
    boxes: list[Any]
    name: str


class Encoding(UserDict[str, Any]):
    """As a tokenizer's minibatch: a mapping that torch's pytrees do not know."""


X = torch.arange(8.0).view(2, 4)


@pytest.mark.parametrize(
    ("dims", "target", "expected"),
    [
        ({"target.boxes": 0}, Target([1, 2, 3, 4], "a"), [Target([1, 2], "a"), Target([3, 4], "a")]),
        ({"target": 0}, [1, 2, 3, 4], [[1, 2], [3, 4]]),
        ({"target.0": None}, ([1, 2, 3, 4], "a"), [([1, 2, 3, 4], "a")] * 2),
        ({"target": None}, {"k": [1, 2, 3, 4]}, [{"k": [1, 2, 3, 4]}] * 2),
        ({"target.k": 0}, Encoding(k=[1, 2, 3, 4]), [Encoding(k=[1, 2]), Encoding(k=[3, 4])]),
    ],
    ids=["named tuple", "the target", "whole in a tuple", "whole mapping", "any mapping"],
)
def test_what_a_name_says_of_a_list(dims: Any, target: Any, expected: Any) -> None:
    dims = {"x": 1, **dims}
    parts = BatchDims(dims).split(Arguments((X,), {}, ("x",)), target, 2)
    assert [own for _, own in parts] == expected
    assert [type(own) for _, own in parts] == [type(each) for each in expected]
    assert [each.args[0].tolist() for each, _ in parts] == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]
    reference = [_split(dims, ["x"], target, "target", index, 2)[0] for index in range(2)]
    assert [dict(each) if isinstance(target, UserDict) else each for each in expected] == reference


@pytest.mark.parametrize(
    ("dims", "words"),
    [
        ({"target.box": 0}, "batch_dims has 'target.box', which is not in the target"),
        ({"target.boxes": 0, "x": 0}, "tensors of 2 and 4 samples cannot be split"),
        ({"y": 0}, "batch_dims has 'y', which is no input of the model: its inputs are x;"),
    ],
)
def test_names_and_lengths_that_do_not_fit(dims: Any, words: str) -> None:
    arguments = Arguments((X,), {}, ("x",))
    with pytest.raises(PipedreamError, match=words):
        BatchDims(dims).check(arguments)
        BatchDims(dims).split(arguments, {"boxes": [1, 2, 3, 4]}, 2)
