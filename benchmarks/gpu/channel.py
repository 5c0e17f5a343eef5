"""Channels between two ranks that share a GPU, or have one each: both routes, and what they hide.

    python benchmarks/gpu/channel.py                    direct (where MPI reaches device memory) and staged
    python benchmarks/gpu/channel.py --device cpu       the same program on host memory, to try it out

Starts two ranks itself. Bandwidth: ping-pong of tensors in device memory, every byte of the last one compared,
beside plain MPI_Send and MPI_Recv of the same memory where MPI reaches it. Overlap: each rank sends 64 MiB to the
other and multiplies matrices meanwhile; what that takes longer than when both multiply alone is not hidden. All
take turns; medians. (Two processes on one GPU take turns on it: small messages wait for theirs.)
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from launch import on_two_ranks

SIZES = (4 << 10, 256 << 10, 4 << 20, 64 << 20)
OVERLAPPED, COMPUTE_S = 64 << 20, 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write what was measured")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        run(options)
        return
    mine = [sys.executable, __file__, "--rank", "--device", options.device, "--rounds", str(options.rounds)]
    (found,) = on_two_ranks(mine)
    show(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


def run(options: argparse.Namespace) -> None:
    """One rank."""
    import torch
    from mpi4py import MPI

    from pipedream_hpc.core import load_comm
    from pipedream_hpc.runtime.comm.gpu_route import child_command, run_child
    from pipedream_hpc.runtime.comm.ping_pong import run_ping_pong

    comm, cuda = MPI.COMM_WORLD, options.device == "cuda"
    assert comm.size == 2
    index = comm.rank % torch.cuda.device_count() if cuda else -1
    device = torch.device("cuda", index) if cuda else torch.device("cpu")
    memory = "device" if cuda else "host"
    if cuda:
        torch.cuda.set_device(index)
    # As Pipeline does: first a child process, then these ranks.
    wrong = comm.bcast(run_child(child_command(memory, index)) if comm.rank == 0 else None)
    wrong = wrong or next(
        (each for each in comm.allgather(None if wrong else run_ping_pong(comm, memory, device=index)) if each), None
    )
    routes = {"direct": False, "staged": True} if wrong is None else {"staged": True}
    if not cuda:
        routes = {"direct": False}
    progress = load_comm().Progress(comm, device=index)
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(index) if cuda else "CPU",
        "mpi": MPI.Get_library_version().split(",")[0],
        "direct": wrong or "bit for bit",
        "bandwidth": {route: {size: [] for size in SIZES} for route in routes},
        "overlap": {route: [] for route in routes},
    }
    if "direct" in routes:
        found["bandwidth"]["plain MPI"] = {size: [] for size in SIZES}
    found["computing"] = []
    links = {
        (route, size): Link(progress, comm.rank, 10 * number + tag, size, memory, staged, device)
        for number, (route, staged) in enumerate(routes.items())
        for tag, size in enumerate(SIZES)
    }
    multiply = matrices(comm, device)
    for turn in range(options.rounds + 1):
        comm.Barrier()
        alone = seconds_of(multiply)
        if turn:
            found["computing"].append(max(comm.allgather(alone)))
        for size in SIZES if "direct" in routes else ():
            tensors = [torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2)]
            comm.Barrier()
            seconds = plain_ping_pong(comm, tensors, rounds_of(size))
            if turn:
                found["bandwidth"]["plain MPI"][size].append(size / seconds)
        for route in routes:
            for size in SIZES:
                comm.Barrier()
                seconds = links[route, size].ping_pong(rounds_of(size))
                if turn:
                    found["bandwidth"][route][size].append(size / seconds)
            comm.Barrier()
            both = links[route, OVERLAPPED].behind(multiply)
            if turn:
                found["overlap"][route].append(max(comm.allgather(both)))
    for link in links.values():
        assert link.right(), "bytes arrived wrong"
    comm.Barrier()
    progress.close()
    if comm.rank == 0:
        print(json.dumps(found), flush=True)


class Link:
    """A channel each way between the two ranks."""

    def __init__(self, progress: Any, rank: int, tag: int, nbytes: int, memory: str, staged: bool, device: Any) -> None:
        import torch

        from pipedream_hpc.core import load_comm
        from pipedream_hpc.runtime.comm.gpu_route import Route

        core, part = load_comm(), [("bytes", "uint8", 1, (nbytes,))]
        self._receiver = core.RecvChannel(progress, 1 - rank, tag, part, 2, memory, staged)
        self._sender = core.SendChannel(progress, 1 - rank, tag, part, memory, staged)
        self._stream = Route(device).stream
        self._rank, self._next, self._device = rank, 0, device
        self._tensor = torch.full((nbytes,), 1 + rank, dtype=torch.uint8, device=device)

    def _send(self) -> None:
        self._sender.send(self._next, [(self._tensor.data_ptr(), None)], 60.0, self._stream())

    def _receive(self) -> None:
        slot, _ = self._receiver.receive(self._next, 60.0)
        self._slot = slot
        self._receiver.release(slot, self._stream())
        self._next += 1

    def ping_pong(self, rounds: int) -> float:
        """Seconds for one way."""
        began = time.perf_counter()
        for _ in range(rounds):
            if self._rank == 0:
                self._send()
                self._receive()
            else:
                self._receive()
                self._next -= 1
                self._send()
                self._next += 1
        self._sender.drain(60.0)
        return (time.perf_counter() - began) / rounds / 2

    def behind(self, compute: Callable[[], None]) -> float:
        """Seconds for an exchange with `compute` between its beginning and its end."""
        began = time.perf_counter()
        self._send()
        compute()
        self._receive()
        self._sender.drain(60.0)
        return time.perf_counter() - began

    def right(self) -> bool:
        """Whether the last bytes are the other rank's."""
        from pipedream_hpc.runtime.comm.tensor_view import tensor_over

        view = self._receiver.slot(self._slot)
        there = tensor_over(view, self._tensor.shape, self._tensor.dtype, device=self._device)
        return bool((there == 2 - self._rank).all())


def rounds_of(size: int) -> int:
    """Of a ping-pong."""
    return max(4, min(200, (32 << 20) // size))


def plain_ping_pong(comm: Any, tensors: Sequence[Any], rounds: int) -> float:
    """Seconds for one way, without the core."""
    leaving, arriving = tensors
    began = time.perf_counter()
    for _ in range(rounds):
        if comm.rank == 0:
            comm.Send(leaving, 1)
            comm.Recv(arriving, 1)
        else:
            comm.Recv(arriving, 0)
            comm.Send(leaving, 0)
    return (time.perf_counter() - began) / rounds / 2


def matrices(comm: Any, device: Any) -> Callable[[], None]:
    """Work of about COMPUTE_S while both ranks are at it, after which the device is idle."""
    import torch

    width = 4096 if device.type == "cuda" else 512
    a, b, c = (torch.randn(width, width, device=device) for _ in range(3))

    def times(count: int) -> None:
        for _ in range(count):
            torch.mm(a, b, out=c)
        if device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    times(3)
    comm.Barrier()
    count = comm.bcast(max(1, int(COMPUTE_S / (seconds_of(lambda: times(10)) / 10))))
    return lambda: times(count)


def seconds_of(work: Callable[[], None]) -> float:
    """How long it takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def show(found: dict[str, Any]) -> None:
    """Tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=110, highlight=False)
    console.print(f"{found['device']}, {found['mpi']}; device memory given to MPI: {found['direct']}")
    table = Table("route", *(f"{size >> 10} KiB" for size in SIZES), title="GB/s and µs one way; medians")
    for route, by_size in found["bandwidth"].items():
        speeds = {int(size): statistics.median(each) for size, each in by_size.items()}
        table.add_row(route, *(f"{each / 1e9:.2f}  {size / each * 1e6:.0f}" for size, each in speeds.items()))
    console.print(table)
    computing = statistics.median(found["computing"])
    table = Table("64 MiB each way", "alone (ms)", "computing (ms)", "both (ms)", title="overlap; medians")
    for route, times in found["overlap"].items():
        alone = OVERLAPPED / statistics.median(found["bandwidth"][route][str(OVERLAPPED)])
        table.add_row(route, *(f"{each * 1e3:.1f}" for each in (alone, computing, statistics.median(times))))
    console.print(table)


if __name__ == "__main__":
    os.environ.setdefault("PIPEDREAM_SHARE_GPUS", "1")
    main()
