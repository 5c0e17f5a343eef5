"""Probe: measure the links between the ranks.

Two ranks at a time play ping-pong, the others sleep, so that no pair disturbs another::

    rank 0   ──►  size  ──►   rank 1          time
             ◄──  size  ◄──                    │        ·  ╱
                                               │     · ╱       seconds = α + size / β
    for sizes 1 KiB ... 4 MiB                  │  ·╱           by least squares
    half the median round trip each            │╱ α
                                               └──────────── size
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from pipedream_hpc.cluster.world import World
from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.planning.topology import Level, Topology

#: Message sizes in bytes: from where latency is everything to where bandwidth is.
SIZES = (1 << 10, 1 << 13, 1 << 16, 1 << 18, 1 << 20, 1 << 22)
#: Pairs of ranks to measure per level; links of one kind are much alike, the median is kept.
MOST_PAIRS = 16
#: Round trips before the clock counts: buffers get registered, shared memory gets mapped.
_WARM_UP = 3

Pair = tuple[int, int]


def measure(world: World, *, repeats: int = 20) -> Topology:
    """Measure α and β of the links within nodes and between them. Collective; the same on all ranks.

    Messages are in host memory. The device is the GPU that torch has, if any, with its memory; else
    the CPU with an even share of its node's physical memory per rank (the smallest share counts).

    Args:
        repeats: round trips per pair and size; the median counts.

    Raises:
        PipedreamError: there are fewer than two ranks, nodes have different numbers of them, or a
            node's ranks are not numbered one after the other.
    """
    if world.comm is None or world.size < 2:
        raise PipedreamError(
            "a link has two ends, but only one rank was started: start one per device, such as "
            "`mpirun -n 4 pipedream probe` or `srun --mpi=pmix -n 4 pipedream probe`"
        )
    hosts: list[str] = world.comm.allgather(world.host)
    nodes = group(hosts)
    per_node = len(nodes[0])
    levels = []
    if per_node > 1:
        levels.append(Level("node", per_node, *_link(world, pairs_within(nodes), repeats)))
    if len(nodes) > 1:
        levels.append(Level("network", len(nodes), *_link(world, pairs_across(nodes), repeats)))
    devices: list[tuple[str, int]] = world.comm.allgather(_device(per_node))
    return Topology(
        levels=tuple(levels),
        device=devices[0][0],
        device_memory_bytes=min(memory for _, memory in devices),
        hosts=tuple(hosts),
    )


def group(hosts: Sequence[str]) -> list[list[int]]:
    """Ranks of every node, in order, given the host of every rank.

    Raises:
        PipedreamError: not all nodes have as many ranks, or their ranks are interleaved: a topology
            is levels of equal parts, filled one node after the other.
    """
    by_host: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        by_host.setdefault(host, []).append(rank)
    if len({len(ranks) for ranks in by_host.values()}) > 1:
        counts = ", ".join(f"{host} has {len(ranks)}" for host, ranks in by_host.items())
        raise PipedreamError(
            f"every node needs as many ranks as the others, but {counts}: set --ntasks-per-node (srun) "
            "or --map-by ppr:N:node (mpirun)"
        )
    for host, ranks in by_host.items():
        if ranks[-1] - ranks[0] != len(ranks) - 1:
            raise PipedreamError(
                f"ranks should fill one node after the other, but {host} has ranks {ranks}: "
                "use --distribution=block (srun) or --map-by slot (mpirun)"
            )
    return list(by_host.values())


def pairs_within(nodes: Sequence[Sequence[int]]) -> list[Pair]:
    """Pairs of ranks of one node: all if there are few, else a sample, the same at every call."""
    if len(nodes) * len(nodes[0]) * (len(nodes[0]) - 1) // 2 <= MOST_PAIRS:
        return [pair for ranks in nodes for pair in combinations(ranks, 2)]
    draw = random.Random(0)
    return [_sorted(draw.sample(draw.choice(nodes), 2)) for _ in range(MOST_PAIRS)]


def pairs_across(nodes: Sequence[Sequence[int]]) -> list[Pair]:
    """Pairs of ranks of two nodes: all if there are few, else a sample, the same at every call."""
    if len(nodes[0]) ** 2 * len(nodes) * (len(nodes) - 1) // 2 <= MOST_PAIRS:
        return [(a, b) for one, other in combinations(nodes, 2) for a in one for b in other]
    draw = random.Random(0)
    return [_sorted([draw.choice(node) for node in draw.sample(nodes, 2)]) for _ in range(MOST_PAIRS)]


def fit(sizes: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """Least-squares α in seconds and β in bytes per second of seconds = α + size / β.

    Errors are taken relative to the time, so that small messages count as much as large ones.
    """
    size, second = np.asarray(sizes, float), np.asarray(seconds, float)
    (latency, per_byte), *_ = np.linalg.lstsq(
        np.stack([1 / second, size / second], axis=1), np.ones(len(size)), rcond=None
    )
    if latency < 0 or per_byte <= 0:
        # Noise must not make a link that takes no time: each then comes from the messages that
        # show it best.
        latency, per_byte = float(second.min()), float(second[-1] / size[-1])
    return float(latency), 1 / float(per_byte)


def _sorted(pair: Sequence[int]) -> Pair:
    return min(pair), max(pair)


def _link(world: World, pairs: Sequence[Pair], repeats: int) -> tuple[float, float]:
    """Median α and β over the pairs, one pair at a time."""
    found = []
    for pair in pairs:
        if world.rank in pair:
            seconds = [_one_way_s(world, pair, size, repeats) for size in SIZES]
            if world.rank == pair[0]:
                found.append(fit(SIZES, seconds))
        _doze(world.comm.Ibarrier())
    everything: list[tuple[float, float]] = [link for part in world.comm.allgather(found) for link in part]
    return statistics.median(a for a, _ in everything), statistics.median(b for _, b in everything)


def _doze(request: Any) -> None:
    """Wait without spinning: the pair at work may need this core."""
    while not request.Test():
        time.sleep(1e-3)


def _one_way_s(world: World, pair: Pair, size: int, repeats: int) -> float:
    """Half the median round trip of `size` bytes, in seconds."""
    first, second = pair
    payload = np.zeros(size, np.uint8)
    trips = []
    for _ in range(_WARM_UP + repeats):
        began = time.perf_counter()
        if world.rank == first:
            world.comm.Send(payload, dest=second)
            world.comm.Recv(payload, source=second)
        else:
            world.comm.Recv(payload, source=first)
            world.comm.Send(payload, dest=first)
        trips.append(time.perf_counter() - began)
    return statistics.median(trips[_WARM_UP:]) / 2


def _device(ranks_on_node: int) -> tuple[str, int]:
    """Name and memory in bytes of the device that this rank would train on."""
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return str(properties.name), int(properties.total_memory)
    return "cpu", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks_on_node
