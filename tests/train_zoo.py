"""Train models of tests/zoo.py.

A training is a dict such as {"name": "resnet", "plan": "1-1", "epochs": [5], "last": 3, "optimizer": "sgd"}, and may
have `schedule` and `train_config` (fields of ScheduleConfig and TrainConfig).
"""

import chains
import torch
from zoo import ZOO

from pipedream_hpc import Pipeline, RunConfig, ScheduleConfig, TrainConfig


def train_all(trainings: list[dict]) -> list[dict]:
    """Run trainings one after the other; return their reports."""
    torch.set_num_threads(1)
    return [train(training) for training in trainings]


def train(training: dict) -> dict:
    """Run one training; return its report."""
    case = ZOO[training["name"]]
    with Pipeline(
        case.model if training.get("function") else case.model(),
        loss_fn=case.loss,
        optimizer=chains.OPTIMIZERS[training["optimizer"]],
        example_inputs=case.example(),
        plan=training["plan"],
        schedule=ScheduleConfig(**training.get("schedule", {})),
        train_config=TrainConfig(**training.get("train_config", {})),
        run_config=RunConfig(stall_limit_s=30),
    ) as pipeline:
        losses = [pipeline.fit(case.minibatches(count, training["last"])) for count in training["epochs"]]
        scores = pipeline.evaluate(case.minibatches(3, 2))
        return {
            "rank": pipeline.rank,
            "ranks": pipeline.world.size,
            "losses": losses,
            "scores": scores,
            "weights": pipeline.state_dict(),
            "stage_of": pipeline.stage_of_parameters(),
        }
