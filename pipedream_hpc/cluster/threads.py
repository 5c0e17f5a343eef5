"""Threads: how many of them a rank may keep busy."""

from __future__ import annotations

import os

import torch

from pipedream_hpc.cluster.cores import BIND, Cores, hold, in_order, share
from pipedream_hpc.cluster.world import World, join


def core_count() -> int:
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
    return max(1, core_count() // max(1, ranks_on_node))


def take_cores(world: World, ranks: int) -> Cores:
    """Let this rank's compute threads be so many, on cores of its own where there are enough.

    Args:
        world: of the rank.
        ranks: of the plan, which are all in this process if it is the only one.
    """
    # A node's cores are for the ranks on it, however many others there are elsewhere.
    threads = threads_per_rank(world.local_size if world.size > 1 else ranks)
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
    return core_count() < ranks_on_node * threads_per_rank(ranks_on_node)
