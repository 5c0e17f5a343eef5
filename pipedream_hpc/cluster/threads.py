"""Threads: how many of them a rank may keep busy."""

from __future__ import annotations

import os


def cores() -> int:
    """Cores this process may use: its cpuset, not the machine."""
    return len(os.sched_getaffinity(0))


def threads_per_rank(ranks_on_node: int) -> int:
    """Compute threads of one rank: OMP_NUM_THREADS if it is set, else an even share of the cores."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, int(given)) if given.isdecimal() else max(1, cores() // ranks_on_node)


def spare_core(ranks_on_node: int) -> bool:
    """Whether the progress thread of a rank has a core that no compute thread needs."""
    return cores() >= ranks_on_node * (threads_per_rank(ranks_on_node) + 1)
