"""Cores: which ones a rank's compute threads and its progress thread run on.

::

    node of 2 NUMA domains     0 1 2 3 4 5 6 7 │ 8 9 10 11 12 13 14 15      every rank may use all of them
    4 ranks                    c c c c c c c c │ c c c  c  c  c  c  c       even shares, in NUMA order
                               └ rank 0 ─┘ ... │          └ rank 3 ─┘
    4 ranks, OMP_NUM_THREADS=3 c c c p c c c p │ c c c  p  c  c  c  p       c: compute, p: progress thread

Ranks divide the cores of their cpusets; a rank that its launcher has bound keeps its cores. No rank is bound where
ranks outnumber cores, or where the launcher has given them overlapping cpusets. A progress thread without a dedicated
core may run on all cores of its rank's original cpuset: it is awake for microseconds at a time.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

#: Environment variable; 0 disables binding.
BIND = "PIPEDREAM_BIND"
_SYSTEM = Path("/sys/devices/system")


@dataclass(frozen=True)
class Cores:
    """Core numbers that one rank runs on.

    Attributes:
        compute: cores of its compute threads, and of all threads and processes it starts; empty: not bound.
        progress: cores of its progress thread; empty: not bound.
    """

    compute: frozenset[int] = frozenset()
    progress: frozenset[int] = frozenset()

    @property
    def progress_is_dedicated(self) -> bool:
        """Whether the progress thread shares no core with compute threads."""
        return bool(self.progress) and self.progress.isdisjoint(self.compute)


def assign_cores(
    cpusets: Sequence[frozenset[int]], index: int, threads: int, order: Sequence[int] | None = None
) -> Cores:
    """Return the cores of one rank of a node.

    Args:
        cpusets: cpusets of all ranks of the node.
        index: the rank's index in `cpusets`.
        threads: compute threads per rank.
        order: all cores of the node, sorted by NUMA domain; default: by number.
    """
    own, others = cpusets[index], [each for other, each in enumerate(cpusets) if other != index]
    if all(own.isdisjoint(each) for each in others):
        assigned = own
    elif all(own == each for each in others) and len(own) >= len(cpusets):
        ordered = [core for core in order or sorted(own) if core in own]
        begin, end = (len(ordered) * each // len(cpusets) for each in (index, index + 1))
        assigned = frozenset(ordered[begin:end])
    else:
        return Cores()
    if len(assigned) <= threads:
        return Cores(assigned, own)
    last = [core for core in order or sorted(assigned) if core in assigned][-1]
    return Cores(assigned - {last}, frozenset({last}))


def numa_order(system: Path = _SYSTEM) -> list[int] | None:
    """Return all cores of this node sorted by NUMA domain, with the hardware threads of a core next to each other.

    Returns None where the kernel does not provide the topology.
    """
    try:
        domains = sorted(system.glob("node/node[0-9]*"), key=lambda path: int(path.name.removeprefix("node")))
        cores = []
        for domain in domains:
            own = parse_cpu_list((domain / "cpulist").read_text())
            cores += sorted(own, key=lambda core: (_first_sibling(system, core), core))
        return cores or None
    except (OSError, ValueError):
        return None


def parse_cpu_list(text: str) -> list[int]:
    """Return the numbers of a list in the kernel's format, such as `0-3,8`."""
    numbers: list[int] = []
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            numbers.extend(range(int(first), int(last or first) + 1))
    return numbers


def _first_sibling(system: Path, core: int) -> int:
    """Return the lowest number of the hardware threads that share a physical core with `core`."""
    return min(parse_cpu_list((system / f"cpu/cpu{core}/topology/thread_siblings_list").read_text()))


def bind_process(cores: Cores) -> None:
    """Bind all existing threads of this process, such as torch's, and all that it will start, to `cores.compute`."""
    if not cores.compute:
        return
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):  # the thread has ended in the meantime
            os.sched_setaffinity(int(task), cores.compute)
