"""Threads: how many of them a rank may keep busy."""

from __future__ import annotations

import os

from pipedream_hpc.cluster.world import join


def cores() -> int:
    """Cores that the ranks of this node may use between them.

    Counted from their cpusets, not from the machine: a container or a batch job seldom has all of it.
    """
    return join().node_cores


def threads_per_rank(ranks_on_node: int) -> int:
    """Compute threads of one rank: OMP_NUM_THREADS if it is set, else an even share of the cores."""
    # OMP_NUM_THREADS may be a list, one entry per level of nesting.
    given = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if given.isdecimal() and int(given) > 0:
        return int(given)
    return max(1, cores() // max(1, ranks_on_node))


def crowded(ranks_on_node: int) -> bool:
    """Whether the compute threads of all ranks want more cores than there are.

    A rank that waits for a message must then leave its core to those that compute.
    """
    return cores() < ranks_on_node * threads_per_rank(ranks_on_node)
