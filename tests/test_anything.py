"""Random plans, schedules, sizes and numbers of minibatches (zero included) on real ranks: no hang, no bit differs.

Several drawn trainings run one after the other; each is compared with the same training in one process.
PIPEDREAM_DRAWS=50 draws 50 times as many, different ones every time.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import training
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from training import Training, assert_bitwise

from pipedream_hpc import ScheduleConfig, TrainConfig
from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.runtime.launch.run_plan import run_schedule
from pipedream_hpc.schedule import registry
from pipedream_hpc.schedule.actions import Layout
from pipedream_hpc.schedule.interleaved import folded

DECAY = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9)
DRAWS = int(os.environ.get("PIPEDREAM_DRAWS", "0"))
#: A schedule with split backwards -> the same schedule with whole backwards.
WHOLE = {"zb-h1": "1f1b-flush", "zb-h2": "1f1b-flush", "gpipe-split": "gpipe"}
SCHEDULES = [
    *("1f1b", "1f1b", "vertical-sync", "2bw", "1f1b-flush", "gpipe", "interleaved", "model-parallel", "naive"),
    *WHOLE,
]


@st.composite
def replicas(draw: st.DrawFn, devices: int) -> tuple[int, ...]:
    """Draw the replicas of stages on `devices` ranks."""
    parts: list[int] = []
    while sum(parts) < devices:
        parts.append(draw(st.integers(1, devices - sum(parts))))
    return tuple(parts)


@st.composite
def trainings(draw: st.DrawFn, devices: int) -> Training:
    """Draw a training on `devices` ranks."""
    name = draw(st.sampled_from(SCHEDULES))
    plan, chunks, n_microbatches = draw(replicas(devices)), 1, None
    if name == "interleaved":
        chunks = draw(st.integers(1, 5 // devices))
        plan = (1,) * (devices * chunks)
    elif len(plan) == 1 and name not in ("1f1b", "naive"):
        name = "data-parallel"
    last = draw(st.integers(1, 8))
    if registry.cuts_minibatches(name):
        # A short last minibatch must have a sample for every microbatch.
        n_microbatches = draw(st.integers(1, 5))
        last = max(last, n_microbatches)
    options: dict[str, Any] = {}
    if draw(st.booleans()):
        options["gradient_accumulation_steps"] = draw(st.integers(1, 3))
    if draw(st.integers(0, 3)) == 0:
        options["recompute"] = True
    if draw(st.integers(0, 3)) == 0:
        options["precision"] = "bf16"
    return Training(
        plan,
        ScheduleConfig(name, n_microbatches, chunks),
        TrainConfig(lr_scheduler=DECAY, **options),
        draw(st.sampled_from(["plain", "rich"])),
        draw(st.sampled_from(["sgd", "adam"])),
        tuple(draw(st.lists(st.sampled_from([1, 2, 3, 5, 9]), min_size=1, max_size=3))),
        last,
    )


def can_run(drawn: Training) -> bool:
    """Return whether the schedule accepts the plan; other tests check that the others are refused."""
    schedule = run_schedule(drawn.schedule, drawn.train_config, drawn.plan)
    ranks = iter(range(sum(drawn.replicas)))
    layout: Layout = tuple(tuple(next(ranks) for _ in range(count)) for count in drawn.replicas)
    try:
        schedule.of(folded(layout, schedule.chunks) if schedule.name == "interleaved" else layout, 0)
    except PipedreamError:
        return False
    return True


@pytest.mark.timeout(300 + 120 * DRAWS)
@pytest.mark.parametrize("devices", [2, 3, 4])
def test_nothing_hangs_and_no_bit_differs(devices: int) -> None:
    @settings(
        max_examples=DRAWS or 1,
        derandomize=not DRAWS,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(trainings(devices).filter(can_run), min_size=24, max_size=24))
    def launch(chosen: list[Training]) -> None:
        for drawn, report in zip(chosen, training.on_ranks(devices, chosen, timeout=180), strict=True):
            expected = training.in_one_process(drawn)
            assert report.scores == expected.scores, drawn
            assert_bitwise(report.weights, expected.weights, drawn)
            schedule = drawn.schedule
            round_size = (schedule.n_microbatches or 1) * drawn.train_config.gradient_accumulation_steps
            if round_size <= 2 and schedule.name in WHOLE:
                # The sum of two gradients has the same bits in either order.
                whole = replace(drawn, schedule=replace(schedule, name=WHOLE[schedule.name]))
                assert_bitwise(report.weights, training.in_one_process(whole).weights, drawn)

    launch()
