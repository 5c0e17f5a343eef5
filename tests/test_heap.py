"""Memory of freed tensors stays with a process that trains on a CPU."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest

pytestmark = pytest.mark.alone

#: Turns until glibc uses what it keeps; pipedream_hpc.cluster.heap says why not at once. A turn that needs fresh memory
#: puts a clipping into the tcache, which takes 7 of each size, and clippings have 5 sizes (32 to 96 bytes). At most 10
#: such turns were seen.
SETTLING = 35
COUNTED = 5

#: Frees and asks for two tensors of 40 MiB again and again, like activations, and for 40 MiB that are not aligned: only
#: those end where the heap ends, where glibc trims. Prints the most pages that a turn gave back to the system, and the
#: page faults of the last turns together.
PROGRAM = f"""
import ctypes, resource, torch
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # no huge pages, wherever they would be given: faults are counted
from pipedream_hpc.cluster.heap import keep_freed_memory
kept = keep_freed_memory() if {{keep}} else False

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])

given_back, faults = [], []
for _ in range({{turns}}):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.ones(10 << 20) for _ in range(2)] + [bytearray(40 << 20)]
    there = resident()
    del held
    given_back.append(there - resident())
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(int(kept), max(given_back), sum(faults[-{COUNTED}:]))
"""

PAGES = 3 * (40 << 20) // resource.getpagesize()


def run(keep: bool, turns: int, **environment: str) -> tuple[bool, int, int]:
    """(whether glibc was told, most pages given back in a turn, page faults of the last turns), in its own process."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(keep=keep, turns=turns)],
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    kept, given_back, faults = done.stdout.split()
    return kept == "1", int(given_back), int(faults)


def test_freed_tensors_stay_and_are_not_faulted_in_again() -> None:
    told, given_back, faults = run(keep=True, turns=SETTLING + COUNTED)
    assert told
    assert given_back < PAGES / 100, "from the first turn on"
    assert faults < PAGES / 100
    _, given_back, faults = run(keep=False, turns=COUNTED)
    assert given_back > PAGES / 2, "without it they are given back, or this test shows nothing"
    assert faults > COUNTED * PAGES / 2, "and faulted in again"


@pytest.mark.parametrize(
    "setting", [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}]
)
def test_what_the_environment_says_of_the_heap_stays(setting: dict[str, str]) -> None:
    told, _, _ = run(keep=True, turns=1, **setting)
    assert not told
