"""What a microbatch costs beyond its compute: two stages of one Linear 8 x 8 each.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --profile 1     where rank 1's time goes

Starts two ranks itself. 1F1B with flush over MPI and torch's 1F1B over gloo take turns with the bare compute
of the slower stage: forward, loss and backward of as many microbatches in a plain loop. Medians of
microseconds per microbatch. Required: at most 60 beyond the compute.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from launch import on_two_ranks
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

MOST_US = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--microbatches", type=int, default=32)
    parser.add_argument("--plot", type=Path, help="write a picture")
    parser.add_argument("--profile", type=int, choices=(0, 1), help="a rank whose worker loop is profiled")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        run(options)
        return
    more = [] if options.profile is None else ["--profile", str(options.profile)]
    counts = ["--rounds", str(options.rounds), "--microbatches", str(options.microbatches)]
    (found,) = on_two_ranks([sys.executable, __file__, "--rank", *counts, *more])
    table = Table(
        "way", "µs per microbatch", "beyond the compute", title=f"{options.microbatches} microbatches to a batch"
    )
    bare = statistics.median(found["bare"])
    for name, times in found.items():
        beyond = statistics.median(time - alone for time, alone in zip(times, found["bare"], strict=True))
        table.add_row(name, f"{1e6 * statistics.median(times):.0f}", "" if name == "bare" else f"{1e6 * beyond:.0f}")
    Console(width=100, highlight=False).print(table, f"bare: the slower stage's own compute, {1e6 * bare:.0f} µs")
    if options.plot:
        draw(found, options.plot)


def draw(found: dict[str, list[float]], path: Path) -> None:
    """Compute, and what comes on top of it."""
    figure = Figure(figsize=(7, 1.8), layout="constrained")
    axes, bare = figure.subplots(), 1e6 * statistics.median(found["bare"])
    ways = [way for way in found if way != "bare"]
    axes.barh(ways, bare, color="tab:gray", label="compute")
    beyond = [1e6 * statistics.median(found[way]) - bare for way in ways]
    axes.barh(ways, beyond, left=bare, color="tab:blue", label="beyond")
    axes.axvline(bare + MOST_US, color="tab:gray", linestyle="--", label="required")
    axes.set(xlabel="µs per microbatch")
    axes.invert_yaxis()
    axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
    figure.savefig(path, dpi=130)


def run(options: argparse.Namespace) -> None:
    """One rank."""
    import contenders as c
    import torch
    import torch.distributed as dist
    from torch import nn

    rank, _ = c.start_ranks()
    size, count = 8, options.microbatches
    workload = c.Workload(
        "tiny",
        lambda: [nn.Linear(8, 8), nn.Linear(8, 8)],
        nn.functional.mse_loss,
        lambda: (torch.randn(size * count, 8), torch.randn(size * count, 8)),
    )
    cuts = (0, 1, 1)  # two halves of one quarter each
    ours, theirs = (
        c.Ours(workload, cuts, "1f1b-flush", count),
        c.TorchPipeline(workload, cuts, "Schedule1F1B", count),
    )
    layer, entry, target = nn.Linear(8, 8), torch.randn(size, 8, requires_grad=True), torch.randn(size, 8)

    def bare(batches: int) -> float:
        began = time.perf_counter()
        for _ in range(batches * count):
            entry.grad = None
            workload.loss(layer(entry), target).backward()
        return (time.perf_counter() - began) / batches

    found: dict[str, list[float]] = {"bare": [], "pipedream_hpc 1f1b-flush": [], "torch 1F1B": []}
    profile = cProfile.Profile() if options.profile == rank else None
    for way in (ours, theirs):
        way.open()
    for _ in range(options.rounds):
        for name, seconds in zip(found, (bare, ours.seconds, theirs.seconds), strict=True):
            both: list[Any] = [None, None]
            dist.barrier()
            if profile and seconds == ours.seconds:
                profile.enable()
            took = seconds(20)
            if profile:
                profile.disable()
            dist.all_gather_object(both, took / count)
            found[name].append(max(both))
    ours.close()
    if profile:
        pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(25)
    if rank == 0:
        print(json.dumps(found), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
