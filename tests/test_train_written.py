"""`--schedule FILE`: a schedule from a file trains the bits of the named one; a tampered file is refused."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import chains
import pytest
import ranks
import training
from torch import nn
from training import Training, assert_bitwise
from typer.testing import CliRunner

from pipedream_hpc import PipedreamError, Pipeline, ScheduleConfig
from pipedream_hpc.cli import app
from pipedream_hpc.files import save

MINIBATCHES = 6
JOB = str(ranks.PROGRAMS / "small_job.py")
CASES = {
    "1f1b": Training((2, 1), ScheduleConfig("1f1b"), optimizer="adam"),
    "vertical-sync": Training((1, 1, 1), ScheduleConfig("vertical-sync")),
    "2bw": Training((1, 1, 1), ScheduleConfig("2bw", 3)),
    "gpipe": Training((1, 2), ScheduleConfig("gpipe", 4), model="rich"),
    "zb-h1": Training((1, 1, 1), ScheduleConfig("zb-h1", 4)),
    "zb-h2": Training((2, 1), ScheduleConfig("zb-h2", 4)),
}
CASES = {name: replace(case, epochs=(MINIBATCHES, MINIBATCHES)) for name, case in CASES.items()}


def pipeline_of(case: Training, schedule: str | ScheduleConfig | None = None) -> Pipeline:
    return Pipeline(
        chains.MODELS[case.model](),
        loss_fn=nn.CrossEntropyLoss(),
        optimizer=chains.OPTIMIZERS[case.optimizer],
        example_inputs=chains.example(),
        plan=case.plan,  # type: ignore[arg-type]
        schedule=case.schedule if schedule is None else schedule,
    )


def written(folder: Path, case: Training, minibatches: int = MINIBATCHES) -> Path:
    """Write the schedule of a training as `pipedream simulate --text` prints it; return the file."""
    plan, path = folder / "plan.json", folder / f"{case.schedule.name}.schedule"
    save(pipeline_of(case).plan, plan)
    words = ["simulate", str(plan), "--minibatches", str(minibatches), "--text"]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    path.write_text(result.stdout)
    return path


def from_file(folder: Path, case: Training) -> Training:
    return replace(case, schedule=ScheduleConfig(str(written(folder, case))))


@pytest.mark.parametrize("name", CASES)
def test_in_one_process_a_file_trains_the_bits_of_the_named_schedule(name: str, tmp_path: Path) -> None:
    named, read = training.in_one_process(CASES[name]), training.in_one_process(from_file(tmp_path, CASES[name]))
    assert_bitwise(read.weights, named.weights)
    assert read.scores == named.scores


def test_on_ranks_a_file_trains_the_bits_of_the_named_schedule(tmp_path: Path) -> None:
    trainings = [from_file(tmp_path, case) for case in CASES.values()]
    for name, report in zip(CASES, training.on_ranks(3, trainings), strict=True):
        expected = training.in_one_process(CASES[name])
        assert_bitwise(report.weights, expected.weights, name)
        assert report.scores == expected.scores, name


def test_a_file_is_repeated_for_a_multiple_of_its_minibatches(tmp_path: Path) -> None:
    """Nothing is in flight between the repetitions, so two of them are two epochs of 1F1B."""
    case = CASES["1f1b"]
    once = training.in_one_process(replace(case, epochs=(MINIBATCHES,) * 2, last=chains.SAMPLES))
    read = pipeline_of(case, str(written(tmp_path, case)))
    read.fit(chains.minibatches(MINIBATCHES) * 2)
    assert_bitwise(read.state_dict(), once.weights)
    with pytest.raises(PipedreamError, match="7"):
        read.fit(chains.minibatches(7))


def test_the_command_trains_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def losses(*words: str) -> list[str]:
        command = ("train", JOB, "--plan", "1-1", "--epochs", "1", "--no-trace", *words)
        result = CliRunner().invoke(app, command, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return re.findall(r"^epoch \d  loss \S+  test accuracy \S+", result.output, re.MULTILINE)

    case = replace(CASES["zb-h1"], plan=(1, 1))
    written(tmp_path, case, 8)  # as many minibatches as the job has
    named = losses("--schedule", "zb-h1", "--n-microbatches", "4")
    assert len(named) == 1
    assert losses("--schedule", "zb-h1.schedule") == named


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (" 1RECV_F1<0r0", "", r"rank 1 \(stage 1\) at 1F1v1 .*: the activation from stage 0 has not been received"),
        ("1B1v1", "1B1v0", r"rank 1 \(stage 1\) at 1B1v0l .*: its forward used version 1"),
        (" 0STEP1n1", "", r"rank 0 \(stage 0\) at 0F2v1 .*: the newest version is 0"),
        ("0F0v0", "0F0x0", "1f1b.schedule, line 4, column 9: '0F0x0' should be written as 0F0v0"),
        ("layout 0 | 1", "layout 0 | 1 2", "1f1b.schedule, line 2: a layout should be written as in"),
        ("schedule 1", "schedule 9", "1f1b.schedule, line 1: version 9 cannot be read, only version 1"),
    ],
    ids=["no receive", "other version", "no step", "no action", "no layout", "other format"],
)
def test_a_tampered_file_is_refused_before_anything_is_trained(
    before: str, after: str, words: str, tmp_path: Path
) -> None:
    path = written(tmp_path, Training((1, 1), ScheduleConfig("1f1b")))
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after, 1))

    def loss_fn(output: object, target: object) -> None:
        raise AssertionError("trained")

    with pytest.raises(PipedreamError, match=words) as refused:
        Pipeline(
            chains.plain_model(),
            loss_fn=loss_fn,  # type: ignore[arg-type]
            optimizer=chains.OPTIMIZERS["sgd"],
            example_inputs=chains.example(),
            plan="1-1",
            schedule=str(path),
        ).fit(chains.minibatches(MINIBATCHES))
    assert "\n" not in str(refused.value)


def test_the_command_refuses_a_tampered_file_in_one_sentence_on_all_ranks(tmp_path: Path) -> None:
    path = written(tmp_path, Training((1, 1), ScheduleConfig("1f1b")))
    path.write_text(path.read_text().replace(" 1RECV_F1<0r0", "", 1))
    finished = ranks.pipedream(2, "train", JOB, "--plan", "1-1", "--schedule", path, "--out", tmp_path / "out")
    assert finished.status == 2, finished.output
    assert len(re.findall(r"pipedream: ", finished.output)) == 1, finished.output
    assert "Traceback" not in finished.output
    assert not (tmp_path / "out" / "summary.json").exists()


def test_ranks_with_different_files_are_refused(tmp_path: Path) -> None:
    """A file of the same name, with the same layout, for another number of minibatches."""
    case = replace(CASES["1f1b"], plan=(1, 1))
    for rank, count in enumerate((MINIBATCHES, 2)):
        folder = tmp_path / str(rank)
        folder.mkdir()
        written(folder, case, count)
    program = "import os; os.chdir(os.environ['OMPI_COMM_WORLD_RANK']); from pipedream_hpc.cli import main; main()"
    command = ("train", JOB, "--plan", "1-1", "--schedule", "1f1b.schedule")
    finished = ranks.mpirun(2, "env", "-C", tmp_path, sys.executable, "-c", program, *command)
    assert finished.status == 2, finished.output
    assert "ranks disagree about the schedule: 1f1b.schedule" in finished.output


def test_the_schedule_of_a_file_is_part_of_a_checkpoint(tmp_path: Path) -> None:
    case = Training((1, 1), ScheduleConfig("1f1b"))
    read = pipeline_of(case, str(written(tmp_path, case)))
    read.fit(chains.minibatches(MINIBATCHES))
    read.save_checkpoint(tmp_path / "kept")
    assert json.loads(next((tmp_path / "kept").rglob("manifest.json")).read_text())
    with pytest.raises(PipedreamError, match="another plan or schedule"):
        pipeline_of(case).resume(tmp_path / "kept")
    assert pipeline_of(case, str(tmp_path / "1f1b.schedule")).resume(tmp_path / "kept") == 1
