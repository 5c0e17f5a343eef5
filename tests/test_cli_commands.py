"""The commands one after the other, as a person types them."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pictures
import pytest
import ranks
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from pipedream_hpc import __version__
from pipedream_hpc.cli import app
from pipedream_hpc.files import load, save
from pipedream_hpc.job import load as load_job
from pipedream_hpc.observe.metrics import minibatch_s, split
from pipedream_hpc.observe.tables import human_seconds
from pipedream_hpc.observe.trace_file import load_trace
from pipedream_hpc.planning.plan import Plan
from pipedream_hpc.planning.profile import Profile

JOB = str(ranks.PROGRAMS / "small_job.py")
PIPEDREAM = (sys.executable, "-m", "pipedream_hpc.cli")
COMMANDS = ("profile", "probe", "partition", "simulate", "train", "trace", "verify")

Command = Callable[..., str]


@pytest.fixture
def pipedream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run a command in an empty folder; return its output."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> str:
        result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return re.sub(r"\x1b\[[0-9;]*m", "", result.output)

    return run


@pytest.fixture
def profiled(pipedream: Command) -> Command:
    """Run commands in a folder with profile.json."""
    pipedream("profile", JOB, "-o", "profile.json", "--minibatches", 2)
    return pipedream


@pytest.fixture
def planned(profiled: Command) -> Command:
    """Run commands in a folder with plan.json, for two ranks."""
    profiled("partition", "profile.json", "--devices", 2, "--bandwidth", 1e9, "--straight")
    return profiled


def test_profile(profiled: Command) -> None:
    profile = load(Profile, "profile.json")
    assert [layer.kind for layer in profile.layers] == ["Linear", "Tanh", "Linear", "Tanh", "Linear"]
    assert (profile.model, profile.minibatch) == ("small_job", 8)


def test_arguments_behind_two_dashes_are_the_jobs(pipedream: Command) -> None:
    pipedream("profile", JOB, "-o", "profile.json", "--minibatches", 1, "--", "--width", "12")
    assert load(Profile, "profile.json").layers[0].output_shape == (8, 12)


def test_partition(planned: Command) -> None:
    plan = load(Plan, "plan.json")
    assert (plan.ranks, plan.straight, plan.cost) == (2, True, "ring")


def test_partition_plans_for_the_optimizer_of_the_profile(profiled: Command) -> None:
    words = ("partition", "profile.json", "--devices", 2, "--bandwidth", 1e9)
    told = "memory counts the state of SGD with momentum: the profile names no optimizer"
    measured = load(Profile, "profile.json")
    assert measured.optimizer == "sgd"
    assert told not in profiled(*words)
    assert load(Plan, "plan.json").optimizer == "sgd"
    profiled(*words, "--optimizer", "adam")
    assert load(Plan, "plan.json").optimizer == "adam"
    save(dataclasses.replace(measured, optimizer=None), "profile.json")
    assert told in " ".join(profiled(*words).split())
    assert load(Plan, "plan.json").optimizer == "momentum"


def test_partition_prints_every_figure_for_programs(profiled: Command) -> None:
    words = ("--devices", "2x2", "--bandwidth", "1e9,1e8", "--latency", "1e-6,1e-5", "--memory", "1e9")
    figures = json.loads(profiled("partition", "profile.json", *words, "--json", "-o", "p.json"))
    plan = load(Plan, "p.json")
    assert figures["bottleneck_s"] == plan.bottleneck_s
    assert figures["throughput"] == pytest.approx(1 / plan.bottleneck_s)
    assert figures["samples_per_s"] == pytest.approx(8 / plan.bottleneck_s)
    assert figures["speedup_vs_one"] == pytest.approx(plan.single_device_s / plan.bottleneck_s)
    assert figures["speedup_vs_dp"] >= 1
    assert sum(stage["replicas"] for stage in figures["stages"]) == 4
    for stage, planned in zip(figures["stages"], plan.stages, strict=True):
        assert stage["layers"] == list(planned.layers)
        assert stage["ranks"] == list(planned.ranks)
        assert {"compute_s", "sync_s", "boundary_s", "in_flight", "limit"} <= set(stage)
        parts = ("weights", "gradients", "optimizer", "activations", "slots")
        assert stage["memory_bytes"]["total"] == sum(stage["memory_bytes"][part] for part in parts)


def test_partition_what_if(profiled: Command) -> None:
    words = ("--devices", 4, "--preset", "ethernet-10g", "--batch", 16, "--compute-scale", 2)
    output = profiled("partition", "profile.json", *words, "--what-if", "--plot", "what-if.png")
    assert "the profile was scaled: minibatch 8 to 16, compute x2" in output
    header = next(line for line in output.splitlines() if "devices" in line and "Gb/s" in line)
    assert [word for word in header.split() if word[0].isdigit()] == ["1", "10", "25", "100"]
    assert Path("what-if.png").read_bytes().startswith(b"\x89PNG")
    figures = json.loads(profiled("partition", "profile.json", *words, "--what-if", "--json"))
    assert [case["devices"] for case in figures["what_if"]] == [1] * 4 + [2] * 4 + [4] * 4
    by_bandwidth = [case["bottleneck_s"] for case in figures["what_if"]][-4:]
    assert by_bandwidth == sorted(by_bandwidth, reverse=True)
    assert load(Plan, "plan.json").minibatch == 16


def test_simulate_and_trace(planned: Command) -> None:
    output = planned("simulate", "plan.json", "--minibatches", 6, "-o", "predicted.json", "--png", "one.png")
    assert "no deadlock in" in output
    assert "weight versions per stage: 2, 1" in output
    assert load_trace("predicted.json").total_microbatches == 6
    output = planned("trace", "predicted.json", "--compare", "predicted.json", "--png", "both.png")
    assert output.count("simulated: ") == 2
    assert all(Path(name).read_bytes().startswith(b"\x89PNG") for name in ("one.png", "both.png"))


def test_simulate_takes_the_microbatches_of_the_plan(profiled: Command) -> None:
    links = ("--devices", 2, "--bandwidth", 1e9, "--straight")
    profiled("partition", "profile.json", *links, "--schedule", "gpipe", "--n-microbatches", 4)
    assert profiled("simulate", "plan.json") == profiled("simulate", "plan.json", "--n-microbatches", 4)
    assert profiled("simulate", "plan.json") != profiled("simulate", "plan.json", "--n-microbatches", 2)


def test_simulate_a_replicated_plan(pipedream: Command) -> None:
    save(pictures.plan(2, 1), "plan.json")
    pipedream("simulate", "plan.json", "-o", "predicted.json", "--png", "predicted.png")
    assert load_trace("predicted.json").layout == ((0, 1), (2,))


def test_train_in_one_process(planned: Command) -> None:
    output = planned("train", JOB, "--plan", "plan.json", "--out", "out", "--epochs", 3)
    epochs = re.findall(r"^epoch (\d)  loss \d\.\d{4}  test accuracy \d\.\d{4}  \d+\.\d\d s$", output, re.MULTILINE)
    assert epochs == ["0", "1", "2"]
    assert sorted(path.name for path in Path("out").iterdir()) == ["summary.json", "timeline.png", "trace.json"]
    summary = json.loads(Path("out/summary.json").read_text())
    assert (summary["epochs"], summary["ranks"], summary["stages"]) == (3, 2, 2)
    assert load_trace("out/trace.json").total_microbatches == 8


def test_figures_are_per_minibatch_where_minibatches_are_cut(planned: Command) -> None:
    gpipe = ("--schedule", "gpipe-split", "--n-microbatches", 4)
    output = planned("train", JOB, "--plan", "plan.json", "--out", "out", "--epochs", 1, *gpipe)
    trace, summary = load_trace("out/trace.json"), json.loads(Path("out/summary.json").read_text())
    assert (trace.total_microbatches, trace.n_microbatches) == (32, 4)
    assert summary["in_flight"] == [4, 4]
    assert summary["minibatch_ms"] == pytest.approx(minibatch_s(trace) * 1e3, abs=1e-3)
    assert f"{human_seconds(minibatch_s(trace))} per minibatch measured" in output
    assert minibatch_s(trace) > 4 * split(trace)[0].forward_s


def test_train_stops_at_the_given_accuracy(planned: Command) -> None:
    planned("train", JOB, "--plan", "plan.json", "--until-accuracy", 0, "--no-trace")
    assert json.loads(Path("out/summary.json").read_text())["epochs"] == 1
    assert not Path("out/trace.json").exists()


def test_train_begins_with_given_weights(pipedream: Command) -> None:
    """A last layer that is sure of one class: the loss is large, and smaller in the next epoch."""
    model = load_job(JOB).model
    assert isinstance(model, torch.nn.Module)
    save_file({**model.state_dict(), "4.bias": torch.tensor([20.0, -20.0])}, "model.safetensors")
    words = ("train", JOB, "--plan", 2, "--no-trace", "--checkpoints", "kept", "--weights", ".")
    losses = []
    for more in (("--epochs", 1), ("--epochs", 2, "--resume")):
        found = re.search(r"^epoch \d  loss (\d+\.\d{4})", pipedream(*words, *more), re.MULTILINE)
        assert found is not None
        losses.append(float(found[1]))
    assert losses[0] > 10
    assert losses[1] < losses[0] - 1, "resumed with the weights of the checkpoint"


def test_train_resumes_until_nothing_is_left(planned: Command) -> None:
    words = ("train", JOB, "--plan", "plan.json", "--checkpoints", "kept", "--resume", "--epochs")

    def reported(output: str) -> list[str]:
        return re.findall(r"^(?:epoch \d|the checkpoint has \d of \d epochs: .*)", output, re.MULTILINE)

    assert reported(planned(*words, 2)) == ["epoch 0", "epoch 1"]
    resumed = ["the checkpoint has 2 of 3 epochs: continuing with epoch 2", "epoch 2"]
    assert reported(planned(*words, 3)) == resumed
    summary = Path("out/summary.json").read_text()
    assert reported(planned(*words, 3)) == ["the checkpoint has 3 of 3 epochs: nothing left to train"]
    assert Path("out/summary.json").read_text() == summary


def test_train_on_ranks_gives_the_losses_of_one_process(planned: Command) -> None:
    one_process = planned("train", JOB, "--plan", "plan.json", "--out", "one")
    finished = ranks.mpirun(2, *PIPEDREAM, "train", JOB, "--plan", "plan.json", "--out", "ranks")
    assert finished.status == 0, finished.output

    def losses(output: str) -> list[str]:
        return re.findall(r"^epoch \d  loss \S+  test accuracy \S+", output, re.MULTILINE)

    assert losses(finished.output) == losses(one_process)
    # A batch log gets the lines of rank 0 only, without colors or a progress bar.
    assert finished.output.count("written to ranks") == 1
    assert "\x1b" not in finished.output
    assert "\r" not in finished.output.replace("\r\n", "\n")  # a pseudo-terminal ends lines so
    trace = load_trace("ranks/trace.json")
    assert {span.rank for span in trace.spans} == {0, 1}
    assert all(span.end_s >= span.start_s >= 0 for span in trace.spans)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(pipedream: Command, command: str) -> None:
    text = pipedream(command, "--help")
    usage, *explanation = text.split("╭")[0].strip().splitlines()
    assert usage.strip().startswith("Usage: ")
    assert any(f"pipedream {command}" in line for line in explanation)  # a worked example
    assert "Next:" in text


def test_help_lists_the_commands_in_the_order_of_use(pipedream: Command) -> None:
    text = pipedream("--help")
    shown = re.findall(rf"^│ ({'|'.join(COMMANDS)}) ", text, re.MULTILINE)
    assert shown == list(COMMANDS)


def test_version_and_help_load_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from pipedream_hpc.cli import main\n"
        "try: main()\n"
        "finally: print([m for m in ('torch', 'numpy', 'matplotlib', 'mpi4py') if m in sys.modules])"
    )
    finished = ranks.without_launcher(sys.executable, "-c", script, "--version")
    assert finished.output.splitlines() == [f"pipedream {__version__}", "[]"]
    assert ranks.without_launcher(sys.executable, "-c", script, "train", "--help").output.splitlines()[-1] == "[]"
