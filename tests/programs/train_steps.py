"""Train step by step, in one of several ways; every rank writes what it saw."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import chains
import torch
from torch import nn

from pipedream_hpc import PipedreamError, Pipeline, RunConfig, ScheduleConfig, TrainConfig
from pipedream_hpc.cluster.world import join

#: Minibatches of an epoch, and samples of the last one.
MINIBATCHES, LAST = 7, 5
#: Minibatches of the second epoch, which an endless loader yields.
ENDLESS = 4
#: Name -> replicas of the stages, schedule, minibatches that an optimizer step learns from.
WAYS = {
    "flush": ((1, 1, 1), ScheduleConfig("1f1b-flush", 4), 1),
    "gpipe": ((1, 2), ScheduleConfig("gpipe", 3), 1),
    "zb-h1": ((1, 1, 1), ScheduleConfig("zb-h1", 2), 2),
    "data-parallel": ((3,), ScheduleConfig("data-parallel"), 3),
    "model-parallel": ((1, 1, 1), ScheduleConfig("model-parallel"), 1),
    "1f1b": ((2, 1), ScheduleConfig("1f1b"), 2),
}


def pipeline_of(name: str) -> Pipeline:
    replicas, schedule, in_round = WAYS[name]
    steps = in_round if schedule.n_microbatches else 1
    return Pipeline(
        chains.plain_model(),
        loss_fn=nn.CrossEntropyLoss(),
        optimizer=chains.OPTIMIZERS["sgd"],
        example_inputs=chains.example(),
        plan=replicas,
        schedule=schedule,
        train_config=TrainConfig(
            gradient_accumulation_steps=steps,
            lr_scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.5),
        ),
        run_config=RunConfig(stall_limit_s=30, device="cpu"),
    )


def endless() -> Iterator[Any]:
    """Yield two minibatches, over and over."""
    while True:
        yield from chains.minibatches(2)


def train(name: str) -> dict[str, Any]:
    """Train; return what this rank saw."""
    batches = chains.minibatches(MINIBATCHES, last=LAST)
    steps, draws, refusals = [], [], []
    with pipeline_of(name) as pipeline:
        torch.manual_seed(5)
        for step in pipeline.train(batches):
            draws.append(float(torch.rand(())))
            steps.append([step.index, step.loss, step.lr])
            assert step.samples_per_s > 0
        second = list(pipeline.train(endless(), steps=ENDLESS))
        for step in pipeline.train(batches):
            if step.index == 3:  # every stage has ended a round with it
                break
        for attempt in (pipeline.state_dict, lambda: pipeline.fit(batches)):
            try:
                attempt()
            except PipedreamError as error:
                refusals.append(str(error))
        # Last of all, and the other ranks do not wait for it here.
        read_by_root = [step.loss for step in second if pipeline.rank == 0]
        return {"steps": steps, "draws": draws, "read_by_root": read_by_root, "refusals": refusals}


def write(folder: Path) -> int:
    """Train in all ways on the ranks that were started; write NAME-RANK.json. Return the number of ranks."""
    torch.set_num_threads(1)
    for name in WAYS:
        (folder / f"{name}-{join().rank}.json").write_text(json.dumps(train(name)))
    return join().size
