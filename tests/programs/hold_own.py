"""Train a model of 15 large layers; write the memory growth and the weights of each rank.

python hold_own.py function|stages|module FOLDER

`function` and `stages` pass a function that builds the model; with `stages` no host has room for all of it.
"""

import functools
import json
import sys
import zlib
from pathlib import Path

import torch
from torch import nn

from pipedream_hpc import Pipeline, RunConfig
from pipedream_hpc.runtime.launch import start

LAYERS, WIDTH = 15, 1536  # 9 MiB of weights per layer


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))


def train(model: object, width: int) -> tuple[Pipeline, int]:
    """Return the pipeline, and the resident bytes when training began."""
    torch.manual_seed(1)
    data = [(torch.randn(2, width), torch.randn(2, width)) for _ in range(6)]
    sgd = functools.partial(torch.optim.SGD, lr=0.1)
    pipeline = Pipeline(
        model,
        loss_fn=nn.MSELoss(),
        optimizer=sgd,
        example_inputs=data[0][0],
        plan=3,
        run_config=RunConfig(stall_limit_s=60),
    )
    started = status("VmRSS")
    pipeline.fit(data)
    return pipeline, started


def status(field: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def main() -> None:
    # First train a tiny model: imports and one-time allocations are not measured.
    torch.manual_seed(0)
    train(lambda: nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))), 8)[0].close()
    before = status("VmRSS")
    if sys.argv[1] == "stages":
        start.available_bytes = lambda: 0
    pipeline, started = train(network() if sys.argv[1] == "module" else network, WIDTH)
    with pipeline:
        (stage,) = pipeline.stages
        weights = dict(zip(stage.stash.trained_names, stage.stash.trained, strict=True))
        report = {
            "ranks": pipeline.world.size,
            "grown": status("VmHWM") - before,
            "started": started - before,
            "own": sum(weight.nbytes for weight in weights.values()),
            "versions": stage.stash.slabs,
            "weights": {name: zlib.crc32(weight.detach().numpy().data) for name, weight in weights.items()},
        }
        (Path(sys.argv[2]) / f"{pipeline.rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
