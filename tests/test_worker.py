"""A worker gives every action to its stage, names what fails, and records when it ran. The stages are stand-ins."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
import torch

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.runtime.comm.allreduce import LocalGroup
from pipedream_hpc.runtime.execution import worker as worker_module
from pipedream_hpc.runtime.execution.emulator import carry_out, emulate
from pipedream_hpc.runtime.execution.position import PassPosition
from pipedream_hpc.runtime.execution.stage import Stage
from pipedream_hpc.runtime.execution.worker import ActionError, Worker
from pipedream_hpc.schedule.actions import Action
from pipedream_hpc.schedule.text import parse_action
from pipedream_hpc.schedule.trace import Span


class GradAllReduce:
    """Ready at the second time it is asked."""

    def __init__(self, notes: list[str]) -> None:
        self.notes, self.asked = notes, 0

    def start_rest(self) -> None:
        self.notes.append("starts the rest")

    def done(self) -> bool:
        self.asked += 1
        return self.asked > 1


class Optimizer:
    """Gradients of norm 3 for stage 0, of norm 4 for stage 1; notes the norm over the model."""

    def __init__(self, index: int, notes: list[str], *, overflow: bool = False) -> None:
        self.index, self.notes, self.overflow = index, notes, overflow

    def squared_norm(self, gradients: Any) -> tuple[float, bool]:
        return (float("inf"), True) if self.overflow else (float((3 + self.index) ** 2), False)

    def set_model_norm(self, squares: float, *, overflow: bool) -> None:
        self.notes.append(f"stage {self.index}: squared norm {squares:g}{', overflow' * overflow}")


class FakeStage:
    """Notes what it is told."""

    def __init__(self, index: int, notes: list[str], replica: int = 0, *, overflow: bool = False) -> None:
        self.index, self.replica, self.notes = index, replica, notes
        self.grad_allreduce = GradAllReduce(notes)
        self.optimizer = Optimizer(index, notes, overflow=overflow)
        self.ready_for: Callable[[Action], bool] = lambda action: True

    def ready(self, action: Action) -> bool:
        return self.ready_for(action)

    def round_gradients(self, n_microbatches: int) -> list[torch.Tensor | None]:
        self.notes.append(f"stage {self.index}: gradients of {n_microbatches}")
        return []

    def begin(self, data: Any, **options: Any) -> None:
        self.notes.append(f"stage {self.index} begins with {data}: {options}")

    def end(self) -> None:
        self.notes.append(f"stage {self.index} ends")


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What stages are called with; the real methods are not run."""
    found: list[str] = []

    def noting(method: Callable[..., None]) -> Callable[[Any, Action], None]:
        return lambda stage, action: found.append(f"stage {stage.index}: {method.__name__}({action.microbatch})")

    table = {kind: noting(method) for kind, method in worker_module._STAGE_ACTIONS.items()}
    table[type(parse_action("0STEP1n1"))] = lambda stage, action: found.append(f"stage {stage.index}: optimizer_step")
    monkeypatch.setattr(worker_module, "_STAGE_ACTIONS", table)
    return found


def made(*stages: Any, rank: int = 1, grad_norm: Any = None) -> Worker:
    return Worker(rank, stages, grad_norm)


def begin(held: Worker, position: PassPosition | None = None, *, trace: bool = False, score_fn: Any = None) -> None:
    data: Any = "data"
    held.begin(
        data,
        position or PassPosition("epoch 2"),
        training=True,
        first_microbatch=100,
        first_trained=80,
        score_fn=score_fn,
        trace=trace,
    )


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ("1RECV_F4<0r0", "stage 1: recv(4)"),
        ("1F4v3", "stage 1: forward(4)"),
        ("3F4v3s", "stage 3: forward(4)"),
        ("1SEND_F4>2r2", "stage 1: send(4)"),
        ("1RECV_B4<2r2", "stage 1: recv(4)"),
        ("1B4v3l", "stage 1: backward(4)"),
        ("3I4v3", "stage 3: backward_input(4)"),
        ("3W4v3", "stage 3: backward_weight(4)"),
        ("1SEND_B4>0r0", "stage 1: send(4)"),
        ("1STEP1n4", "stage 1: optimizer_step"),
        ("3REDUCE0n4", "stage 3: gradients of 4"),
    ],
)
def test_each_action_is_the_method_of_its_stage(text: str, call: str, notes: list[str]) -> None:
    """A rank with stages 1 and 3."""
    made(FakeStage(1, notes), FakeStage(3, notes)).run(parse_action(text))
    assert notes == [call]


def test_the_table_has_the_stages_own_methods() -> None:
    names = {kind.__name__: method for kind, method in worker_module._STAGE_ACTIONS.items()}
    for kind, method in names.items():
        snake = re.sub(r"(?<!^)(?=[A-Z])", "_", kind).lower()
        assert method is getattr(Stage, snake)


def test_begin_and_end_reach_every_stage() -> None:
    notes: list[str] = []
    held = made(FakeStage(0, notes), FakeStage(2, notes))
    begin(held)
    counts = "'training': True, 'first_microbatch': 100, 'first_trained': 80"
    assert notes == [
        f"stage {index} begins with data: {{{counts}, 'score_fn': None, 'publish': False}}" for index in (0, 2)
    ]
    notes.clear()
    begin(held, score_fn="accuracy")
    assert notes[0].endswith("'score_fn': 'accuracy', 'publish': False}")
    notes.clear()
    held.end()
    assert notes == ["stage 0 ends", "stage 2 ends"]


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "n_microbatches", "where"),
    [
        ("1F5v3", 1, "epoch 2, minibatch 5, forward (1F5v3)"),
        ("1F5v3", 4, "epoch 2, minibatch 1, microbatch 1, forward (1F5v3)"),
        ("1B5v3l", 2, "epoch 2, minibatch 2, microbatch 1, backward (1B5v3l)"),
        ("1I5v3", 1, "epoch 2, minibatch 5, backward input (1I5v3)"),
        ("1W5v3", 1, "epoch 2, minibatch 5, backward weight (1W5v3)"),
        ("1RECV_B5<2r2", 1, "epoch 2, minibatch 5, recv (1RECV_B5<2r2)"),
        ("1SEND_F5>2r3", 1, "epoch 2, minibatch 5, send (1SEND_F5>2r3)"),
        ("1STEP6n4", 4, "epoch 2, round 5, optimizer step (1STEP6n4)"),
        ("1REDUCE5n4", 4, "epoch 2, round 5, reduce gradients (1REDUCE5n4)"),
        ("1NORM5n4", 4, "epoch 2, round 5, all reduce grad norm (1NORM5n4)"),
    ],
)
@pytest.mark.parametrize("error", [PipedreamError("the loss has shape (3,)"), ValueError("no")], ids=["input", "other"])
def test_what_fails_is_named(
    text: str, n_microbatches: int, where: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bad input is one sentence; anything else says that it failed, and how. The cause is chained."""

    def fail(*_: Any) -> None:
        raise error

    stage = FakeStage(1, [])
    monkeypatch.setattr(worker_module, "_STAGE_ACTIONS", dict.fromkeys(worker_module._STAGE_ACTIONS, fail))
    monkeypatch.setattr(stage, "round_gradients", fail)
    held = made(stage, grad_norm=LocalGroup().join([(2, torch.float64)]))
    begin(held, PassPosition("epoch 2", n_microbatches))
    kind = PipedreamError if isinstance(error, PipedreamError) else ActionError
    said = ": the loss has shape (3,)" if isinstance(error, PipedreamError) else " failed: ValueError: no"
    with pytest.raises(kind, match=re.escape(f"rank 1 (stage 1) at {where}{said}") + "$") as raised:
        held.run(parse_action(text))
    assert raised.value.__cause__ is error


# -- what other ranks wait for ---------------------------------------------------------------------------------------


def test_ready_asks_the_channel_the_all_reduce_or_nobody() -> None:
    notes: list[str] = []
    stage = FakeStage(1, notes)
    stage.ready_for = lambda action: action.microbatch == 0  # type: ignore[union-attr]
    held = made(stage)
    asked = ["1RECV_F0<0r0", "1RECV_F1<0r0", "1SEND_F1>2r2", "1F7v0", "1STEP1n1", "1REDUCE0n1", "1REDUCE0n1"]
    assert [held.ready(parse_action(text)) for text in asked] == [True, False, False, True, True, False, True]
    assert notes == ["starts the rest"] * 2, "replicas wait for these buckets"


@pytest.mark.parametrize(("overflowing", "words"), [(None, ""), (1, ", overflow")])
def test_the_norm_over_the_model(overflowing: int | None, words: str) -> None:
    """rank  stage  replica  norm
    0     0      0        3
    1     1      0        4        infinite where it overflows: counted, not added
    2     1      1        4        another replica has the same gradients: not added either
    """
    notes: list[str] = []
    group = LocalGroup()
    places = [(0, 0), (1, 0), (1, 1)]
    ranks = [
        made(
            FakeStage(stage, notes, replica, overflow=stage == overflowing),
            rank=rank,
            grad_norm=group.join([(2, torch.float64)]),
        )
        for rank, (stage, replica) in enumerate(places)
    ]
    norms = [parse_action(f"{stage}NORM0n4") for stage, _ in places]
    for round_ in range(2):
        notes.clear()
        assert [held.ready(norm) for held, norm in zip(ranks, norms, strict=True)] == [False, False, True]
        assert [held.ready(norm) for held, norm in zip(ranks, norms, strict=True)] == [True, True, True]
        assert notes == [f"stage {stage}: gradients of 4" for stage, _ in places], f"started once in round {round_}"
        notes.clear()
        for held, norm in zip(ranks, norms, strict=True):
            held.run(norm)
        squares = 9 if overflowing else 9 + 16
        assert notes == [f"stage {stage}: squared norm {squares}{words}" for stage, _ in places]


def test_the_norm_of_a_rank_with_two_stages_is_started_by_the_first_that_needs_it() -> None:
    notes: list[str] = []
    grad_norm = LocalGroup().join([(2, torch.float64)])
    made(FakeStage(0, notes), FakeStage(1, notes), grad_norm=grad_norm).run(parse_action("0NORM0n2"))
    assert notes == [
        "stage 0: gradients of 2",
        "stage 1: gradients of 2",
        "stage 0: squared norm 25",
        "stage 1: squared norm 25",
    ]


# -- spans -----------------------------------------------------------------------------------------------------------


class Ticking:
    """A clock that advances by a second whenever it is read."""

    def __init__(self) -> None:
        self.seconds = count()

    def mark(self) -> int:
        return next(self.seconds)

    def read(self, marks: list[int]) -> list[float]:
        return [float(mark) for mark in marks]


def test_spans_say_what_ran_when(notes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Ticking()
    monkeypatch.setattr(worker_module, "clock_of", lambda device: clock)
    held = made(FakeStage(1, notes))
    begin(held, trace=True)
    for text in ("1RECV_F4<0r0", "1F4v3", "1REDUCE0n1", "1STEP4n1"):
        held.run(parse_action(text))
    assert held.spans(epoch_ns=-10 * 10**9) == [
        Span(1, 1, "recv", 4, -1, 10.0, 11.0),
        Span(1, 1, "forward", 4, 3, 12.0, 13.0),
        Span(1, 1, "reduce-gradients", -1, -1, 14.0, 15.0),
        Span(1, 1, "optimizer-step", -1, 4, 16.0, 17.0),
    ]


def test_without_a_trace_nothing_is_recorded(notes: list[str]) -> None:
    held = made(FakeStage(1, notes))
    begin(held, trace=True)
    held.run(parse_action("1F4v3"))
    begin(held)
    held.run(parse_action("1F5v3"))
    assert held.spans(0) == []


# -- one after the other ---------------------------------------------------------------------------------------------


class Lanes:
    """A schedule of these actions per rank."""

    def __init__(self, *lanes: str) -> None:
        self.lanes = lanes

    def actions(self, rank: int) -> Any:
        return map(parse_action, self.lanes[rank].split())


def test_emulated_ranks_take_turns(notes: list[str]) -> None:
    """Rank 0 goes on until it waits for rank 1."""
    stages = [FakeStage(0, notes), FakeStage(1, notes)]
    ran: list[str] = []
    stages[0].ready_for = lambda action: action.payload == "activation" or "backward" in "".join(notes)  # type: ignore[union-attr]
    workers = [made(stage, rank=rank) for rank, stage in enumerate(stages)]
    schedule: Any = Lanes("0F0v0 0SEND_F0>1r1 0RECV_B0<1r1 0B0v0l", "1RECV_F0<0r0 1F0v0 1B0v0l")
    for worker, action in emulate(workers, schedule):
        ran.append(f"{worker.rank}:{type(action).__name__}")
    assert ran == ["0:Forward", "0:Send", "1:Recv", "1:Forward", "1:Backward", "0:Recv", "0:Backward"]


def test_emulated_ranks_that_wait_for_each_other_are_an_error(notes: list[str]) -> None:
    stages = [FakeStage(0, notes), FakeStage(1, notes)]
    for stage in stages:
        stage.ready_for = lambda action: False
    workers = [made(stage, rank=rank) for rank, stage in enumerate(stages)]
    schedule: Any = Lanes("0RECV_B0<1r1", "1RECV_F0<0r0")
    with pytest.raises(RuntimeError, match="another: rank 0: receive gradient 0 from rank 1; rank 1: receive"):
        list(emulate(workers, schedule))


def test_a_rank_publishes_before_it_waits(notes: list[str]) -> None:
    """The callback runs before actions that are not ready, and only there."""
    stage = FakeStage(0, notes)
    stage.ready_for = lambda action: action.microbatch != 1  # type: ignore[union-attr]
    schedule: Any = Lanes("0F0v0 0RECV_B0<1r1 0RECV_B1<1r1")
    for _ in carry_out(made(stage, rank=0), schedule, before_waiting=lambda: notes.append("flush")):
        pass
    assert notes == ["stage 0: forward(0)", "stage 0: recv(0)", "flush", "stage 0: recv(1)"]
