"""Every option is a field of a configuration dataclass: it is in `--help`, and it reaches the pipeline."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import ranks
from typer.testing import CliRunner

from pipedream_hpc import PipedreamError, RunConfig, ScheduleConfig, TrainConfig
from pipedream_hpc.cli import app
from pipedream_hpc.runtime.pipeline import Pipeline

JOB = str(ranks.PROGRAMS / "small_job.py")
CONFIGS: dict[str, Any] = {"schedule": ScheduleConfig, "train_config": TrainConfig, "run_config": RunConfig}
#: A value of every option that is not its default.
GIVEN = {
    "name": "gpipe",
    "n_microbatches": 4,
    "chunks": 2,
    "gradient_accumulation_steps": 3,
    "precision": "bf16",
    "master_weights": True,
    "clip_grad_norm": 0.5,
    "clip_grad_over": "model",
    "recompute": True,
    "compile_backend": "eager",
    "deterministic": False,
    "seed": 7,
    "check_model": False,
    "device": "cpu",
    "stall_limit_s": 12.5,
    "trace": False,  # train records by default
}


def fields() -> list[tuple[str, dataclasses.Field[Any]]]:
    """Return (argument of Pipeline, field) of every option."""
    return [(name, field) for name, config in CONFIGS.items() for field in dataclasses.fields(config) if field.metadata]


def words_of(field: dataclasses.Field[Any], value: Any) -> list[str]:
    """Return an option as it is typed."""
    flag = field.metadata["flag"] or "--" + field.name.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    return [flag, str(value)]


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the pipeline of a command gets; the command ends there."""
    arguments: dict[str, Any] = {}

    def from_job(job: Any, **given: Any) -> Pipeline:
        arguments.update(given)
        raise PipedreamError("far enough")

    monkeypatch.setattr(Pipeline, "from_job", from_job)
    return arguments


def run(*words: str) -> None:
    with pytest.raises(PipedreamError, match="far enough"):
        CliRunner().invoke(app, words, catch_exceptions=False)


def test_every_option_has_a_value_here() -> None:
    assert [field.name for _, field in fields()] == list(GIVEN)


@pytest.mark.parametrize("command", ["train", "verify"])
def test_every_option_is_in_the_help(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "240"})
    text = re.sub(r"\x1b\[[0-9;]*m", "", result.output)
    for _, field in fields():
        if command == "verify" and field.name == "trace":
            continue
        for value in (True, False) if isinstance(GIVEN[field.name], bool) else (1,):
            assert re.search(rf"{words_of(field, value)[0]}\b", text), field.name
        assert field.metadata["help"].rstrip(".").split(",")[0] in text, field.name


@pytest.mark.parametrize("command", ["train", "verify"])
def test_every_option_reaches_the_pipeline(command: str, received: dict[str, Any]) -> None:
    chosen = [(name, field) for name, field in fields() if command == "train" or field.name != "trace"]
    run(command, JOB, "--plan", "2", *(word for _, field in chosen for word in words_of(field, GIVEN[field.name])))
    assert received["plan"] == "2"
    for name, field in chosen:
        assert getattr(received[name], field.name) == GIVEN[field.name], field.name


def test_options_that_are_not_given_are_those_of_the_job(received: dict[str, Any]) -> None:
    run("train", JOB, "--plan", "2")
    assert received["schedule"] == ScheduleConfig()
    assert received["train_config"] == TrainConfig()
    assert received["run_config"] == RunConfig(trace=True)
