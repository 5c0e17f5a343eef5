"""Threads: how many compute threads a rank runs, and on which cores."""

from __future__ import annotations

import os

import torch

from pipedream_hpc.cluster.cores import BIND, Cores, assign_cores, bind_process, numa_order
from pipedream_hpc.cluster.world import World, join


def core_count() -> int:
    """Return the number of cores that the ranks of this node may use in total.

    It is counted from their cpusets, not from the machine: a container or a batch job seldom has all cores.
    """
    return join().node_cores


def threads_per_rank(ranks_on_node: int) -> int:
    """Return the compute threads of one rank: OMP_NUM_THREADS if it is set, else an even share of the cores."""
    # OMP_NUM_THREADS may be a list with one entry per level of nesting.
    setting = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if setting.isdecimal() and int(setting) > 0:
        return int(setting)
    return max(1, core_count() // max(1, ranks_on_node))


def bind_rank(world: World, ranks: int) -> Cores:
    """Set the number of this rank's compute threads, and bind them to cores of their own if there are enough.

    Args:
        world: the ranks of the job.
        ranks: ranks of the plan; all of them run in this process if it is the only one.

    Returns:
        The cores that the rank is bound to; empty if it is not bound.
    """
    # A node's cores are shared by the ranks on that node only.
    threads = threads_per_rank(world.local_size if world.size > 1 else ranks)
    torch.set_num_threads(threads)
    if world.size == 1 or os.environ.get(BIND) == "0":
        return Cores()
    cores = assign_cores(world.cpusets, world.cpuset_index, threads, numa_order())
    bind_process(cores)
    return cores


def oversubscribed(ranks_on_node: int) -> bool:
    """Return whether the compute threads of all ranks need more cores than the node has.

    A rank that waits for a message must then yield its core to ranks that compute.
    """
    return core_count() < ranks_on_node * threads_per_rank(ranks_on_node)
