"""Train in a way that fails on one rank: python failing.py HOW [PLAN]

raise, kill, sleep    in the loss function of the output stage, in minibatch 4
absent                rank 2 never begins the epoch
large                 minibatch 3 is larger than the example
data, length          the last rank reads other data, or fewer minibatches
example, schedule     rank 1 has another example, or another schedule
seed, unseeded        rank 1 builds its model from another seed; from NumPy without a seed, in a function
left                  the loop over steps is left in minibatch 2
anything else         nothing but what PLAN does
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import chains

from pipedream_hpc import Pipeline, RunConfig, ScheduleConfig


def stamp() -> None:
    """Print the time, from which on all ranks must end within seconds."""
    print(f"stamp {time.time()}", flush=True)


def unseeded() -> nn.Module:
    model = chains.plain_model()
    model[6].weight.data.copy_(torch.from_numpy(numpy.random.rand(*model[6].weight.shape)))
    return model


def main() -> None:
    how, *rest = sys.argv[1:]
    launched = int(os.environ["OMPI_COMM_WORLD_SIZE"])
    minibatches = 0

    def loss_fn(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        nonlocal minibatches
        minibatches += 1
        if minibatches == 5:
            stamp()
            if how == "raise":
                raise ValueError("the labels of this minibatch are broken")
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "sleep":
                time.sleep(3600)
        return nn.functional.cross_entropy(output, target)

    batches = chains.minibatches(20)
    example = chains.example()
    if how == "large":
        batches[3] = (torch.zeros(chains.SAMPLES + 1, chains.FEATURES), torch.zeros(chains.SAMPLES + 1).long())
    if how == "example" and os.environ.get("OMPI_COMM_WORLD_RANK") == "1":
        example = example[:5]
    model: Any = chains.plain_model()
    if how == "seed" and os.environ.get("OMPI_COMM_WORLD_RANK") == "1":
        nn.init.normal_(model[0].weight)
    if how == "unseeded":
        model = unseeded
    schedule = None
    if how == "schedule":
        schedule = ScheduleConfig("zb-h2" if os.environ.get("OMPI_COMM_WORLD_RANK") == "1" else "zb-h1", 2)
    stamp()
    pipeline = Pipeline(
        model,
        loss_fn=loss_fn,
        optimizer=chains.OPTIMIZERS["sgd"],
        example_inputs=example,
        plan=rest[0] if rest else launched,
        schedule=schedule,
        run_config=RunConfig(stall_limit_s=3),
    )
    if how == "data" and pipeline.rank == launched - 1:
        batches = chains.minibatches(20)[::-1]
    if how == "length" and pipeline.rank == launched - 1:
        batches = chains.minibatches(19)
    if how == "absent" and pipeline.rank == 2:
        time.sleep(3600)
    stamp()
    if how == "left":
        for step in pipeline.train(batches):
            if step.index == 2:
                break
        pipeline.state_dict()
    pipeline.fit(batches)
    print("all went well")


if __name__ == "__main__":
    main()
