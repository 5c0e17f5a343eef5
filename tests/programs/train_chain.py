"""Train chains of tests/chains.py and write down everything that tests compare.

python train_chain.py '[{"plan": 4, "model": "plain", "optimizer": "sgd", "epochs": [40, 40], "out": "x.pt"}, ...]'

Each case may have `last` (samples of the last minibatch), `options` (more arguments of Pipeline), `clip`
and `decay` (the learning rate's, per minibatch). Many cases in one launch save its seconds.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import chains

from pipedream_hpc import Clip, Pipeline, core


def main() -> None:
    torch.set_num_threads(1)
    for wanted in json.loads(sys.argv[1]):
        report = train(wanted)
        if "weights" in report:
            torch.save(report, wanted["out"])


def train(wanted: dict) -> dict:
    """The report of rank 0; nothing on the others."""
    options = dict(wanted.get("options", {}))
    if "checkpoints" in options:
        rank = os.environ.get("OMPI_COMM_WORLD_RANK", "0")
        options["checkpoints"] = options["checkpoints"].format(rank=rank)
    if "clip" in wanted:
        options["clip"] = Clip(*wanted["clip"])
    if "decay" in wanted:
        options["scheduler"] = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=wanted["decay"])
    pipeline = Pipeline(
        chains.MODELS[wanted["model"]](),
        loss=nn.CrossEntropyLoss(),
        optimizer=chains.OPTIMIZERS[wanted["optimizer"]],
        example=chains.example(),
        plan=wanted["plan"],
        leaves=[chains.Functional],
        trace=True,
        stall_limit_s=30,
        **options,
    )
    if "resume" in wanted:
        assert pipeline.resume() == wanted["resume"]
    report = {"ranks": pipeline.world.size, "losses": [], "scores": [], "traces": [], "allocations": []}
    for count in wanted["epochs"]:
        batches = chains.minibatches(count, last=wanted.get("last", chains.SAMPLES))
        report["losses"].append(pipeline.fit(batches))
        report["scores"].append(pipeline.evaluate(batches))
        report["traces"].append(
            [(s.rank, s.kind, s.minibatch, s.version) for s in pipeline.last_trace().spans if s.version >= 0]
        )
        report["allocations"].append(
            core.load_memory().allocations() + (core.load_core().allocations() if pipeline.world.size > 1 else 0)
        )
    report["slabs"] = {
        worker.rank: stage.stash.slabs for worker in pipeline._workers for stage in worker.stages.values()
    }
    report["stages"] = [len(stage.layers) for stage in pipeline.plan.stages]
    report["weights"] = pipeline.state_dict()
    if pipeline.world.comm is not None:
        for part in pipeline.world.comm.allgather((report["losses"], report["scores"])):
            assert str(part) == str((report["losses"], report["scores"])), "the same answer everywhere"
        report["slabs"] = {k: v for part in pipeline.world.comm.allgather(report["slabs"]) for k, v in part.items()}
        report["allocations"] = pipeline.world.comm.allgather(report["allocations"])
    report["stage_of"] = pipeline.stage_of_parameters()
    pipeline.close()
    return report if pipeline.rank == 0 else {}


if __name__ == "__main__":
    main()
