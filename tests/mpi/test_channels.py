"""Channels between two ranks: messages arrive unchanged, in order, checked and within bounds."""

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

from pipedream_hpc.core import load_comm
from pipedream_hpc.runtime.comm.channels import MpiRecvChannel, MpiSendChannel, TensorMeta

RANKS = (2,)  # tests/test_on_ranks.py starts this file on as many ranks

core = load_comm()
comm = MPI.COMM_WORLD
SOON = 20.0


@pytest.fixture(scope="module")
def progress() -> Any:
    engine = core.Progress(comm)
    yield engine
    engine.close()


def spec(dtype: str, shape: Any) -> tuple[str, str, int, Any]:
    # One byte per element, whatever the dtype: only sizes and names are compared.
    return "the test's bytes", dtype, 1, shape


class Pair:
    """A channel from rank 0 to rank 1; both ranks create it."""

    tags = iter(range(1000))

    def __init__(
        self, progress: Any, capacity: int, slots: int = 2, dtype: str = "uint8", shape: Any = None, sends: Any = None
    ) -> None:
        tag, shape = next(self.tags), shape or (capacity,)
        if comm.rank == 0:
            self.sender = core.SendChannel(progress, 1, tag, [spec(*(sends or (dtype, shape)))])
        else:
            self.receiver = core.RecvChannel(progress, 0, tag, [spec(dtype, shape)], slots)
            self.shape = shape
        comm.Barrier()

    def send(self, microbatch: int, data: np.ndarray, shape: Any = None) -> None:
        self.sender.send(microbatch, [(data.ctypes.data, shape or data.shape)], SOON)

    def receive(self, microbatch: int) -> tuple[int, np.ndarray]:
        slot, smaller = self.receiver.receive(microbatch, SOON)
        (offset, shape), *_ = smaller or [(0, self.shape)]
        assert offset == 0
        return slot, np.frombuffer(self.receiver.slot(slot), np.uint8)[: int(np.prod(shape))]


def pattern(seed: int, size: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def test_two_ranks_really_run() -> None:
    assert comm.size == 2


@pytest.mark.parametrize("capacity", [1, 100, 16 * 1024, 16 * 1024 + 1, 100_000, 3 << 20])
def test_random_sizes_with_guard_bytes(progress: Any, capacity: int) -> None:
    """Small and large messages, slots released in any order, nothing written beyond a payload."""
    pair, draw = Pair(progress, capacity, slots=3), random.Random(capacity)
    sizes = [draw.randint(1, capacity) for _ in range(25)]
    if comm.rank == 0:
        sent = []
        for microbatch, size in enumerate(sizes):
            sent.append(pattern(microbatch, size))
            pair.send(microbatch, sent[-1])
        pair.sender.drain(SOON)
        assert pair.sender.messages == 25
        assert pair.sender.payload_bytes == sum(sizes)
    else:
        held: list[int] = []
        for microbatch, size in enumerate(sizes):
            if len(held) == 2 or (held and draw.random() < 0.5):
                pair.receiver.release(held.pop(draw.randrange(len(held))))
            slot, data = pair.receive(microbatch)
            whole = np.frombuffer(pair.receiver.slot(slot), np.uint8)
            assert np.array_equal(data, pattern(microbatch, size))
            assert len(whole) == capacity
            held.append(slot)
    comm.Barrier()


def test_tensors_outlive_their_send_channel(progress: Any) -> None:
    """The channel is dropped before anybody receives; the tensor's memory is not reused until MPI has read it."""
    count, tag = 4 << 20, next(Pair.tags)
    meta = TensorMeta("fc", 0, (count,), torch.float32)
    if comm.rank == 0:
        channel = MpiSendChannel(progress, 1, tag, [meta], "activation", SOON)
        channel.send(0, [torch.full((count,), 3.0)])
        del channel
        others = [torch.full((count,), 5.0) for _ in range(3)]
        comm.Barrier()
        comm.Barrier()
        assert all((other == 5).all() for other in others)
    else:
        comm.Barrier()
        channel = MpiRecvChannel(progress, 0, tag, [meta], "activation", 1, SOON)
        (arrived,) = channel.receive(0)
        assert (arrived == 3).all()
        channel.release(0)
        comm.Barrier()


@pytest.mark.parametrize("capacity", [64, 1 << 20])
def test_a_smaller_message_leaves_the_rest_of_its_slot_alone(progress: Any, capacity: int) -> None:
    pair = Pair(progress, capacity, slots=1)
    if comm.rank == 0:
        sent = [np.full(capacity, 7, np.uint8), np.full(capacity // 2, 9, np.uint8)]  # alive until drained
        for microbatch, data in enumerate(sent):
            pair.send(microbatch, data)
        pair.sender.drain(SOON)
    else:
        slot, _ = pair.receive(0)
        pair.receiver.release(slot)
        slot, data = pair.receive(1)
        whole = np.frombuffer(pair.receiver.slot(slot), np.uint8)
        assert (data == 9).all()
        assert (whole[capacity // 2 :] == 7).all()
    comm.Barrier()


def test_the_third_send_waits_for_the_first(progress: Any) -> None:
    """Back-pressure: with every slot taken, two sends are in progress and the third does not return."""
    size = 8 << 20  # more than MPI buffers by itself
    pair = Pair(progress, size, slots=1)
    if comm.rank == 0:
        data = [pattern(k, size) for k in range(4)]
        for microbatch in range(3):
            pair.send(microbatch, data[microbatch])
        began = time.monotonic()
        pair.send(3, data[3])
        waited = time.monotonic() - began
        pair.sender.drain(SOON)
        assert pair.sender.in_flight == 0
        slept = comm.recv(source=1)
        assert waited > slept / 2, "it returned before the receiver had received anything"
    else:
        slot, _ = pair.receive(0)  # takes the only slot; microbatch 1 cannot arrive
        time.sleep(0.5)
        for microbatch in (1, 2, 3):
            pair.receiver.release(slot)
            slot, data = pair.receive(microbatch)
            assert np.array_equal(data, pattern(microbatch, size))
        comm.send(0.5, dest=0)
    comm.Barrier()


def test_receive_lands_in_persistent_slots_and_allocates_nothing(progress: Any) -> None:
    pair = Pair(progress, 1 << 16, slots=2)
    before = core.allocations()
    addresses = set()
    data = pattern(0, 1 << 16)
    for microbatch in range(20):
        if comm.rank == 0:
            pair.send(microbatch, data)
        else:
            slot, _ = pair.receive(microbatch)
            addresses.add(pair.receiver.slot(slot).address)
            pair.receiver.release(slot)
    if comm.rank == 0:
        pair.sender.drain(SOON)
    else:
        assert len(addresses) == 2
    assert core.allocations() == before
    comm.Barrier()


EXPECTED = r"expected float32 \[4, 3\] \(or smaller\) but got "
FAULTS = {
    "minibatch": ((5, "float32", (2, 3)), r"expected microbatch 4 of the run but got microbatch 5 of the run: "),
    "dtype": ((4, "float64", (2, 3)), EXPECTED + r"float64 \[2, 3\] for microbatch 4 of the run: the test's bytes"),
    "width": ((4, "float32", (2, 4)), EXPECTED + r"float32 \[2, 4\]"),
    "samples": ((4, "float32", (5, 1)), EXPECTED + r"float32 \[5, 1\]"),
    "dimensions": ((4, "float32", (6,)), EXPECTED + r"float32 \[6\]"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_message_unlike_the_plan_is_refused_on_arrival(progress: Any, fault: str) -> None:
    (microbatch, dtype, shape), expected = FAULTS[fault]
    pair = Pair(progress, 64, dtype="float32", shape=(4, 3), sends=(dtype, shape))
    if comm.rank == 0:
        pair.send(microbatch, np.zeros(24, np.uint8), shape)
        pair.sender.drain(SOON)
    else:
        with pytest.raises(core.MessageError, match=expected):
            pair.receiver.receive(4, SOON)
    comm.Barrier()


def test_a_message_beyond_the_capacity_never_leaves(progress: Any) -> None:
    pair = Pair(progress, 10)
    if comm.rank == 0:
        with pytest.raises(core.MessageError, match=r"microbatch 3 of the run is uint8 \[11\], .* planned for 10"):
            pair.send(3, np.zeros(11, np.uint8))
    comm.Barrier()


def test_a_stalled_receive_names_message_and_peer(progress: Any) -> None:
    pair = Pair(progress, 10)
    if comm.rank == 0:
        pair.send(0, np.zeros(10, np.uint8))
        comm.Barrier()
    else:
        pair.receive(0)
        sentence = (
            r"rank 1 has waited 0\.\d s for microbatch 1 of the run: the test's bytes from rank 0; "
            r"messages received so far: 1, the last was microbatch 0 of the run"
        )
        with pytest.raises(core.StallError, match=sentence):
            pair.receiver.receive(1, 0.3)
        comm.Barrier()


def test_ready_tells_without_waiting(progress: Any) -> None:
    pair = Pair(progress, 10)
    if comm.rank == 1:
        assert not pair.receiver.ready()
    comm.Barrier()
    if comm.rank == 0:
        pair.send(0, np.zeros(10, np.uint8))
        pair.sender.drain(SOON)
    else:
        deadline = time.monotonic() + SOON
        while not pair.receiver.ready() and time.monotonic() < deadline:
            time.sleep(0.001)
        assert pair.receiver.ready()
        pair.receive(0)
    comm.Barrier()


def test_a_transfer_progresses_during_compute(progress: Any) -> None:
    """A large message arrives while both main threads compute and never call MPI."""
    size = 32 << 20
    pair = Pair(progress, size)
    data = pattern(1, size)
    comm.Barrier()
    before = progress.statistics()["polls_computing"]
    if comm.rank == 0:
        pair.send(0, data)
    time.sleep(1.0)
    if comm.rank == 1:
        assert pair.receiver.ready()
        _, arrived = pair.receive(0)
        assert np.array_equal(arrived, data)
    else:
        pair.sender.drain(SOON)
    assert progress.statistics()["polls_computing"] > before
    comm.Barrier()


def test_a_progress_thread_that_shares_its_core_with_compute_polls_rarely() -> None:
    """While the main thread computes: at most every 20 ms, on its own core every 4 ms, two polls each time."""
    fewest, most = {}, {}
    for spare in (False, True):
        thread = core.Progress(comm, cores=sorted(os.sched_getaffinity(0)), spare=spare)
        pair = Pair(thread, 8)  # a receive to poll
        time.sleep(0.5)
        per_second = []
        for _ in range(4):  # whatever else runs on this machine disturbs some of them
            before, began = thread.statistics()["polls_computing"], time.monotonic()
            time.sleep(0.5)
            polls = thread.statistics()["polls_computing"] - before
            per_second.append(polls / (time.monotonic() - began))
        fewest[spare], most[spare] = min(per_second), max(per_second)
        comm.Barrier()
        del pair
        thread.close()
    # 100 are meant. A poll that took long looks like one that moved data, and is followed by quick ones for a while.
    assert fewest[False] <= 500
    assert most[False] > 0
    assert most[True] > fewest[False]


def test_several_tensors_are_one_message(progress: Any) -> None:
    """In every other message the second tensor is smaller than planned and the last has no elements."""
    specs = [("a", "int8", 1, (7,)), ("b", "float32", 4, (5, 30)), ("c", "uint8", 1, (2000,))]
    assert core.tensor_offsets(specs) == [0, 64, 64 + 640]
    tag = next(Pair.tags)
    sender = core.SendChannel(progress, 1, tag, specs) if comm.rank == 0 else None
    receiver = core.RecvChannel(progress, 0, tag, specs, 2) if comm.rank == 1 else None
    for microbatch in range(6):
        rows, rest = (5, 2000) if microbatch % 2 else (3, 0)
        a, b, c = pattern(1, 7), pattern(2, rows * 120), pattern(3, rest)
        if sender is not None:
            sent = [(a.ctypes.data, (7,)), (b.ctypes.data, (rows, 30)), (c.ctypes.data, (rest,))]
            sender.send(microbatch, sent, SOON)
            sender.drain(SOON)  # before the arrays are freed
            assert sender.messages == microbatch + 1
        if receiver is not None:
            slot, smaller = receiver.receive(microbatch, SOON)
            assert (smaller is None) == (rows == 5)
            assert not smaller or [shape for _, shape in smaller] == [(7,), (3, 30), (0,)]
            offsets = core.tensor_offsets(specs) if smaller is None else [offset for offset, _ in smaller]
            whole = np.frombuffer(receiver.slot(slot), np.uint8)
            for offset, expected in zip(offsets, (a, b, c), strict=True):
                assert np.array_equal(whole[offset : offset + expected.size], expected)
            receiver.release(slot)
    comm.Barrier()


def test_slots_run_out(progress: Any) -> None:
    pair = Pair(progress, 10, slots=1)
    if comm.rank == 0:
        pair.send(0, np.zeros(10, np.uint8))
        pair.sender.drain(SOON)
    else:
        slot, _ = pair.receive(0)
        with pytest.raises(core.MessageError, match="all 1 slots are in use, so microbatch 1 of the run has none"):
            pair.receiver.receive(1, SOON)
        pair.receiver.release(slot)
        with pytest.raises(RuntimeError, match="slot 0 is not in use"):
            pair.receiver.release(slot)
    comm.Barrier()


def test_a_failed_call_names_rank_call_peer_and_microbatch() -> None:
    progress = core.Progress(comm)
    channel = core.SendChannel(progress, 99, 0, [spec("uint8", (1 << 20,))])
    sentence = rf"rank {comm.rank}: MPI_Isend failed for the test's bytes, microbatch 7 of the run, .*99: MPI_ERR_RANK"
    data = np.zeros(10, np.uint8)
    with pytest.raises(core.MpiError, match=sentence):
        channel.send(7, [(data.ctypes.data, (10,))], SOON)
    progress.close()


def test_a_failure_on_the_progress_thread_reaches_the_main_thread() -> None:
    """The two ends have different capacities: MPI truncates the message, and the receiver learns of it."""
    progress = core.Progress(comm)
    data = np.zeros(1000, np.uint8)
    if comm.rank == 0:
        channel = core.SendChannel(progress, 1, 0, [spec("uint8", (1000,))])
        channel.send(0, [(data.ctypes.data, data.shape)], SOON)
        comm.Barrier()
    else:
        channel = core.RecvChannel(progress, 0, 0, [spec("uint8", (500,))], 2)
        time.sleep(0.5)  # the progress thread sees the failure
        with pytest.raises(core.MpiError, match=r"rank 1: MPI_Irecv failed for the test's bytes from rank 0.*TRUNCATE"):
            channel.receive(0, SOON)
        comm.Barrier()
    progress.close()


def test_ctrl_c_ends_a_wait(progress: Any) -> None:
    pair = Pair(progress, 10)
    if comm.rank == 1:
        threading.Timer(0.3, signal.raise_signal, (signal.SIGINT,)).start()
        with pytest.raises(KeyboardInterrupt):
            pair.receiver.receive(0, SOON)
    comm.Barrier()
