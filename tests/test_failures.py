"""Whatever goes wrong on one rank, every rank stops within seconds and one message says why."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import chains
import pytest
import ranks
import torch
from torch import nn

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.files import load, save
from pipedream_hpc.job import LossFn
from pipedream_hpc.model.capture import capture
from pipedream_hpc.model.counting import count
from pipedream_hpc.planning.plan import Plan
from pipedream_hpc.planning.solver import Request, solve
from pipedream_hpc.planning.topology import Level, Topology
from pipedream_hpc.runtime.pipeline import Pipeline

SOON = 10.0  # seconds from the fault to the end of the last rank: the promise

#: While other tests run, ranks that wait for each other answer late.
alone = pytest.mark.alone


def flat(devices: int) -> Topology:
    return Topology((Level("node", devices, 0.0, 1e9),), device="cpu")


def plan_file(folder: Path, model: nn.Module, devices: int, *, straight: bool = True) -> Path:
    path = folder / "plan.json"
    save(solve(count(capture(model, chains.example())), flat(devices), Request(straight=straight)), path)
    return path


def fails(how: str, *args: object, launched: int = 4) -> str:
    """Return the output of a run that fails soon, on every rank."""
    finished = ranks.python(launched, "failing.py", how, *args, timeout=60)
    assert finished.status != 0, finished.output
    assert "all went well" not in finished.output
    stamps = [float(stamp) for stamp in re.findall(r"stamp (\d+\.\d+)", finished.output)]
    assert stamps, finished.output
    began = max(stamps)
    assert finished.ended - began < SOON, f"{finished.ended - began:.1f} s\n{finished.output}"
    return finished.output


def sentence(output: str, ranks: int = 4) -> str:
    """Return the only error sentence in `output`."""
    lines = re.findall(rf"\[rank \d/{ranks}[^\]]*\] pipedream: (.*)", output)
    assert len(lines) == 1, output
    return str(lines[0])


@alone
def test_a_rank_that_raises() -> None:
    output = fails("raise")
    assert output.count("ValueError: the labels of this minibatch are broken") == 2, output  # cause, and summary
    assert "rank 3 (stage 3) at epoch 0, minibatch 4, forward (3F4v4) failed: ValueError: the labels" in output
    assert "rank 0 (stage 0) at" not in output


@alone
def test_a_rank_killed_by_sigkill() -> None:
    output = fails("kill")
    # The launcher's own words: which rank, where, which signal.
    assert re.search(r"rank 3 .* on\s+signal 9 \(Killed\)", output), output


@alone
def test_a_rank_that_does_not_answer_is_named() -> None:
    text = sentence(fails("sleep"))
    assert "no answer from rank 3, which may be stuck" in text
    for rank in (0, 1, 2):
        waits = rf"rank {rank} has waited 3\.\d s for epoch 0, minibatch \d: "
        assert re.search(waits + rf"gradient of layer '\d' \(stage {rank}\) from rank {rank + 1}", text), text


@alone
def test_a_rank_that_never_begins_the_epoch_is_named() -> None:
    assert sentence(fails("absent")).startswith("rank 2 did not answer within 3 s")


def test_a_plan_for_two_ranks_started_on_three(tmp_path: Path) -> None:
    text = sentence(fails("plan", plan_file(tmp_path, chains.plain_model(), 2), launched=3), ranks=3)
    assert "is for 2 ranks, but 3 were started: start 2 (mpirun -n 2 ...)" in text


def test_a_model_that_does_not_match_its_plan(tmp_path: Path) -> None:
    text = sentence(fails("model", plan_file(tmp_path, chains.rich_model(), 2), launched=2), ranks=2)
    assert "was made for another model" in text
    assert "profile and partition this model again" in text


def test_a_minibatch_larger_than_the_example() -> None:
    text = sentence(fails("large", launched=2), ranks=2)
    assert text.startswith("rank 0 (stage 0) at epoch 0, minibatch 3, send (0SEND_F3>1r1): activation of layer")
    assert "has shape (9, 16) and dtype float32, but example_inputs led to (8, 16)" in text
    assert "give example_inputs that are as large as the largest minibatch" in text


def test_ranks_that_read_different_data() -> None:
    assert "ranks 0 and 2 read different first minibatches" in sentence(fails("data", launched=3), ranks=3)


def test_ranks_with_examples_of_different_sizes() -> None:
    text = sentence(fails("example", launched=2), ranks=2)
    shapes = [f"[('2', ({samples}, 16), 'float32')] on rank {rank}" for rank, samples in enumerate((8, 5))]
    assert text.startswith("ranks disagree about the boundary tensors that the example leads to: " + ", ".join(shapes))


def test_ranks_with_different_schedules() -> None:
    options = "n_microbatches=2, chunks=1, gradient_accumulation_steps=1"
    assert sentence(fails("schedule", launched=2), ranks=2) == (
        f"ranks disagree about the schedule: zb-h1, {options} on rank 0, zb-h2, {options} on rank 1: start every rank "
        "with the same"
    )


def test_ranks_with_other_weights() -> None:
    text = sentence(fails("seed", launched=2), ranks=2)
    assert re.match(r"ranks disagree about the weights and buffers of the model: .* rank 0, .* rank 1: call", text)


def test_a_function_that_builds_other_weights_on_another_rank() -> None:
    text = sentence(fails("unseeded", launched=2), ranks=2)
    assert text.startswith("the function given as model built '6.weight' with other values than for the check")


def test_a_loop_over_steps_that_is_left() -> None:
    """The output stage leaves first and ends all others, which wait for its gradients."""
    assert sentence(fails("left", launched=2), ranks=2).startswith(
        "epoch 0 is not finished, and a schedule is fixed before"
    )


def test_ranks_with_loaders_of_different_lengths() -> None:
    text = sentence(fails("length", launched=2), ranks=2)
    assert "ranks disagree about the minibatches: 20 on rank 0, 19 on rank 1" in text


def make(
    model: nn.Module,
    plan: Plan | Path | int,
    *,
    loss_fn: LossFn = nn.functional.cross_entropy,
    optimizer: Any = chains.OPTIMIZERS["sgd"],
) -> Pipeline:
    return Pipeline(model, loss_fn=loss_fn, optimizer=optimizer, example_inputs=chains.example(), plan=plan)


def test_other_weights_under_the_same_names(tmp_path: Path) -> None:
    plan = load(Plan, plan_file(tmp_path, chains.plain_model(), 2))
    wider = chains.plain_model()
    wider[2], wider[4] = nn.Linear(16, 20), nn.Linear(20, 16)
    with pytest.raises(PipedreamError, match=r"stage \d .* bytes of parameters in the plan and \d+ in the model"):
        make(wider, plan)


def test_a_loader_without_length() -> None:
    with pytest.raises(PipedreamError, match="generator has no length"):
        make(chains.plain_model(), 2).fit(batch for batch in chains.minibatches(3))


def test_a_loader_that_yields_no_pairs() -> None:
    with pytest.raises(PipedreamError, match="epoch 0, minibatch 0: the loader yielded int instead of an"):
        make(chains.plain_model(), 2).fit([1, 2])


def test_more_stages_than_layers() -> None:
    with pytest.raises(
        PipedreamError, match="'Sequential' has 7 layers and cannot be cut into 9 stages: use fewer stages"
    ):
        make(chains.plain_model(), 9)


def test_a_plan_with_another_schedule_or_too_few_versions(tmp_path: Path) -> None:
    plan = load(Plan, plan_file(tmp_path, chains.plain_model(), 3))
    with pytest.raises(PipedreamError, match="there is no schedule 'gpip': choose from 1f1b"):
        make(chains.plain_model(), replace(plan, schedule="gpip"))
    first, *others = plan.stages
    with pytest.raises(PipedreamError, match=r"'stages\[0\]\.in_flight' is 1, but 1f1b on 3 ranks keeps 3"):
        make(chains.plain_model(), replace(plan, stages=(replace(first, in_flight=1), *others)))


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        (lambda parameters: None, r"optimizer\(parameters\) returned NoneType; optimizer should be a function"),
        (torch.optim.SGD([torch.ones(1)], lr=0.1), "optimizer is SGD; it should be a function of the parameters"),
        (None, "optimizer is NoneType; it should be a function of the parameters"),
        (torch.optim.LBFGS, "LBFGS runs the model again within a step, which no pipeline can do"),
    ],
)
def test_a_factory_that_returns_no_usable_optimizer(optimizer: Any, words: str) -> None:
    with pytest.raises(PipedreamError, match=words):
        make(chains.plain_model(), 2, optimizer=optimizer)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (torch.zeros(8, 13), r"minibatch 0: input 'input' has shape \(8, 13\) .* example_inputs has shape \(8, 12\)"),
        (
            torch.zeros(8, 2, 6),
            r"has shape \(8, 2, 6\) and dtype torch.float32, but example_inputs has shape \(8, 12\)",
        ),
        (torch.zeros(8, 12).double(), r"torch.float64, but example_inputs has shape \(8, 12\) and dtype torch.float32"),
    ],
)
def test_data_unlike_the_example(inputs: torch.Tensor, words: str) -> None:
    pipeline = make(chains.plain_model(), 2)
    with pytest.raises(PipedreamError, match=words):
        pipeline.fit([(inputs, torch.zeros(8).long())])


def test_a_loss_per_sample() -> None:
    pipeline = make(chains.plain_model(), 2, loss_fn=nn.CrossEntropyLoss(reduction="none"))
    words = (
        r"rank 1 \(stage 1\) at epoch 0, minibatch 0, forward \(1F0v0\): the loss should be one number, .* shape \(8,\)"
    )
    with pytest.raises(PipedreamError, match=words):
        pipeline.fit(chains.minibatches(3))
