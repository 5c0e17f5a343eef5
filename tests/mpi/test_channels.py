"""Channels between two ranks: what is sent arrives, in order, checked, within bounds."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI

from pipedream_hpc.core import load_core
from pipedream_hpc.runtime.transport import Boundary, MpiInbox, MpiOutbox

RANKS = (2,)  # tests/test_on_ranks.py starts this file on as many

core = load_core()
comm = MPI.COMM_WORLD
SOON = 20.0


@pytest.fixture(scope="module")
def progress() -> Any:
    made = core.Progress(comm)
    yield made
    made.close()


def part(dtype: str, shape: Any) -> tuple[str, str, int, Any]:
    # Bytes, whatever the dtype: only sizes and names are compared.
    return "the test's bytes", dtype, 1, shape


class Pair:
    """Rank 0 sends, rank 1 receives; both call the same methods and each does its part."""

    tags = iter(range(1000))

    def __init__(
        self, progress: Any, capacity: int, slots: int = 2, dtype: str = "uint8", shape: Any = None, sends: Any = None
    ) -> None:
        tag, shape = next(self.tags), shape or (capacity,)
        if comm.rank == 0:
            self.out = core.SendChannel(progress, 1, tag, [part(*(sends or (dtype, shape)))])
        else:
            self.inn = core.ReceiveChannel(progress, 0, tag, [part(dtype, shape)], slots)
            self.shape = shape
        comm.Barrier()

    def send(self, minibatch: int, data: np.ndarray, shape: Any = None) -> None:
        self.out.send(minibatch, [(data.ctypes.data, shape or data.shape)], SOON)

    def receive(self, minibatch: int) -> tuple[int, np.ndarray]:
        slot, smaller = self.inn.receive(minibatch, SOON)
        (offset, shape), *_ = smaller or [(0, self.shape)]
        assert offset == 0
        return slot, np.frombuffer(self.inn.slot(slot), np.uint8)[: int(np.prod(shape))]


def pattern(minibatch: int, size: int) -> np.ndarray:
    return np.random.default_rng(minibatch).integers(0, 256, size, dtype=np.uint8)


def test_two_ranks_really_run() -> None:
    assert comm.size == 2


@pytest.mark.parametrize("capacity", [1, 100, 16 * 1024, 16 * 1024 + 1, 100_000, 3 << 20])
def test_random_sizes_with_guard_bytes(progress: Any, capacity: int) -> None:
    """Small and large messages, slots given back in any order, nothing written beyond a payload."""
    pair, draw = Pair(progress, capacity, slots=3), random.Random(capacity)
    sizes = [draw.randint(1, capacity) for _ in range(25)]
    if comm.rank == 0:
        sent = []
        for minibatch, size in enumerate(sizes):
            sent.append(pattern(minibatch, size))
            pair.send(minibatch, sent[-1])
        pair.out.drain(SOON)
        assert pair.out.messages == 25
        assert pair.out.payload_bytes == sum(sizes)
    else:
        held: list[int] = []
        for minibatch, size in enumerate(sizes):
            if len(held) == 2 or (held and draw.random() < 0.5):
                pair.inn.release(held.pop(draw.randrange(len(held))))
            slot, data = pair.receive(minibatch)
            whole = np.frombuffer(pair.inn.slot(slot), np.uint8)
            assert np.array_equal(data, pattern(minibatch, size))
            assert len(whole) == capacity
            held.append(slot)
    comm.Barrier()


def test_what_an_outbox_sends_outlives_it(progress: Any) -> None:
    """Dropped before anybody took the tensor: its memory is nobody else's until MPI has read it."""
    count, tag = 4 << 20, next(Pair.tags)
    boundary = Boundary("fc", 0, (count,), torch.float32)
    if comm.rank == 0:
        outbox = MpiOutbox(progress, 1, tag, [boundary], "activation", SOON)
        outbox.send(0, [torch.full((count,), 3.0)])
        del outbox
        others = [torch.full((count,), 5.0) for _ in range(3)]
        comm.Barrier()
        comm.Barrier()
        assert all((other == 5).all() for other in others)
    else:
        comm.Barrier()
        inbox = MpiInbox(progress, 0, tag, [boundary], "activation", 1, SOON)
        (arrived,) = inbox.receive(0)
        assert (arrived == 3).all()
        inbox.release(0)
        comm.Barrier()


@pytest.mark.parametrize("capacity", [64, 1 << 20])
def test_a_smaller_message_leaves_the_rest_of_its_slot_alone(progress: Any, capacity: int) -> None:
    pair = Pair(progress, capacity, slots=1)
    if comm.rank == 0:
        sent = [np.full(capacity, 7, np.uint8), np.full(capacity // 2, 9, np.uint8)]  # alive until drained
        for minibatch, data in enumerate(sent):
            pair.send(minibatch, data)
        pair.out.drain(SOON)
    else:
        slot, _ = pair.receive(0)
        pair.inn.release(slot)
        slot, data = pair.receive(1)
        whole = np.frombuffer(pair.inn.slot(slot), np.uint8)
        assert (data == 9).all()
        assert (whole[capacity // 2 :] == 7).all()
    comm.Barrier()


def test_the_third_send_waits_for_the_first(progress: Any) -> None:
    """Back-pressure: with every slot taken, two sends are under way and the third does not return."""
    size = 8 << 20  # beyond what MPI sends ahead by itself
    pair = Pair(progress, size, slots=1)
    if comm.rank == 0:
        data = [pattern(k, size) for k in range(4)]
        for minibatch in range(3):
            pair.send(minibatch, data[minibatch])
        began = time.monotonic()
        pair.send(3, data[3])
        waited = time.monotonic() - began
        pair.out.drain(SOON)
        assert pair.out.in_flight == 0
        slept = comm.recv(source=1)
        assert waited > slept / 2, "it returned although the receiver had taken nothing"
    else:
        slot, _ = pair.receive(0)  # takes the only slot; minibatch 1 cannot land
        time.sleep(0.5)
        for minibatch in (1, 2, 3):
            pair.inn.release(slot)
            slot, data = pair.receive(minibatch)
            assert np.array_equal(data, pattern(minibatch, size))
        comm.send(0.5, dest=0)
    comm.Barrier()


def test_receive_lands_in_persistent_slots_and_allocates_nothing(progress: Any) -> None:
    pair = Pair(progress, 1 << 16, slots=2)
    before = core.allocations()
    addresses = set()
    data = pattern(0, 1 << 16)
    for minibatch in range(20):
        if comm.rank == 0:
            pair.send(minibatch, data)
        else:
            slot, _ = pair.receive(minibatch)
            addresses.add(pair.inn.slot(slot).address)
            pair.inn.release(slot)
    if comm.rank == 0:
        pair.out.drain(SOON)
    else:
        assert len(addresses) == 2
    assert core.allocations() == before
    comm.Barrier()


EXPECTED = r"expected float32 \[4, 3\] \(or smaller\) but got "
FAULTS = {
    "minibatch": ((5, "float32", (2, 3)), r"expected minibatch 4 but got minibatch 5: the test's bytes from rank 0"),
    "dtype": ((4, "float64", (2, 3)), EXPECTED + r"float64 \[2, 3\] for minibatch 4: the test's bytes from rank 0"),
    "width": ((4, "float32", (2, 4)), EXPECTED + r"float32 \[2, 4\]"),
    "samples": ((4, "float32", (5, 1)), EXPECTED + r"float32 \[5, 1\]"),
    "dimensions": ((4, "float32", (6,)), EXPECTED + r"float32 \[6\]"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_message_that_was_not_planned_is_refused_on_arrival(progress: Any, fault: str) -> None:
    (minibatch, dtype, shape), expected = FAULTS[fault]
    pair = Pair(progress, 64, dtype="float32", shape=(4, 3), sends=(dtype, shape))
    if comm.rank == 0:
        pair.send(minibatch, np.zeros(24, np.uint8), shape)
        pair.out.drain(SOON)
    else:
        with pytest.raises(core.MessageError, match=expected):
            pair.inn.receive(4, SOON)
    comm.Barrier()


def test_a_message_beyond_the_capacity_never_leaves(progress: Any) -> None:
    pair = Pair(progress, 10)
    if comm.rank == 0:
        with pytest.raises(core.MessageError, match=r"minibatch 3 is uint8 \[11\], 11 bytes, but .* planned for 10"):
            pair.send(3, np.zeros(11, np.uint8))
    comm.Barrier()


def test_waiting_too_long_says_for_what_and_whom(progress: Any) -> None:
    pair = Pair(progress, 10)
    if comm.rank == 0:
        pair.send(0, np.zeros(10, np.uint8))
        comm.Barrier()
    else:
        pair.receive(0)
        words = (
            r"rank 1 has waited 0\.\d s for minibatch 1: the test's bytes from rank 0; "
            r"messages received so far: 1, the last was minibatch 0"
        )
        with pytest.raises(core.StallError, match=words):
            pair.inn.receive(1, 0.3)
        comm.Barrier()


def test_ready_tells_without_waiting(progress: Any) -> None:
    pair = Pair(progress, 10)
    if comm.rank == 1:
        assert not pair.inn.ready()
    comm.Barrier()
    if comm.rank == 0:
        pair.send(0, np.zeros(10, np.uint8))
        pair.out.drain(SOON)
    else:
        deadline = time.monotonic() + SOON
        while not pair.inn.ready() and time.monotonic() < deadline:
            time.sleep(0.001)
        assert pair.inn.ready()
        pair.receive(0)
    comm.Barrier()


def test_a_transfer_goes_on_behind_compute(progress: Any) -> None:
    """While both main threads compute and never call MPI, a large message arrives all the same."""
    size = 32 << 20
    pair = Pair(progress, size)
    data = pattern(1, size)
    comm.Barrier()
    before = progress.statistics()["polls_computing"]
    if comm.rank == 0:
        pair.send(0, data)
    time.sleep(1.0)
    if comm.rank == 1:
        assert pair.inn.ready()
        _, arrived = pair.receive(0)
        assert np.array_equal(arrived, data)
    else:
        pair.out.drain(SOON)
    assert progress.statistics()["polls_computing"] > before
    comm.Barrier()


def test_a_progress_thread_that_shares_its_core_with_compute_looks_seldom() -> None:
    """Beside two seconds of compute: every 20 ms at most, on a core of its own every 4 ms, twice each time."""
    counts = {}
    for spare in (False, True):
        thread = core.Progress(comm, cores=sorted(os.sched_getaffinity(0)), spare=spare)
        pair = Pair(thread, 8)  # a receive to look after
        time.sleep(0.5)
        before = thread.statistics()["polls_computing"]
        time.sleep(2.0)
        counts[spare] = thread.statistics()["polls_computing"] - before
        comm.Barrier()
        del pair
        thread.close()
    assert 0 < counts[False] <= 250
    assert counts[True] > counts[False]


def test_several_tensors_are_one_message(progress: Any) -> None:
    """The second is smaller than planned in every other message, and the last has no elements then."""
    parts = [("a", "int8", 1, (7,)), ("b", "float32", 4, (5, 30)), ("c", "uint8", 1, (2000,))]
    assert core.places(parts) == [0, 64, 64 + 640]
    tag = next(Pair.tags)
    out = core.SendChannel(progress, 1, tag, parts) if comm.rank == 0 else None
    inn = core.ReceiveChannel(progress, 0, tag, parts, 2) if comm.rank == 1 else None
    for minibatch in range(6):
        rows, rest = (5, 2000) if minibatch % 2 else (3, 0)
        a, b, c = pattern(1, 7), pattern(2, rows * 120), pattern(3, rest)
        if out is not None:
            sent = [(a.ctypes.data, (7,)), (b.ctypes.data, (rows, 30)), (c.ctypes.data, (rest,))]
            out.send(minibatch, sent, SOON)
            out.drain(SOON)  # before the arrays go
            assert out.messages == minibatch + 1
        if inn is not None:
            slot, smaller = inn.receive(minibatch, SOON)
            assert (smaller is None) == (rows == 5)
            assert not smaller or [shape for _, shape in smaller] == [(7,), (3, 30), (0,)]
            offsets = core.places(parts) if smaller is None else [offset for offset, _ in smaller]
            whole = np.frombuffer(inn.slot(slot), np.uint8)
            for offset, expected in zip(offsets, (a, b, c), strict=True):
                assert np.array_equal(whole[offset : offset + expected.size], expected)
            inn.release(slot)
    comm.Barrier()


def test_slots_run_out(progress: Any) -> None:
    pair = Pair(progress, 10, slots=1)
    if comm.rank == 0:
        pair.send(0, np.zeros(10, np.uint8))
        pair.out.drain(SOON)
    else:
        slot, _ = pair.receive(0)
        with pytest.raises(core.MessageError, match="all 1 slots are in use, so minibatch 1 has none"):
            pair.inn.receive(1, SOON)
        pair.inn.release(slot)
        with pytest.raises(RuntimeError, match="slot 0 is not in use"):
            pair.inn.release(slot)
    comm.Barrier()


def test_a_failed_call_names_rank_call_peer_and_minibatch() -> None:
    progress = core.Progress(comm)
    channel = core.SendChannel(progress, 99, 0, [part("uint8", (1 << 20,))])
    words = rf"rank {comm.rank}: MPI_Isend failed for the test's bytes, minibatch 7, to rank 99: MPI_ERR_RANK"
    data = np.zeros(10, np.uint8)
    with pytest.raises(core.MpiError, match=words):
        channel.send(7, [(data.ctypes.data, (10,))], SOON)
    progress.close()


def test_a_failure_on_the_progress_thread_reaches_the_main_thread() -> None:
    """The ends disagree about the capacity: MPI cuts the message and says so, whoever polls."""
    progress = core.Progress(comm)
    data = np.zeros(1000, np.uint8)
    if comm.rank == 0:
        channel = core.SendChannel(progress, 1, 0, [part("uint8", (1000,))])
        channel.send(0, [(data.ctypes.data, data.shape)], SOON)
        comm.Barrier()
    else:
        channel = core.ReceiveChannel(progress, 0, 0, [part("uint8", (500,))], 2)
        time.sleep(0.5)  # the progress thread meets the failure
        with pytest.raises(core.MpiError, match=r"rank 1: MPI_Irecv failed for the test's bytes from rank 0.*TRUNCATE"):
            channel.receive(0, SOON)
        comm.Barrier()
    progress.close()


def test_ctrl_c_ends_a_wait(progress: Any) -> None:
    pair = Pair(progress, 10)
    if comm.rank == 1:
        threading.Timer(0.3, signal.raise_signal, (signal.SIGINT,)).start()
        with pytest.raises(KeyboardInterrupt):
            pair.inn.receive(0, SOON)
    comm.Barrier()
