"""What a plan becomes under each schedule: microbatches in flight, weight versions and memory; and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from schedules import layout

from pipedream_hpc import Plan, ScheduleConfig, TrainConfig
from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.planning.memory import MemoryParts
from pipedream_hpc.planning.plan import StagePlan
from pipedream_hpc.runtime.launch.run_plan import RunSchedule, plan_as_run, run_schedule
from pipedream_hpc.schedule import registry
from pipedream_hpc.schedule.text import format_schedule

PARAMETERS, ACTIVATIONS, BOUNDARY = 1000, 1200, 120  # bytes of a stage, for a whole minibatch


def planned(*replicas: int) -> Plan:
    """Return a plan of equal stages for 1F1B, with SGD and momentum."""
    members = layout(*replicas)
    schedule, last = registry.make("1f1b", members, 0), len(members) - 1
    stages = []
    for index, ranks in enumerate(members):
        in_flight = schedule.in_flight(index)
        # Activations in flight and one ahead; gradients: one in use and one ahead.
        slots = BOUNDARY * ((in_flight + 1) * (index > 0) + 2 * (index < last))
        memory = MemoryParts(PARAMETERS * in_flight, PARAMETERS, PARAMETERS, ACTIVATIONS * in_flight, slots)
        times_s = (1.0, 2.0, 3.0, 0.0, 0.0)  # forward, backward, both, sync, boundary
        sizes = (in_flight, PARAMETERS, BOUNDARY, (8, 4), "float32", "compute")
        stages.append(StagePlan((f"l{index}",), ranks, *times_s, *sizes, memory=memory))
    return Plan("net", 8, "1f1b", "paper2018", tuple(stages), 3.0, 9.0)


def as_run(plan: Plan, schedule: ScheduleConfig, config: TrainConfig | None = None) -> tuple[Plan, RunSchedule]:
    config = config or TrainConfig()
    chosen = run_schedule(schedule, config, plan)
    return plan_as_run(plan, "plan.json", chosen, config.recompute), chosen


def row(plan: Plan, schedule: ScheduleConfig, config: TrainConfig | None = None) -> str:
    """Return the figures of every stage, as a row of the tables below."""
    made, chosen = as_run(plan, schedule, config)
    assert (made.schedule, made.n_microbatches) == (chosen.name, chosen.n_microbatches)
    run = chosen.of(chosen.layout(plan), 0)
    columns: list[list[object]] = [[], [], [], [], []]
    for index, stage in enumerate(made.stages):
        assert stage.memory is not None
        assert stage.memory.weights == run.versions(index) * PARAMETERS
        assert stage.memory.gradients == stage.memory.optimizer == PARAMETERS
        cells = (stage.in_flight, run.versions(index), stage.memory.activations, stage.memory.slots, stage.recompute)
        for column, cell in zip(columns, cells, strict=True):
            column.append("again" if cell is True else "kept" if cell is False else cell)
    words = [" ".join(map(str, column)) for column in columns[:4]]
    return " ".join(f"{word:<{width}}" for word, width in zip(words, (9, 9, 14, 11), strict=True)) + f" {columns[4][0]}"


TABLE = """
schedule       n │ in flight versions  activations    slots
1f1b           - │ 3 2 1     3 2 1     3600 2400 1200 240 600 240
1f1b-rr        - │ 3 2 1     3 2 1     3600 2400 1200 240 600 240
vertical-sync  - │ 3 2 1     3 3 3     3600 2400 1200 240 600 240
model-parallel - │ 1 1 1     1 1 1     1200 1200 1200 240 480 240
naive          - │ 3 2 1     1 1 1     3600 2400 1200 240 600 240
1f1b-flush     4 │ 3 2 1     1 1 1     900 600 300    60 150 60
1f1b-flush     2 │ 2 2 1     1 1 1     1200 1200 600  120 300 120
zb-h1          4 │ 3 3 3     1 1 1     900 900 900    60 210 120
zb-h2          8 │ 5 5 5     1 1 1     750 750 750    30 150 90
gpipe          4 │ 4 4 4     1 1 1     1200 1200 1200 60 210 150
gpipe-split    4 │ 4 4 4     1 1 1     1200 1200 1200 60 270 150
2bw            4 │ 3 2 1     2 2 2     900 600 300    60 150 60
"""


@pytest.mark.parametrize("line", TABLE.strip().splitlines()[1:], ids=lambda line: line.split(" │")[0])
def test_a_plan_for_1f1b_under_every_schedule(line: str) -> None:
    """Three stages. A microbatch is 1/n of a minibatch, and so are its activations and the slots it travels in."""
    words, figures = line.split(" │ ")
    name, n = words.split()
    schedule = ScheduleConfig(name, None if n == "-" else int(n))
    assert row(planned(1, 1, 1), schedule) == f"{figures:<47}kept"


def test_the_table_has_every_schedule_of_several_stages() -> None:
    rows = {line.split()[0] for line in TABLE.strip().splitlines()[1:]}
    assert rows == set(registry.TRAINING_NAMES) - {"data-parallel", "interleaved"}


def test_one_stage_of_replicas() -> None:
    assert row(planned(4), ScheduleConfig("data-parallel")).split()[:4] == ["1", "1", "1200", "0"]


def test_chunks_deal_the_stages_out() -> None:
    """stage  0 1 2 3
    rank   0 1 0 1
    """
    made, chosen = as_run(planned(1, 1, 1, 1), ScheduleConfig("interleaved", 4, chunks=2))
    assert chosen.layout(planned(1, 1, 1, 1)) == ((0,), (1,), (0,), (1,))
    assert [stage.in_flight for stage in made.stages] == [4, 3, 2, 1]


def test_replicas_share_what_is_in_flight() -> None:
    """Each of two replicas has half; the next stage's single rank has a channel with both."""
    assert (
        row(planned(2, 1), ScheduleConfig("1f1b-rr")) == f"{'2 1':<9} {'2 1':<9} {'2400 1200':<14} {'240 480':<11} kept"
    )


@pytest.mark.parametrize(
    ("recompute", "figures"),
    [
        (None, "3600 2400 1200 240 600 240 kept"),
        (False, "3600 2400 1200 240 600 240 kept"),
        (True, "1200 1200 1200 240 600 240 again"),
    ],
)
def test_recomputation_keeps_the_activations_of_one(recompute: bool | None, figures: str) -> None:
    assert row(planned(1, 1, 1), ScheduleConfig(), TrainConfig(recompute=recompute)).split()[6:] == figures.split()


def test_a_plan_that_recomputes_can_be_told_not_to() -> None:
    plan, _ = as_run(planned(1, 1, 1), ScheduleConfig(), TrainConfig(recompute=True))
    assert row(plan, ScheduleConfig()).endswith("again")
    kept = row(plan, ScheduleConfig(), TrainConfig(recompute=False))
    assert kept == row(planned(1, 1, 1), ScheduleConfig())


@pytest.mark.parametrize(
    ("schedule", "n", "in_flight"),
    [
        (ScheduleConfig(), 4, [4, 4, 4]),  # the plan's own
        (ScheduleConfig(n_microbatches=8), 8, [8, 8, 8]),
        (ScheduleConfig("gpipe", 2), 2, [2, 2, 2]),
        (ScheduleConfig("1f1b-flush"), 1, [1, 1, 1]),
    ],
)
def test_a_plan_for_microbatches_may_run_with_others(schedule: ScheduleConfig, n: int, in_flight: list[int]) -> None:
    plan, _ = as_run(planned(1, 1, 1), ScheduleConfig("gpipe", 4))
    made, _ = as_run(plan, schedule)
    assert made.n_microbatches == n
    assert [stage.in_flight for stage in made.stages] == in_flight


def test_accumulation_makes_rounds_longer() -> None:
    """GPipe has all microbatches of a round in flight, of 1F1B a round is several minibatches, and nothing changes."""
    steps = TrainConfig(gradient_accumulation_steps=2)
    assert row(planned(1, 1, 1), ScheduleConfig("gpipe", 4), steps).split()[:3] == ["8", "8", "8"]
    assert row(planned(1, 1, 1), ScheduleConfig(), steps) == row(planned(1, 1, 1), ScheduleConfig())


def test_a_plan_without_memory_figures_gets_none() -> None:
    plan = planned(1, 1)
    bare = dataclasses.replace(plan, stages=tuple(dataclasses.replace(stage, memory=None) for stage in plan.stages))
    made, _ = as_run(bare, ScheduleConfig("gpipe", 4))
    assert [(stage.in_flight, stage.memory) for stage in made.stages] == [(4, None), (4, None)]


# -- schedules from files --------------------------------------------------------------------------------------------


def write_schedule(folder: Path, **options: Any) -> str:
    """Write GPipe of two minibatches on two stages, as a file."""
    made = registry.make("gpipe", layout(1, 1), 8, n_microbatches=4, **options)
    path = folder / "mine.txt"
    path.write_text(format_schedule(made))
    return str(path)


def test_a_written_schedule_gives_the_figures_of_what_it_does(tmp_path: Path) -> None:
    path = write_schedule(tmp_path)
    made, chosen = as_run(planned(1, 1), ScheduleConfig(path))
    expected, _ = as_run(planned(1, 1), ScheduleConfig("gpipe", 4))
    assert made == dataclasses.replace(expected, schedule=path)
    assert chosen.cuts_minibatches
    assert chosen.fingerprint
    assert run_schedule(ScheduleConfig("gpipe", 4), TrainConfig(), 2).fingerprint == ""


@pytest.mark.parametrize(
    ("schedule", "config", "words"),
    [
        ({"n_microbatches": 2}, TrainConfig(), r"mine\.txt is for 4 microbatches per minibatch, not 2: leave n_micro"),
        ({"chunks": 2}, TrainConfig(), r"mine\.txt says itself which stages a rank holds: leave chunks out"),
        ({}, TrainConfig(gradient_accumulation_steps=2), r"mine\.txt says itself how many minibatches a step learns"),
        ({}, TrainConfig(precision="fp16"), r"mine\.txt has no NORM action, which fp16 and clipping over the model"),
    ],
)
def test_a_written_schedule_refuses_options_that_it_contradicts(
    schedule: dict[str, Any], config: TrainConfig, words: str, tmp_path: Path
) -> None:
    with pytest.raises(PipedreamError, match=words):
        run_schedule(ScheduleConfig(write_schedule(tmp_path), **schedule), config, 2)


def test_a_written_schedule_with_norms_runs_fp16(tmp_path: Path) -> None:
    path = write_schedule(tmp_path, all_reduce_grad_norm=True)
    assert run_schedule(ScheduleConfig(path), TrainConfig(precision="fp16"), 2).all_reduce_grad_norm


# -- refusals --------------------------------------------------------------------------------------------------------


def stale(plan: Plan) -> Plan:
    """Return the plan with a number in flight that 1F1B does not have."""
    return dataclasses.replace(plan, stages=(dataclasses.replace(plan.stages[0], in_flight=5), *plan.stages[1:]))


@pytest.mark.parametrize(
    ("plan", "schedule", "config", "words"),
    [
        (planned(1, 1, 1), ScheduleConfig("nope"), TrainConfig(), "there is no schedule 'nope': choose from 1f1b"),
        (
            planned(1, 1, 1),
            ScheduleConfig("1f1b", 2),
            TrainConfig(),
            "1f1b passes whole minibatches and does not cut them into 2 microbatches: use 1 microbatch",
        ),
        (
            planned(1, 1, 1),
            ScheduleConfig(n_microbatches=2),
            TrainConfig(),
            "1f1b passes whole minibatches and does not cut them into 2 microbatches: use 1 microbatch",
        ),
        (
            planned(1, 1, 1),
            ScheduleConfig("data-parallel"),
            TrainConfig(),
            "data-parallel runs the whole model on every rank, but the plan has 3 stages: use a plan of one stage",
        ),
        (
            planned(1, 1),
            ScheduleConfig(chunks=2),
            TrainConfig(),
            "1f1b has one stage per rank, not 2 chunks: use interleaved",
        ),
        (
            planned(1, 1, 1),
            ScheduleConfig("interleaved", 3, 2),
            TrainConfig(),
            "3 stages cannot be distributed 2 per rank: use a plan whose number of stages is a multiple of 2",
        ),
        (
            planned(1, 1, 1),
            ScheduleConfig("2bw", 1),
            TrainConfig(),
            "2bw needs at least 2 microbatches per minibatch on 1-1-1 ranks, not 1",
        ),
        (
            planned(1, 1),
            ScheduleConfig(),
            TrainConfig(clip_grad_norm=1.0, clip_grad_over="model"),
            "gradients cannot be clipped by their norm over the model, nor losses be scaled for fp16, where each stage",
        ),
        (
            stale(planned(1, 1, 1)),
            ScheduleConfig(),
            TrainConfig(),
            r"plan\.json: field 'stages\[0\]\.in_flight' is 5, but 1f1b on 3 ranks keeps 3 in flight there: make the",
        ),
    ],
    ids=lambda value: value.name if isinstance(value, ScheduleConfig) else "",
)
def test_refused_in_one_sentence(plan: Plan, schedule: ScheduleConfig, config: TrainConfig, words: str) -> None:
    with pytest.raises(PipedreamError, match=words) as refused:
        as_run(plan, schedule, config)
    assert "\n" not in str(refused.value)


def test_stale_figures_do_not_matter_under_another_schedule() -> None:
    made, _ = as_run(stale(planned(1, 1, 1)), ScheduleConfig("vertical-sync"))
    assert [stage.in_flight for stage in made.stages] == [3, 2, 1]


@pytest.mark.parametrize(
    ("request_of", "expected"),
    [
        (lambda: 3, ("1f1b", 1)),
        (lambda: (2, 1), ("1f1b", 1)),
        (lambda: planned(1, 1), ("1f1b", 1)),
        (lambda: as_run(planned(1, 1), ScheduleConfig("gpipe", 4))[0], ("gpipe", 4)),
    ],
    ids=["a number", "replicas", "a plan", "a plan for microbatches"],
)
def test_the_schedule_when_none_is_named(request_of: Callable[[], Any], expected: tuple[str, int]) -> None:
    chosen = run_schedule(ScheduleConfig(), TrainConfig(), request_of())
    assert (chosen.name, chosen.n_microbatches) == expected


@pytest.mark.parametrize(
    ("named", "n_microbatches"),
    [("gpipe", 4), ("1f1b-flush", 1), ("zb-h1", 1), ("1f1b", 1), ("vertical-sync", 1)],
)
def test_naming_the_schedule_of_the_plan_keeps_its_microbatches(named: str, n_microbatches: int) -> None:
    plan = as_run(planned(1, 1), ScheduleConfig("gpipe", 4))[0]
    assert run_schedule(ScheduleConfig(named), TrainConfig(), plan).n_microbatches == n_microbatches
