"""Models of every kind: on ranks = in one process bit for bit, and = the whole model on mixed versions."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import chains
import pytest
import ranks
import torch
from zoo import ZOO, seed_masks

from pipedream_hpc.verification import reference
from pipedream_hpc.verification.reference import Way

sys.path.insert(0, str(Path(__file__).parent / "programs"))
import train_zoo

SHORT = {"epochs": [5, 4], "last": 3, "optimizer": "sgd"}


def cases() -> list[dict[str, Any]]:
    found = []
    for name in ZOO:
        found += [{"name": name, "plan": plan, **SHORT} for plan in ("1-1-1", "2-1")]
        found.append(
            {"name": name, "plan": "1-1-1-1", **SHORT, "options": {"schedule": "1f1b-flush", "microbatches": 2}}
        )
        found.append({"name": name, "plan": "1-2-1", **SHORT, "optimizer": "adam"})
    return found


def named(wanted: dict[str, Any]) -> str:
    return f"{wanted['name']} {wanted['plan']} {wanted.get('options', {}).get('schedule', '1f1b')}"


CASES = {named(wanted): wanted for wanted in cases()}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def plainly(wanted: dict[str, Any], stage_of: dict[str, int]) -> dict[str, torch.Tensor]:
    specimen, options = ZOO[wanted["name"]], wanted.get("options", {})
    return reference.train(
        specimen.model(),
        stage_of,
        [specimen.minibatches(count, wanted["last"]) for count in wanted["epochs"]],
        specimen.loss,
        chains.OPTIMIZERS[wanted["optimizer"]],
        Way(
            options.get("schedule", "1f1b"),
            [int(count) for count in wanted["plan"].split("-")],
            options.get("microbatches", 1),
        ),
        seeded=seed_masks,
    )


@pytest.mark.parametrize("name", CASES)
def test_in_one_process_as_the_reference(name: str) -> None:
    """Up to the order in which gradients of values with several users are added up."""
    report = train_zoo.train(CASES[name])
    for key, expected in plainly(CASES[name], report["stage_of"]).items():
        torch.testing.assert_close(
            report["weights"][key], expected, rtol=2e-4, atol=2e-5, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.parametrize("on_ranks", [3, 4])
def test_on_ranks_as_in_one_process(on_ranks: int, tmp_path: Path) -> None:
    chosen = [wanted for wanted in CASES.values() if sum(map(int, wanted["plan"].split("-"))) == on_ranks]
    orders = [{**wanted, "out": str(tmp_path / f"{index}.pt")} for index, wanted in enumerate(chosen)]
    finished = ranks.python(on_ranks, "train_zoo.py", json.dumps(orders), timeout=240)
    assert finished.status == 0, finished.output
    for index, wanted in enumerate(chosen):
        report, alone = torch.load(tmp_path / f"{index}.pt"), train_zoo.train(wanted)
        assert report["ranks"] == on_ranks, "the ranks really ran"
        different = [key for key, value in alone["weights"].items() if not torch.equal(report["weights"][key], value)]
        assert different == [], named(wanted)
        assert (report["losses"], report["scores"]) == (alone["losses"], alone["scores"]), named(wanted)
