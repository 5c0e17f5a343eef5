"""Forms of inputs: what minibatches and example_inputs may be, and what an evaluation may leave out.

The reference is plain torch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

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


def row(n: int) -> tuple[numpy.ndarray[Any, Any], int]:
    return numpy.random.default_rng(n).standard_normal(6, dtype=numpy.float32), n % 3


def stacked(rows: list[Any]) -> tuple[numpy.ndarray[Any, Any], numpy.ndarray[Any, Any]]:
    """As a collate_fn that makes no tensors."""
    x, y = zip(*rows, strict=True)
    return numpy.stack(x), numpy.array(y)


def frozen(array: numpy.ndarray[Any, Any]) -> numpy.ndarray[Any, Any]:
    array.flags.writeable = False
    return array


ARRAYS: dict[str, Callable[[Any, Any], Any]] = {
    "a pair": lambda x, y: (x, y),
    "a list": lambda x, y: [x, y],
    "nested": lambda x, y: ((x,), {"y": y}),
    "read only": lambda x, y: (frozen(x), frozen(y)),
    "reversed": lambda x, y: (x[::-1].copy()[::-1], y[::-1].copy()[::-1]),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("n_microbatches", [1, 2])
@pytest.mark.parametrize("form", ARRAYS)
def test_minibatches_and_examples_of_arrays(form: str, n_microbatches: int) -> None:
    arrays = [stacked([row(n) for n in range(begin, begin + 4)]) for begin in (0, 4, 8)]
    net = network()
    steps = SGD(net.parameters())
    for x, y in arrays:
        steps.zero_grad()
        functional.cross_entropy(net(torch.tensor(x)), torch.tensor(y)).backward()
        steps.step()
    data = [ARRAYS[form](*each) for each in arrays]

    def loss_fn(output: torch.Tensor, target: Any) -> torch.Tensor:
        return functional.cross_entropy(output, target["y"] if isinstance(target, dict) else target)

    with Pipeline(
        network(),
        loss_fn=loss_fn,
        optimizer=SGD,
        example_inputs=data[0][0],
        plan=2,
        schedule=ScheduleConfig("gpipe", n_microbatches),
    ) as pipeline:
        pipeline.fit(data)
        found = pipeline.state_dict()
    for name, value in net.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=0 if n_microbatches == 1 else 1e-5, atol=1e-7)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.mark.parametrize(
    ("example", "words"),
    [
        (None, "example_inputs is None: give one minibatch of inputs: a tensor, a tuple of the model's arguments"),
        (3, "example_inputs is 3: give one minibatch"),
        (DataLoader(TensorDataset(torch.zeros(4, 6))), r"is a DataLoader: .* such as next\(iter\(loader\)\)\[0\], or"),
        (TensorDataset(torch.zeros(4, 6)), "is a TensorDataset: give one minibatch of its inputs"),
        (iter([torch.zeros(4, 6)]), "is a list_iterator: give one minibatch of its inputs"),
        ([torch.zeros(4, 6)] * 2, r"Sequential.forward takes 1 inputs \(input\), but example_inputs has 2"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_examples_that_are_no_minibatch(example: Any, words: str) -> None:
    with pytest.raises(PipedreamError, match=words):
        Pipeline(network(), loss_fn=functional.cross_entropy, optimizer=SGD, example_inputs=example, plan=2)


def test_a_list_of_one_input_is_an_example() -> None:
    with Pipeline(
        network(), loss_fn=functional.cross_entropy, optimizer=SGD, example_inputs=[torch.zeros(4, 6)], plan=2
    ) as pipeline:
        assert pipeline.fit([(torch.zeros(4, 6), torch.zeros(4, dtype=torch.int64))]) > 0


def test_training_needs_all_inputs() -> None:
    with (
        pipeline_of(Labelled()) as pipeline,
        pytest.raises(PipedreamError, match="have no 'labels', which example_inputs has"),
    ):
        pipeline.fit([labelled(4, 1, "labels")])


def test_a_loader_without_a_minibatch_is_refused() -> None:
    few = TensorDataset(torch.zeros(3, 6), torch.zeros(3, dtype=torch.int64))
    for loader, kind in ((DataLoader(few, 4, drop_last=True), "DataLoader"), ([], "list")):
        with Pipeline(
            network(), loss_fn=functional.cross_entropy, optimizer=SGD, example_inputs=torch.zeros(4, 6), plan=2
        ) as pipeline:
            for run in (pipeline.fit, pipeline.evaluate, lambda each: list(pipeline.train(each))):
                with pytest.raises(PipedreamError, match=rf"the loader \({kind}\) has no minibatch: .* drop_last=True"):
                    run(loader)
            pipeline.fit(DataLoader(few, 3))


class Options(nn.Module):
    """Takes a number, a flag and the name of a task beside its samples, and uses each in other layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 16)
        self.tasks = nn.ModuleDict({"p": nn.Linear(16, 3), "q": nn.Linear(16, 3)})

    def forward(self, x: torch.Tensor, scale: float = 1.0, flip: bool = False, task: str = "p") -> Any:
        hidden = self.b(self.a(x).tanh() * scale)
        return self.tasks[task](hidden * (-1 if flip else 1) / (1 + scale))


def with_options(**of_minibatch: list[Any]) -> list[Any]:
    draw = torch.Generator().manual_seed(3)
    return [
        (
            {"x": torch.randn(8, 6, generator=draw), **{name: each[index] for name, each in of_minibatch.items()}},
            torch.randint(0, 3, (8,), generator=draw),
        )
        for index in range(4)
    ]


def pipeline_with_options(model: nn.Module, batches: list[Any], plan: int, n_microbatches: int = 1) -> Pipeline:
    return Pipeline(
        model, loss_fn=nn.CrossEntropyLoss(), optimizer=SGD, example_inputs=batches[0][0], plan=plan,
        schedule=ScheduleConfig("1f1b-flush", n_microbatches),
    )  # fmt: skip


@pytest.mark.parametrize("n_microbatches", [1, 2])
@pytest.mark.parametrize("plan", [1, 2, 3])
@pytest.mark.parametrize(
    "options", [{"scale": [1.0, 2.0, 0.5, 4.0]}, {"scale": [1, 0, 2, 2], "flip": [False, True, True, False]}]
)
def test_numbers_of_a_minibatch_are_its_own(options: dict[str, list[Any]], plan: int, n_microbatches: int) -> None:
    """In every stage, and not those of the example."""
    batches, model, reference = with_options(**options), Options(), Options()
    steps = SGD(reference.parameters())
    with pipeline_with_options(model, batches, plan, n_microbatches) as pipeline:
        pipeline.fit(batches)
        scores = pipeline.evaluate(batches[1:])
        for inputs, target in batches:
            steps.zero_grad()
            functional.cross_entropy(reference(**inputs), target).backward()
            steps.step()
        for name, value in pipeline.state_dict().items():
            torch.testing.assert_close(value, reference.state_dict()[name], rtol=1e-6, atol=1e-6 * (n_microbatches > 1))
        with torch.no_grad():
            losses = [float(functional.cross_entropy(reference(**inputs), target)) for inputs, target in batches[1:]]
    assert scores["loss"] == pytest.approx(sum(losses) / 3, rel=1e-6)


@pytest.mark.parametrize("plan", [2, 4])
def test_a_text_of_a_minibatch_that_leads_to_other_modules_is_refused(plan: int) -> None:
    batches = with_options(task=["p", "p", "q", "p"])
    pipeline = pipeline_with_options(Options(), batches, plan)
    with pytest.raises(PipedreamError, match="took another path"):
        pipeline.fit(batches)


class Tasks(nn.Module):
    """Nothing but modules: no function tells one path from another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self.tasks = nn.ModuleDict({"p": nn.Linear(8, 3), "q": nn.Linear(8, 3)})

    def forward(self, x: torch.Tensor, task: str) -> Any:
        return self.tasks[task](self.trunk(x))


@pytest.mark.parametrize("plan", [2, 3])
def test_modules_that_the_example_does_not_reach_are_refused_when_they_are_reached(plan: int) -> None:
    """Their weights are in no stage, and would not be trained."""
    batches = with_options(task=["p", "p", "q", "p"])
    pipeline = pipeline_with_options(Tasks(), batches, plan)
    pipeline.fit(batches[:2])
    with pytest.raises(PipedreamError, match=r"another path .* called module 'tasks\.q' where 'tasks\.p' had been"):
        pipeline.fit(batches[2:])
