"""Probe: measure the links between the ranks."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from itertools import combinations

import numpy as np

from pipedream_hpc.cluster.world import World
from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.planning.topology import Level, Topology

#: Message sizes in bytes: from where latency is everything to where bandwidth is.
SIZES = (1 << 10, 1 << 14, 1 << 17, 1 << 20, 1 << 22)
#: Pairs of ranks to measure per level; links of one kind are much alike, the median is kept.
MOST_PAIRS = 16


def probe(world: World, *, repeats: int = 20) -> Topology:
    """Measure α and β of the links within nodes and between them. Collective; the same on all ranks.

    Args:
        repeats: round trips per pair and size; the median counts.

    Raises:
        PipedreamError: there are fewer than two ranks, or nodes have different numbers of them.
    """
    if world.comm is None or world.size < 2:
        raise PipedreamError("a link has two ends: start at least two ranks, such as `mpirun -n 4 pipedream probe`")
    hosts: list[str] = world.comm.allgather(world.host)
    nodes = {host: [rank for rank, name in enumerate(hosts) if name == host] for host in dict.fromkeys(hosts)}
    per_node = sorted({len(ranks) for ranks in nodes.values()})
    if len(per_node) > 1:
        counts = ", ".join(f"{host} has {len(ranks)}" for host, ranks in nodes.items())
        raise PipedreamError(f"every node needs as many ranks as the others ({counts}): set --ntasks-per-node")
    levels = []
    if per_node[0] > 1:
        within = [pair for ranks in nodes.values() for pair in combinations(ranks, 2)]
        latency_s, bandwidth = _measure(world, within, repeats)
        levels.append(Level("node", per_node[0], latency_s, bandwidth))
    if len(nodes) > 1:
        across = [(a, b) for a, b in combinations(range(world.size), 2) if hosts[a] != hosts[b]]
        latency_s, bandwidth = _measure(world, across, repeats)
        levels.append(Level("network", len(nodes), latency_s, bandwidth))
    # Host memory is shared by the ranks of a node.
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // per_node[0]
    memory = min(world.comm.allgather(memory))
    return Topology(tuple(levels), device="cpu", device_memory_bytes=memory, hosts=tuple(hosts))


def fit(sizes: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """Least-squares α in seconds and β in bytes per second of seconds = α + size / β.

    Errors are taken relative to the time, so that small messages count as much as large ones.
    """
    sizes_, seconds_ = np.asarray(sizes, float), np.asarray(seconds, float)
    system = np.stack([1 / seconds_, sizes_ / seconds_], axis=1)
    (latency, per_byte), *_ = np.linalg.lstsq(system, np.ones(len(sizes_)), rcond=None)
    fastest = float(np.min(seconds_ / sizes_))
    # Noise must not make a link that takes no time or negative time.
    per_byte = per_byte if per_byte > 0 else fastest
    return max(0.0, float(latency)), 1 / float(per_byte)


def _measure(world: World, pairs: list[tuple[int, int]], repeats: int) -> tuple[float, float]:
    """Median α and β over some of the pairs, one pair at a time so that none disturbs another."""
    step = max(1, len(pairs) // MOST_PAIRS)
    found = []
    for pair in pairs[::step][:MOST_PAIRS]:
        world.comm.Barrier()
        seconds = [_one_way_s(world, pair, size, repeats) for size in SIZES] if world.rank in pair else None
        found.append(world.comm.bcast(fit(SIZES, seconds) if seconds else None, root=pair[0]))
    return statistics.median(a for a, _ in found), statistics.median(b for _, b in found)


def _one_way_s(world: World, pair: tuple[int, int], size: int, repeats: int) -> float:
    """Half the median round trip of `size` bytes."""
    first, second = pair
    payload = np.zeros(size, np.uint8)
    trips = []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        if world.rank == first:
            world.comm.Send(payload, dest=second)
            world.comm.Recv(payload, source=second)
        else:
            world.comm.Recv(payload, source=first)
            world.comm.Send(payload, dest=first)
        trips.append(time.perf_counter() - began)
    return statistics.median(trips[2:]) / 2
