"""Measure the cost of communication and schedule: a balanced pipeline of two stages against its stages alone.

    python benchmarks/steady_state.py             all models; a few minutes
    python benchmarks/steady_state.py --only mlp --plot steady.png

Starts two ranks itself, with one thread and one core each. First both ranks run forward, backward and update of their
own stage repeatedly at the same time, without communication: no pipeline of these stages can be faster. Then the
pipeline (asynchronous 1F1B) runs on the same inputs; the two take turns. Required: at least 0.95 of that throughput,
and the bottleneck stage idle for at most 3 % of the time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from launch import on_two_ranks
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

MIN_THROUGHPUT = 0.95


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("mlp", "vgg", "gpt"), action="append", help="one of the models")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=12, help="minibatches per turn")
    parser.add_argument("--plot", type=Path, help="write a figure")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        run(options)
        return
    table = Table(
        "model",
        "stages alone (ms)",
        "at the same time (ms)",
        "pipeline (ms)",
        "throughput",
        "bottleneck idle",
        title="medians",
    )
    results = []
    for name in options.only or ("mlp", "vgg", "gpt"):
        command = [sys.executable, __file__, "--rank", "--only", name]
        (found,) = on_two_ranks([*command, "--rounds", str(options.rounds), "--batches", str(options.batches)])
        results.append(found)
        ratio, idle = throughput(found), statistics.median(found["idle"])
        table.add_row(
            found["model"],
            " and ".join(f"{1e3 * statistics.median(times):.1f}" for times in zip(*found["stages"], strict=True)),
            f"{1e3 * statistics.median(map(max, found['stages'])):.1f}",
            f"{1e3 * statistics.median(found['pipeline']):.1f}",
            f"{ratio:.3f}",
            f"{idle:.1%}",
        )
    Console(width=110, highlight=False).print(table)
    if options.plot:
        draw(results, options.plot)


def throughput(found: dict[str, Any]) -> float:
    """Return the throughput of the pipeline relative to that of its stages alone: the median over the rounds."""
    pairs = zip(found["stages"], found["pipeline"], strict=True)
    return statistics.median(max(stages) / pipeline for stages, pipeline in pairs)


def run(options: argparse.Namespace) -> None:
    """Run as one rank."""
    import contenders as c
    import torch.distributed as dist

    rank, _ = c.start_ranks()
    workload = c.WORKLOADS[options.only[0]]
    decided: list[Any] = [c.quarters_of(c.block_seconds(workload)) if rank == 0 else None]
    dist.broadcast_object_list(decided)
    cuts = decided[0]
    stages = c.Stages(workload, cuts)
    stages.open()
    found: dict[str, Any] = {"model": workload.name, "stages": [], "pipeline": [], "idle": []}
    for _ in range(options.rounds):
        dist.barrier()
        by_rank: list[Any] = [None, None]
        dist.all_gather_object(by_rank, stages.seconds(options.batches))
        found["stages"].append(list(by_rank))
        ours = c.Ours(workload, cuts, "1f1b", trace=True)
        ours.open()
        dist.barrier()
        dist.all_gather_object(by_rank, ours.seconds(options.batches))
        found["pipeline"].append(max(by_rank))
        found["idle"].append(ours.bottleneck_idle())
        ours.close()
    if rank == 0:
        print(json.dumps(found), flush=True)
    dist.destroy_process_group()


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Draw the throughput of every round and the required one."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for position, found in enumerate(results):
        pairs = zip(found["stages"], found["pipeline"], strict=True)
        ratios = [max(stages) / pipeline for stages, pipeline in pairs]
        axes.plot([position] * len(ratios), ratios, "o", color="tab:blue", alpha=0.4)
        axes.plot(position, statistics.median(ratios), "_", color="tab:blue", markersize=30, markeredgewidth=2)
    axes.axhline(MIN_THROUGHPUT, color="tab:gray", linewidth=1, linestyle="--")
    axes.axhline(1.0, color="tab:gray", linewidth=1)
    axes.set_xticks(range(len(results)), [found["model"].replace(", ", ",\n") for found in results], fontsize="small")
    axes.set_ylabel("throughput relative to the stages alone")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
