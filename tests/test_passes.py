"""Around the actions of a pass: data that differs, replicas that drift apart, mean scores, losses for other ranks."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipedream_hpc.cluster.world import World
from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.model.arguments import Arguments
from pipedream_hpc.runtime.comm.loss_board import CAPACITY, Loss, local_loss_board
from pipedream_hpc.runtime.execution import passes, run_losses
from pipedream_hpc.runtime.execution.data import MicrobatchLoader, Reader
from pipedream_hpc.runtime.execution.loss_meter import LossMeter
from pipedream_hpc.runtime.execution.passes import check_data, finish_pass
from pipedream_hpc.runtime.execution.run_losses import RunLosses
from pipedream_hpc.runtime.execution.score import Score, read_score

ALONE = World(0, 1, 0, 1, "n1")


@pytest.fixture
def other_ranks(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What ranks 1, 2, ... answer; rank 0 is this process."""
    answers: list[dict[str, Any]] = []
    monkeypatch.setattr(passes, "exchange", lambda world, facts, *, limit_s: [facts, *answers])
    return answers


# -- data ------------------------------------------------------------------------------------------------------------


def loader(value: float = 0.0, *, reads: bool = True) -> MicrobatchLoader:
    """Return a pass over two equal minibatches."""
    data = [(torch.full((2, 1), value), torch.zeros(2))] * 2
    readers = [Reader(0, 1)] if reads else []
    return MicrobatchLoader(
        data, epoch=0, seed=0, readers=readers, example=Arguments((torch.ones(2, 1),), {}, ("x",)), length=2
    )


def seen(value: float, **options: Any) -> dict[str, Any]:
    return {"minibatches": 2, "data": loader(value, **options).fingerprint()}


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ([], None),
        ([seen(0.0), seen(0.0)], None),
        ([seen(5.0, reads=False), seen(0.0)], None),  # a stage in the middle reads nothing
        ([seen(0.0), seen(5.0)], "^ranks 0 and 2 read different first minibatches: the order of the data must depend"),
        (
            [{**seen(0.0), "minibatches": 3}],
            "^ranks disagree about the minibatches: 2 on rank 0, 3 on rank 1: give every rank the same loader$",
        ),
    ],
)
def test_ranks_read_the_same_data(
    others: list[dict[str, Any]], words: str | None, other_ranks: list[dict[str, Any]]
) -> None:
    other_ranks += others
    if words is None:
        check_data(ALONE, 2, loader(), limit_s=1)
        return
    with pytest.raises(PipedreamError, match=words):
        check_data(ALONE, 2, loader(), limit_s=1)


def test_ranks_that_read_are_compared_when_rank_0_does_not(other_ranks: list[dict[str, Any]]) -> None:
    other_ranks += [seen(1.0), seen(0.0, reads=False), seen(2.0)]
    with pytest.raises(PipedreamError, match=r"^ranks 1 and 3 read different first minibatches"):
        check_data(ALONE, 2, loader(reads=False), limit_s=1)


# -- the end of a pass -----------------------------------------------------------------------------------------------


def stage(
    index: int, weight: float, *, scores: list[tuple[int, Any, int]] | None = None, replicated: bool = True
) -> Any:
    """Return a stand-in for a stage with one weight; one with scores is the output stage."""
    module = torch.nn.BatchNorm1d(1)
    meter = LossMeter()
    for microbatch, score, samples in scores or []:
        meter.add(microbatch, [Score(each) for each in torch.atleast_1d(torch.as_tensor(score))], samples)
    return SimpleNamespace(
        index=index,
        is_last=scores is not None,
        loss=SimpleNamespace(meter=meter, means=None),
        module=module,
        stash=SimpleNamespace(trained=[torch.tensor([weight])]),
        grad_allreduce=object() if replicated else None,
    )


def workers(*stages: Any) -> list[Any]:
    """Return stand-ins for workers: one rank for each stage."""
    return [SimpleNamespace(rank=rank, stages={each.index: each}) for rank, each in enumerate(stages)]


def finish(*stages: Any, training: bool = True) -> list[float]:
    return finish_pass(ALONE, workers(*stages), {0: 7, 2: 9}, training=training, limit_s=1)


def test_scores_are_means_over_samples_in_the_order_of_microbatches() -> None:
    """microbatch  0    1    2    3
    replica     0    1    0    1
    samples     4    4    4    2
    loss        1    3    2    5
    """
    one = stage(0, 1.0, scores=[(0, 1.0, 4), (2, 2.0, 4)])
    other = stage(0, 1.0, scores=[(1, 3.0, 4), (3, 5.0, 2)])
    assert finish(one, other) == [(1 * 4 + 3 * 4 + 2 * 4 + 5 * 2) / 14]


def test_every_metric_has_its_mean() -> None:
    assert finish(stage(0, 1.0, scores=[(0, [1.0, 0.0], 1), (1, [2.0, 1.0], 3)]), training=False) == [7 / 4, 3 / 4]


def test_scores_of_other_ranks_count(other_ranks: list[dict[str, Any]]) -> None:
    other_ranks.append({"data": {}, "scores": [(0, [2.0], [1])], "weights": [], "divisors": []})
    assert finish(stage(0, 1.0, replicated=False)) == [2.0]


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ([{0: 7, 1: 8}, {1: 8, 2: 9}], None),
        ([{0: 7, 1: 8}, {1: 8, 2: 5}], "ranks 0 and 2 have read different numbers in minibatch 2: an item of a data"),
        ([{0: 7, 1: 8}, {1: 6}], "ranks 1 and 2 have read different numbers in minibatch 1"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_ranks_that_have_read_different_data_are_named(
    others: Any, words: str | None, training: bool, other_ranks: list[dict[str, Any]]
) -> None:
    other_ranks += [{"data": each, "scores": [], "weights": [], "divisors": []} for each in others]
    with pytest.raises(PipedreamError, match=words) if words else nullcontext():
        finish(stage(0, 1.0, scores=[]), training=training)


def test_a_pass_without_minibatches_has_no_mean() -> None:
    (mean,) = finish(stage(0, 1.0, scores=[]))
    assert mean != mean


@pytest.mark.parametrize(
    ("stages", "training", "words"),
    [
        ([stage(0, 1.0), stage(0, 1.0)], True, None),
        (
            [stage(0, 1.0), stage(0, 2.0)],
            True,
            "^replicas of stage 0 have drifted apart: .* weights of ranks 0 and 1 differ",
        ),
        ([stage(0, 1.0), stage(1, 3.0), stage(1, 2.0)], True, "^replicas of stage 1 .* ranks 1 and 2 differ"),
        ([stage(0, 1.0), stage(0, 2.0)], False, None),  # an evaluation changes no weight
        ([stage(0, 1.0, replicated=False), stage(1, 2.0, replicated=False)], True, None),
    ],
)
def test_replicas_that_drift_apart(stages: list[Any], training: bool, words: str | None) -> None:
    if words is None:
        finish(*stages, training=training)
        return
    with pytest.raises(PipedreamError, match=words):
        finish(*stages, training=training)


def test_replicas_with_different_buffers_have_drifted_apart() -> None:
    one, other = stage(0, 1.0), stage(0, 1.0)
    other.module.running_mean += 1
    with pytest.raises(PipedreamError, match="replicas of stage 0 have drifted apart"):
        finish(one, other)


# -- losses ----------------------------------------------------------------------------------------------------------


class Board:
    """Notes what is published."""

    def __init__(self) -> None:
        self.published: list[tuple[int, Loss]] = []
        self.asked: list[tuple[int, int]] = []

    def publish(self, microbatch: int, loss: Loss) -> None:
        self.published.append((microbatch, loss))

    def ask(self, owner: int, microbatch: int) -> Loss:
        self.asked.append((owner, microbatch))
        return Loss(0.0, 1)


def test_losses_on_a_cpu_are_published_at_once() -> None:
    board = Board()
    losses = RunLosses(board, [3])
    losses.publish(100, Score(torch.tensor(0.5)), 4)
    assert board.published == [(100, Loss(0.5, 4, counted=False))]
    losses.publish(101, read_score((torch.tensor(6.0), torch.tensor(8)), "the loss"), 4)
    assert board.published[1] == (101, Loss(0.75, 8.0, counted=True))
    losses.flush()
    assert len(board.published) == 2


def test_a_loss_is_asked_of_the_replica_that_ran_the_microbatch() -> None:
    """microbatch   0  1  2  3  4
    rank            4  7  4  7  4
    """
    board = Board()
    losses = RunLosses(board, [4, 7])
    for microbatch in range(5):
        losses.ask(10, microbatch)
    assert board.asked == [(4, 10), (7, 11), (4, 12), (7, 13), (4, 14)]


def test_losses_on_a_gpu_are_published_when_their_copy_has_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    """microbatch  0      1      2      ask
    arrived     no     0      0, 1   all
    published   -      0      1      2
    """
    board, arrived = Board(), 0
    events: list[Any] = []

    class Event:
        def __init__(self) -> None:
            self.number = len(events)
            events.append(self)

        def record(self) -> None: ...

        def query(self) -> bool:
            return self.number < arrived

        def synchronize(self) -> None: ...

    class OnGpu:
        device = SimpleNamespace(type="cuda")

        def __init__(self, value: float) -> None:
            self.value = value

        def detach(self) -> OnGpu:
            return self

    def empty(size: int, *, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        assert pin_memory
        return torch.zeros(size, dtype=dtype)

    torch_of_a_gpu = SimpleNamespace(
        empty=empty,
        as_tensor=lambda value: torch.tensor(getattr(value, "value", value)),
        float64=torch.float64,
        cuda=SimpleNamespace(Event=Event),
    )
    monkeypatch.setattr(run_losses, "torch", torch_of_a_gpu)
    losses = RunLosses(board, [0])
    for microbatch in range(3):
        arrived = microbatch
        loss: Any = OnGpu(microbatch / 4)
        losses.publish(microbatch, Score(loss), 8)
        assert [number for number, *_ in board.published] == list(range(microbatch))
    losses.ask(0, 2)
    assert board.published == [(0, Loss(0.0, 8)), (1, Loss(0.25, 8)), (2, Loss(0.5, 8))]


def test_a_board_forgets_the_oldest_losses() -> None:
    board = local_loss_board()
    for microbatch in range(CAPACITY + 1):
        board.publish(microbatch, Loss(microbatch / 8, 4))
    assert board.ask(0, 1) == Loss(0.125, 4)
    assert board.ask(0, CAPACITY) == Loss(CAPACITY / 8, 4)
    with pytest.raises(PipedreamError, match=r"the loss of microbatch 0 of the run is no longer kept: read step\.loss"):
        board.ask(0, 0)


def test_a_loss_that_was_computed_again_counts() -> None:
    board = local_loss_board()
    board.publish(3, Loss(0.5, 4))
    board.publish(3, Loss(0.25, 2))
    assert board.ask(0, 3) == Loss(0.25, 2)
