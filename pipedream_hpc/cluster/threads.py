"""Threads: how many of them a rank may keep busy."""

from __future__ import annotations

import os

import torch

from pipedream_hpc.cluster.cores import BIND, Cores, hold, in_order, share
from pipedream_hpc.cluster.world import World, join


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


def take_cores(world: World, ranks_on_node: int) -> Cores:
    """Let this rank's compute threads be so many, on cores of its own where there are enough.

    Args:
        world: of the rank.
        ranks_on_node: among whom cores are shared out; more than the world's if one process has several.
    """
    threads = threads_per_rank(ranks_on_node)
    torch.set_num_threads(threads)
    if world.size == 1 or os.environ.get(BIND) == "0":
        return Cores()
    taken = share(world.cpusets, world.place, threads, in_order())
    hold(taken)
    return taken


def crowded(ranks_on_node: int) -> bool:
    """Whether the compute threads of all ranks want more cores than there are.

    A rank that waits for a message must then leave its core to those that compute.
    """
    return cores() < ranks_on_node * threads_per_rank(ranks_on_node)
