"""Models of every kind: MPI ranks give the bits of one process, which match the whole model on mixed versions."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import chains
import pytest
import ranks
import torch
import train_zoo
from zoo import ZOO, masks_seeded

from pipedream_hpc.verification import reference
from pipedream_hpc.verification.reference import ReferenceConfig

# test_check_model compares the stages of all these models before training.
SETTINGS = {"epochs": [5, 4], "last": 3, "optimizer": "sgd", "train_config": {"check_model": False}}


def trainings() -> list[dict[str, Any]]:
    """Return the settings of all trainings."""
    found = []
    for name in ZOO:
        found += [{"name": name, "plan": plan, **SETTINGS} for plan in ("1-1-1", "2-1")]
        found.append(
            {"name": name, "plan": "1-1-1-1", **SETTINGS, "schedule": {"name": "1f1b-flush", "n_microbatches": 2}}
        )
        found.append({"name": name, "plan": "1-2-1", **SETTINGS, "optimizer": "adam"})
    return found


def title(training: dict[str, Any]) -> str:
    return f"{training['name']} {training['plan']} {training.get('schedule', {}).get('name', '1f1b')}"


CASES = {title(training): training for training in trainings()}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@cache
def in_one_process(name: str) -> dict[str, Any]:
    return train_zoo.train(CASES[name])


def reference_weights(training: dict[str, Any], stage_of: dict[str, int]) -> dict[str, torch.Tensor]:
    """Return the weights that the reference implementation computes."""
    case, schedule = ZOO[training["name"]], training.get("schedule", {})
    model = case.model()
    return reference.train(
        model,
        stage_of,
        [case.minibatches(count, training["last"]) for count in training["epochs"]],
        case.loss,
        chains.OPTIMIZERS[training["optimizer"]],
        ReferenceConfig(
            schedule.get("name", "1f1b"),
            [int(count) for count in training["plan"].split("-")],
            schedule.get("n_microbatches", 1),
        ),
        during=partial(masks_seeded, model),
    )


@pytest.mark.parametrize("name", CASES)
def test_one_process_matches_the_reference(name: str) -> None:
    """They match up to the order in which the gradients of a value with several users are added."""
    report = in_one_process(name)
    for key, expected in reference_weights(CASES[name], report["stage_of"]).items():
        torch.testing.assert_close(
            report["weights"][key], expected, rtol=2e-4, atol=2e-5, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.parametrize("on_ranks", [3, 4])
def test_ranks_give_the_bits_of_one_process(on_ranks: int) -> None:
    chosen = {
        name: training for name, training in CASES.items() if sum(map(int, training["plan"].split("-"))) == on_ranks
    }
    reports = ranks.call(on_ranks, train_zoo.train_all, list(chosen.values()))
    for name, report in zip(chosen, reports, strict=True):
        expected = in_one_process(name)
        assert report["ranks"] == on_ranks, "the job ran on that many ranks"
        different = [
            key for key, value in expected["weights"].items() if not torch.equal(report["weights"][key], value)
        ]
        assert different == [], name
        assert (report["losses"], report["scores"]) == (expected["losses"], expected["scores"]), name
