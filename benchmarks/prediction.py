"""Compare predicted and measured time per minibatch on 2 ranks: the demo's classifier, a small GPT, transformers.

    python benchmarks/prediction.py

Every round profiles (on both ranks at once, as in training), plans, simulates and trains, so that prediction
and measurement are taken within the same minute. Expected: the prediction is within 10 % of the measurement
if every rank has its own core. For each model, a picture shows the predicted timeline above the measured one.

The speed of a shared machine may change within the minute. So the plan is simulated once more, with the times that its
stages took in this very training: that ratio is of the model of the pipeline alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from dataclasses import replace
from pathlib import Path

from launch import run
from rich.console import Console
from rich.table import Table

from pipedream_hpc.files import load, save
from pipedream_hpc.observe.metrics import minibatch_s, split
from pipedream_hpc.observe.timeline import draw
from pipedream_hpc.observe.trace_file import load_trace
from pipedream_hpc.planning.plan import Plan

HERE = Path(__file__).resolve().parent
#: The job's file and, after --, its arguments.
JOBS: dict[str, list[object]] = {
    "classifier": [HERE.parent / "examples/classifier.py"],
    "GPT-like": [HERE.parent / "examples/language_model.py"],
    "GPT-2": [HERE / "huggingface_job.py", "--", "gpt2"],
    "Llama": [HERE / "huggingface_job.py", "--", "llama"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=JOBS, action="append", help="one of the models, instead of all")
    parser.add_argument("--out", type=Path, default=Path("prediction-out"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    cores = len(os.sched_getaffinity(0))
    if options.ranks > cores:
        sys.exit(f"{options.ranks} ranks would share {cores} cores, which plans do not model: use --ranks {cores}")
    os.environ.update(OMP_NUM_THREADS=str(cores // options.ranks), OMPI_MCA_btl="^ofi")
    os.environ.setdefault("OMPI_ALLOW_RUN_AS_ROOT", "1")
    os.environ.setdefault("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")

    jobs = {name: job for name, job in JOBS.items() if name in (options.only or JOBS)}
    rows: dict[str, list[tuple[float, float, float]]] = {name: [] for name in jobs}
    stages: dict[str, list[str]] = {}
    for turn in range(options.rounds):
        for name, job in jobs.items():
            folder = options.out / f"{name}-{turn}".lower()
            rows[name].append(once(job, folder, options.ranks))
            stages[name] = by_stage(folder)
            predicted, simulated, measured = (seconds * 1e3 for seconds in rows[name][-1])
            print(f"round {turn} {name}: predicted {predicted:.2f} ms, simulated from its own stage times "
                  f"{simulated:.2f} ms, measured {measured:.2f} ms", flush=True)  # fmt: skip
    table = Table(title=f"time per minibatch, {options.ranks} ranks, medians of {options.rounds} rounds")
    for column in ("model", "predicted", "measured", "ratio", "range of ratios", "from its own stage times", "range"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, found in rows.items():
        ratios = sorted(predicted / measured for predicted, _, measured in found)
        within = sorted(simulated / measured for _, simulated, measured in found)
        predicted, _, measured = (statistics.median(column) * 1e3 for column in zip(*found, strict=True))
        table.add_row(name, f"{predicted:.2f} ms", f"{measured:.2f} ms", f"{statistics.median(ratios):.3f}",
                      f"{ratios[0]:.3f} to {ratios[-1]:.3f}", f"{statistics.median(within):.3f}",
                      f"{within[0]:.3f} to {within[-1]:.3f}")  # fmt: skip
        middle = sorted(range(len(found)), key=lambda turn: found[turn][0] / found[turn][2])[len(found) // 2]
        folder = options.out / f"{name}-{middle}".lower()
        draw([load_trace(folder / "predicted.json"), load_trace(folder / "trace.json")],
             options.out / f"{name}.png".lower(), minibatches=8)  # fmt: skip
    Console().print(table)
    for name, lines in stages.items():
        print(f"{name}, last round, forward and backward per stage:", *lines, sep="\n  ")
    result = {
        name: dict(zip(("predicted_s", "simulated_s", "measured_s"), zip(*found, strict=True), strict=True))
        for name, found in rows.items()
    }
    (options.out / "prediction.json").write_text(json.dumps(result, indent=1))


def once(job: list[object], folder: Path, ranks: int) -> tuple[float, float, float]:
    """Profile, probe, plan, simulate and train; simulate what was trained.

    Returns:
        seconds per minibatch: predicted, simulated from the stages' times in the training, measured.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Every rank is bound to its own core, as on a cluster.
    mpirun = ["mpirun", "-n", str(ranks), "--bind-to", "core"]
    run(*mpirun, "pipedream", "profile", "-o", folder / "profile.json", *job)
    run(*mpirun, "pipedream", "probe", "-o", folder / "topology.json")
    run("pipedream", "partition", folder / "profile.json", "--topology", folder / "topology.json", "--straight",
        "-o", folder / "plan.json")  # fmt: skip
    predicted = simulated(folder, "plan.json", "predicted.json")
    run(*mpirun, "pipedream", "train", "--plan", folder / "plan.json", "--out", folder, "--epochs", 2, *job)
    trace = load_trace(folder / "trace.json")
    plan = load(Plan, folder / "plan.json")
    stages = tuple(
        replace(stage, forward_s=rank.forward_s, backward_s=rank.backward_s)
        for stage, rank in zip(plan.stages, split(trace), strict=True)
    )
    save(replace(plan, stages=stages), folder / "trained.json")
    return predicted, simulated(folder, "trained.json", "simulated.json"), minibatch_s(trace)


def simulated(folder: Path, plan: str, out: str) -> float:
    """Simulate a plan; return the seconds per minibatch."""
    run("pipedream", "simulate", folder / plan, "--topology", folder / "topology.json", "--minibatches", 40,
        "-o", folder / out)  # fmt: skip
    return minibatch_s(load_trace(folder / out))


def by_stage(folder: Path) -> list[str]:
    """Return a line with the planned and measured times of every stage."""
    plan, measured = load(Plan, folder / "plan.json"), split(load_trace(folder / "trace.json"))
    return [
        f"stage {index}: predicted {stage.forward_s * 1e3:.2f} + {stage.backward_s * 1e3:.2f} ms, "
        f"measured {rank.forward_s * 1e3:.2f} + {rank.backward_s * 1e3:.2f} ms"
        for index, (stage, rank) in enumerate(zip(plan.stages, measured, strict=True))
    ]


if __name__ == "__main__":
    main()
