"""Compare planned and measured memory of an MLP, a small VGG and a small GPT, each on 2 ranks.

    python benchmarks/memory.py

Each model is profiled, planned for one stage per rank, and trained for an epoch of 24 minibatches. The table shows
every part of a rank's memory as planned and as measured (runtime/state/memory_report.py), and the growth of the whole
process since before its first minibatch (on a GPU: what torch allocated, and the weights).

Expected: no part is larger than planned. Activations may be smaller: a profile measures layers one by one, and a
tensor that two neighbours keep is counted for both. The process grows by more than the parts: by temporary memory of
operations, and by memory that the allocator keeps. This file also defines the job that is trained:
`pipedream train benchmarks/memory.py -- --model vgg`.
"""

from __future__ import annotations

import argparse
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipedream_hpc import Job
from pipedream_hpc.zoo import gpt, vgg_small

#: Model -> kind of optimizer that the plan assumes.
MODELS = {"mlp": "momentum", "vgg": "momentum", "gpt": "adam"}
PARTS = ("weights", "gradients", "optimizer", "activations", "slots")
MINIBATCHES = 24


def job(args: list[str]) -> Job:
    """Return the job that the `pipedream` commands run, with synthetic data of realistic sizes."""
    parser = argparse.ArgumentParser(prog="memory.py")
    parser.add_argument("--model", choices=MODELS, default="mlp")
    model = parser.parse_args(args).model
    torch.manual_seed(0)
    momentum = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
    if model == "mlp":
        layers = [nn.Sequential(nn.Linear(1024, 1024), nn.ReLU()) for _ in range(8)]
        return _job(nn.Sequential(*layers, nn.Linear(1024, 10)), torch.randn(256, 1024), _labels(256), momentum)
    if model == "vgg":
        return _job(vgg_small(), torch.randn(64, 3, 32, 32), _labels(64), momentum)
    network = gpt(layers=6, width=256, heads=4, vocabulary=4096, sequence=128, tied=False)
    tokens = torch.randint(0, 4096, (8, 128))
    return _job(network, tokens, tokens, partial(torch.optim.AdamW, lr=1e-3), loss_fn=_next_token)


def _labels(count: int) -> torch.Tensor:
    return torch.randint(0, 10, (count,))


def _next_token(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy: (samples, length, words), (samples, length) -> ()."""
    return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())


def _job(model: nn.Module, inputs: torch.Tensor, target: torch.Tensor, optimizer: Any, loss_fn: Any = None) -> Job:
    data = [(inputs, target)] * MINIBATCHES
    return Job(
        model,
        loss_fn=loss_fn or nn.functional.cross_entropy,
        optimizer=optimizer,
        train_loader=data,
        example_inputs=inputs,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--only", choices=MODELS, action="append", help="measure only this model")
    parser.add_argument("--device", default="auto", help="as for pipedream train")
    parser.add_argument("--out", type=Path, default=Path("memory-out"))
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("OMPI_MCA_btl", "^ofi")
    found = {
        model: measure(model, options.out / model, options.ranks, options.device) for model in options.only or MODELS
    }
    show(found)
    draw(found, options.out / "memory.png")
    (options.out / "memory.json").write_text(json.dumps(found, indent=1))
    print(f"written to {options.out}: memory.png, memory.json")


def measure(model: str, folder: Path, ranks: int, device: str) -> list[dict[str, Any]]:
    """Profile, plan and train one model; return the memory of every rank from the summary of `pipedream train`."""
    from launch import run  # not at the top: `pipedream train` loads this file too, without this folder on its path

    folder.mkdir(parents=True, exist_ok=True)
    mpirun = ["mpirun", "-n", str(ranks), "--oversubscribe", "--bind-to", "none"]
    target = [Path(__file__).resolve(), "--device", device]
    own = ["--", "--model", model]
    profile, topology, plan = folder / "profile.json", folder / "topology.json", folder / "plan.json"
    run(*mpirun, "pipedream", "profile", *target, "--minibatches", 5, "-o", profile, *own)
    run(*mpirun, "pipedream", "probe", "--repeats", 3, "-o", topology)
    run("pipedream", "partition", profile, "--topology", topology, "--straight", "--optimizer", MODELS[model],
        "-o", plan)  # fmt: skip
    run(*mpirun, "pipedream", "train", *target, "--plan", plan, "--out", folder, "--no-trace", *own)
    memory: list[dict[str, Any]] = json.loads((folder / "summary.json").read_text())["memory"]
    return memory


def show(found: dict[str, list[dict[str, Any]]]) -> None:
    """Print a table with planned and measured memory of each rank, and their ratio."""
    from rich.console import Console
    from rich.table import Table

    from pipedream_hpc.observe.tables import human_bytes

    table = Table(title="memory, planned and measured")
    for column in ("model", "rank", "", *PARTS, "sum", "process grew by"):
        table.add_column(column, justify="left" if column in ("model", "") else "right")
    for model, ranks in found.items():
        for each in ranks:
            for what in ("planned", "measured"):
                sizes = [each[what][part] for part in PARTS]
                grew = human_bytes(each["peak_bytes"] - each["before_bytes"]) if what == "measured" else ""
                table.add_row(model, str(each["rank"]), what, *map(human_bytes, [*sizes, sum(sizes)]), grew)
            shares = [
                f"{each['measured'][part] / each['planned'][part]:.2f}" if each["planned"][part] else "-"
                for part in PARTS
            ]
            whole = sum(each["measured"].values()) / sum(each["planned"].values())
            table.add_row("", "", "ratio", *shares, f"{whole:.2f}", "", end_section=True)
    Console(width=140).print(table)


def draw(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw planned and measured memory of each rank of each model as stacked bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(found), figsize=(4 * len(found), 4), squeeze=False)
    for axis, (model, ranks) in zip(axes[0], found.items(), strict=True):
        labels = [f"rank {each['rank']}\n{what}" for each in ranks for what in ("planned", "measured")]
        bars = [each[what] for each in ranks for what in ("planned", "measured")]
        below = [0.0] * len(bars)
        for part in PARTS:
            heights = [bar[part] / 1e6 for bar in bars]
            axis.bar(labels, heights, bottom=below, label=part)
            below = [low + height for low, height in zip(below, heights, strict=True)]
        axis.set_title(model)
        axis.set_ylabel("MB")
        axis.tick_params(axis="x", labelsize=7)
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
