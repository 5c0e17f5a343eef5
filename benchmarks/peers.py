"""pipedream_hpc beside its peers: torch.distributed.pipelining and DDP over gloo, and the bound of two copies.

    python benchmarks/peers.py                    all models, some twenty minutes
    python benchmarks/peers.py --only mlp --rounds 5 --plot peers.png

Asynchronous 1F1B is filled once and drained once in an epoch: its time is that from one minibatch's end to another's,
as many as two turns of the others have. Everybody else fills and drains with every batch, and is timed whole.
Synchronous ways run with whole backwards, as torch's same schedule does, and with split ones.

Starts two ranks itself. The same models, cut at the same place, on the same cores with one thread each, take
turns in one run; medians of milliseconds per global batch, and of ratios within a round, since a machine is not
equally fast at all times. What should come out: asynchronous 1F1B at least
1.15 times as fast as torch's 1F1B at its best number of microbatches (1.4 times on the MLP), and at least
0.95 of the two-copies bound where the cut is balanced within 5 %; 1F1B-flush and GPipe at least 1.05 times
as fast as torch's same schedule, with the gradients of one process.
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

#: torch's schedules that we have not.
TORCH = (
    "ScheduleInterleaved1F1B",
    "ScheduleLoopedBFS",
    "ScheduleInterleavedZeroBubble",
    "ScheduleZBVZeroBubble",
    "ScheduleDualPipeV",
)
#: By schedule, how: backwards whole, split, or split with twice as many microbatches in flight.
OURS: dict[str, tuple[dict[str, bool], ...]] = {
    "1f1b-flush": ({}, {"split": True}, {"zero_bubble": True}),
    "gpipe": ({}, {"split": True}),
}
#: torch's same schedule.
SAME = {"1f1b-flush": "1F1B", "gpipe": "GPipe"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("mlp", "vgg", "gpt"), action="append", help="one of the models")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every way")
    parser.add_argument("--batches", type=int, default=6, help="batches per turn")
    parser.add_argument("--microbatches", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--plot", type=Path, help="write a picture")
    parser.add_argument("--json", type=Path, help="write all samples, in seconds")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        run(options)
        return
    every = [measured(name, options) for name in options.only or ("mlp", "vgg", "gpt")]
    console = Console(width=110, highlight=False)
    for one in every:
        report(one, console)
    if options.json:
        options.json.write_text(json.dumps(every, indent=1))
    if options.plot:
        draw(every, options.plot)


def measured(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Start two ranks for one model; what they found."""
    mine = [sys.executable, __file__, "--rank", "--only", name, "--rounds", str(options.rounds)]
    more = ["--batches", str(options.batches), "--microbatches", *map(str, options.microbatches)]
    return on_two_ranks([*mine, *more])[-1]


def run(options: argparse.Namespace) -> None:
    """One rank."""
    import contenders as c
    import torch.distributed as dist

    rank, _ = c.start_ranks()
    workload = c.WORKLOADS[options.only[0]]
    # One rank measures and decides for both.
    decided: list[Any] = [c.block_seconds(workload) if rank == 0 else None]
    dist.broadcast_object_list(decided)
    seconds = decided[0]
    cuts = c.quarters_of(seconds)
    stages = c.Stages(workload, cuts)
    ways: list[c.Way] = [c.Copies(workload, cuts), stages, c.Ddp(workload, cuts), c.Ours(workload, cuts, "1f1b")]
    for m in options.microbatches:
        # What is compared, one behind the other.
        for kind, own in OURS.items():
            ways.append(c.TorchPipeline(workload, cuts, f"Schedule{SAME[kind]}", m))
            ways += [c.Ours(workload, cuts, kind, m, **how) for how in own]
        ways += [c.TorchPipeline(workload, cuts, kind, m) for kind in TORCH]
    samples: dict[str, list[float]] = defaultdict(list)
    halves: list[list[float]] = []
    failed: dict[str, str] = {}
    differs: dict[str, float] = {}
    before, after = c.one_process(workload, cuts)
    for way in c.interleaved(ways, options.rounds):
        name = f"{way.name}|{way.microbatches}"
        if name in failed:
            continue
        try:
            dist.barrier()
            way.open()
            if name not in differs and way.kind not in ("bound", "stages", "ddp", "1f1b"):
                differs[name] = _difference(way.weights(), before, after)
            took: list[Any] = [None, None]
            dist.barrier()
            dist.all_gather_object(took, way.seconds(2 * options.batches if way.kind == "1f1b" else options.batches))
            samples[name].append(max(took))
            if way is stages:
                halves.append(took)
            way.close()
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if rank == 0:
        found = {"model": workload.name, "halves": halves, "seconds": samples, "failed": failed}
        print(json.dumps(found | {"differs": differs}), flush=True)
    c.leave()


def _difference(got: dict[str, Any], before: dict[str, Any], after: dict[str, Any]) -> float:
    """Largest error of the first update, relative to the largest update of the tensor."""
    if not got:
        return 0.0
    return max(
        float((got[name] - value).abs().max() / (value - before[name]).abs().max().clamp_min(1e-30))
        for name, value in after.items()
    )


def _best(found: dict[str, Any], prefix: str) -> str:
    """The fastest way whose name begins so; DDP is none of torch's schedules."""
    medians = {
        name: statistics.median(times)
        for name, times in found["seconds"].items()
        if name.startswith(prefix) and (prefix != "torch " or not name.startswith("torch DDP"))
    }
    return min(medians, key=lambda each: medians[each])


def _times_as_fast(found: dict[str, Any], name: str, other: str) -> float:
    """As `other`: the median over the rounds."""
    pairs = zip(found["seconds"][other], found["seconds"][name], strict=False)
    return statistics.median(theirs / own for theirs, own in pairs)


def report(found: dict[str, Any], console: Console) -> None:
    """Tables of one model."""
    medians = {name: statistics.median(times) for name, times in found["seconds"].items()}
    own = "pipedream_hpc 1f1b|1"
    table = Table(
        "way", "microbatches", "ms per batch", "spread", "of the bound", "update differs", title=found["model"]
    )
    for name, median in sorted(medians.items(), key=lambda item: item[1]):
        way, m = name.split("|")
        times = found["seconds"][name]
        spread = f"{min(times) * 1e3:.0f} to {max(times) * 1e3:.0f}"
        differs = found["differs"].get(name)
        table.add_row(
            way,
            m,
            f"{median * 1e3:.1f}",
            spread,
            f"{_times_as_fast(found, name, 'two copies|1'):.2f}",
            "" if differs is None else f"{differs:.0e}",
        )
    console.print(table)
    for name, why in found["failed"].items():
        console.print(f"did not run: {name.replace('|', ' with m = ')}: {why}")
    first, second = (statistics.median(times) for times in zip(*found["halves"] or [[0.0, 0.0]], strict=True))
    at, best = _best(found, "torch 1F1B"), _best(found, "torch ")
    over = max(first, second) / (statistics.fmean([first, second]) or 1.0) - 1
    console.print(
        f"stages alone {first * 1e3:.1f} and {second * 1e3:.1f} ms, the slower {over:.1%} over their mean; "
        f"asynchronous 1F1B is {_times_as_fast(found, own, at):.2f} x "
        f"torch's 1F1B at its best ({at.split('|')[1]} microbatches), {_times_as_fast(found, own, best):.2f} x the "
        f"best of its schedules ({best.replace('|', ', m = ')}), {_times_as_fast(found, own, 'torch DDP|1'):.2f} x "
        f"torch DDP, {_times_as_fast(found, own, 'two copies|1'):.2f} of the two-copies bound"
    )
    same = Table("times as fast as torch's same schedule", "m", "at the same m", "at the best m of each")
    for way in dict.fromkeys(name.split("|")[0] for name in medians):
        theirs = SAME.get(way.removeprefix("pipedream_hpc ").split(",")[0])
        if theirs is None or way.startswith("torch"):
            continue
        counts = [m for m in found_at(medians, way) if f"torch {theirs}|{m}" in medians]
        ratios = [_times_as_fast(found, f"{way}|{m}", f"torch {theirs}|{m}") for m in counts]
        at_best = _times_as_fast(found, _best(found, f"{way}|"), _best(found, f"torch {theirs}|"))
        same.add_row(
            way.removeprefix("pipedream_hpc "),
            ", ".join(counts),
            ", ".join(f"{ratio:.2f}" for ratio in ratios),
            f"{at_best:.2f}",
        )
    console.print(same)


def found_at(medians: dict[str, float], way: str) -> list[str]:
    """Numbers of microbatches at which `way` ran."""
    return [m for name, m in (key.split("|") for key in medians) if name == way]


def draw(every: list[dict[str, Any]], path: Path) -> None:
    """The best of every way, side by side."""
    figure = Figure(figsize=(5.0 * len(every), 4.6), layout="constrained")
    for axes, found in zip(figure.subplots(1, len(every), squeeze=False)[0], every, strict=True):
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
