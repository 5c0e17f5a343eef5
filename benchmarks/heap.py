"""Measure the cost of returning freed activations to the system: training on a CPU with and without glibc's defaults.

    python benchmarks/heap.py          three models, one thread; about a minute

Each model is trained by plain torch in separate processes, which take turns; in every other process
pipedream_hpc.cluster.heap makes glibc keep freed memory, as a Pipeline on a CPU does.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

from rich.console import Console
from rich.table import Table

BATCHES = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        train(options.one[0], options.one[1] == "kept")
        return
    table = Table("model", "glibc's defaults (ms)", "page faults", "kept (ms)", "page faults", "speedup")
    for name in ("mlp", "vgg", "gpt"):
        found: dict[str, list[list[float]]] = {"default": [], "kept": []}
        for _ in range(options.rounds):
            for setting, samples in found.items():
                clean = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))}
                command = [sys.executable, __file__, "--one", name, setting]
                samples.append(json.loads(subprocess.run(command, env=clean, check=True, capture_output=True).stdout))
        (default_s, faults), (kept_s, kept_faults) = (
            [statistics.median(figures) for figures in zip(*samples, strict=True)] for samples in found.values()
        )
        table.add_row(
            name,
            f"{default_s * 1e3:.1f}",
            f"{faults:,.0f}",
            f"{kept_s * 1e3:.1f}",
            f"{kept_faults:,.0f}",
            f"{default_s / kept_s:.2f}",
        )
    Console(width=100, highlight=False).print(table)


def train(name: str, keep: bool) -> None:
    """Train a model; print the seconds and page faults per minibatch."""
    import contenders as c
    import torch

    from pipedream_hpc.cluster.heap import keep_freed_memory

    torch.set_num_threads(1)
    if keep:
        keep_freed_memory()
    workload = c.WORKLOADS[name]
    model = torch.nn.Sequential(*workload.blocks())
    x, y = workload.batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=c.LEARNING_RATE)
    for batch in range(2 + BATCHES):
        if batch == 2:
            before, began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        optimizer.zero_grad()
        workload.loss_fn(model(x), y).backward()
        optimizer.step()
    seconds = time.perf_counter() - began
    print(json.dumps([seconds / BATCHES, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / BATCHES]))


if __name__ == "__main__":
    main()
