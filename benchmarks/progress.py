"""What the progress thread takes from compute: when ranks have a core each, and when there are cores to spare.

    python benchmarks/progress.py
    python benchmarks/progress.py --plot progress.png

A fixed amount of work (small matrix products, one thread) without a progress thread, beside one that has nothing
but posted receives to look after, and beside one that drives an exchange of 1 MiB every 20 ms. Ranks = cores: two
ranks, each with its thread on its one core. Ranks < cores: one rank, which sends to itself, with the thread on the
other core. Ways take turns in one run; medians. What should come out: an idle thread costs nothing that can be
told from noise, and an exchange no more than copying its bytes does.
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

WAYS = ("no thread", "idle", "exchanging")
NBYTES, EVERY_S, WORK_S = 1 << 20, 0.02, 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="turns of every way")
    parser.add_argument("--plot", type=Path, help="write a picture")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        run(options.rounds)
        return
    mine = [sys.executable, __file__, "--rank", "--rounds", str(options.rounds)]
    found = {"ranks = cores": on_two_ranks(mine)[-1]}
    alone = subprocess.run(mine, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, check=True)
    found["ranks < cores"] = json.loads(alone.stdout.decode().splitlines()[-1])
    table = Table("", "thread", "work (ms)", "longer by", "polls per second", title="medians")
    for case, ways in found.items():
        base = statistics.median(ways["seconds"]["no thread"])
        for way in WAYS:
            median = statistics.median(ways["seconds"][way])
            polls = f"{statistics.median(ways['polls'][way]):.0f}" if way in ways["polls"] else ""
            table.add_row(case, way, f"{median * 1e3:.1f}", f"{median / base - 1:.2%}", polls)
    Console(width=100, highlight=False).print(table)
    if options.plot:
        draw(found, options.plot)


def run(rounds: int) -> None:
    """One rank."""
    import torch
    from mpi4py import MPI

    from pipedream_hpc.core import load_core

    comm, core = MPI.COMM_WORLD, load_core()
    cores = sorted(os.sched_getaffinity(0))
    own = cores[comm.rank % len(cores)]
    os.sched_setaffinity(0, {own})
    # As Pipeline shares them out: a core of the thread's own where there is one to spare.
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
        for way in order.sample(WAYS, len(WAYS)):
            progress, polls = None, 0
            if way != "no thread":
                progress = core.Progress(comm, cores=others, spare=bool(others))
                peer = (comm.rank + 1) % comm.size
                part = [("bytes", "uint8", 1, (NBYTES,))]
                receiver = core.ReceiveChannel(progress, peer, 0, part, 2)
                sender = core.SendChannel(progress, peer, 0, part)
                polls = progress.statistics()["polls_computing"]
            comm.Barrier()
            began, sent, last = time.perf_counter(), 0, 0.0
            for _ in range(count):
                torch.mm(a, b, out=c)
                if way == "exchanging" and time.perf_counter() - began >= last + EVERY_S:
                    last += EVERY_S
                    if receiver.ready():
                        receiver.release(receiver.receive(_next(receiver), 60.0)[0])
                    if sender.in_flight < 2:
                        sender.send(sent, [(tensor.data_ptr(), None)], 60.0)
                        sent += 1
            took = time.perf_counter() - began
            if progress is not None:
                polls = progress.statistics()["polls_computing"] - polls
                # Whatever is still under way arrives before anybody closes.
                for _ in range(comm.sendrecv(sent, peer, source=peer) - receiver.messages):
                    receiver.release(receiver.receive(_next(receiver), 60.0)[0])
                sender.drain(60.0)
                comm.Barrier()
                progress.close()
            slowest = max(comm.allgather(took))
            if turn:
                found["seconds"][way].append(slowest)
                if progress is not None:
                    found["polls"][way].append(polls / took)
    if comm.rank == 0:
        print(json.dumps(found), flush=True)


def _next(receiver: Any) -> int:
    return int(receiver.messages)


def draw(found: dict[str, Any], path: Path) -> None:
    """How much longer the work takes."""
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    for axes, (case, ways) in zip(figure.subplots(1, len(found)), found.items(), strict=True):
        base = statistics.median(ways["seconds"]["no thread"])
        axes.barh(WAYS, [statistics.median(ways["seconds"][way]) / base for way in WAYS], color="tab:blue")
        axes.set(title=case, xlabel="time of the work", xlim=(0.95, None))
        axes.invert_yaxis()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
