"""Measure the overhead per microbatch beyond its compute, with two stages of one Linear 8 x 8 each.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --profile 1     profile the Python code of rank 1

Starts two ranks itself. 1F1B-flush over MPI and torch's 1F1B over gloo take turns with the bare compute of the slower
stage: forward, loss and backward of as many microbatches in a plain loop. The table shows medians of microseconds per
microbatch. Required: an overhead of at most 60 µs.
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

MAX_OVERHEAD_US = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--microbatches", type=int, default=32)
    parser.add_argument("--plot", type=Path, help="write a figure")
    parser.add_argument("--profile", type=int, choices=(0, 1), help="rank to profile")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        run(options)
        return
    more = [] if options.profile is None else ["--profile", str(options.profile)]
    counts = ["--rounds", str(options.rounds), "--microbatches", str(options.microbatches)]
    (found,) = on_two_ranks([sys.executable, __file__, "--rank", *counts, *more])
    table = Table("contender", "µs per microbatch", "overhead", title=f"{options.microbatches} microbatches per batch")
    bare = statistics.median(found["bare"])
    for name, times in found.items():
        overhead = statistics.median(time - compute for time, compute in zip(times, found["bare"], strict=True))
        table.add_row(name, f"{1e6 * statistics.median(times):.0f}", "" if name == "bare" else f"{1e6 * overhead:.0f}")
    Console(width=100, highlight=False).print(table, f"bare: the compute of the slower stage, {1e6 * bare:.0f} µs")
    if options.plot:
        draw(found, options.plot)


def draw(found: dict[str, list[float]], path: Path) -> None:
    """Draw the compute and the overhead."""
    figure = Figure(figsize=(7, 1.8), layout="constrained")
    axes, bare = figure.subplots(), 1e6 * statistics.median(found["bare"])
    contenders = [name for name in found if name != "bare"]
    axes.barh(contenders, bare, color="tab:gray", label="compute")
    overheads = [1e6 * statistics.median(found[name]) - bare for name in contenders]
    axes.barh(contenders, overheads, left=bare, color="tab:blue", label="overhead")
    axes.axvline(bare + MAX_OVERHEAD_US, color="tab:gray", linestyle="--", label="required")
    axes.set(xlabel="µs per microbatch")
    axes.invert_yaxis()
    axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
    figure.savefig(path, dpi=130)


def run(options: argparse.Namespace) -> None:
    """Run as one rank."""
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
    cuts = (0, 1, 1)  # each half has one non-empty quarter
    ours, theirs = (
        c.Ours(workload, cuts, "1f1b-flush", count),
        c.TorchPipeline(workload, cuts, "Schedule1F1B", count),
    )
    layer, x, target = nn.Linear(8, 8), torch.randn(size, 8, requires_grad=True), torch.randn(size, 8)

    def bare(batches: int) -> float:
        began = time.perf_counter()
        for _ in range(batches * count):
            x.grad = None
            workload.loss_fn(layer(x), target).backward()
        return (time.perf_counter() - began) / batches

    found: dict[str, list[float]] = {"bare": [], "pipedream_hpc 1f1b-flush": [], "torch 1F1B": []}
    profile = cProfile.Profile() if options.profile == rank else None
    for contender in (ours, theirs):
        contender.open()
    for _ in range(options.rounds):
        for name, seconds in zip(found, (bare, ours.seconds, theirs.seconds), strict=True):
            by_rank: list[Any] = [None, None]
            dist.barrier()
            if profile and seconds == ours.seconds:
                profile.enable()
            batch_s = seconds(20)
            if profile:
                profile.disable()
            dist.all_gather_object(by_rank, batch_s / count)
            found[name].append(max(by_rank))
    ours.close()
    if profile:
        pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(25)
    if rank == 0:
        print(json.dumps(found), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
