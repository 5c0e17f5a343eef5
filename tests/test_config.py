"""The options of a run: defaults, every refusal, and the command line that is generated from them."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import subprocess
import sys
from typing import Annotated, Any

import pytest
import torch
import typer
import typer.main
from torch import nn
from typer.testing import CliRunner

from pipedream_hpc import RunConfig, ScheduleConfig, TrainConfig
from pipedream_hpc.cli.options import Given, with_options
from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.schedule import registry

CONFIGS = (ScheduleConfig, TrainConfig, RunConfig)


# -- values ----------------------------------------------------------------------------------------------------------

COUNT = "should be an integer of at least 1, not"


@pytest.mark.parametrize(
    ("config", "field", "value", "words"),
    [
        *(
            (config, field, value, f"{field} {COUNT} {value!r}")
            for config, field in (
                (ScheduleConfig, "n_microbatches"),
                (ScheduleConfig, "chunks"),
                (TrainConfig, "gradient_accumulation_steps"),
            )
            for value in (0, -1, 1.5, "2", True)
        ),
        (TrainConfig, "precision", "fp32", "precision should be one of 'bf16', 'fp16' or None, not 'fp32'"),
        (TrainConfig, "precision", 16, "precision should be one of 'bf16', 'fp16' or None, not 16"),
        (TrainConfig, "clip_grad_over", "layer", "clip_grad_over should be one of 'stage', 'model', not 'layer'"),
        *(
            (
                TrainConfig,
                "clip_grad_norm",
                value,
                "clip_grad_norm should be a positive number, or None for no clipping",
            )
            for value in (0, -1.0, math.inf, math.nan, "1", True)
        ),
        (TrainConfig, "seed", 1.5, "seed should be an integer, not 1.5"),
        (TrainConfig, "lr_scheduler", 0.9, "lr_scheduler is float; it should be a function of the optimizer"),
        (TrainConfig, "compile_backend", "gcc", "compile_backend should be one of .*'inductor'.* or None, not 'gcc'"),
        *(
            (TrainConfig, name, value, f"{name} should be True or False, not {value!r}")
            for name, value in (("check_model", "no"), ("deterministic", 1), ("master_weights", None))
        ),
        (
            TrainConfig,
            "leaf_modules",
            "Block",
            "leaf_modules has 'Block'; it should be a list of classes: leaf_m",
        ),
        *(
            (TrainConfig, "batch_dims", value, rf"batch_dims is {words}; it should map names of inputs to dimensions")
            for value, words in ((1, "1"), ([("x", 1)], r"\[\('x', 1\)\]"), (None, "None"))
        ),
        (TrainConfig, "leaf_modules", ["Block"], "leaf_modules has 'Block'; it should be a list of classes"),
        (
            TrainConfig,
            "leaf_modules",
            nn.Linear(1, 1),
            "leaf_modules has an object of type Linear; it should be",
        ),
        (
            TrainConfig,
            "leaf_modules",
            [nn.Linear(1, 1)],
            "leaf_modules has an object of type Linear; it should be",
        ),
        (TrainConfig, "leaf_modules", [int], "leaf_modules has an object of type type; it should be a list of classes"),
        (RunConfig, "device", "tpu", "device should be one of 'auto', 'cpu', 'cuda', not 'tpu'"),
        *(
            (RunConfig, "stall_limit_s", value, "stall_limit_s should be a positive number of seconds, not")
            for value in (0, -1, math.inf, math.nan, "30", True)
        ),
    ],
)
def test_refused_in_one_sentence(config: Any, field: str, value: Any, words: str) -> None:
    with pytest.raises(PipedreamError, match=words) as refused:
        config(**{field: value})
    assert "\n" not in str(refused.value)


def test_what_is_accepted() -> None:
    assert ScheduleConfig("gpipe", 4, 2) == ScheduleConfig(name="gpipe", n_microbatches=4, chunks=2)
    scheduler = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=100)
    config = TrainConfig(2, "bf16", True, 1.0, "model", True, "eager", False, -3, False, scheduler, [nn.GRU])  # type: ignore[arg-type]
    assert config.leaf_modules == (nn.GRU,) == TrainConfig(leaf_modules=nn.GRU).leaf_modules  # type: ignore[arg-type]
    assert config.lr_scheduler is scheduler
    assert RunConfig("cpu", 1, True) == RunConfig(device="cpu", stall_limit_s=1, trace=True)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, ScheduleConfig()),
        ("gpipe", ScheduleConfig("gpipe")),
        (ScheduleConfig("gpipe", 4), ScheduleConfig("gpipe", 4)),
    ],
)
def test_a_schedule_may_be_given_by_its_name(given: Any, expected: ScheduleConfig) -> None:
    assert ScheduleConfig.of(given) == expected


def test_a_schedule_of_another_type() -> None:
    with pytest.raises(
        PipedreamError, match="schedule is int; it should be a name such as '1f1b', or a ScheduleConfig"
    ):
        ScheduleConfig.of(4)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ({}, False),
        ({"precision": "bf16"}, False),
        ({"precision": "fp16"}, True),  # an overflow in one stage concerns all of them
        ({"clip_grad_norm": 1.0}, False),
        ({"clip_grad_norm": 1.0, "clip_grad_over": "model"}, True),
        ({"clip_grad_over": "model"}, False),
    ],
)
def test_when_stages_exchange_their_gradients_norm(options: dict[str, Any], needed: bool) -> None:
    assert TrainConfig(**options).needs_global_grad_norm == needed


# -- the command line ------------------------------------------------------------------------------------------------


def fields_with_options(config: type) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(config) if field.metadata.get("help")]


def flag_of(field: dataclasses.Field[Any]) -> str:
    return field.metadata["flag"] or "--" + field.name.replace("_", "-")


EVERY_OPTION = [(config, field) for config in CONFIGS for field in fields_with_options(config)]


def test_only_what_a_text_cannot_say_is_missing_on_the_command_line() -> None:
    without = {field.name for config in CONFIGS for field in dataclasses.fields(config) if not field.metadata}
    assert without == {"lr_scheduler", "leaf_modules", "batch_dims"}


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a command was called with."""

    schedule: Given
    train_config: Given
    run_config: Given
    plan: str


def called(*words: str) -> Seen:
    """Run a command with all options of the three groups."""
    seen: list[Seen] = []
    small = typer.Typer()

    @small.command()
    @with_options(schedule=ScheduleConfig, train_config=TrainConfig, run_config=RunConfig)
    def run(
        schedule: Given, train_config: Given, run_config: Given, plan: Annotated[str, typer.Option()] = "4"
    ) -> None:
        seen.append(Seen(schedule, train_config, run_config, plan))

    finished = CliRunner().invoke(small, list(words))
    assert finished.exit_code == 0, finished.output
    return seen[0]


def test_without_flags_the_jobs_own_values_stay() -> None:
    seen = called()
    own = TrainConfig(2, "bf16", True, 3.0, "model", False, None, False, 7)
    assert (seen.schedule.values, seen.train_config.values, seen.run_config.values) == ({}, {}, {})
    assert seen.schedule.applied_to(ScheduleConfig("gpipe", 4)) == ScheduleConfig("gpipe", 4)
    assert seen.train_config.applied_to(own) == own
    assert seen.run_config.applied_to(RunConfig("cpu", 9.0, True)) == RunConfig("cpu", 9.0, True)
    assert seen.plan == "4"


@pytest.mark.parametrize(
    ("words", "config", "field", "value"),
    [
        ("--schedule zb-h1", "schedule", "name", "zb-h1"),
        ("--n-microbatches 4", "schedule", "n_microbatches", 4),
        ("--chunks 2", "schedule", "chunks", 2),
        ("--gradient-accumulation-steps 3", "train_config", "gradient_accumulation_steps", 3),
        ("--precision fp16", "train_config", "precision", "fp16"),
        ("--master-weights", "train_config", "master_weights", True),
        ("--no-master-weights", "train_config", "master_weights", False),
        ("--clip-grad-norm 0.5", "train_config", "clip_grad_norm", 0.5),
        ("--clip-grad-over model", "train_config", "clip_grad_over", "model"),
        ("--recompute", "train_config", "recompute", True),
        ("--no-recompute", "train_config", "recompute", False),
        ("--compile-backend eager", "train_config", "compile_backend", "eager"),
        ("--deterministic", "train_config", "deterministic", True),
        ("--no-deterministic", "train_config", "deterministic", False),
        ("--seed 0", "train_config", "seed", 0),
        ("--check-model", "train_config", "check_model", True),
        ("--no-check-model", "train_config", "check_model", False),
        ("--device cpu", "run_config", "device", "cpu"),
        ("--stall-limit-s 5", "run_config", "stall_limit_s", 5.0),
        ("--trace", "run_config", "trace", True),
        ("--no-trace", "run_config", "trace", False),
    ],
)
def test_a_flag_replaces_the_jobs_value_and_no_other(words: str, config: str, field: str, value: Any) -> None:
    given = {name: getattr(called(*words.split()), name).values for name in ("schedule", "train_config", "run_config")}
    assert given.pop(config) == {field: value}
    assert list(given.values()) == [{}, {}]


def test_the_flags_above_are_all_there_are() -> None:
    (mark,) = (each for each in test_a_flag_replaces_the_jobs_value_and_no_other.pytestmark if each.args)  # type: ignore[attr-defined]
    tried = {words.split()[0] for words, *_ in mark.args[1]}
    flags = {flag_of(field) for _, field in EVERY_OPTION}
    opposites = {f"--no-{flag_of(field)[2:]}" for _, field in EVERY_OPTION if "bool" in str(field.type)}
    assert tried == flags | opposites


def test_a_flag_that_is_not_accepted() -> None:
    with pytest.raises(PipedreamError, match="n_microbatches should be an integer of at least 1, not 0"):
        called("--n-microbatches", "0").schedule.applied_to(ScheduleConfig("gpipe", 4))


def test_a_command_may_take_some_fields_only() -> None:
    small = typer.Typer()

    @small.command()
    @with_options(run_config=(RunConfig, ("device",)))
    def run(run_config: Given) -> None:
        raise AssertionError(run_config)

    flags = {flag for each in typer.main.get_command(small).params for flag in each.opts if flag.startswith("--")}
    assert flags - {"--install-completion", "--show-completion", "--help"} == {"--device"}


def test_choices_of_schedules_are_those_that_train() -> None:
    assert set(fields_with_options(ScheduleConfig)[0].metadata["choices"]) == set(registry.TRAINING_NAMES)


# -- start-up --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "program",
    [
        "import pipedream_hpc",
        "import pipedream_hpc.config",
        "import pipedream_hpc.cli",
        *(
            f"import pipedream_hpc.cli as cli; cli.app({words!r}, standalone_mode=False)"
            for words in (["--help"], ["--version"], ["train", "--help"], ["verify", "--help"], ["simulate", "--help"])
        ),
    ],
)
def test_help_and_imports_load_neither_torch_nor_mpi(program: str) -> None:
    """torch takes a second or more, and MPI would start."""
    slow = ("torch", "mpi4py", "matplotlib", "pipedream_hpc._comm", "pipedream_hpc._weights")
    code = f"import sys\n{program}\nprint('loaded', [name for name in {slow!r} if name in sys.modules])"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert re.search(r"^loaded \[\]$", finished.stdout, re.MULTILINE), finished.stdout
