"""Jobs that go wrong in a chosen way: python failing.py HOW ..."""

import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import chains

from pipedream_hpc import Pipeline


def stamp() -> None:
    """From here on the clock of the promise runs."""
    print(f"stamp {time.time()}", flush=True)


def main() -> None:
    how, *rest = sys.argv[1:]
    minibatches = 0

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
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
    more = {}
    if how == "parts":
        own = {"zero_bubble": True} if os.environ.get("OMPI_COMM_WORLD_RANK") == "1" else {"split_backward": True}
        more = {"schedule": "1f1b-flush", "microbatches": 2, **own}
    stamp()
    pipeline = Pipeline(
        chains.plain_model(),
        loss=loss,
        optimizer=chains.OPTIMIZERS["sgd"],
        example=example,
        plan=rest[0] if rest else 4,
        stall_limit_s=3,
        **more,
    )
    if how == "data" and pipeline.rank == 3:
        batches = chains.minibatches(20)[::-1]
    if how == "length" and pipeline.rank == 3:
        batches = chains.minibatches(19)
    if how == "absent" and pipeline.rank == 2:
        time.sleep(3600)
    stamp()
    pipeline.fit(batches)
    print("all went well")


if __name__ == "__main__":
    main()
