"""Every schedule on real ranks = in one process = plain autograd with the papers' equations, bit for bit."""

from __future__ import annotations

import ast
import dataclasses
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import Any

import chains
import pytest
import torch
import training
from torch import nn
from training import Report, Training, assert_bitwise

from pipedream_hpc import Pipeline, ScheduleConfig, TrainConfig
from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.model.precision import autocast
from pipedream_hpc.verification import reference
from pipedream_hpc.verification.reference import ReferenceConfig

DECAY = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9)
#: Two epochs that end in the middle of a round of 2, 3 or 4 minibatches, with a short last minibatch.
EPOCHS, LAST = (11, 7), 5

#: One case for each combination of an optimizer and a plan in a row. Plans are the replicas of the stages; options are
#: fields of ScheduleConfig and TrainConfig, or `model`, a name in chains.MODELS.
TABLE = """
schedule       | optimizers | plans                                         | options
1f1b           | sgd adam   | 1 2 4 1-1 2-1 1-2 2-1-1 1-2-1 3-1 1-1-1-1     |
1f1b           | sgd        | 2-1                                           | gradient_accumulation_steps=2
1f1b           | sgd        | 2-1                                           | clip_grad_norm=0.1
1f1b           | sgd        | 1-1 2-1                                       | precision=bf16
1f1b           | sgd        | 1-1-1                                         | recompute=True
1f1b           | sgd        | 1-1-1 2-1                                     | model=half master_weights=True
1f1b           | adam       | 1-1-1                                         | model=half master_weights=True
vertical-sync  | sgd        | 1-1 2-1 1-2 2-1-1 3-1 1-1-1-1                 |
vertical-sync  | sgd        | 1-1-1                                         | gradient_accumulation_steps=3
data-parallel  | sgd adam   | 2 4                                           |
data-parallel  | sgd        | 2                                             | gradient_accumulation_steps=2
model-parallel | sgd        | 1-1 2-1 1-1-1-1                               |
2bw            | sgd        | 1-1 2-1 1-1-1-1                               | n_microbatches=4
1f1b-flush     | sgd        | 1-1 2-1 1-2-1 1-1-1-1 4                       | n_microbatches=4
1f1b-flush     | adam       | 1-1-1                                         | n_microbatches=5
1f1b-flush     | sgd        | 2-2                                           | n_microbatches=4 clip_grad_norm=0.1 clip_grad_over=model
zb-h1          | sgd        | 1-1 2-1 1-2-1 1-1-1-1                         | n_microbatches=4
zb-h1          | adam       | 1-1 1-2 1-3 1-1-1-1                           | n_microbatches=3
zb-h1          | sgd        | 1-1-1                                         | n_microbatches=4 recompute=True
zb-h1          | sgd        | 2-2                                           | n_microbatches=4 clip_grad_norm=0.1 clip_grad_over=model
zb-h1          | sgd        | 1-1-1                                         | n_microbatches=2 precision=bf16
zb-h1          | adam       | 1-1                                           | n_microbatches=2 model=half master_weights=True
zb-h2          | sgd        | 1-1 2-1 1-1-1 1-1-1-1                         | n_microbatches=5
zb-h2          | adam       | 1-2-1                                         | n_microbatches=4 recompute=True
gpipe          | sgd        | 1-1 2-1 1-2-1 1-1-1-1 4                       | n_microbatches=4
gpipe          | sgd        | 1-1                                           | n_microbatches=3
gpipe          | sgd        | 1-1                                           | n_microbatches=2 gradient_accumulation_steps=2
gpipe          | sgd        | 1-1                                           | n_microbatches=2 clip_grad_norm=0.1 clip_grad_over=model
gpipe          | sgd        | 1-1-1                                         | n_microbatches=2 precision=bf16
gpipe          | adam       | 1-1                                           | n_microbatches=2 model=half master_weights=True
gpipe-split    | sgd        | 1-1 2-1 1-2-1                                 | n_microbatches=4
gpipe-split    | sgd        | 1-1-1-1                                       | n_microbatches=3
gpipe-split    | sgd        | 1-1-1-1                                       | n_microbatches=5
"""  # noqa: E501


def training_of(schedule: str, optimizer: str, plan: str, options: str = "") -> Training:
    """Return the training of one case."""
    values = dict(option.split("=") for option in options.split())
    model = values.pop("model", "plain")
    numbers: dict[str, Any] = {
        name: ast.literal_eval(value) if value[0].isdigit() or value == "True" else value
        for name, value in values.items()
    }
    of_schedule = {field.name for field in dataclasses.fields(ScheduleConfig)}
    return Training(
        tuple(map(int, plan.split("-"))),
        ScheduleConfig(schedule, **{name: value for name, value in numbers.items() if name in of_schedule}),
        TrainConfig(lr_scheduler=DECAY, **{name: value for name, value in numbers.items() if name not in of_schedule}),
        model,
        optimizer,
        EPOCHS,
        LAST,
    )


def cases() -> dict[str, Training]:
    """Return the trainings of the table by name, such as `gpipe sgd 1-1 n_microbatches=3`."""
    found = {}
    for row in TABLE.strip().splitlines()[1:]:
        schedule, optimizers, plans, options = (cell.strip() for cell in row.split("|"))
        for optimizer in optimizers.split():
            for plan in plans.split():
                name = f"{schedule} {optimizer} {plan} {options}".strip()
                found[name] = training_of(schedule, optimizer, plan, options)
    return found


CASES = cases()


@cache
def in_one_process(name: str) -> Report:
    return training.in_one_process(CASES[name])


def by_reference(case: Training, stage_of: dict[str, int], schedule: str | None = None) -> dict[str, torch.Tensor]:
    """Return the weights by the reference."""
    options = case.train_config
    return reference.train(
        chains.MODELS[case.model](),
        stage_of,
        case.minibatches,
        nn.CrossEntropyLoss(),
        chains.OPTIMIZERS[case.optimizer],
        ReferenceConfig(
            schedule or case.schedule.name or "1f1b",
            case.replicas,
            case.schedule.n_microbatches or 1,
            options.gradient_accumulation_steps,
            None if options.clip_grad_norm is None else (options.clip_grad_norm, options.clip_grad_over),
            options.master_weights,
        ),
        lr_scheduler=options.lr_scheduler,
        precision=autocast(options.precision) or nullcontext,
    )


@pytest.mark.parametrize("name", CASES)
def test_one_process_computes_the_bits_of_the_reference(name: str) -> None:
    report = in_one_process(name)
    assert_bitwise(report.weights, by_reference(CASES[name], report.stage_of))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_ranks_compute_the_bits_of_one_process(count: int) -> None:
    chosen = {name: case for name, case in CASES.items() if sum(case.replicas) == count}
    expected = {name: in_one_process(name) for name in chosen}
    if count == 2:
        # Interleaved with two stages per rank computes the bits of GPipe.
        gpipe = "gpipe sgd 1-1-1-1 n_microbatches=4"
        chosen["interleaved"] = replace(CASES[gpipe], schedule=ScheduleConfig("interleaved", 4, chunks=2))
        expected["interleaved"] = in_one_process(gpipe)
    for name, report in zip(chosen, training.on_ranks(count, list(chosen.values())), strict=True):
        assert_bitwise(report.weights, expected[name].weights, name)
        assert report.losses == expected[name].losses, name


@pytest.mark.parametrize("options", ["1f1b", "gpipe n_microbatches=2"])
def test_recomputation_changes_no_bit(options: str) -> None:
    """The model has BatchNorm, which must count every minibatch once, dropout, and writes in place."""
    schedule, _, rest = options.partition(" ")
    kept, recomputed = (
        training.in_one_process(training_of(schedule, "sgd", "1-1-1", f"model=rich {rest} {recompute}"))
        for recompute in ("", "recompute=True")
    )
    assert_bitwise(kept.weights, recomputed.weights)
    assert kept.losses == recomputed.losses


def test_naive_pipelining_computes_neither_stale_nor_plain_gradients() -> None:
    """Without weight stashing, a gradient belongs to no function."""
    naive = training.in_one_process(training_of("naive", "sgd", "1-1-1-1"))
    stashed = in_one_process("1f1b sgd 1-1-1-1").weights
    plain = by_reference(CASES["model-parallel sgd 1-1-1-1"], naive.stage_of)
    for other in (stashed, plain):
        assert any(not torch.equal(value, other[name]) for name, value in naive.weights.items())


def test_replicas_stay_equal_where_mpi_chooses_the_order_of_sums() -> None:
    """The run compares the replicas itself, at the end of each epoch."""
    case = training_of("1f1b", "sgd", "3")
    training.on_ranks(3, [replace(case, train_config=replace(case.train_config, deterministic=False))])


@pytest.mark.parametrize(
    ("schedule", "options", "words"),
    [
        (ScheduleConfig("gpip"), {}, "there is no schedule 'gpip': choose from 1f1b"),
        (
            ScheduleConfig(n_microbatches=4),
            {},
            "1f1b passes whole minibatches and does not cut them into 4 microbatches",
        ),
        (ScheduleConfig("gpipe", 9), {}, "8 samples cannot be split into 9 microbatches: use at most 8"),
        (ScheduleConfig(), {"clip_grad_norm": 1.0, "clip_grad_over": "model"}, "cannot be clipped .* use 1f1b-flush"),
        (ScheduleConfig(), {"precision": "fp16"}, "nor losses be scaled for fp16"),
        (ScheduleConfig("2bw", 1), {}, "2bw needs at least 3 microbatches"),
        (ScheduleConfig("data-parallel"), {}, "the plan has 4 stages"),
        (ScheduleConfig("interleaved", chunks=3), {}, "4 stages cannot be distributed 3 per rank"),
    ],
)
def test_a_schedule_that_cannot_run_is_refused(schedule: ScheduleConfig, options: dict[str, Any], words: str) -> None:
    with pytest.raises(PipedreamError, match=words):
        pipeline(schedule, TrainConfig(**options))


def test_master_weights_need_an_optimizer_of_the_core() -> None:
    with pytest.raises(PipedreamError, match=r"master_weights=True needs .* this RMSprop is not"):
        pipeline(ScheduleConfig(), TrainConfig(master_weights=True), torch.optim.RMSprop)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "fp8"}, "precision should be one of 'bf16', 'fp16' or None, not 'fp8'"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps should be an integer of at least 1, not 0"),
    ],
)
def test_an_option_with_an_impossible_value_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(PipedreamError, match=words):
        TrainConfig(**options)


def pipeline(
    schedule: ScheduleConfig, train_config: TrainConfig, optimizer: Any = chains.OPTIMIZERS["sgd"]
) -> Pipeline:
    return Pipeline(
        chains.plain_model(),
        loss_fn=nn.CrossEntropyLoss(),
        optimizer=optimizer,
        example_inputs=chains.example(),
        plan="1-1-1-1",
        schedule=schedule,
        train_config=train_config,
    )
