"""Losses that ranks ask each other for, and how messages name microbatches."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from pipedream_hpc.core import load_comm

RANKS = (1, 3)  # tests/test_on_ranks.py starts this file on as many

core = load_comm()
comm = MPI.COMM_WORLD
SOON = 20.0
NEXT, PREVIOUS = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size


@pytest.fixture
def progress() -> Any:
    made = core.Progress(comm, oversubscribed=True)
    yield made
    comm.Barrier()
    made.close()


@pytest.fixture
def board_of(progress: Any) -> Any:
    """Create boards that answer until all ranks have come to the end of the test."""
    boards: list[Any] = []

    def make(capacity: int) -> Any:
        boards.append(core.LossBoard(progress, capacity))
        return boards[-1]

    yield make
    comm.Barrier()


def test_messages_name_the_position_in_the_run(progress: Any) -> None:
    assert progress.microbatch_name(109) == "microbatch 109 of the run"
    progress.set_position("epoch 2", 100, 4)
    assert progress.microbatch_name(109) == "epoch 2, minibatch 2, microbatch 1"
    assert progress.microbatch_name(99) == "microbatch 99 of the run"
    progress.set_position("epoch 2", first=100, n_microbatches=1)
    assert progress.microbatch_name(109) == "epoch 2, minibatch 9"
    with pytest.raises(ValueError, match="at least one microbatch"):
        progress.set_position("epoch 2", 100, 0)
    receiver = core.RecvChannel(progress, PREVIOUS, 0, [("the test's bytes", "uint8", 1, (10,))], 1)
    with pytest.raises(core.StallError, match=r"has waited .* s for epoch 2, minibatch 9: the test's bytes from rank"):
        receiver.receive(109, 0.1)


def test_every_rank_asks_every_rank(board_of: Any) -> None:
    board = board_of(8)
    for microbatch in range(8):
        board.publish(microbatch, comm.rank + microbatch / 8, 10.5 + microbatch, microbatch == 2)
    for owner in range(comm.size):
        for microbatch in (7, 0, 3):
            assert board.ask(owner, microbatch, SOON) == (owner + microbatch / 8, 10.5 + microbatch, microbatch == 2)


def test_an_owner_that_waits_for_the_asker_answers(progress: Any, board_of: Any) -> None:
    """Rank 1 waits for a message that rank 0 sends only after it has got the loss from rank 1."""
    if comm.size == 1:
        pytest.skip("needs two ranks")
    specs, board, data = [("the test's bytes", "uint8", 1, (10,))], board_of(2), np.zeros(10, np.uint8)
    board.publish(0, 0.5, 4)
    if comm.rank == 1:
        slot, _ = core.RecvChannel(progress, 0, 0, specs, 1).receive(0, SOON)
        assert slot == 0
    if comm.rank == 0:
        sender = core.SendChannel(progress, 1, 0, specs)
        time.sleep(0.2)
        assert board.ask(1, 0, SOON) == (0.5, 4, False)
        sender.send(0, [(data.ctypes.data, None)], SOON)
        sender.drain(SOON)


def test_an_owner_in_python_code_answers(board_of: Any) -> None:
    """Its main thread holds the interpreter's lock and makes no call of MPI."""
    board = board_of(2)
    board.publish(0, 0.5, 4)
    comm.Barrier()
    if comm.rank == 0:
        assert board.ask(comm.size - 1, 0, SOON) == (0.5, 4, False)
    else:
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            pass


def test_a_loss_that_is_no_longer_kept(progress: Any, board_of: Any) -> None:
    board = board_of(2)
    progress.set_position("epoch 0", 0, 1)
    for microbatch in range(5):
        board.publish(microbatch, 0.0, 1)
    words = rf"the loss of epoch 0, minibatch 2 is no longer kept: read step.loss before rank {NEXT} runs 2 more"
    with pytest.raises(core.CoreError, match=words):
        board.ask(NEXT, 2, SOON)
    assert board.ask(NEXT, 3, SOON) == (0.0, 1, False)
    with pytest.raises(ValueError, match="at least 1"):
        core.LossBoard(progress, 0)


def test_a_loss_that_is_never_published(board_of: Any) -> None:
    board = board_of(2)
    words = rf"rank {comm.rank} has waited 0\.\d s for the loss of microbatch 3 of the run from rank {NEXT}"
    with pytest.raises(core.StallError, match=words):
        board.ask(NEXT, 3, 0.2)


def test_ctrl_c_ends_ask(board_of: Any) -> None:
    board = board_of(2)
    threading.Timer(0.3, signal.raise_signal, (signal.SIGINT,)).start()
    with pytest.raises(KeyboardInterrupt):
        board.ask(NEXT, 0, SOON)
    comm.Barrier()
    board.publish(0, 1.5, 1)
    assert board.ask(NEXT, 0, SOON) == (1.5, 1, False)
