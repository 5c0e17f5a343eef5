"""Train models of tests/zoo.py.

python train_zoo.py '[{"name": "resnet", "plan": "1-1", "epochs": [5], "last": 3, "out": "x.pt"}, ...]'
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import chains
from zoo import ZOO

from pipedream_hpc import Pipeline


def main() -> None:
    torch.set_num_threads(1)
    for wanted in json.loads(sys.argv[1]):
        report = train(wanted)
        if report["rank"] == 0:
            torch.save(report, wanted["out"])


def train(wanted: dict) -> dict:
    specimen = ZOO[wanted["name"]]
    with Pipeline(
        specimen.model if wanted.get("function") else specimen.model(),
        loss=specimen.loss,
        optimizer=chains.OPTIMIZERS[wanted["optimizer"]],
        example=specimen.example(),
        plan=wanted["plan"],
        stall_limit_s=30,
        **wanted.get("options", {}),
    ) as pipeline:
        losses = [pipeline.fit(specimen.minibatches(count, wanted["last"])) for count in wanted["epochs"]]
        scores = pipeline.evaluate(specimen.minibatches(3, 2), specimen.loss)
        return {
            "rank": pipeline.rank,
            "ranks": pipeline.world.size,
            "losses": losses,
            "scores": scores,
            "weights": pipeline.state_dict(),
            "stage_of": pipeline.stage_of_parameters(),
        }


if __name__ == "__main__":
    main()
