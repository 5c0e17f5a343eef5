"""Compare the test accuracy of pipelined training under several schedules with plain SGD in one process.

    python benchmarks/accuracy.py
    python benchmarks/accuracy.py --data fashion-mnist DIR --epochs 10

All of them train the demo's classifier, pipelined in 4 stages, with the same initial weights, learning rate and
number of epochs; runs differ in the order of the data. Stages run in one process, whose results are bitwise
equal to those of real ranks. Expected: weight stashing, vertical sync and 2BW are within half a percentage
point of plain SGD. `naive`, pipelining without stashing, is included for comparison.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from pipedream_hpc import Job, Pipeline, ScheduleConfig, TrainConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import classifier

SCHEDULES = {
    "weight stashing": ScheduleConfig("1f1b"),
    "vertical sync": ScheduleConfig("vertical-sync"),
    "2BW": ScheduleConfig("2bw", n_microbatches=4),
    "naive": ScheduleConfig("naive"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["digits"], metavar=("NAME", "DIR"))
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("accuracy-out"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    curves: dict[str, list[list[float]]] = {"plain SGD": [], **{name: [] for name in SCHEDULES}}
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("epochs", total=len(curves) * options.runs * options.epochs)
        for run in range(options.runs):
            for name in curves:
                job = classifier.job(["--data", *options.data])
                step = plain(job, run) if name == "plain SGD" else pipelined(job, run, options.stages, SCHEDULES[name])
                curve = []
                for _ in range(options.epochs):
                    curve.append(step())
                    bar.advance(task)
                curves[name].append(curve)

    final = {name: [curve[-1] for curve in runs] for name, runs in curves.items()}
    expected = statistics.mean(final["plain SGD"])
    table = Table(title=f"test accuracy after {options.epochs} epochs, {options.stages} stages, {options.runs} runs")
    for column in ("schedule", "mean", "of each run", "difference from plain SGD"):
        table.add_column(column, justify="left" if column == "schedule" else "right")
    for name, reached in final.items():
        mean = statistics.mean(reached)
        each = ", ".join(f"{value:.2%}" for value in reached)
        table.add_row(name, f"{mean:.2%}", each, f"{(mean - expected) * 100:+.2f} points")
    Console().print(table)
    (options.out / "accuracy.json").write_text(json.dumps(curves, indent=1))
    draw(curves, options.out / "accuracy.png", " ".join(options.data[:1]))


def plain(job: Job, run: int) -> Callable[[], float]:
    """Return a function that trains one epoch in an ordinary training loop and returns the test accuracy."""
    optimizer = job.optimizer(job.model.parameters())
    torch.manual_seed(100 + run)

    def epoch() -> float:
        job.model.train()
        for inputs, target in job.train_loader:
            optimizer.zero_grad()
            job.loss_fn(job.model(inputs), target).backward()
            optimizer.step()
        job.model.eval()
        with torch.no_grad():
            right = sum(int((job.model(inputs).argmax(1) == target).sum()) for inputs, target in job.test_loader)
        return right / len(job.test_loader.dataset)

    return epoch


def pipelined(job: Job, run: int, stages: int, schedule: ScheduleConfig) -> Callable[[], float]:
    """Return a function that trains one epoch in stages and returns the test accuracy."""
    pipeline = Pipeline(
        job.model,
        loss_fn=job.loss_fn,
        optimizer=job.optimizer,
        example_inputs=job.example_inputs,
        plan=stages,
        schedule=schedule,
        train_config=TrainConfig(seed=run),
    )

    def epoch() -> float:
        pipeline.fit(job.train_loader)
        return pipeline.evaluate(job.test_loader, job.metrics)["accuracy"]

    return epoch


def draw(curves: dict[str, list[list[float]]], path: Path, data: str) -> None:
    """Draw the mean accuracy by epoch, with the range of the runs."""
    figure = Figure(figsize=(8, 4.5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    for (name, runs), style in zip(curves.items(), ("k-", "C0-", "C2--", "C1-.", "C3:"), strict=True):
        columns = list(zip(*runs, strict=True))
        epochs = range(1, len(columns) + 1)
        axis.plot(epochs, [100 * statistics.mean(column) for column in columns], style, label=name, linewidth=1.6)
        axis.fill_between(
            epochs,
            [100 * min(column) for column in columns],
            [100 * max(column) for column in columns],
            color=axis.lines[-1].get_color(),
            alpha=0.12,
            linewidth=0,
        )
    axis.set(xlabel="epoch", ylabel="test accuracy (%)", title=f"{data}: the demo's classifier in 4 stages")
    best = max(value for runs in curves.values() for curve in runs for value in curve)
    axis.set_ylim(max(0.0, 100 * best - 25), 100.5)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
    figure.savefig(path)


if __name__ == "__main__":
    main()
