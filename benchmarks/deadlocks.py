"""Search all small pipelines for deadlocks, and measure what the proof costs at a launch.

    python benchmarks/deadlocks.py            775 combinations x 1 to 60 minibatches (some minutes)
    python benchmarks/deadlocks.py --launch   seconds per rank of 1,024 ranks

The combinations are all pipelines of 2 to 4 stages with 1 to 5 replicas each, every send blocking. None may
deadlock; with the all-reduce before the upstream send, 221 do (an independent simulation found as many).
Exits with 1 if the counts differ.
"""

from __future__ import annotations

import sys
import time
from itertools import product
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipedream_hpc.schedule import registry
from pipedream_hpc.schedule.actions import ScheduleError
from pipedream_hpc.schedule.interleaved import folded
from pipedream_hpc.schedule.one_f_one_b import OneFOneB
from pipedream_hpc.schedule.verifier import verify, verify_around

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from schedules import ReduceFirst, layout

LENGTHS, EXPECTED = range(1, 61), 221


def stuck(schedule: OneFOneB) -> bool:
    """Return whether the ranks wait for each other for ever."""
    try:
        verify(schedule)
    except ScheduleError as error:
        if "deadlocks" not in str(error):
            raise
        return True
    return False


def combinations(console: Console) -> int:
    """Print, per number of stages, how many pipelines deadlock for some number of minibatches, and for 60."""
    table = Table("stages", "combinations", "runs", "1F1B: deadlocks", "all-reduce first: deadlock for some number",
                  "of these for 60 minibatches", "smallest number")  # fmt: skip
    right, wrong = 0, 0
    for stages in (2, 3, 4):
        members = [layout(*replicas) for replicas in product(range(1, 6), repeat=stages)]
        bad = sum(stuck(OneFOneB(each, length)) for each in members for length in LENGTHS)
        first = [next((n for n in LENGTHS if stuck(ReduceFirst(each, n))), None) for each in members]
        found = [length for length in first if length is not None]
        at_end = sum(stuck(ReduceFirst(each, LENGTHS[-1])) for each in members)
        table.add_row(str(stages), str(len(members)), str(len(members) * len(LENGTHS)), str(bad), str(len(found)),
                      str(at_end), str(min(found, default="-")))  # fmt: skip
        right, wrong = right + bad, wrong + at_end
    console.print(table)
    console.print(f"{right} deadlocks, allowed 0; {wrong} found with the all-reduce first, expected {EXPECTED}")
    return int(right != 0 or wrong != EXPECTED)


def launch(console: Console) -> int:
    """Print the seconds of `verify_around` on the slowest of the ranks at both ends and in the middle."""
    cases = [
        ("1f1b", (1,) * 1024, 1, 1),
        ("1f1b", (512, 512), 1, 1),
        ("1f1b", (1023, 1), 1, 1),
        ("1f1b", (900, 100, 24), 1, 1),
        ("1f1b", (8,) * 128, 1, 1),
        ("vertical-sync", (1,) * 1024, 1, 1),
        ("1f1b-flush", (8,) * 128, 512, 1),
        ("2bw", (8,) * 128, 1024, 1),
        ("interleaved", (64,) * 16, 1024, 4),
        ("data-parallel", (1024,), 1, 1),
    ]
    table = Table("schedule", "replicas x stages", "microbatches", "seconds")
    for name, replicas, n_microbatches, chunks in cases:
        members = layout(*replicas * chunks)
        if chunks > 1:
            members = folded(members, chunks)
        schedule = registry.make(name, members, 100_000, n_microbatches=n_microbatches)
        slowest_s = 0.0
        for rank in (0, 512, 1023):
            began = time.perf_counter()
            verify_around(schedule, rank)
            slowest_s = max(slowest_s, time.perf_counter() - began)
        shape = f"{replicas[0]} x {len(replicas)}" if len(set(replicas)) == 1 else "-".join(map(str, replicas))
        table.add_row(name, shape, "100,000", f"{slowest_s:.3f}")
    console.print(table)
    return 0


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--launch"]):
        sys.exit(__doc__)
    sys.exit((launch if sys.argv[1:] else combinations)(Console()))
