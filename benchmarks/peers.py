"""Compare pipedream_hpc with torch.distributed.pipelining and DDP over gloo, and with two independent copies.

    python benchmarks/peers.py                    all models, about twenty minutes
    python benchmarks/peers.py --only mlp --rounds 5 --plot peers.png

Starts two ranks itself. All contenders train the same models, cut at the same place, on the same cores with one
thread each. They take turns in one run, because the speed of a machine varies. The tables show medians of
milliseconds per global batch, and medians of the ratios within a round.

Asynchronous 1F1B fills and drains once per epoch: its time is measured from the end of one minibatch to the end of
another, over twice as many batches as for the others. All others fill and drain with every batch, and their time
includes that. Synchronous schedules run with whole backwards, like torch's same schedule, and with split backwards.

Expected: asynchronous 1F1B is at least 1.15 times as fast as torch's 1F1B at its best number of microbatches (1.4
times on the MLP), and reaches at least 0.95 of the two copies where the stages are balanced within 5 %. 1F1B-flush
and GPipe are at least 1.05 times as fast as torch's same schedule, with the gradients of one process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from launch import on_two_ranks
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

#: Schedules of torch that pipedream_hpc does not have.
TORCH_ONLY = (
    "ScheduleInterleaved1F1B",
    "ScheduleLoopedBFS",
    "ScheduleInterleavedZeroBubble",
    "ScheduleZBVZeroBubble",
    "ScheduleDualPipeV",
)
#: torch's schedule -> our schedules that are compared with it: whole backwards first, then split ones.
COMPARED = {"1F1B": ("1f1b-flush", "zb-h1", "zb-h2"), "GPipe": ("gpipe", "gpipe-split")}
#: Our schedule -> torch's.
SAME = {ours: theirs for theirs, schedules in COMPARED.items() for ours in schedules}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("mlp", "vgg", "gpt"), action="append", help="one of the models")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every contender")
    parser.add_argument("--batches", type=int, default=6, help="batches per turn")
    parser.add_argument("--microbatches", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--plot", type=Path, help="write a figure")
    parser.add_argument("--json", type=Path, help="write all samples, in seconds")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        run(options)
        return
    results = [measure(name, options) for name in options.only or ("mlp", "vgg", "gpt")]
    console = Console(width=110, highlight=False)
    for found in results:
        report(found, console)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    if options.plot:
        draw(results, options.plot)


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Start two ranks for one model and return their measurements."""
    command = [sys.executable, __file__, "--rank", "--only", name, "--rounds", str(options.rounds)]
    more = ["--batches", str(options.batches), "--microbatches", *map(str, options.microbatches)]
    return on_two_ranks([*command, *more])[-1]


def run(options: argparse.Namespace) -> None:
    """Run as one rank."""
    import contenders as c
    import torch.distributed as dist

    rank, _ = c.start_ranks()
    workload = c.WORKLOADS[options.only[0]]
    # One rank measures and decides where both cut.
    decided: list[Any] = [c.block_seconds(workload) if rank == 0 else None]
    dist.broadcast_object_list(decided)
    cuts = c.quarters_of(decided[0])
    stages = c.Stages(workload, cuts)
    contenders: list[c.Contender] = [
        c.Copies(workload, cuts),
        stages,
        c.Ddp(workload, cuts),
        c.Ours(workload, cuts, "1f1b"),
    ]
    for m in options.microbatches:
        # Contenders that are compared run one after the other.
        for theirs, schedules in COMPARED.items():
            contenders.append(c.TorchPipeline(workload, cuts, f"Schedule{theirs}", m))
            contenders += [c.Ours(workload, cuts, schedule, m) for schedule in schedules]
        contenders += [c.TorchPipeline(workload, cuts, schedule, m) for schedule in TORCH_ONLY]
    samples: dict[str, list[float]] = defaultdict(list)
    halves: list[list[float]] = []
    failed: dict[str, str] = {}
    differs: dict[str, float] = {}
    before, after = c.one_process(workload, cuts)
    for contender in c.rotate(contenders, options.rounds):
        name = f"{contender.name}|{contender.n_microbatches}"
        if name in failed:
            continue
        try:
            dist.barrier()
            contender.open()
            if name not in differs and contender.kind not in ("bound", "stages", "ddp", "1f1b"):
                differs[name] = _difference(contender.weights(), before, after)
            seconds_by_rank: list[Any] = [None, None]
            batches = 2 * options.batches if contender.kind == "1f1b" else options.batches
            dist.barrier()
            dist.all_gather_object(seconds_by_rank, contender.seconds(batches))
            samples[name].append(max(seconds_by_rank))
            if contender is stages:
                halves.append(seconds_by_rank)
            contender.close()
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if rank == 0:
        found = {"model": workload.name, "halves": halves, "seconds": samples, "failed": failed}
        print(json.dumps(found | {"differs": differs}), flush=True)
    c.exit_together()


def _difference(got: dict[str, Any], before: dict[str, Any], after: dict[str, Any]) -> float:
    """Return the largest error of the first update, relative to the largest update in its tensor."""
    if not got:
        return 0.0
    return max(
        float((got[name] - value).abs().max() / (value - before[name]).abs().max().clamp_min(1e-30))
        for name, value in after.items()
    )


def _best(found: dict[str, Any], prefix: str) -> str:
    """Return the fastest contender whose name starts with `prefix`; "torch " means torch's schedules, without DDP."""
    medians = {
        name: statistics.median(times)
        for name, times in found["seconds"].items()
        if name.startswith(prefix) and (prefix != "torch " or not name.startswith("torch DDP"))
    }
    return min(medians, key=lambda each: medians[each])


def _speedup(found: dict[str, Any], name: str, other: str) -> float:
    """Return how many times as fast as `other` a contender is: the median over the rounds."""
    pairs = zip(found["seconds"][other], found["seconds"][name], strict=False)
    return statistics.median(theirs / own for theirs, own in pairs)


def report(found: dict[str, Any], console: Console) -> None:
    """Print the tables of one model."""
    medians = {name: statistics.median(times) for name, times in found["seconds"].items()}
    own = "pipedream_hpc 1f1b|1"
    table = Table(
        "contender", "microbatches", "ms per batch", "spread", "of the bound", "update differs", title=found["model"]
    )
    for name, median in sorted(medians.items(), key=lambda item: item[1]):
        contender, m = name.split("|")
        times = found["seconds"][name]
        spread = f"{min(times) * 1e3:.0f} to {max(times) * 1e3:.0f}"
        differs = found["differs"].get(name)
        table.add_row(
            contender,
            m,
            f"{median * 1e3:.1f}",
            spread,
            f"{_speedup(found, name, 'two copies|1'):.2f}",
            "" if differs is None else f"{differs:.0e}",
        )
    console.print(table)
    for name, why in found["failed"].items():
        console.print(f"did not run: {name.replace('|', ' with m = ')}: {why}")
    first, second = (statistics.median(times) for times in zip(*found["halves"] or [[0.0, 0.0]], strict=True))
    best_1f1b, best = _best(found, "torch 1F1B"), _best(found, "torch ")
    imbalance = max(first, second) / (statistics.fmean([first, second]) or 1.0) - 1
    console.print(
        f"stages alone {first * 1e3:.1f} and {second * 1e3:.1f} ms, the slower {imbalance:.1%} above their mean; "
        f"asynchronous 1F1B is {_speedup(found, own, best_1f1b):.2f} x "
        f"torch's 1F1B at its best ({best_1f1b.split('|')[1]} microbatches), {_speedup(found, own, best):.2f} x the "
        f"best of its schedules ({best.replace('|', ', m = ')}), {_speedup(found, own, 'torch DDP|1'):.2f} x "
        f"torch DDP, {_speedup(found, own, 'two copies|1'):.2f} of the two-copies bound"
    )
    same = Table("times as fast as torch's same schedule", "m", "at the same m", "at the best m of each")
    for contender in dict.fromkeys(name.split("|")[0] for name in medians):
        theirs = SAME.get(contender.removeprefix("pipedream_hpc "))
        if theirs is None or contender.startswith("torch"):
            continue
        counts = [m for m in _microbatches_of(medians, contender) if f"torch {theirs}|{m}" in medians]
        ratios = [_speedup(found, f"{contender}|{m}", f"torch {theirs}|{m}") for m in counts]
        at_best = _speedup(found, _best(found, f"{contender}|"), _best(found, f"torch {theirs}|"))
        same.add_row(
            contender.removeprefix("pipedream_hpc "),
            ", ".join(counts),
            ", ".join(f"{ratio:.2f}" for ratio in ratios),
            f"{at_best:.2f}",
        )
    console.print(same)


def _microbatches_of(medians: dict[str, float], contender: str) -> list[str]:
    """Return the numbers of microbatches with which a contender ran."""
    return [m for name, m in (key.split("|") for key in medians) if name == contender]


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Draw every contender at its best number of microbatches."""
    figure = Figure(figsize=(5.0 * len(results), 4.6), layout="constrained")
    for axes, found in zip(figure.subplots(1, len(results), squeeze=False)[0], results, strict=True):
        names = list(dict.fromkeys(name.split("|")[0] for name in found["seconds"]))
        medians = {name: statistics.median(times) for name, times in found["seconds"].items()}
        best = sorted((_best(found, f"{name}|") for name in names), key=lambda name: medians[name], reverse=True)
        labels = [name.replace("|", ", m = ").removesuffix(", m = 1") for name in best]
        colors = [
            "tab:blue" if "pipedream" in name else "tab:orange" if "torch" in name else "tab:gray" for name in labels
        ]
        axes.barh(labels, [medians[name] * 1e3 for name in best], color=colors)
        axes.set_title(found["model"].replace(", ", ",\n"), fontsize="medium")
        axes.set_xlabel("ms per global batch")
        axes.tick_params(labelsize="small")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
