"""Random plans, modes, sizes and numbers of minibatches, none included, on real ranks: nothing hangs, no bit differs.

Every launch runs several drawn trainings one after the other, each compared with the same in one
process. PIPEDREAM_DRAWS=50 draws so many launches instead, other ones every time.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import training
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from training import assert_bitwise

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.schedule import kinds

DRAWS = int(os.environ.get("PIPEDREAM_DRAWS", "0"))
MODES = ["1f1b", "1f1b", "vertical-sync", "2bw", "1f1b-flush", "gpipe", "interleaved", "model-parallel", "naive"]


@st.composite
def shares(draw: st.DrawFn, devices: int) -> str:
    """Replicas of stages that add up to `devices`, as in 2-1."""
    parts: list[int] = []
    while sum(parts) < devices:
        parts.append(draw(st.integers(1, devices - sum(parts))))
    return "-".join(map(str, parts))


SPLITTING = {"split_backward", "zero_bubble"}


@st.composite
def trainings(draw: st.DrawFn, devices: int) -> dict[str, Any]:
    """What train_chain.py trains, on `devices` ranks."""
    kind = draw(st.sampled_from(MODES))
    options: dict[str, Any] = {"schedule": kind}
    plan = draw(shares(devices))
    if kind == "interleaved":
        options["chunks"] = draw(st.integers(1, 5 // devices))
        plan = "-".join(["1"] * (devices * options["chunks"]))
    elif "-" not in plan and kind not in ("1f1b", "naive"):
        kind = options["schedule"] = "data-parallel"
    last = draw(st.integers(1, 8))
    if kinds.takes_microbatches(kind):
        # A short last minibatch must have a sample for every microbatch.
        options["microbatches"] = draw(st.integers(1, 5))
        last = max(last, options["microbatches"])
    if kind in ("1f1b-flush", "gpipe") and draw(st.booleans()):
        options["zero_bubble" if kind == "1f1b-flush" and draw(st.booleans()) else "split_backward"] = True
    if draw(st.booleans()):
        options["accumulate"] = draw(st.integers(1, 3))
    if draw(st.integers(0, 3)) == 0:
        options["recompute"] = True
    if draw(st.integers(0, 3)) == 0:
        options["precision"] = "bf16"
    return {
        "plan": plan,
        "model": draw(st.sampled_from(["plain", "rich"])),
        "optimizer": draw(st.sampled_from(["sgd", "adam"])),
        "epochs": draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 9]), min_size=1, max_size=3)),
        "last": last,
        "decay": 0.9,
        "options": options,
    }


def can_run(wanted: dict[str, Any]) -> bool:
    """Whether there is such a schedule; that the others are refused is tested elsewhere."""
    layout, rank = [], 0
    for count in map(int, wanted["plan"].split("-")):
        layout.append(tuple(range(rank, rank + count)))
        rank += count
    options = wanted["options"]
    if options["schedule"] == "interleaved":
        devices = len(layout) // options["chunks"]
        layout = [(stage % devices,) for stage in range(len(layout))]
    try:
        kinds.make(
            options["schedule"],
            tuple(layout),
            0,
            microbatches=options.get("microbatches", 1),
            accumulate=options.get("accumulate", 1),
        )
    except PipedreamError:
        return False
    return True


@pytest.mark.timeout(300 + 120 * DRAWS)
@pytest.mark.parametrize("devices", [2, 3, 4])
def test_nothing_hangs_and_no_bit_differs(devices: int, tmp_path: Path) -> None:
    @settings(
        max_examples=DRAWS or 1,
        derandomize=not DRAWS,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(trainings(devices).filter(can_run), min_size=24, max_size=24))
    def drawn(chosen: list[dict[str, Any]]) -> None:
        for wanted, report in zip(chosen, training.on_ranks(devices, chosen, tmp_path, timeout=180), strict=True):
            expected = training.alone(wanted)
            assert str(report["losses"] + report["scores"]) == str(expected["losses"] + expected["scores"]), wanted
            assert_bitwise(report["weights"], expected["weights"], wanted)
            options = wanted["options"]
            units = options.get("microbatches", 1) * options.get("accumulate", 1)
            if units <= 2 and SPLITTING & options.keys():
                # Two gradients add up to the same bits in either order.
                whole = {key: value for key, value in options.items() if key not in SPLITTING}
                expected = training.alone({**wanted, "options": whole})
                assert_bitwise(report["weights"], expected["weights"], wanted)

    drawn()
