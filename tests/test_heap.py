"""Memory of freed tensors stays with a process that trains on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

#: Frees and asks for two tensors of 40 MiB again and again, like activations; prints page faults of the last turn.
PROGRAM = """
import ctypes, resource, torch
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # no huge pages, wherever they would be given: faults are counted
from pipedream_hpc.cluster.heap import keep_freed_memory
kept = keep_freed_memory() if {keep} else False
faults = []
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.ones(10 << 20) for _ in range(2)]
    del held
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(int(kept), faults[-1])
"""


def run(keep: bool, **environment: str) -> tuple[bool, int]:
    """(whether glibc was told, page faults of the last turn) of a process of its own."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(keep=keep)],
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    kept, faults = done.stdout.split()
    return kept == "1", int(faults)


def test_freed_tensors_are_not_faulted_in_again() -> None:
    pages = 2 * (40 << 20) // 4096
    told, faults = run(keep=True)
    assert told
    assert faults < pages / 100
    _, before = run(keep=False)
    assert before > pages / 2, "without it they are, or this test shows nothing"


@pytest.mark.parametrize(
    "setting", [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}]
)
def test_what_the_environment_says_of_the_heap_stays(setting: dict[str, str]) -> None:
    told, _ = run(keep=True, **setting)
    assert not told
