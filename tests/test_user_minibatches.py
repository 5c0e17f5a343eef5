"""Minibatches as people have them: samples along any dimension, unequal numbers of targets, evaluations of any size."""

from __future__ import annotations

from typing import Any

import pytest
import ranks
import torch
from torch import nn
from user_programs import LOSS, chain, cut, minibatches, plain

from pipedream_hpc import PipedreamError


class TimeFirst(nn.Module):
    """Takes (time, samples, features)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm, self.head = nn.LSTM(6, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0])


class Bank(nn.Module):
    """Compares samples with a bank of keys, which has as many rows as there are samples."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return self.b((self.a(x) @ keys.T).softmax(1) @ keys)


class Decoder(nn.Module):
    """Takes words as (time, samples), and a mask of (time, time) that is no sample's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)

    def forward(self, words: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.embed(words), src_mask=mask))


def sentences(samples: tuple[int, ...] = (8, 8, 7, 8)) -> list[Any]:
    draw = torch.Generator().manual_seed(3)
    mask = nn.Transformer.generate_square_subsequent_mask(6)
    words = [torch.randint(0, 11, (6, each), generator=draw) for each in samples]
    return [((each, mask), each.roll(-1, 0)) for each in words]


def next_word(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())


#: Samples are along the second dimension; the mask has none.
TIME_FIRST = {"words": 1, "mask": None, "target": 1}


@pytest.mark.parametrize("plan", [1, 2, "2-1"])
@pytest.mark.parametrize("n_microbatches", [2, 3])
def test_samples_may_be_along_any_dimension(plan: Any, n_microbatches: int) -> None:
    batches = sentences()
    pipeline = cut(Decoder(), batches, next_word, n_microbatches, plan, TIME_FIRST)
    for step in pipeline.train(batches):
        assert step.loss > 0
    for name, value in plain(Decoder(), batches, next_word).items():
        torch.testing.assert_close(pipeline.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    model = Decoder()
    model.load_state_dict(pipeline.state_dict())
    model.eval()
    losses = [float(next_word(model(*inputs), target).detach()) for inputs, target in batches]
    expected = sum(loss * inputs[0].shape[1] for loss, (inputs, _) in zip(losses, batches, strict=True)) / 31
    assert pipeline.evaluate(batches)["loss"] == pytest.approx(expected, rel=1e-5)


def test_keys_of_a_mapping_have_batch_dimensions_too() -> None:
    batches = [{"words": words, "mask": mask, "labels": target} for (words, mask), target in sentences()]

    class WithLabels(Decoder):
        def forward(self, words: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> Any:
            return {"loss": next_word(super().forward(words, mask), labels)}

    dims = {"words": 1, "mask": None, "labels": 1}
    pipeline = cut(WithLabels(), batches, lambda output, batch: output["loss"], 2, 2, dims)
    pipeline.fit(batches)
    for name, value in plain(Decoder(), sentences(), next_word).items():
        torch.testing.assert_close(pipeline.state_dict()[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("dims", "words"),
    [
        (
            {"word": 1},
            r"batch_dims has 'word', which is no input of the model: its inputs are words, mask; 'target' is",
        ),
        ({**TIME_FIRST, "words": 2}, r"'words' has its samples along dimension 2, but its shape is \(6, 8\)"),
        ({"words": 1}, r"tensors of 6 and 8 samples cannot be split into 2 microbatches: .*batch_dims"),
        ({"words": True}, r"batch_dims maps 'words' to True; it should map names of inputs to dimensions, or to None"),
        ({"words": 0, "mask": 0}, r"does not accept example_inputs of shape \(3, 8\) .* and \(3, 6\)"),
    ],
)
def test_batch_dims_that_do_not_fit_are_refused(dims: Any, words: str) -> None:
    with pytest.raises(PipedreamError, match=words):
        cut(Decoder(), sentences(), next_word, batch_dims=dims)


def test_inputs_that_are_not_per_sample_are_refused() -> None:
    with pytest.raises(PipedreamError, match=r"output for a minibatch differs .*n_microbatches=1"):
        cut(TimeFirst(), minibatches(shape=(4, 6)))
    with pytest.raises(PipedreamError, match=r"output for a minibatch differs .*n_microbatches=1"):
        cut(Bank(), [((x, torch.randn(8, 16)), y) for x, y in minibatches()])


@pytest.mark.parametrize(
    ("ignored", "weight"), [((2, 0, 0, 0), None), ((3, 3, 3, 2), None), ((0, 0, 0, 0), (1.0, 5.0, 0.1))]
)
def test_a_mean_over_unequal_numbers_of_targets_is_refused(
    ignored: tuple[int, ...], weight: tuple[float, ...] | None
) -> None:
    """Four microbatches of two samples with three targets each, of which some are ignored, or weighted by class."""
    batches = minibatches(shape=(3, 6))
    for index, (x, _) in enumerate(batches):
        target = torch.randint(0, 3, (8, 3), generator=torch.Generator().manual_seed(index))
        for microbatch, count in enumerate(ignored):
            target[2 * microbatch, :count] = -100
        batches[index] = (x, target)
    classes = None if weight is None else torch.tensor(weight)

    def loss_fn(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten(), weight=classes)

    with pytest.raises(PipedreamError, match=r"the loss is a mean over .* another; let loss_fn return a pair"):
        cut(chain(), batches, loss_fn, 4).fit(batches)


def test_a_mean_over_equal_numbers_of_targets_is_that_of_the_minibatch() -> None:
    batches = [(x, y.clone()) for x, y in minibatches(shape=(3, 6))]
    batches = [(x, torch.randint(0, 3, (8, 3), generator=torch.Generator().manual_seed(0))) for x, _ in batches]
    for _, target in batches:
        target[:, 0] = -100

    def loss_fn(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())

    pipeline = cut(chain(), batches, loss_fn, 4)
    pipeline.fit(batches)
    for name, value in plain(chain(), batches, loss_fn).items():
        torch.testing.assert_close(pipeline.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def mean_loss(model: nn.Module, batches: list[Any], loss_fn: Any) -> float:
    """Return the mean per sample of a plain loop."""
    model.eval()
    with torch.no_grad():
        losses = [(float(loss_fn(model(inputs), target)), len(inputs)) for inputs, target in batches]
    return sum(loss * count for loss, count in losses) / sum(count for _, count in losses)


class Lengths(nn.Module):
    """Any number of positions; the middle stage's inputs are in another order in memory."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix, self.head = nn.Linear(6, 8), nn.Conv1d(8, 8, 3, padding=1), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.mix(self.embed(x).transpose(1, 2)).relu()
        return self.head(h.transpose(1, 2)).mean(1)


def of_sizes(*sizes: tuple[int, int]) -> list[Any]:
    """Return minibatches of (samples, length)."""
    draw = torch.Generator().manual_seed(5)
    return [
        (torch.randn(samples, length, 6, generator=draw), torch.randint(0, 3, (samples,), generator=draw))
        for samples, length in sizes
    ]


def evaluate_sizes(argument: tuple[Any, int, list[Any]]) -> list[float]:
    """Train and evaluate in turns; return the scores, and check them against a plain loop on rank 0."""
    plan, n_microbatches, evaluations = argument
    train = of_sizes((4, 5), (4, 3))
    scores = []
    with cut(Lengths(), train, LOSS, n_microbatches, plan) as pipeline:
        for evaluated in evaluations:
            pipeline.fit(train)
            weights = pipeline.state_dict()
            scores.append(pipeline.evaluate(evaluated)["loss"])
            if pipeline.rank == 0:
                model = Lengths()
                model.load_state_dict(weights)
                assert scores[-1] == pytest.approx(mean_loss(model, evaluated, LOSS), rel=1e-5)
    return scores


EVALUATIONS = [
    of_sizes((4, 5)),  # as the example
    of_sizes((10, 5), (3, 5)),  # more samples
    of_sizes((4, 11), (2, 2)),  # longer
    of_sizes((10, 12), (9, 7)),  # both
    of_sizes((2, 2)),
]


@pytest.mark.parametrize("plan", [1, 2, 3, "2-1"])
@pytest.mark.parametrize("n_microbatches", [1, 2])
def test_minibatches_of_an_evaluation_may_be_larger_than_the_example(plan: Any, n_microbatches: int) -> None:
    evaluate_sizes((plan, n_microbatches, EVALUATIONS))


def test_minibatches_of_an_evaluation_may_be_larger_on_ranks() -> None:
    on_ranks = ranks.call(3, evaluate_sizes, (3, 2, EVALUATIONS))
    assert on_ranks == evaluate_sizes((3, 2, EVALUATIONS))


def test_a_minibatch_larger_than_the_first_of_an_evaluation_is_refused() -> None:
    with pytest.raises(Exception, match=r"in an evaluation the first minibatch may be the largest instead"):
        evaluate_sizes((3, 1, [of_sizes((4, 5), (4, 9))]))
