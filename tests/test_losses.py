"""A loss that is a pair (sum, count) is the mean over all that was counted, however a round is cut.

The reference is a plain loop: the sum of the losses of all tokens of the round, divided by how many there are.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import ranks
import torch
from torch import nn
from torch.nn import functional

from pipedream_hpc import PipedreamError, Pipeline, ScheduleConfig, TrainConfig
from pipedream_hpc.runtime.execution.loss_meter import LossMeter
from pipedream_hpc.runtime.execution.score import Score

PADDING = -100
SAMPLES, LENGTH, WORDS = 8, 6, 11
SGD = partial(torch.optim.SGD, lr=0.5)
Batch = tuple[torch.Tensor, torch.Tensor]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(WORDS, 16), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, WORDS)
    )


def minibatches(count: int = 4, padded: int | None = None) -> list[Batch]:
    """Return sentences of different lengths; of minibatch `padded` all, of each other one the last two are empty."""
    draw = torch.Generator().manual_seed(1)
    made = []
    for number in range(count):
        words = torch.randint(0, WORDS, (SAMPLES, LENGTH), generator=draw)
        lengths = torch.randint(1, LENGTH + 1, (SAMPLES,), generator=draw)
        lengths[-2:] = 0
        if number == padded:
            lengths[:] = 0
        target = words.roll(-1, 1).where(torch.arange(LENGTH) < lengths[:, None], PADDING)
        made.append((words, target))
    return made


def per_token(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum of the losses of all words, and how many there are."""
    total = functional.cross_entropy(output.flatten(0, 1), target.flatten(), ignore_index=PADDING, reduction="sum")
    return total, (target != PADDING).sum()


def per_token_on_host(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, int]:
    total, count = per_token(output, target)
    return total, int(count)


def plain(batches: Sequence[Batch], in_round: int = 1, clip: float | None = None) -> tuple[list[float], dict[str, Any]]:
    """Train in a plain loop; return the mean loss of every minibatch, and the weights."""
    net = model()
    steps, losses = SGD(net.parameters()), []
    for begin in range(0, len(batches), in_round):
        parts = [per_token(net(words), target) for words, target in batches[begin : begin + in_round]]
        losses += [float(total.detach() / max(int(count), 1)) for total, count in parts]
        steps.zero_grad()
        (sum(total for total, _ in parts) / max(sum(int(count) for _, count in parts), 1)).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        steps.step()
    return losses, dict(net.state_dict())


@dataclass(frozen=True)
class Case:
    plan: str
    schedule: ScheduleConfig
    config: TrainConfig = field(default_factory=TrainConfig)

    def train(self, batches: Sequence[Batch], loss_fn: Any = per_token) -> tuple[list[float], float, dict[str, Any]]:
        """Return the losses of the steps, the mean of the pass, and the weights."""
        with Pipeline(
            model(),
            loss_fn=loss_fn,
            optimizer=SGD,
            example_inputs=batches[0][0],
            plan=self.plan,
            schedule=self.schedule,
            train_config=self.config,
        ) as pipeline:
            losses = [step.loss for step in pipeline.train(batches)]
            return losses, pipeline.evaluate(batches)["loss"], pipeline.state_dict()


#: Minibatches in a round, and the case.
TABLE = [
    (1, Case("2", ScheduleConfig("gpipe", 4))),
    (1, Case("1-1-1", ScheduleConfig("1f1b-flush", 3))),
    (1, Case("1-1-1", ScheduleConfig("zb-h1", 4))),
    (1, Case("1-1", ScheduleConfig("1f1b-flush", 4), TrainConfig(recompute=True))),
    (1, Case("2-1", ScheduleConfig("1f1b-flush", 4))),
    (1, Case("1-2", ScheduleConfig("gpipe", 4))),
    (1, Case("2-2", ScheduleConfig("gpipe", 4), TrainConfig(clip_grad_norm=0.3, clip_grad_over="model"))),
    (1, Case("2-1-1", ScheduleConfig("zb-h1", 4))),
    (2, Case("2", ScheduleConfig("data-parallel"))),
    (2, Case("1-1", ScheduleConfig("1f1b-flush", 2), TrainConfig(gradient_accumulation_steps=2))),
]


def assert_close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Sums over microbatches have another order: one part in a million."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(("in_round", "case"), TABLE, ids=lambda each: "" if isinstance(each, int) else str(each.plan))
def test_a_round_is_one_mean_over_all_that_was_counted(in_round: int, case: Case) -> None:
    batches = minibatches(padded=2)
    losses, after, weights = case.train(batches)
    expected_losses, expected = plain(batches, in_round, case.config.clip_grad_norm)
    assert_close(weights, expected)
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    net = model()
    net.load_state_dict(expected)
    totals, counts = zip(*(per_token(net(words), target) for words, target in batches), strict=True)
    assert after == pytest.approx(float(sum(totals).detach() / sum(counts)), rel=1e-5)


@pytest.mark.parametrize("loss_fn", [per_token, per_token_on_host])
def test_whole_minibatches_have_the_bits_of_sum_divided_by_count(loss_fn: Any) -> None:
    batches = minibatches()
    losses, _, weights = Case("1-1-1", ScheduleConfig("1f1b-flush", 1)).train(batches, loss_fn)
    expected_losses, expected = plain(batches)
    assert losses == expected_losses
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_nothing_is_learned_from_padding() -> None:
    words, target = minibatches(1)[0]
    nothing = [(words, torch.full_like(target, PADDING))] * 3
    for n_microbatches in (1, 4):
        losses, after, weights = Case("1-1", ScheduleConfig("1f1b-flush", n_microbatches)).train(nothing)
        assert losses == [0.0] * 3
        assert after != after  # a mean over nothing
        assert all(torch.equal(weights[name], value) for name, value in model().state_dict().items())


def train_on_ranks(case: Case) -> tuple[list[float], float, dict[str, Any]]:
    return case.train(minibatches(padded=2))


@pytest.mark.parametrize("plan", ["2-1", "1-2"])
def test_ranks_ask_the_output_stage_for_counts(plan: str) -> None:
    case = Case(plan, ScheduleConfig("1f1b-flush", 4))
    losses, after, weights = ranks.call(3, train_on_ranks, case)
    expected = case.train(minibatches(padded=2))
    assert (losses, after) == expected[:2]
    assert all(torch.equal(weights[name], value) for name, value in expected[2].items())


def test_with_asynchronous_replicas_each_stage_means_over_its_own_round() -> None:
    """stage 0   round of both minibatches, 2 and 6 words    (g0 + g1) / 8
    stage 1   a round each; the second on its version 1   g0 / 2, then g1 / 6
    """
    words = minibatches(1)[0][0]
    batches = [(words, torch.full_like(words, PADDING)) for _ in range(2)]
    batches[0][1][0, :2], batches[1][1][0, :6] = words[0, :2], words[0, :6]
    with Pipeline(
        model(), loss_fn=per_token, optimizer=SGD, example_inputs=words, plan="2-1", schedule="1f1b"
    ) as pipeline:
        pipeline.fit(batches)
        stage_of, trained = pipeline.stage_of_parameters(), pipeline.state_dict()
    net = model()
    own = [[each for name, each in net.named_parameters() if stage_of[name] == stage] for stage in (0, 1)]
    for (inputs, target), count in zip(batches, (2, 6), strict=True):
        per_token(net(inputs), target)[0].backward()
        for weight in own[1]:
            weight.data -= 0.5 * weight.grad / count
            weight.grad = None
    for weight in own[0]:
        weight.data -= 0.5 * weight.grad / 8
    assert_close(trained, dict(net.state_dict()))


METRICS = {
    "per token": per_token,
    "right": lambda output, target: ((output.argmax(-1) == target).sum(), (target != PADDING).sum()),
    "largest": lambda output, target: output.max(),
}


def test_metrics_may_count_as_well() -> None:
    batches = minibatches()
    pipeline = Pipeline(
        model(), loss_fn=per_token, optimizer=SGD, example_inputs=batches[0][0], plan=2, schedule="1f1b-flush"
    )
    short = [(words[:5], target[:5]) for words, target in batches[:1]] + batches[1:]
    found = pipeline.evaluate(short, METRICS)
    net = model()
    outputs = [net(words) for words, _ in short]
    pairs = [(output, target) for output, (_, target) in zip(outputs, short, strict=True)]
    for name in ("per token", "right"):
        totals, counts = zip(*(METRICS[name](*pair) for pair in pairs), strict=True)
        assert found[name] == pytest.approx(float(sum(totals)) / float(sum(counts)), rel=1e-6)
    samples = [len(words) for words, _ in short]
    largest = sum(float(output.max()) * n for output, n in zip(outputs, samples, strict=True)) / sum(samples)
    assert found["largest"] == pytest.approx(largest, rel=1e-6)


def at_times(output: torch.Tensor, target: torch.Tensor) -> Any:
    total, count = per_token(output, target)
    return (total, count) if count > 20 else total / count


@pytest.mark.parametrize(
    ("loss_fn", "words"),
    [
        (lambda o, t: (o.sum(), None), r"the loss has the count of type NoneType; in a pair \(sum, count\)"),
        (lambda o, t: (o.sum(), -1), r"the loss has the count -1; in a pair \(sum, count\) it should be 0 or more"),
        (lambda o, t: (o.sum(), torch.tensor(-0.5)), "the loss has the count -0.5"),
        (lambda o, t: (o.sum(), float("nan")), "the loss has the count nan"),
        (lambda o, t: (o, 3), r"the loss has the sum of shape \(8, 6, 11\)"),
        (
            lambda o, t: (o.sum(), 1, 2),
            r"the loss should be one number, .* or a pair \(sum, count\), but is of type tu",
        ),
        (at_times, r"the loss is a pair \(sum, count\) for some microbatches and one number for others"),
    ],
)
def test_a_loss_that_is_no_score_is_refused(loss_fn: Any, words: str) -> None:
    batches = minibatches()
    batches[1] = (batches[1][0], batches[1][1].where(torch.arange(LENGTH) < 1, PADDING))
    with pytest.raises(Exception, match=words) as raised:
        Case("2", ScheduleConfig("1f1b-flush", 1)).train(batches, loss_fn)
    assert isinstance(raised.value, PipedreamError) or isinstance(raised.value.__cause__, PipedreamError)


def test_a_count_may_be_a_sum_of_weights() -> None:
    weights = torch.linspace(0.1, 1.0, WORDS)

    def weighted(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = functional.cross_entropy(output.flatten(0, 1), target.flatten(), weights, reduction="sum")
        return total, weights[target[target != PADDING]].sum()

    net = model()
    steps = SGD(net.parameters())
    for words, target in minibatches():
        steps.zero_grad()
        functional.cross_entropy(net(words).flatten(0, 1), target.flatten(), weights).backward()
        steps.step()
    assert_close(Case("2", ScheduleConfig("gpipe", 4)).train(minibatches(), weighted)[2], dict(net.state_dict()))


def test_a_negative_count_on_a_device_is_found_at_the_end_of_the_pass() -> None:
    meter = LossMeter()
    meter.add(0, [Score(torch.tensor(1.0), torch.tensor(-2.0), torch.tensor(-2))], 4)
    with pytest.raises(PipedreamError, match="has the count -2; in a pair"):
        meter.read()


# -- a loss that the model computes itself ----------------------------------------------------------------------------


class OwnLoss(nn.Module):
    """As a language model of transformers: the mean loss over the labels that are not -100."""

    def __init__(self) -> None:
        super().__init__()
        self.net = model()

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
        logits = self.net(input_ids)
        return SimpleNamespace(loss=functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits=logits)


def own_mean(output: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    loss: torch.Tensor = output.loss
    return loss


def own_pair(output: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    count = (batch["labels"] != PADDING).sum()
    return output.loss * count, count


def train_own(
    loss_fn: Any,
    batches: Sequence[dict[str, torch.Tensor]],
    recompute: bool = False,
    plan: Any = 2,
    n_microbatches: int = 4,
) -> dict[str, Any]:
    with Pipeline(
        OwnLoss(),
        loss_fn=loss_fn,
        optimizer=SGD,
        example_inputs=batches[0],
        plan=plan,
        schedule=ScheduleConfig("1f1b-flush", n_microbatches),
        train_config=TrainConfig(recompute=recompute),
    ) as pipeline:
        pipeline.fit(batches)
        return {name.removeprefix("net."): value for name, value in pipeline.state_dict().items()}


@pytest.mark.parametrize("recompute", [False, True])
def test_a_mean_that_the_model_computes_over_unequal_numbers_of_targets_is_refused(recompute: bool) -> None:
    batches = [{"input_ids": words, "labels": target} for words, target in minibatches()]
    for batch in batches:
        batch["labels"][-2:, 0] = 0  # no microbatch is empty
    with pytest.raises(PipedreamError, match=r"the loss is a mean over .* let loss_fn return a pair \(sum, count\)"):
        train_own(own_mean, batches, recompute)
    weights = train_own(own_pair, batches, recompute)
    assert_close(weights, plain([(each["input_ids"], each["labels"]) for each in batches])[1])


def test_a_mean_that_the_model_computes_over_equal_numbers_of_targets_is_that_of_the_minibatch() -> None:
    batches = [{"input_ids": words, "labels": words.roll(-1, 1)} for words, _ in minibatches()]
    expected = plain([(each["input_ids"], each["labels"]) for each in batches])[1]
    assert_close(train_own(own_mean, batches), expected)


def test_means_of_replicas_are_compared_at_the_end_of_the_pass() -> None:
    """Two microbatches, one for each replica of the output stage: neither sees what the other divides by."""
    batches = [{"input_ids": words, "labels": words.clone()} for words, _ in minibatches()]
    train_own(own_mean, batches, plan="1-2", n_microbatches=2)
    batches[2]["labels"][0, :3] = PADDING
    with pytest.raises(PipedreamError, match=r"a mean over 24 targets of 4 samples .* over 21 of 4 in another"):
        train_own(own_mean, batches, plan="1-2", n_microbatches=2)


# -- losses that are no mean over samples ------------------------------------------------------------------------------


def labels(count: int = 3) -> list[Batch]:
    draw = torch.Generator().manual_seed(2)
    return [(torch.randn(8, 6, generator=draw), torch.randint(0, 3, (8,), generator=draw)) for _ in range(count)]


def classifier() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))


def contrast(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Compare the samples of a minibatch with each other."""
    return functional.cross_entropy(output @ output.T, torch.arange(len(output)))


def of_some(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the mean over the samples of two classes, of which microbatches have unequal numbers."""
    mask = (target != 0).float()
    return (functional.cross_entropy(output, target, reduction="none") * mask).sum() / mask.sum()


def noisy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(output + torch.randn_like(output), target)


class Smoothed(nn.Module):
    """A loss with a state: how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            self.calls += 1
        return functional.cross_entropy(output, target, label_smoothing=0.1)


def classify(loss_fn: Any, n_microbatches: int, plan: Any = 2, model: nn.Module | None = None, **options: Any) -> Any:
    batches = labels()
    with Pipeline(
        model or classifier(),
        loss_fn=loss_fn,
        optimizer=SGD,
        example_inputs=batches[0][0],
        plan=plan,
        schedule=ScheduleConfig("1f1b-flush", n_microbatches),
        train_config=TrainConfig(**options),
    ) as pipeline:
        pipeline.fit(batches)
        return pipeline.state_dict()


def masked_squares(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    mask = target != 0
    return ((output.mean(1) - target).pow(2) * mask).sum() / mask.sum()


def selected(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    mask = target != 0
    return (output.mean(1) - target)[mask].pow(2).mean()


def selected_by_torch(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    mask = target != 0
    return functional.mse_loss(output.mean(1)[mask], target[mask].float())


def by_reciprocal(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    mask = target != 0
    return ((output.mean(1) - target).pow(2) * mask).sum() * (1 / mask.sum())


def by_python(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    mask = target != 0
    return ((output.mean(1) - target).pow(2) * mask).sum() / int(mask.sum())


def spread_first(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    mask = (target != 0).float()
    return ((output.mean(1) - target).pow(2) * mask / mask.sum()).sum()


MASKED = [of_some, masked_squares, selected, selected_by_torch, by_python]


class WithLoss(nn.Module):
    """A model that computes its loss itself."""

    def __init__(self, loss_fn: Any) -> None:
        super().__init__()
        self.net, self.loss_fn = classifier(), loss_fn

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.loss_fn(self.net(x), y)}


def losses_of(loss_fn: Any, batches: list[Batch], in_model: bool, n_microbatches: int, plan: Any = 2) -> list[float]:
    pipeline = Pipeline(
        WithLoss(loss_fn) if in_model else classifier(),
        loss_fn=(lambda output, _: output["loss"]) if in_model else loss_fn,
        optimizer=SGD,
        example_inputs={"x": batches[0][0], "y": batches[0][1]} if in_model else batches[0][0],
        plan=plan,
        schedule=ScheduleConfig("gpipe", n_microbatches),
    )
    data: list[Any] = [{"x": x, "y": y} for x, y in batches] if in_model else batches
    return [step.loss for step in pipeline.train(data)]


def plain_losses(loss_fn: Any, batches: list[Batch]) -> list[float]:
    net = classifier()
    steps, losses = SGD(net.parameters()), []
    for x, y in batches:
        loss = loss_fn(net(x), y)
        steps.zero_grad()
        loss.backward()
        steps.step()
        losses.append(float(loss.detach()))
    return losses


#: Four of eight samples count, in any half of the minibatch two of them.
EVEN, UNEVEN = [1, 0, 2, 0, 1, 0, 0, 2], [1, 1, 2, 0, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("loss_fn", "in_model"),
    # In a model only what is done with one number with a gradient is taken for a loss.
    [(each, False) for each in (*MASKED, by_reciprocal, spread_first)] + [(each, True) for each in MASKED],
)
def test_a_masked_mean_is_refused_at_the_minibatch_whose_microbatches_divide_by_other_numbers(
    loss_fn: Any, in_model: bool
) -> None:
    """Also where the first minibatches happen to have equal numbers: until then it is the loss of plain torch."""
    even, uneven = ([(x, torch.tensor(counts)) for x, _ in labels()] for counts in (EVEN, UNEVEN))
    assert losses_of(loss_fn, even, in_model, 2) == pytest.approx(plain_losses(loss_fn, even), rel=1e-5)
    with pytest.raises(PipedreamError, match=r"minibatch 2, .* the loss divides by 1 for 4 samples .* and by 3 for 4"):
        losses_of(loss_fn, [*even[:2], uneven[2]], in_model, 2)
    assert losses_of(loss_fn, uneven, in_model, 1) == pytest.approx(plain_losses(loss_fn, uneven), rel=1e-5)


def test_a_masked_mean_in_replicas_is_refused_at_the_end_of_the_pass() -> None:
    batches = [(x, torch.tensor(UNEVEN)) for x, _ in labels()]
    with pytest.raises(PipedreamError, match="the loss divides by 1 for 4 samples in one microbatch, and by 3 for 4"):
        losses_of(masked_squares, batches, False, 2, plan="1-2")


class Tempered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(2.0))

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(output / self.temperature.detach(), target) / 2


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda o, t: functional.mse_loss(o.mean(1), t.float()),
        lambda o, t: (o.mean(1) - t).pow(2).mean() / 3,
        lambda o, t: (o.mean(1) - t).pow(2).sum() / len(t),
        lambda o, t: (o.mean(1) - t).pow(2).mean() + (torch.ones(5) * 0.1).mean(),
        Tempered(),
    ],
)
def test_what_a_mean_over_samples_may_divide_by(loss_fn: Any) -> None:
    """The last minibatch is cut into 4 and 3 samples."""
    batches = labels()
    batches[-1] = (batches[-1][0][:7], batches[-1][1][:7])
    assert losses_of(loss_fn, batches, False, 2) == pytest.approx(plain_losses(loss_fn, batches), rel=1e-5)


@pytest.mark.parametrize("plan", [2, "1-2"])
@pytest.mark.parametrize("loss_fn", [nn.CrossEntropyLoss(reduction="sum"), contrast])
def test_a_number_that_is_no_mean_over_samples_is_refused_where_minibatches_are_cut(loss_fn: Any, plan: Any) -> None:
    with pytest.raises(PipedreamError, match=r"minibatch 0, .* loss of the minibatch is .* but the mean .* pair"):
        classify(loss_fn, 4, plan)
    classify(loss_fn, 1, plan)


@pytest.mark.parametrize("samples", [6, 8, 12])  # in microbatches of half as many: classes are 4
@pytest.mark.parametrize(
    "loss_fn",
    [
        nn.CrossEntropyLoss(reduction="sum"),
        lambda o, t: nn.functional.mse_loss(o, nn.functional.one_hot(t, 4).float(), reduction="sum"),
        lambda o, t: nn.functional.mse_loss(o, nn.functional.one_hot(t, 4).float()).sqrt(),
    ],
    ids=["cross entropy", "squares", "root"],
)
@pytest.mark.filterwarnings("error")
def test_a_sum_is_refused_also_where_outputs_are_square(loss_fn: Any, samples: int) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(samples, 6), torch.randint(0, 4, (samples,))
    with pytest.raises(PipedreamError, match=r"minibatch 0, .*loss of the minibatch is"):
        Pipeline(
            nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)),
            loss_fn=loss_fn,
            optimizer=SGD,
            example_inputs=x,
            plan=2,
            schedule=ScheduleConfig("gpipe", 2),
        ).fit([(x, y)])


def unseen(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A masked mean that divides by nothing."""
    mask = (target != 0).float()
    return ((output.mean(1) - target).pow(2) * mask).sum() * (1.0 / float(mask.sum()))


def by_power(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    mask = (target != 0).float()
    return ((output.mean(1) - target).pow(2) * mask).sum() * mask.sum() ** -1


def by_softmax(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    weights = torch.zeros(len(target)).masked_fill(target == 0, -1e9).softmax(0)
    return ((output.mean(1) - target).pow(2) * weights).sum()


@pytest.mark.parametrize("loss_fn", [unseen, by_power, by_softmax])
@pytest.mark.parametrize(("first_uneven", "refused"), [(0, 0), (1, 1), (2, 2), (3, 4)])
def test_means_that_divide_by_nothing_are_compared_at_minibatches_0_1_2_4_and_so_on(
    loss_fn: Any, first_uneven: int, refused: int
) -> None:
    even, uneven = ([(x, torch.tensor(counts)) for x, _ in labels(6)] for counts in (EVEN, UNEVEN))
    assert losses_of(loss_fn, even, False, 2) == pytest.approx(plain_losses(loss_fn, even), rel=1e-5)
    with pytest.raises(PipedreamError, match=rf"epoch 0, minibatch {refused}, .*the loss of the minibatch is"):
        losses_of(loss_fn, [*even[:first_uneven], *uneven[first_uneven:]], False, 2)


def by_float(output: torch.Tensor, target: dict[str, Any]) -> torch.Tensor:
    """A masked mean of which no function but float() tells that it depends on values."""
    return ((output.mean(1) - target["y"]).pow(2) * target["mask"]).sum() / float(target["mask"].sum())


def by_lengths(output: torch.Tensor, target: dict[str, Any]) -> torch.Tensor:
    return ((output.mean(1) - target["y"]).pow(2)).sum() / sum(target["lengths"])


@pytest.mark.parametrize("loss_fn", [by_float, by_lengths])
def test_a_divisor_that_follows_from_shapes_once_is_known_only_if_it_always_does(loss_fn: Any) -> None:
    """Minibatches 0 to 2 have equal divisors in both halves, and so has the 4th; minibatch 3 is not compared whole."""
    batches: list[Any] = []
    for number, (x, y) in enumerate(labels(5)):
        counts = torch.tensor(UNEVEN if number == 3 else EVEN)
        of = {"mask": (counts != 0).float()} if loss_fn is by_float else {"lengths": (counts + 1).tolist()}
        batches.append((x, {"y": y, **of}))
    with pytest.raises(PipedreamError, match=r"epoch 0, minibatch 3, .* the loss divides by"):
        Pipeline(
            classifier(),
            loss_fn=loss_fn,
            optimizer=SGD,
            example_inputs=batches[0][0],
            plan=2,
            schedule=ScheduleConfig("gpipe", 2),
            train_config=TrainConfig(batch_dims={} if loss_fn is by_float else {"target.lengths": 0}),
        ).fit(batches)


class Counts:
    """A loss with state in an attribute."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return functional.cross_entropy(output, target) * (1 + self.calls // 100)


def test_comparing_does_not_count_as_a_call_of_the_loss() -> None:
    loss_fn, calls = Counts(), 0

    def closure(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return functional.cross_entropy(output, target)

    losses_of(loss_fn, labels(5), False, 2)
    losses_of(closure, labels(5), False, 2)
    assert (loss_fn.calls, calls) == (10, 10)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("loss_fn", [nn.CrossEntropyLoss(), noisy, lambda o, t: ((o[:, 0] - t) ** 2).mean()])
def test_means_over_samples_and_random_losses_are_accepted(loss_fn: Any, recompute: bool) -> None:
    classify(loss_fn, 4, recompute=recompute)


def test_what_is_compared_leaves_no_trace() -> None:
    loss_fn = Smoothed()
    classify(loss_fn, 4)
    assert loss_fn.calls == 12  # three minibatches of four


def test_a_loss_that_reads_weights_of_another_stage_is_refused() -> None:
    model = classifier()

    def scaled(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(output, target) * (1 + model[0].weight.detach().norm())

    def of_its_own(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(output, target) * (1 + model[4].weight.detach().norm())

    with pytest.raises(PipedreamError, match=r"the loss or a metric reads '0\.weight', which another stage has"):
        classify(scaled, 1, model=model)
    classify(of_its_own, 1, model=(model := classifier()))
    classify(scaled, 1, plan=1, model=(model := classifier()))


def test_a_mean_over_nothing_times_nothing_counts_as_nothing() -> None:
    """The model's own mean over an empty microbatch is no number; the pair has the count 0."""
    batches = [{"input_ids": words, "labels": target} for words, target in minibatches(padded=2)]
    with Pipeline(
        OwnLoss(),
        loss_fn=own_pair,
        optimizer=SGD,
        example_inputs=batches[0],
        plan=2,
        schedule=ScheduleConfig("gpipe", 4),
    ) as pipeline:
        losses = [step.loss for step in pipeline.train(batches)]
        weights = {name.removeprefix("net."): value for name, value in pipeline.state_dict().items()}
        assert pipeline.evaluate(batches)["loss"] > 0
    expected_losses, expected = plain([(each["input_ids"], each["labels"]) for each in batches])
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert_close(weights, expected)


class Encoding(UserDict[str, torch.Tensor]):
    """A mapping of its own class, as a tokenizer returns it."""

    @property
    def labels(self) -> torch.Tensor:
        return self["labels"]


def test_minibatches_of_any_class_of_mapping_are_cut() -> None:
    def loss_fn(output: Any, batch: Encoding) -> tuple[torch.Tensor, torch.Tensor]:
        assert len(batch.labels) == len(output.logits)
        return per_token(output.logits, batch.labels)

    batches = [Encoding(input_ids=words, labels=target) for words, target in minibatches()]
    expected = plain([(each["input_ids"], each["labels"]) for each in batches])[1]
    assert_close(train_own(loss_fn, batches), expected)  # type: ignore[arg-type]


def test_a_list_with_a_value_for_each_sample_is_refused() -> None:
    batches = [(words, {"words": target, "weights": [1.0] * SAMPLES}) for words, target in minibatches()]
    with pytest.raises(
        PipedreamError, match=r"have a list of 8 values, as many as there are samples, .* make it a ten"
    ):
        Case("2", ScheduleConfig("gpipe", 4)).train(batches, lambda o, t: per_token(o, t["words"]))  # type: ignore[arg-type]
    batches = [(words, {"words": target, "name": "a", "scale": [1.0, 2.0]}) for words, target in minibatches()]
    Case("2", ScheduleConfig("gpipe", 4)).train(batches, lambda o, t: per_token(o, t["words"]))  # type: ignore[arg-type]


@dataclass
class Target:
    words: torch.Tensor


def test_a_target_that_cannot_be_cut_is_refused() -> None:
    batches = [(words, Target(target)) for words, target in minibatches()]
    with pytest.raises(
        PipedreamError, match=r"have Target, whose tensors cannot be split into microbatches: use tuples"
    ):
        Case("2", ScheduleConfig("gpipe", 4)).train(batches, lambda o, t: per_token(o, t.words))  # type: ignore[arg-type]


class Divided(nn.Module):
    """As a language model of transformers that is told how many labels the whole minibatch has."""

    def __init__(self) -> None:
        super().__init__()
        self.net = model()

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, num_items_in_batch: int) -> SimpleNamespace:
        logits = self.net(input_ids)
        total = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return SimpleNamespace(loss=total / num_items_in_batch)


@pytest.mark.parametrize(("n_microbatches", "refused"), [(1, False), (4, True)])
def test_a_sum_that_the_model_divides_by_a_number_of_the_minibatch(n_microbatches: int, refused: bool) -> None:
    batches = [
        {"input_ids": words, "labels": target, "num_items_in_batch": int((target != PADDING).sum())}
        for words, target in minibatches()
    ]

    def pair(output: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        count = (batch["labels"] != PADDING).sum()
        return output.loss * batch["num_items_in_batch"], count

    for loss_fn in (own_mean, pair):
        pipeline = Pipeline(
            Divided(),
            loss_fn=loss_fn,
            optimizer=SGD,
            example_inputs=batches[0],
            plan=2,
            schedule=ScheduleConfig("gpipe", n_microbatches),
        )
        if refused and loss_fn is own_mean:
            with pytest.raises(PipedreamError, match=r"own loss is a sum .* let loss_fn return a pair \(sum, count\)"):
                pipeline.fit(batches)
            continue
        pipeline.fit(batches)
        trained = {name.removeprefix("net."): value for name, value in pipeline.state_dict().items()}
        assert_close(trained, plain([(each["input_ids"], each["labels"]) for each in batches])[1])


def test_a_loss_is_refused_before_a_step_learns_from_it() -> None:
    (inputs, target), *_ = labels()
    with pytest.raises(PipedreamError, match=r"minibatch 0, .*loss of the minibatch is"):
        Pipeline(
            classifier(),
            loss_fn=contrast,
            optimizer=SGD,
            example_inputs=inputs,
            plan=2,
            schedule=ScheduleConfig("gpipe", 4),
        ).fit([(inputs, target)])
