"""Run many ranks on one machine: a deep chain with one rank per layer, oversubscribed.

    python benchmarks/scale.py                    16 and 32 ranks
    python benchmarks/scale.py --ranks 8 16

Ranks share cores and take turns, so this does not measure how fast a cluster would be. It shows that such a
pipeline starts and trains, that its weights are bitwise equal to those of one process, the time from
the launcher to the first minibatch, and the memory of a rank.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from launch import mpirun
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

WIDTH, SAMPLES, MINIBATCHES = 64, 16, 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for each launch")
    parser.add_argument("--plot", type=Path, help="file for a picture")
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.began is not None:
        run(options.ranks[0], options.began)
        return
    cores = len(os.sched_getaffinity(0))
    table = Table(
        "ranks",
        "to MPI (s)",
        "to training (s)",
        "ms per minibatch",
        "MiB per rank",
        "weights",
        title=f"on {cores} cores",
    )
    started = {}
    for ranks in options.ranks:
        found = started[ranks] = launched(ranks, options.timeout)
        alone = json.loads(_run([sys.executable, __file__, "--ranks", str(ranks), "--began", "0"], options.timeout))
        same = "as in one process" if found["weights"] == alone["weights"] else "DIFFER"
        table.add_row(
            str(ranks),
            f"{found['joined_s']:.1f}",
            f"{found['ready_s']:.1f}",
            f"{found['minibatch_s'] * 1e3:.1f}",
            f"{min(found['rss_mib']):.0f} to {max(found['rss_mib']):.0f}",
            same,
        )
    Console(width=100, highlight=False).print(table)
    if options.plot:
        draw(started, options.plot)


def draw(started: dict[int, dict[str, Any]], path: Path) -> None:
    """Draw start-up time and memory over the number of ranks."""
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = [f"{ranks} ranks" for ranks in started]
    joined = [found["joined_s"] for found in started.values()]
    left.bar(names, joined, color="tab:gray", label="launcher, imports, MPI")
    built = [found["ready_s"] - found["joined_s"] for found in started.values()]
    left.bar(names, built, bottom=joined, color="tab:blue", label="pipeline built and verified")
    left.set(ylabel="s until training begins")
    left.legend(loc="lower center", bbox_to_anchor=(0.5, 1))
    right.bar(names, [max(found["rss_mib"]) for found in started.values()], color="tab:blue")
    right.set(ylabel="MiB per rank, at most")
    figure.savefig(path, dpi=130)


def launched(ranks: int, timeout_s: float) -> dict[str, Any]:
    """Return what rank 0 of a launch on `ranks` ranks printed."""
    launcher = [mpirun(), "-n", str(ranks), "--oversubscribe", "--bind-to", "none"]
    mine = [sys.executable, __file__, "--ranks", str(ranks), "--began", str(time.time())]
    found: dict[str, Any] = json.loads(_run([*launcher, *mine], timeout_s))
    return found


def _run(command: list[str], timeout_s: float) -> str:
    settings = {"OMP_NUM_THREADS": "1", "OMPI_MCA_btl": "^ofi", "OMPI_MCA_mpi_yield_when_idle": "1"}
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    environment = root | os.environ | settings
    done = subprocess.run(command, env=environment, text=True, stdout=subprocess.PIPE, timeout=timeout_s, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed (exit {done.returncode}):\n{done.stdout[-2000:]}")
    return done.stdout.splitlines()[-1]


def run(ranks: int, began: float) -> None:
    """Run one rank, or all ranks in one process."""
    import torch
    from torch import nn

    from pipedream_hpc import Pipeline
    from pipedream_hpc.cluster.world import join

    torch.set_num_threads(1)
    world = join()
    joined = time.time()
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(ranks)))
    data = [(torch.randn(SAMPLES, WIDTH), torch.randn(SAMPLES, WIDTH)) for _ in range(MINIBATCHES)]
    pipeline = Pipeline(
        model,
        loss_fn=nn.functional.mse_loss,
        optimizer=partial(torch.optim.SGD, lr=0.01),
        example_inputs=data[0][0],
        plan="-".join(["1"] * ranks),
    )
    ready = time.time()
    pipeline.fit(data)
    took = time.time() - ready
    # Hexadecimal, so that every bit is compared.
    weights = [[float(each).hex() for each in value.flatten()[:8]] for value in pipeline.state_dict().values()]
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    every = [rss] if world.comm is None else world.comm.gather(rss)
    if world.is_root:
        found = {"joined_s": joined - began, "ready_s": ready - began, "minibatch_s": took / MINIBATCHES}
        print(json.dumps(found | {"rss_mib": every, "weights": weights}), flush=True)


if __name__ == "__main__":
    main()
