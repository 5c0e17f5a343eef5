"""The Pipeline as a program holds it: plans, steps, metrics, and what it refuses."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import chains
import pytest
import ranks
import torch
from torch import nn

from pipedream_hpc import Job, PipedreamError, Pipeline, RunConfig, ScheduleConfig, Step, TrainConfig
from pipedream_hpc.job import accuracy
from pipedream_hpc.runtime.comm import loss_board

sys.path.insert(0, str(ranks.PROGRAMS))
import train_steps

LR = 0.05  # of chains.OPTIMIZERS["sgd"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def pipeline_of(plan: Any = 2, schedule: str | None = None, **options: Any) -> Pipeline:
    return Pipeline(
        chains.plain_model(),
        loss_fn=nn.CrossEntropyLoss(),
        optimizer=chains.OPTIMIZERS["sgd"],
        example_inputs=chains.example(),
        plan=plan,
        schedule=schedule,
        **options,
    )


# --- plans ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "schedule", "layout"),
    [
        (4, None, ((0,), (1,), (2,), (3,))),
        ("4", None, ((0,), (1,), (2,), (3,))),
        ((4,), None, ((0, 1, 2, 3),)),
        (4, "data-parallel", ((0, 1, 2, 3),)),
        ("4", "data-parallel", ((0, 1, 2, 3),)),
        ("2-1-1", None, ((0, 1), (2,), (3,))),
        ((2, 1, 1), None, ((0, 1), (2,), (3,))),
    ],
)
def test_a_number_is_a_number_of_stages_as_an_integer_and_as_text(plan: Any, schedule: str | None, layout: Any) -> None:
    assert pipeline_of(plan, schedule).plan.layout == layout


# --- steps ----------------------------------------------------------------------------------------


def plain_losses(name: str) -> list[list[float]]:
    """Return the losses of the minibatches of two epochs in a plain training loop, with the rounds of a way."""
    in_round = train_steps.WAYS[name][2]
    model, loss_fn = chains.plain_model(), nn.CrossEntropyLoss()
    optimizer = chains.OPTIMIZERS["sgd"](model.parameters())
    lr_scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    first = chains.minibatches(train_steps.MINIBATCHES, last=train_steps.LAST)
    second = [batch for batch, _ in zip(train_steps.endless(), range(train_steps.ENDLESS), strict=False)]
    found = []
    for batches in (first, second):
        losses = []
        for begin in range(0, len(batches), in_round):
            members = batches[begin : begin + in_round]
            optimizer.zero_grad()
            for inputs, target in members:
                loss = loss_fn(model(inputs), target)
                losses.append(loss.item())
                (loss / len(members)).backward()
            optimizer.step()
            for _ in members:
                lr_scheduler.step()
        found.append(losses)
    return found


def assert_steps(report: dict[str, Any], name: str) -> None:
    """Assert what every rank sees of a training: indices, learning rates, the user's random numbers, refusals."""
    in_round, indices = train_steps.WAYS[name][2], range(train_steps.MINIBATCHES)
    assert [index for index, _, _ in report["steps"]] == list(indices)
    if name != "1f1b":  # where the stages have rounds of different sizes
        learned_before = [index // in_round * in_round for index in indices]
        assert [lr for _, _, lr in report["steps"]] == [LR * 0.5 ** (count // 2) for count in learned_before]
    torch.manual_seed(5)
    assert report["draws"] == [float(torch.rand(())) for _ in indices]
    refusal = (
        "epoch 2 is not finished, and a schedule is fixed before its first minibatch: let the loop over "
        "train() run to its end, or give steps= to train fewer minibatches"
    )
    assert report["refusals"] == [refusal, refusal]


@pytest.mark.parametrize("name", [name for name in train_steps.WAYS if name != "1f1b"])
def test_losses_of_synchronous_schedules_are_those_of_a_plain_loop(name: str) -> None:
    report, (first, second) = train_steps.train(name), plain_losses(name)
    assert_steps(report, name)
    assert [loss for _, loss, _ in report["steps"]] == pytest.approx(first, rel=1e-5)
    assert report["read_by_root"] == pytest.approx(second, rel=1e-5)


def test_all_ranks_see_the_steps_of_one_process(tmp_path: Path) -> None:
    """A loss that only rank 0 reads keeps no rank waiting."""
    assert ranks.call(3, train_steps.write, tmp_path) == 3, "ranks"
    for name in train_steps.WAYS:
        expected = train_steps.train(name)
        assert_steps(expected, name)
        for rank in range(3):
            report = json.loads((tmp_path / f"{name}-{rank}.json").read_text())
            assert_steps(report, name)
            assert [loss for _, loss, _ in report["steps"]] == [loss for _, loss, _ in expected["steps"]], name
            assert report["read_by_root"] == (expected["read_by_root"] if rank == 0 else []), name


def test_fit_calls_on_step_and_returns_the_mean_loss_of_the_last_epoch() -> None:
    steps: list[Step] = []
    losses: list[float] = []

    def on_step(step: Step) -> None:
        steps.append(step)
        losses.append(step.loss)

    batches = chains.minibatches(5, last=3)
    mean = pipeline_of().fit(batches, epochs=2, on_step=on_step)
    assert [step.index for step in steps] == [0, 1, 2, 3, 4] * 2
    samples = [len(target) for _, target in batches]
    assert mean == pytest.approx(sum(n * loss for n, loss in zip(samples, losses[5:], strict=True)) / sum(samples))
    assert pipeline_of().fit(batches, epochs=2) == mean, "with or without on_step"


def test_a_loss_is_kept_for_some_time_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_board, "CAPACITY", 3)
    steps = list(pipeline_of(1).train(chains.minibatches(5)))
    assert all(math.isfinite(step.loss) for step in steps[2:])
    with pytest.raises(PipedreamError, match=r"the loss of .* is no longer kept: read step.loss within the next 3"):
        _ = steps[1].loss


def stream() -> Iterator[Any]:
    """A loader without a length."""
    yield from chains.minibatches(6)


def test_a_loader_without_a_length_needs_steps() -> None:
    words = "generator has no length, .* say how many minibatches to run, with steps="
    pipeline = pipeline_of()
    for attempt in (pipeline.fit, pipeline.evaluate, pipeline.train):
        with pytest.raises(PipedreamError, match=words):
            attempt(stream())  # type: ignore[operator]
    assert [step.index for step in pipeline.train(stream(), steps=4)] == [0, 1, 2, 3]
    assert pipeline.fit(stream(), steps=4) > 0
    assert pipeline.evaluate(stream(), steps=6) == pipeline.evaluate(chains.minibatches(6))


def test_steps_shorten_an_epoch() -> None:
    shortened, short = pipeline_of(), pipeline_of()
    shortened.fit(chains.minibatches(6), steps=4)
    short.fit(chains.minibatches(6)[:4])
    weights, expected = shortened.state_dict(), short.state_dict()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("loader", "steps", "words"),
    [
        (chains.minibatches(3), 4, "steps is 4, but the loader has 3 minibatches: give at most 3"),
        (chains.minibatches(3), 0, "steps should be an integer of at least 1, not 0"),
        (stream(), 7, r"epoch 0, minibatch 6, forward \(0F6v5\): the loader ended after 6 minibatches of 7: make"),
    ],
)
def test_more_or_fewer_steps_than_there_can_be_are_refused(loader: Any, steps: int, words: str) -> None:
    with pytest.raises(PipedreamError, match=words):
        pipeline_of().fit(loader, steps=steps)


@pytest.mark.parametrize("epochs", [0, -1, 1.5, "2"])
def test_epochs_that_are_no_count_are_refused(epochs: Any) -> None:
    with pytest.raises(PipedreamError, match=f"epochs should be an integer of at least 1, not {epochs!r}"):
        pipeline_of().fit(chains.minibatches(1), epochs=epochs)


# --- metrics --------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [ScheduleConfig(), ScheduleConfig("gpipe", 4)])
def test_metrics_are_means_per_sample_by_name(schedule: ScheduleConfig) -> None:
    batches = chains.minibatches(4, last=6)
    metrics = {"accuracy": accuracy, "loss": nn.CrossEntropyLoss(), "first": lambda output, target: output[:, 0].mean()}
    with pipeline_of("1-1", schedule) as pipeline:  # type: ignore[arg-type]
        found = pipeline.evaluate(batches, metrics)
        assert list(found) == list(metrics)
        assert pipeline.evaluate(batches) == {"loss": pytest.approx(found["loss"])}
    model, samples = chains.plain_model(), sum(len(target) for _, target in batches)
    with torch.no_grad():
        for name, metric in metrics.items():
            total = sum(float(metric(model(inputs), target)) * len(target) for inputs, target in batches)
            assert found[name] == pytest.approx(total / samples, rel=1e-5)


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({}, "metrics is empty: give at least one"),
        ({"each": lambda output, target: output[:, 0]}, r"the metric 'each' should be one number, .* shape \(8,\)"),
        ({"count": lambda output, target: 3}, "the metric 'count' should be one number, .* but is 3"),
    ],
)
def test_metrics_that_are_no_numbers_are_refused(metrics: Any, words: str) -> None:
    with pytest.raises(PipedreamError, match=words):
        pipeline_of().evaluate(chains.minibatches(2), metrics)


# --- from a Job -----------------------------------------------------------------------------------


def test_arguments_of_from_job_replace_the_fields_of_the_job() -> None:
    job = Job(
        chains.plain_model(),
        nn.CrossEntropyLoss(),
        chains.OPTIMIZERS["sgd"],
        chains.minibatches(2),
        chains.example(),
        schedule=ScheduleConfig("gpipe", 2),
        train_config=TrainConfig(seed=3),
    )
    own = Pipeline.from_job(job, plan=2)
    assert (own.plan.schedule, own.n_microbatches, own.train_config.seed) == ("gpipe", 2, 3)
    replaced = Pipeline.from_job(
        job, plan=2, schedule="1f1b", train_config=replace(job.train_config, seed=4), run_config=RunConfig(trace=True)
    )
    assert (replaced.plan.schedule, replaced.n_microbatches, replaced.train_config.seed) == ("1f1b", 1, 4)
    assert replaced.run_config.trace


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"schedule": 3}, "schedule is int; it should be a name such as '1f1b', or a ScheduleConfig"),
        ({"plan": 0}, "plan 0: a pipeline needs at least one stage"),
        ({"plan": 1.5}, "plan should not be 1.5, a float"),
    ],
)
def test_arguments_of_other_types_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(PipedreamError, match=words):
        pipeline_of(**options)


def test_the_accuracy_of_an_output_that_is_no_tensor_is_refused() -> None:
    assert float(accuracy(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([1, 1]))) == 0.5
    with pytest.raises(PipedreamError, match=r"the output is dict: give the Job metrics of its own"):
        accuracy({"logits": torch.zeros(2, 2)}, torch.zeros(2))  # type: ignore[arg-type]
