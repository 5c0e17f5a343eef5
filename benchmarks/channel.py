"""The core's channel beside plain MPI, and how much of a transfer hides behind compute.

    mpirun -n 2 --bind-to none python benchmarks/channel.py

Ping-pong between two ranks through the core (header checks included) and through mpi4py's Send and
Recv, taking turns in one run; medians. Then 64 MiB each way behind 200 ms of compute, with the core
and with raw Isend, compute, Wait.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
from mpi4py import MPI
from rich.console import Console
from rich.table import Table

from pipedream_hpc.core import load_core

core, comm = load_core(), MPI.COMM_WORLD
LIMIT_S, COMPUTE_S, LARGE = 60.0, 0.2, 64 << 20
TURNS = 10


def main() -> None:
    if comm.size != 2:
        sys.exit("start it on two ranks: mpirun -n 2 python benchmarks/channel.py")
    # Plain MPI first, as long as no thread of ours lends it a hand.
    alone = statistics.median(raw(lambda: None) for _ in range(3))
    plain = statistics.median(raw(compute) for _ in range(5))
    progress = core.Progress(comm)
    latency = Table("payload", "core (µs)", "plain MPI (µs)", "ratio", title="one way, median")
    for tag, size in enumerate((64, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 64 << 20)):
        ours, theirs = ping_pong(progress, tag, size, repeats=max(3, min(200, (64 << 20) // size)))
        latency.add_row(f"{size:,}", f"{ours * 1e6:.1f}", f"{theirs * 1e6:.1f}", f"{ours / theirs:.2f}")
    hidden = Table("how", "both ranks done after (ms)", "hidden", title="64 MiB each way behind 200 ms of compute")
    own = statistics.median(overlapped(progress, 100) for _ in range(5))
    for name, took in (("core", own), ("raw Isend, compute, Wait", plain)):
        share = max(0.0, min(1.0, 1 - (took - COMPUTE_S) / alone))
        hidden.add_row(name, f"{took * 1e3:.1f}", f"{share:.0%}")
    if comm.rank == 0:
        console = Console(width=100, highlight=False, force_terminal=False)
        console.print(latency, hidden, f"the transfer alone: {alone * 1e3:.1f} ms; {progress.statistics()}")
    progress.close()


def ping_pong(progress: object, tag: int, size: int, repeats: int) -> tuple[float, float]:
    """Median one-way seconds through the core and through plain MPI, in turns."""
    peer = 1 - comm.rank
    out = core.SendChannel(progress, peer, 2 * tag + comm.rank, size, "ping")
    inn = core.ReceiveChannel(progress, peer, 2 * tag + peer, size, 2, "uint8", (size,), "pong")
    data, landing = np.ones(size, np.uint8), np.empty(size, np.uint8)
    minibatch = 0

    def through_core() -> None:
        nonlocal minibatch
        for turn in (0, 1):
            if turn == comm.rank:
                out.send(minibatch, data.ctypes.data, size, "uint8", (size,), LIMIT_S)
            else:
                inn.release(inn.receive(minibatch, LIMIT_S)[0])
        minibatch += 1

    def through_mpi() -> None:
        for turn in (0, 1):
            if turn == comm.rank:
                comm.Send(data, peer)
            else:
                comm.Recv(landing, peer)

    times: dict[Callable[[], None], list[float]] = {through_core: [], through_mpi: []}
    for _ in range(TURNS):
        for way, samples in times.items():
            comm.Barrier()
            for _ in range(repeats):
                began = time.perf_counter()
                way()
                samples.append((time.perf_counter() - began) / 2)
    out.drain(LIMIT_S)
    comm.Barrier()
    ours, theirs = (statistics.median(samples) for samples in times.values())
    return ours, theirs


def compute() -> None:
    matrix = np.ones((200, 200))
    until = time.perf_counter() + COMPUTE_S
    while time.perf_counter() < until:
        matrix @ matrix


_channels: dict[int, tuple[object, object, np.ndarray]] = {}


def overlapped(progress: object, tag: int) -> float:
    """Seconds until both ranks have computed, sent and received, with the core."""
    peer = 1 - comm.rank
    if tag not in _channels:
        out = core.SendChannel(progress, peer, tag + comm.rank, LARGE, "large")
        inn = core.ReceiveChannel(progress, peer, tag + peer, LARGE, 2, "uint8", (LARGE,), "large")
        _channels[tag] = out, inn, np.ones(LARGE, np.uint8)
    out, inn, data = _channels[tag]
    comm.Barrier()
    began = time.perf_counter()
    out.send(0, data.ctypes.data, LARGE, "uint8", (LARGE,), LIMIT_S)
    compute()
    slot, _ = inn.receive(0, LIMIT_S)
    out.drain(LIMIT_S)
    comm.Barrier()
    took = time.perf_counter() - began
    inn.release(slot)
    return took


def raw(work: Callable[[], None]) -> float:
    """The same with plain non-blocking MPI."""
    peer = 1 - comm.rank
    data, landing = np.ones(LARGE, np.uint8), np.empty(LARGE, np.uint8)
    comm.Barrier()
    began = time.perf_counter()
    requests = [comm.Irecv(landing, peer), comm.Isend(data, peer)]
    work()
    MPI.Request.Waitall(requests)
    comm.Barrier()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
