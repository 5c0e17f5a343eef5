"""Measure how much the progress thread slows down compute, with one core per rank and with a spare core.

    python benchmarks/progress.py
    python benchmarks/progress.py --plot progress.png

A fixed amount of work (small matrix products, one thread) is timed without a progress thread, with an idle one that
only polls posted receives, and with one that drives an exchange of 1 MiB every 20 ms. Ranks = cores: two ranks, each
with its progress thread on its only core. Ranks < cores: one rank, which sends to itself, with the progress thread on
the other core. The three cases take turns in one run; the table shows medians.

Expected: the cost of an idle thread is within the noise, and an exchange costs no more than copying its bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from launch import on_two_ranks
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

MODES = ("no thread", "idle", "exchanging")
NBYTES, EVERY_S, WORK_S = 1 << 20, 0.02, 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="turns of every mode")
    parser.add_argument("--plot", type=Path, help="write a figure")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        run(options.rounds)
        return
    command = [sys.executable, __file__, "--rank", "--rounds", str(options.rounds)]
    found = {"ranks = cores": on_two_ranks(command)[-1]}
    single = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, check=True)
    found["ranks < cores"] = json.loads(single.stdout.decode().splitlines()[-1])
    table = Table("", "thread", "work (ms)", "longer by", "polls per second", title="medians")
    for case, figures in found.items():
        base = statistics.median(figures["seconds"]["no thread"])
        for mode in MODES:
            median = statistics.median(figures["seconds"][mode])
            polls = f"{statistics.median(figures['polls'][mode]):.0f}" if mode in figures["polls"] else ""
            table.add_row(case, mode, f"{median * 1e3:.1f}", f"{median / base - 1:.2%}", polls)
    Console(width=100, highlight=False).print(table)
    if options.plot:
        draw(found, options.plot)


def run(rounds: int) -> None:
    """Run as one rank."""
    import torch
    from mpi4py import MPI

    from pipedream_hpc.core import load_comm

    comm, core = MPI.COMM_WORLD, load_comm()
    cores = sorted(os.sched_getaffinity(0))
    own = cores[comm.rank % len(cores)]
    os.sched_setaffinity(0, {own})
    # As in a Pipeline: the progress thread gets its own core where there is a spare one.
    others = [each for each in cores if each != own] if comm.size == 1 else []
    torch.set_num_threads(1)
    a, b, c = (torch.randn(256, 256) for _ in range(3))
    tensor = torch.ones(NBYTES, dtype=torch.uint8)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < WORK_S:
        torch.mm(a, b, out=c)
        count += 1
    count = comm.bcast(count)
    found: dict[str, dict[str, list[float]]] = {"seconds": defaultdict(list), "polls": defaultdict(list)}
    order = random.Random(0)
    for turn in range(rounds + 1):
        for mode in order.sample(MODES, len(MODES)):
            progress, polls = None, 0
            if mode != "no thread":
                progress = core.Progress(comm, cores=others, spare=bool(others))
                peer_rank = (comm.rank + 1) % comm.size
                specs = [("bytes", "uint8", 1, (NBYTES,))]
                receiver = core.RecvChannel(progress, peer_rank, 0, specs, 2)
                sender = core.SendChannel(progress, peer_rank, 0, specs)
                polls = progress.statistics()["polls_computing"]
            comm.Barrier()
            began, sent, last = time.perf_counter(), 0, 0.0
            for _ in range(count):
                torch.mm(a, b, out=c)
                if mode == "exchanging" and time.perf_counter() - began >= last + EVERY_S:
                    last += EVERY_S
                    if receiver.ready():
                        receiver.release(receiver.receive(_next(receiver), 60.0)[0])
                    if sender.in_flight < 2:
                        sender.send(sent, [(tensor.data_ptr(), None)], 60.0)
                        sent += 1
            seconds = time.perf_counter() - began
            if progress is not None:
                polls = progress.statistics()["polls_computing"] - polls
                # All messages arrive before any rank closes.
                for _ in range(comm.sendrecv(sent, peer_rank, source=peer_rank) - receiver.messages):
                    receiver.release(receiver.receive(_next(receiver), 60.0)[0])
                sender.drain(60.0)
                comm.Barrier()
                progress.close()
            slowest = max(comm.allgather(seconds))
            if turn:
                found["seconds"][mode].append(slowest)
                if progress is not None:
                    found["polls"][mode].append(polls / seconds)
    if comm.rank == 0:
        print(json.dumps(found), flush=True)


def _next(receiver: Any) -> int:
    return int(receiver.messages)


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw the relative time of the work."""
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    for axes, (case, figures) in zip(figure.subplots(1, len(found)), found.items(), strict=True):
        base = statistics.median(figures["seconds"]["no thread"])
        axes.barh(MODES, [statistics.median(figures["seconds"][mode]) / base for mode in MODES], color="tab:blue")
        axes.set(title=case, xlabel="relative time of the work", xlim=(0.95, None))
        axes.invert_yaxis()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
