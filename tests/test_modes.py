"""Every schedule on real ranks = in one process = plain autograd with the papers' equations, bit for bit."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import chains
import pytest
import torch
import training
from torch import nn
from training import Order, Report, assert_bitwise

from pipedream_hpc import Clip, Pipeline
from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.model.precision import autocast
from pipedream_hpc.verification import reference
from pipedream_hpc.verification.reference import Way

PLANS = ["1", "2", "4", "1-1", "2-1", "1-2", "2-1-1", "1-2-1", "3-1", "1-1-1-1"]
#: Two epochs, whose ends fill no round of 2, 3 or 4, the last minibatch being short.
SPLITTING = ("split_backward", "zero_bubble")
UNEVEN = {"epochs": [11, 7], "last": 5, "model": "plain"}


def case(plan: str, kind: str = "1f1b", optimizer: str = "sgd", **more: Any) -> dict[str, Any]:
    return {"plan": plan, "kind": kind, "optimizer": optimizer, "decay": 0.9, **UNEVEN, **more}


def cases() -> list[dict[str, Any]]:
    found = [case(plan, "1f1b", optimizer) for plan in PLANS for optimizer in ("sgd", "adam")]
    found += [case(plan, "vertical-sync") for plan in ("1-1", "2-1", "1-2", "2-1-1", "3-1", "1-1-1-1")]
    for kind in ("1f1b-flush", "gpipe"):
        found += [case(plan, kind, microbatches=4) for plan in ("1-1", "2-1", "1-2-1", "1-1-1-1", "4")]
    found += [case("1-1", "gpipe", microbatches=3), case("1-1-1", "1f1b-flush", "adam", microbatches=5)]
    found += [case(plan, "2bw", microbatches=4) for plan in ("1-1", "2-1", "1-1-1-1")]
    found += [case(plan, "data-parallel", optimizer) for plan in ("2", "4") for optimizer in ("sgd", "adam")]
    found += [case(plan, "model-parallel") for plan in ("1-1", "2-1", "1-1-1-1")]
    found += [case("2-1", "1f1b", accumulate=2), case("1-1-1", "vertical-sync", accumulate=3)]
    found += [case("1-1", "gpipe", microbatches=2, accumulate=2), case("2", "data-parallel", accumulate=2)]
    found += [case("2-1", "1f1b", clip=(0.1, "stage")), case("1-1", "gpipe", microbatches=2, clip=(0.1, "model"))]
    found += [case("2-2", "1f1b-flush", microbatches=4, clip=(0.1, "model"))]
    found += [case(plan, "1f1b", precision="bf16") for plan in ("1-1", "2-1")]
    found += [case("1-1-1", "gpipe", microbatches=2, precision="bf16"), case("1-1-1", "1f1b", recompute=True)]
    half = {"model": "half", "master_weights": True}
    found += [case("1-1-1", "1f1b", optimizer, **half) for optimizer in ("sgd", "adam")]
    found += [case("2-1", "1f1b", **half), case("1-1", "gpipe", "adam", microbatches=2, **half)]
    split: dict[str, Any] = {"split_backward": True}
    found += [case(plan, "1f1b-flush", microbatches=4, **split) for plan in ("1-1", "2-1", "1-2-1", "1-1-1-1")]
    found += [case(plan, "1f1b-flush", "adam", microbatches=3, **split) for plan in ("1-1", "1-2", "1-3", "1-1-1-1")]
    found += [case("1-1-1", "1f1b-flush", microbatches=4, recompute=True, **split)]
    found += [case("2-2", "1f1b-flush", microbatches=4, clip=(0.1, "model"), **split)]
    found += [case("1-1-1", "1f1b-flush", microbatches=2, precision="bf16", **split)]
    found += [case("1-1", "1f1b-flush", "adam", microbatches=2, **half, **split)]
    found += [case(plan, "gpipe", microbatches=4, **split) for plan in ("1-1", "2-1", "1-2-1")]
    found += [case("1-1-1-1", "gpipe", microbatches=m, **split) for m in (3, 5)]
    zero: dict[str, Any] = {"zero_bubble": True}
    found += [case(plan, "1f1b-flush", microbatches=5, **zero) for plan in ("1-1", "2-1", "1-1-1", "1-1-1-1")]
    found += [case("1-2-1", "1f1b-flush", "adam", microbatches=4, recompute=True, **zero)]
    return found


def named(wanted: dict[str, Any]) -> str:
    extra = [
        f"{key}={wanted[key]}"
        for key in ("microbatches", "accumulate", "clip", "precision", "recompute", "master_weights", *SPLITTING)
        if key in wanted
    ]
    return " ".join([wanted["plan"], wanted["kind"], wanted["optimizer"], *extra])


CASES = {named(wanted): wanted for wanted in cases()}


def replicas(wanted: dict[str, Any]) -> list[int]:
    return [int(count) for count in wanted["plan"].split("-")]


def options(wanted: dict[str, Any]) -> dict[str, Any]:
    keys = ("microbatches", "accumulate", "precision", "recompute", "master_weights", *SPLITTING)
    found = {key: wanted[key] for key in keys if key in wanted}
    return {**found, "schedule": wanted["kind"]}


def ordered(wanted: dict[str, Any], **more: Any) -> Order:
    return {**wanted, "options": {**options(wanted), **more}}


@cache
def emulated(name: str) -> Report:
    return training.alone(ordered(CASES[name]))


def by_reference(wanted: dict[str, Any], stage_of: dict[str, int]) -> dict[str, torch.Tensor]:
    return reference.train(
        chains.MODELS[wanted["model"]](),
        stage_of,
        [chains.minibatches(count, last=wanted["last"]) for count in wanted["epochs"]],
        nn.CrossEntropyLoss(),
        chains.OPTIMIZERS[wanted["optimizer"]],
        Way(
            wanted["kind"],
            replicas(wanted),
            wanted.get("microbatches", 1),
            wanted.get("accumulate", 1),
            wanted.get("clip"),
            wanted.get("master_weights", False),
            2 if "zero_bubble" in wanted else int("split_backward" in wanted),
        ),
        scheduler=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=wanted["decay"]),
        precision=autocast(wanted.get("precision")) or nullcontext,
    )


@pytest.mark.parametrize("name", CASES)
def test_in_one_process_as_the_reference(name: str) -> None:
    report = emulated(name)
    assert_bitwise(report["weights"], by_reference(CASES[name], report["stage_of"]))


@pytest.mark.parametrize("on_ranks", [1, 2, 3, 4])
def test_on_ranks_as_in_one_process(on_ranks: int, tmp_path: Path) -> None:
    """One launch trains all the cases that are for so many ranks."""
    chosen = {name: ordered(wanted) for name, wanted in CASES.items() if sum(replicas(wanted)) == on_ranks}
    expected = {name: emulated(name) for name in chosen}
    if on_ranks == 2:
        # Two stages to a rank: GPipe to the last bit.
        name = "1-1-1-1 interleaved sgd"
        chosen[name] = ordered(case("1-1-1-1", "interleaved", microbatches=4), chunks=2)
        expected[name] = emulated("1-1-1-1 gpipe sgd microbatches=4")
    for name, report in zip(chosen, training.on_ranks(on_ranks, list(chosen.values()), tmp_path), strict=True):
        assert_bitwise(report["weights"], expected[name]["weights"], name)
        assert report["losses"] == expected[name]["losses"], name


@pytest.mark.parametrize("kind", ["1f1b", "gpipe"])
def test_recomputing_changes_nothing(kind: str) -> None:
    """With BatchNorm, whose statistics see a minibatch once, dropout and writes in place."""
    wanted = case("1-1-1", kind, **{**UNEVEN, "model": "rich"}, **({"microbatches": 2} if kind == "gpipe" else {}))
    kept, again = (training.alone(ordered({**wanted, "recompute": recompute})) for recompute in (False, True))
    assert_bitwise(kept["weights"], again["weights"])
    assert kept["losses"] == again["losses"]


def test_naive_pipelining_is_none_of_the_others() -> None:
    """What weight stashing is for: without it gradients are of no function at all."""
    naive = training.alone(ordered(case("1-1-1-1", "naive")))
    plain = by_reference(case("1-1-1-1", "model-parallel"), naive["stage_of"])
    for other in (emulated("1-1-1-1 1f1b sgd")["weights"], plain):
        assert any(not torch.equal(value, other[name]) for name, value in naive["weights"].items())


def test_fixed_order_or_not_replicas_stay_equal(tmp_path: Path) -> None:
    """MPI may sum in an order of its own, but all replicas must get the same sum."""
    training.on_ranks(3, [ordered(case("3"), deterministic=False)], tmp_path)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"schedule": "gpip"}, "there is no schedule 'gpip': choose from 1f1b"),
        ({"microbatches": 4}, "1f1b sends whole minibatches, not 4 microbatches"),
        ({"schedule": "gpipe", "microbatches": 9}, "tensors of 8 samples, which cannot be cut into 9 microbatches"),
        ({"clip": Clip(1.0, "model")}, "stages cannot agree about gradients .* use 1f1b-flush or gpipe"),
        ({"precision": "fp16"}, "stages cannot agree about gradients"),
        ({"precision": "fp8"}, "precision should be 'bf16' or 'fp16', or left away"),
        (
            {"master_weights": True, "optimizer": torch.optim.RMSprop},
            "master_weights=True needs .* this RMSprop is not",
        ),
        ({"accumulate": 0}, "at least one minibatch, not of 0"),
        ({"schedule": "2bw", "microbatches": 1}, "2bw needs at least 3 microbatches"),
        ({"schedule": "data-parallel"}, "the plan has 4 stages"),
        ({"schedule": "interleaved", "chunks": 3}, "4 stages cannot be shared out in chunks of 3"),
    ],
)
def test_what_cannot_be_run_is_said_in_a_sentence(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(PipedreamError, match=words):
        Pipeline(
            chains.plain_model(),
            loss=nn.CrossEntropyLoss(),
            example=chains.example(),
            plan="1-1-1-1",
            **{"optimizer": chains.OPTIMIZERS["sgd"], **asked},
        )
