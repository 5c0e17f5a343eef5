"""Ranks that were started with something else are named before anything depends on them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
from schedules import layout
from torch import nn

from pipedream_hpc import ScheduleConfig, TrainConfig
from pipedream_hpc.cluster.device import Device
from pipedream_hpc.cluster.world import World
from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.model.capture import capture
from pipedream_hpc.model.counting import count
from pipedream_hpc.planning.resolve import resolve_plan
from pipedream_hpc.runtime.comm.handshake import exchange, require_equal
from pipedream_hpc.runtime.launch.deployment import Deployment, deploy
from pipedream_hpc.runtime.launch.preflight import check_checkpoints, check_devices, check_launch
from pipedream_hpc.runtime.launch.run_plan import plan_as_run, run_schedule
from pipedream_hpc.schedule import registry
from pipedream_hpc.schedule.text import format_schedule

CPU = Device("cpu", "n1")


class Comm:
    """Messages between the last rank, which runs here, and rank 0, which answers what all ranks have sent.

    Args:
        others: what the ranks before the last one sent.
        answers: whether rank 0 answers at all.
    """

    def __init__(self, others: list[dict[str, Any]], *, answers: bool = True) -> None:
        self.others, self.answers, self.sent = others, answers, []

    def isend(self, facts: dict[str, Any], dest: int, tag: int) -> Comm:
        assert dest == 0
        self.sent.append(facts)
        return self

    def wait(self) -> None: ...

    def iprobe(self, source: int, tag: int) -> bool:
        return self.answers

    def recv(self, source: int, tag: int) -> list[dict[str, Any]]:
        assert source == 0
        return [*self.others, *self.sent]


def last_rank(*others: dict[str, Any], answers: bool = True) -> World:
    """Return the world of the last rank, after the others have sent these facts."""
    rank = max(1, len(others))
    return World(rank, rank + 1, rank, rank + 1, "n1", Comm(list(others), answers=answers))


def deployment(
    plan: int | tuple[int, ...] = 2,
    schedule: ScheduleConfig | None = None,
    wide: int = 4,
    model: Any = None,
    **config: Any,
) -> Deployment:
    example = torch.zeros(8, wide)
    torch.manual_seed(0)
    graph = capture(model or nn.Sequential(*(nn.Linear(wide, wide) for _ in range(4))), example)
    chosen = run_schedule(schedule or ScheduleConfig(), TrainConfig(**config), plan)
    made = plan_as_run(resolve_plan(plan, lambda: count(graph), chosen.name), "the plan", chosen, None)
    return deploy(made, "the plan", graph, chosen, World(0, 1, 0, 1, "n1"))


def sent_by(other: Deployment, config: TrainConfig | None = None) -> dict[str, Any]:
    """Return what a rank with this deployment sends."""
    world = last_rank({})
    with pytest.raises((PipedreamError, KeyError)):
        check_launch(world, other, config or TrainConfig(), limit_s=1)
    facts: dict[str, Any] = world.comm.sent[0]
    return facts


def noisy(seed: int) -> Any:
    """Return a function that builds a model, from random numbers of its own."""

    def build() -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))

    return build


def test_ranks_that_run_the_same_get_the_launch_of_rank_0() -> None:
    first, second = sent_by(deployment()), sent_by(deployment())
    assert first["launch"] != second["launch"]
    assert check_launch(last_rank(first, second), deployment(), TrainConfig(), limit_s=1) == first["launch"]


@pytest.mark.parametrize(
    ("rank_0", "rank_1", "words"),
    [
        (deployment(2), deployment((1, 2)), r"the plan: \[.*\(0,\).*\(1,\).*\] on rank 0, \[.*\(1, 2\).*\] on rank 1"),
        (
            deployment(2),
            deployment(wide=5),
            "the boundary tensors that the example leads to: .*8, 4.*, .*8, 5.* on rank 1",
        ),
        (
            deployment(schedule=ScheduleConfig("1f1b-flush", 4)),
            deployment(schedule=ScheduleConfig("1f1b-flush", 2)),
            "the schedule: 1f1b-flush, n_microbatches=4, .* on rank 0, 1f1b-flush, n_microbatches=2, .* on rank 1",
        ),
        (
            deployment(),
            deployment(schedule=ScheduleConfig("vertical-sync")),
            "the schedule: 1f1b, .* on rank 0, vertical-sync, .* on rank 1",
        ),
        (deployment(), deployment(gradient_accumulation_steps=2), "the schedule: .* on rank 0, .* on rank 1"),
        (
            deployment(model=noisy(1)),
            deployment(model=noisy(2)),
            "the random numbers that the model is made of: .*: call torch.manual_seed in the function that builds",
        ),
    ],
    ids=["plan", "example", "microbatches", "schedule", "accumulation", "model"],
)
def test_ranks_that_run_something_else(rank_0: Deployment, rank_1: Deployment, words: str) -> None:
    with pytest.raises(PipedreamError, match=f"^ranks disagree about {words}") as refused:
        check_launch(last_rank(sent_by(rank_0)), rank_1, TrainConfig(), limit_s=1)
    assert str(refused.value).count("rank 0") == str(refused.value).count("rank 1") == 1
    assert "\n" not in str(refused.value)


def test_ranks_with_models_of_different_seeds() -> None:
    """A built model may be another one on every rank only if its weights are loaded afterwards."""
    same, other = deployment(model=noisy(1)()), deployment(model=noisy(2)())
    words = (
        r"^ranks disagree about the weights and buffers of the model: checksum \w+ on rank 0, checksum \w+ on rank 1: "
        r"call torch.manual_seed before the model is built, or give TrainConfig\(check_model=False\) if"
    )
    with pytest.raises(PipedreamError, match=words):
        check_launch(last_rank(sent_by(same)), other, TrainConfig(), limit_s=1)
    check_launch(last_rank(sent_by(same)), deployment(model=noisy(1)()), TrainConfig(), limit_s=1)
    unchecked = TrainConfig(check_model=False)
    check_launch(last_rank(sent_by(same, unchecked)), other, unchecked, limit_s=1)


def test_ranks_with_different_files_of_a_schedule(tmp_path: Any) -> None:
    """Both are called mine.txt, but rank 1 has another one."""
    path, deployed = tmp_path / "mine.txt", []
    for name in ("gpipe", "1f1b-flush"):
        path.write_text(format_schedule(registry.make(name, layout(1, 1), 8, n_microbatches=4)))
        deployed.append(deployment(schedule=ScheduleConfig(str(path))))
    with pytest.raises(PipedreamError, match=r"ranks disagree about the schedule: .* on rank 0, .* on rank 1: start"):
        check_launch(last_rank(sent_by(deployed[0])), deployed[1], TrainConfig(), limit_s=1)


@pytest.mark.parametrize(
    ("fact", "value"),
    [
        ("seed", 7),
        ("version of pipedream_hpc", "0.0.9"),
        ("version of torch", "2.11.0"),
        ("byte order", "s390x"),
    ],
)
def test_ranks_of_another_installation(fact: str, value: Any) -> None:
    """Rank 2 runs here; rank 1 is the odd one."""
    same = sent_by(deployment())
    words = rf"^ranks disagree about the {fact}: .* on rank 0, {value} on rank 1: start every rank with the same$"
    with pytest.raises(PipedreamError, match=words):
        check_launch(last_rank(same, {**same, fact: value}), deployment(), TrainConfig(), limit_s=1)


@pytest.mark.parametrize(
    ("rank_0", "rank_1", "words"),
    [
        (TrainConfig(), TrainConfig(seed=3), "the seed: 0 on rank 0, 3 on rank 1"),
        (
            TrainConfig(),
            TrainConfig(precision="bf16"),
            "the training options: .*=None.* rank 0, .*precision=bf16.* rank 1",
        ),
        (
            TrainConfig(clip_grad_norm=1.0),
            TrainConfig(clip_grad_norm=2.0),
            "the training options: .*clip_grad_norm=1.0.* on rank 0, .*clip_grad_norm=2.0.* on rank 1",
        ),
    ],
)
def test_ranks_that_train_differently(rank_0: TrainConfig, rank_1: TrainConfig, words: str) -> None:
    with pytest.raises(PipedreamError, match=f"^ranks disagree about {words}: start every rank with the same$"):
        check_launch(last_rank(sent_by(deployment(), rank_0)), deployment(), rank_1, limit_s=1)


def info(device: Device, *, shares: bool = False) -> dict[str, Any]:
    return {"device": asdict(device), "shares": shares}


def test_devices_of_all_ranks() -> None:
    assert check_devices(last_rank(info(CPU)), CPU, limit_s=1) == (CPU, CPU)
    assert check_devices(World(0, 1, 0, 1, "n1"), CPU, limit_s=1) == (CPU,)


@pytest.mark.parametrize(
    ("others", "words"),
    [
        (
            [Device("cpu", "n1")],
            "rank 0 has the CPU of node n1, and rank 1 the GPU 0 of node n2, H200: give every rank",
        ),
        (
            [Device("cuda", "n1", 0, "H200", "GPU-1"), Device("cuda", "n2", 0, "H200", "GPU-2")],
            "ranks 1 and 2 would both",
        ),
    ],
)
def test_devices_that_do_not_go_together(others: list[Device], words: str) -> None:
    own = Device("cuda", "n2", 0, "H200", "GPU-2")
    with pytest.raises(PipedreamError, match=words):
        check_devices(last_rank(*map(info, others)), own, limit_s=1)


def test_ranks_may_share_a_gpu_if_one_of_them_says_so() -> None:
    own = Device("cuda", "n1", 0, "H200", "GPU-1")
    assert check_devices(last_rank(info(own, shares=True)), own, limit_s=1) == (own, own)


@pytest.mark.parametrize(
    ("rank_0", "rank_1", "words"),
    [
        ([(2, 14), (1, 7)], [], "epochs 2, 1 on rank 0, none on rank 1"),
        ([], [(2, 14)], "epochs none on rank 0, 2 on rank 1"),
        ([(2, 14)], [(2, 16)], "epochs 2 on rank 0, 2 on rank 1"),
    ],
)
def test_ranks_that_see_different_checkpoints(
    rank_0: list[tuple[int, int]], rank_1: list[tuple[int, int]], words: str
) -> None:
    with pytest.raises(
        PipedreamError, match=f"^ranks see different checkpoints: {words}: give a folder that all ranks"
    ):
        check_checkpoints(last_rank({"complete": rank_0}), rank_1, limit_s=1)
    check_checkpoints(last_rank({"complete": rank_0}), rank_0, limit_s=1)


def test_a_rank_that_does_not_answer_is_named() -> None:
    with pytest.raises(PipedreamError, match=r"^rank 0 did not answer within 0 s: look at that rank's log, or raise"):
        exchange(last_rank({}, answers=False), {}, limit_s=0.01)


def test_rank_0_gathers_in_rank_order() -> None:
    """Rank 1 is late; rank 0 sends everybody everything."""
    sent: list[tuple[int, list[dict[str, Any]]]] = []
    asked = iter([False, True, True])

    class Root(Comm):
        def iprobe(self, source: int, tag: int) -> bool:
            return next(asked)

        def recv(self, source: int, tag: int) -> Any:
            return {"who": source}

        def isend(self, facts: Any, dest: int, tag: int) -> Root:
            sent.append((dest, facts))
            return self

    everything = [{"who": rank} for rank in range(3)]
    assert exchange(World(0, 3, 0, 3, "n1", Root([])), {"who": 0}, limit_s=1) == everything
    assert sent == [(1, everything), (2, everything)]


def test_only_what_must_be_equal_is_compared() -> None:
    require_equal([{"a": 1, "b": 1}, {"a": 1, "b": 2}], {"a": "never"})
