"""Cores: which ones a rank computes on, and which its progress thread.

::

    node of 2 NUMA domains     0 1 2 3 4 5 6 7 │ 8 9 10 11 12 13 14 15      every rank may use all of them
    4 ranks                    c c c c c c c c │ c c c  c  c  c  c  c       even shares, in the order of the domains
                               └ rank 0 ─┘ ... │          └ rank 3 ─┘
    4 ranks, OMP_NUM_THREADS=3 c c c p c c c p │ c c c  p  c  c  c  p       c: computes, p: the progress thread

The cores are those of the ranks' cpusets, and one that its launcher has bound keeps what it has. Where ranks
outnumber cores, or a launcher has given them overlapping cpusets, nobody is bound. A progress thread without a
core of its own runs wherever its rank was allowed to run at first: it is awake for microseconds at a time.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

#: Set to 0, nobody is bound.
BIND = "PIPEDREAM_BIND"
_SYSTEM = Path("/sys/devices/system")


@dataclass(frozen=True)
class Cores:
    """What one rank runs on, by numbers of cores.

    Attributes:
        compute: of its compute threads, and of whatever it starts; empty to leave them where they are.
        progress: of its progress thread; empty likewise.
    """

    compute: frozenset[int] = frozenset()
    progress: frozenset[int] = frozenset()

    @property
    def spare(self) -> bool:
        """Whether nobody computes where the progress thread runs."""
        return bool(self.progress) and self.progress.isdisjoint(self.compute)


def share(cpusets: Sequence[frozenset[int]], place: int, threads: int, order: Sequence[int] | None = None) -> Cores:
    """The cores of one rank of a node.

    Args:
        cpusets: of all its ranks.
        place: of the rank among them.
        threads: compute threads of a rank.
        order: of the node's cores, those of a NUMA domain beside each other; by default in that of their numbers.
    """
    own, others = cpusets[place], [each for index, each in enumerate(cpusets) if index != place]
    if all(own.isdisjoint(each) for each in others):
        held = own
    elif all(own == each for each in others) and len(own) >= len(cpusets):
        ordered = [core for core in order or sorted(own) if core in own]
        begin, end = (len(ordered) * index // len(cpusets) for index in (place, place + 1))
        held = frozenset(ordered[begin:end])
    else:
        return Cores()
    if len(held) <= threads:
        return Cores(held, own)
    last = [core for core in order or sorted(held) if core in held][-1]
    return Cores(held - {last}, frozenset({last}))


def in_order(system: Path = _SYSTEM) -> list[int] | None:
    """All cores of this node, NUMA domain by domain, and in each the threads of a core beside each other.

    None where the kernel does not say.
    """
    try:
        domains = sorted(system.glob("node/node[0-9]*"), key=lambda path: int(path.name.removeprefix("node")))
        found = []
        for domain in domains:
            own = numbers((domain / "cpulist").read_text())
            found += sorted(own, key=lambda core: (_siblings(system, core), core))
        return found or None
    except (OSError, ValueError):
        return None


def numbers(text: str) -> list[int]:
    """Of a list in the kernel's words, such as `0-3,8`."""
    found: list[int] = []
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            found.extend(range(int(first), int(last or first) + 1))
    return found


def _siblings(system: Path, core: int) -> int:
    """The first of those that are threads of the same core."""
    return min(numbers((system / f"cpu/cpu{core}/topology/thread_siblings_list").read_text()))


def hold(cores: Cores) -> None:
    """Bind this process to its cores: all threads that it has, such as torch's, and all that it will start."""
    if not cores.compute:
        return
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            os.sched_setaffinity(int(task), cores.compute)
