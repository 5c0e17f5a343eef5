"""Probe: measure the links between the ranks.

Two ranks at a time play ping-pong, the others sleep, so that no pair disturbs another. Then all
ranks of every node, and at last all ranks, sum arrays::

    rank 0   ──►  size  ──►   rank 1          time
             ◄──  size  ◄──                    │        ·  ╱
                                               │     · ╱       seconds = α + size / β
    for sizes 1 KiB ... 64 MiB,                │  ·╱           by least squares (cluster.fit)
    until one takes too long                   │╱ α
                                               └──────────── size
"""

from __future__ import annotations

import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipedream_hpc.cluster.fit import fit
from pipedream_hpc.cluster.world import World
from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.planning.topology import Level, Topology

#: Message sizes in bytes: from where latency is everything to where no burst or cache helps.
SIZES = tuple(1 << power for power in range(10, 27))
#: Pairs of ranks to measure per level; links of one kind are much alike, the median is kept.
MOST_PAIRS = 16
#: No larger size once a round takes as many seconds, but at least so many sizes for a fit.
_LONG_ROUND_S = 0.3
_FEWEST_SIZES = 4
#: Seconds for all rounds of one size, if that leaves the fewest that make a median.
_SIZE_S = 0.03
_FEWEST_ROUNDS = 3
#: Rounds before the clock counts: buffers get registered, shared memory gets mapped.
_WARM_UP = 3
#: Seconds after which no further pair of a level is begun; the pairs come in random order.
_LEVEL_S = 20.0

Pair = tuple[int, int]
#: α in seconds and β in bytes per second.
Link = tuple[float, float]


def measure(world: World, *, repeats: int = 20) -> Topology:
    """Measure α and β of the links within nodes and between them. Collective; the same on all ranks.

    Messages are in host memory. At each level pairs of ranks play ping-pong, and all ranks of a node,
    or of all nodes, do ring all-reduces (float32 sums). The device is the GPU that the rank would train
    on, if any, with what is free of its memory; else the CPU with an even share of its node's physical
    memory per rank (the smallest share counts).

    Args:
        repeats: rounds per pair and size, fewer if they take long; the median counts.

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
        together = world.comm.Split(hosts.index(world.host), world.rank)
        links = (*_link(world, pairs_within(nodes), repeats), *_reduction(world, together, repeats))
        levels.append(Level("node", per_node, *links))
        together.Free()
    if len(nodes) > 1:
        links = (*_link(world, pairs_across(nodes), repeats), *_reduction(world, world.comm, repeats))
        levels.append(Level("network", len(nodes), *links))
    devices: list[tuple[str, str, int]] = world.comm.allgather(_device(world))
    return Topology(
        levels=tuple(levels),
        device=devices[0][0],
        device_memory_bytes=min(memory for _, _, memory in devices),
        hosts=tuple(hosts),
        devices_of=tuple(name for _, name, _ in devices),
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


def _sorted(pair: Sequence[int]) -> Pair:
    return min(pair), max(pair)


def _link(world: World, pairs: Sequence[Pair], repeats: int) -> Link:
    """Median α and β over the pairs, one pair at a time."""
    found = []
    deadline = time.monotonic() + _LEVEL_S
    for pair in random.Random(0).sample(pairs, len(pairs)):
        if world.rank in pair:
            found += _ping_pong(world, pair, repeats)
        _doze(world.comm.Ibarrier())
        if world.comm.bcast(time.monotonic() > deadline):
            break
    return _median(world, found)


def _ping_pong(world: World, pair: Pair, repeats: int) -> list[Link]:
    """α and β of a pair, on its first rank; nothing on the second."""
    first, second = pair
    # Touched, so that it is memory of its own and not the one page of zeros.
    payload = np.ones(SIZES[-1], np.uint8)

    def lead(size: int) -> None:
        world.comm.Send(payload[:size], dest=second)
        world.comm.Recv(payload[:size], source=second)

    def follow(size: int) -> None:
        world.comm.Recv(payload[:size], source=first)
        world.comm.Send(payload[:size], dest=first)

    def tell(rounds: int) -> int:
        world.comm.send(rounds, dest=second)
        return rounds

    if world.rank == second:
        _times(follow, lambda _: int(world.comm.recv(source=first)), repeats)
        return []
    times = _times(lead, tell, repeats)
    return [fit(SIZES[: len(times)], [seconds / 2 for seconds in times])]


def _reduction(world: World, comm: Any, repeats: int) -> Link:
    """Median over the nodes of α and β of a ring all-reduce among the ranks of `comm`."""
    # Zeros, for sums of sums overflow; written, so that they are memory of their own.
    total = np.full(SIZES[-1] // 4, 0, np.float32)
    times = _times(lambda size: _ring(comm, total[: size // 4]), comm.bcast, repeats)
    # What a ring sends out of every rank.
    sent = [2 * (comm.size - 1) / comm.size * size for size in SIZES[: len(times)]]
    return _median(world, [fit(sent, times)] if comm.rank == 0 else [])


def _ring(comm: Any, array: npt.NDArray[np.float32]) -> None:
    """Sum `array` over the ranks of `comm`, in place: m - 1 steps sum the parts, m - 1 spread them."""
    parts = np.array_split(array, comm.size)
    spare = np.empty_like(parts[0])
    after, before = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    for step in range(comm.size - 1):
        mine, theirs = parts[(comm.rank - step) % comm.size], parts[(comm.rank - step - 1) % comm.size]
        comm.Sendrecv(mine, after, recvbuf=spare[: len(theirs)], source=before)
        theirs += spare[: len(theirs)]
    for step in range(comm.size - 1):
        mine, theirs = parts[(comm.rank + 1 - step) % comm.size], parts[(comm.rank - step) % comm.size]
        comm.Sendrecv(mine, after, recvbuf=theirs, source=before)


def _median(world: World, found: Sequence[Link]) -> Link:
    """Median α and β over what all ranks found."""
    everything: list[Link] = [link for part in world.comm.allgather(found) for link in part]
    return statistics.median(a for a, _ in everything), statistics.median(b for _, b in everything)


def _times(play: Callable[[int], None], agree: Callable[[int], int], repeats: int) -> list[float]:
    """Median seconds of a round of `play`, for one size after the other until a round takes long.

    Args:
        play: one round with that many bytes.
        agree: gives every rank the number of rounds that the first one proposes; 0 ends it.
    """
    medians: list[float] = []
    for size in SIZES:
        expected = 2 * medians[-1] if medians else 0.0
        rounds = max(min(repeats, _FEWEST_ROUNDS), min(repeats, int(_SIZE_S / max(expected, 1e-9))))
        if len(medians) >= _FEWEST_SIZES and medians[-1] > _LONG_ROUND_S:
            rounds = 0
        rounds = agree(rounds)
        if not rounds:
            break
        for _ in range(_WARM_UP if rounds > _FEWEST_ROUNDS else 1):
            play(size)
        seconds = []
        for _ in range(rounds):
            began = time.perf_counter()
            play(size)
            seconds.append(time.perf_counter() - began)
        medians.append(statistics.median(seconds))
    return medians


def _doze(request: Any) -> None:
    """Wait without spinning: the pair at work may need this core."""
    while not request.Test():
        time.sleep(1e-3)


def _device(world: World) -> tuple[str, str, int]:
    """Kind, name and memory in bytes of the device that this rank would train on."""
    from pipedream_hpc.cluster.device import choose  # with torch, which takes its time

    device = choose("auto", world)
    if device.kind == "cuda":
        return device.name, device.name, device.memory_bytes
    return "cpu", _cpu(), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // world.local_size


def _cpu() -> str:
    """Model of the CPU as Linux calls it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "") or platform.machine() or "cpu"
