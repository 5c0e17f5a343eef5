"""Probe: measure the links between the ranks.

One pair of ranks at a time exchanges messages while the others sleep, so that pairs do not disturb each
other. Then all ranks of every node, and finally all ranks, run ring all-reduces::

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

#: Message sizes in bytes: from sizes that latency dominates to sizes beyond bursts and caches.
SIZES = tuple(1 << power for power in range(10, 27))
#: Largest number of pairs measured per level; links of one kind are similar, and the median is kept.
MOST_PAIRS = 16
#: Sizes stop growing once a round takes this many seconds, but a fit needs at least _FEWEST_SIZES sizes.
_LONG_ROUND_S = 0.3
_FEWEST_SIZES = 4
#: Seconds for all rounds of one size; at least _FEWEST_ROUNDS rounds are run for a median.
_SIZE_S = 0.03
_FEWEST_ROUNDS = 3
#: Rounds that are not timed: MPI registers buffers and maps shared memory in them.
_WARM_UP = 3
#: Seconds after which no further pair of a level is measured; pairs are in random order.
_LEVEL_S = 20.0

Pair = tuple[int, int]
#: α in seconds and β in bytes per second.
Link = tuple[float, float]


def measure(world: World, *, repeats: int = 20) -> Topology:
    """Measure α and β of the links within and between nodes. Collective; all ranks return the same result.

    Messages are in host memory. At each level pairs of ranks exchange messages, and all ranks of a node,
    or of all nodes, run ring all-reduces (float32 sums). The topology's device is the GPU that the rank
    would train on, with its free memory, or else the CPU with an even share of its node's physical memory
    per rank; the smallest memory of all ranks counts.

    Args:
        world: the ranks of the job.
        repeats: rounds per pair and size, fewer if they take long; the median counts.

    Raises:
        PipedreamError: there are fewer than two ranks, nodes have different numbers of ranks, or the
            ranks of a node are not consecutive.
    """
    if world.comm is None or world.size < 2:
        raise PipedreamError(
            "the probe measures links between ranks, but only one rank was started: start one rank per device, such "
            "as `mpirun -n 4 pipedream probe` or `srun --mpi=pmix -n 4 pipedream probe`"
        )
    hosts: list[str] = world.comm.allgather(world.host)
    nodes = group_by_host(hosts)
    per_node = len(nodes[0])
    levels = []
    if per_node > 1:
        node = world.comm.Split(hosts.index(world.host), world.rank)
        links = (*_link(world, pairs_within(nodes), repeats), *_all_reduce(world, node, repeats))
        levels.append(Level("node", per_node, *links))
        node.Free()
    if len(nodes) > 1:
        links = (*_link(world, pairs_across(nodes), repeats), *_all_reduce(world, world.comm, repeats))
        levels.append(Level("network", len(nodes), *links))
    devices: list[tuple[str, str, int]] = world.comm.allgather(_device(world))
    return Topology(
        levels=tuple(levels),
        device=devices[0][0],
        device_memory_bytes=min(memory for _, _, memory in devices),
        hosts=tuple(hosts),
        devices_of=tuple(name for _, name, _ in devices),
    )


def group_by_host(hosts: Sequence[str]) -> list[list[int]]:
    """Return the ranks of every node, given the host of every rank.

    Raises:
        PipedreamError: nodes have different numbers of ranks, or their ranks are interleaved; a topology
            has equal components, filled one after the other.
    """
    by_host: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        by_host.setdefault(host, []).append(rank)
    if len({len(ranks) for ranks in by_host.values()}) > 1:
        counts = ", ".join(f"{host} has {len(ranks)}" for host, ranks in by_host.items())
        raise PipedreamError(
            f"every node needs the same number of ranks, but {counts}: set --ntasks-per-node (srun) or "
            "--map-by ppr:N:node (mpirun)"
        )
    for host, ranks in by_host.items():
        if ranks[-1] - ranks[0] != len(ranks) - 1:
            raise PipedreamError(
                f"ranks should fill one node after the other, but {host} has ranks {ranks}: "
                "use --distribution=block (srun) or --map-by slot (mpirun)"
            )
    return list(by_host.values())


def pairs_within(nodes: Sequence[Sequence[int]]) -> list[Pair]:
    """Return pairs of ranks on the same node: all pairs if there are few, else a sample, always the same one."""
    if len(nodes) * len(nodes[0]) * (len(nodes[0]) - 1) // 2 <= MOST_PAIRS:
        return [pair for ranks in nodes for pair in combinations(ranks, 2)]
    draw = random.Random(0)
    return [_sorted(draw.sample(draw.choice(nodes), 2)) for _ in range(MOST_PAIRS)]


def pairs_across(nodes: Sequence[Sequence[int]]) -> list[Pair]:
    """Return pairs of ranks on different nodes: all pairs if there are few, else a sample, always the same one."""
    if len(nodes[0]) ** 2 * len(nodes) * (len(nodes) - 1) // 2 <= MOST_PAIRS:
        return [(a, b) for one, other in combinations(nodes, 2) for a in one for b in other]
    draw = random.Random(0)
    return [_sorted([draw.choice(node) for node in draw.sample(nodes, 2)]) for _ in range(MOST_PAIRS)]


def _sorted(pair: Sequence[int]) -> Pair:
    return min(pair), max(pair)


def _link(world: World, pairs: Sequence[Pair], repeats: int) -> Link:
    """Return the median α and β over the pairs, measured one pair at a time."""
    found = []
    deadline = time.monotonic() + _LEVEL_S
    for pair in random.Random(0).sample(pairs, len(pairs)):
        if world.rank in pair:
            found += _ping_pong(world, pair, repeats)
        _wait_without_spinning(world.comm.Ibarrier())
        if world.comm.bcast(time.monotonic() > deadline):
            break
    return _median(world, found)


def _ping_pong(world: World, pair: Pair, repeats: int) -> list[Link]:
    """Return [(α, β)] of a pair on its first rank, and [] on its second rank."""
    first, second = pair
    # Written, so that the kernel does not map all of it to the zero page.
    payload = np.ones(SIZES[-1], np.uint8)

    def ping(size: int) -> None:
        world.comm.Send(payload[:size], dest=second)
        world.comm.Recv(payload[:size], source=second)

    def pong(size: int) -> None:
        world.comm.Recv(payload[:size], source=first)
        world.comm.Send(payload[:size], dest=first)

    def announce(rounds: int) -> int:
        world.comm.send(rounds, dest=second)
        return rounds

    if world.rank == second:
        _times(pong, lambda _: int(world.comm.recv(source=first)), repeats)
        return []
    times = _times(ping, announce, repeats)
    return [fit(SIZES[: len(times)], [seconds / 2 for seconds in times])]


def _all_reduce(world: World, comm: Any, repeats: int) -> Link:
    """Return α and β of a ring all-reduce among the ranks of `comm`; medians over the nodes."""
    # Zeros, since repeated sums would overflow; written, so that the kernel does not map them to the zero page.
    total = np.full(SIZES[-1] // 4, 0, np.float32)
    times = _times(lambda size: _ring(comm, total[: size // 4]), comm.bcast, repeats)
    # Bytes that every rank of a ring sends.
    sent = [2 * (comm.size - 1) / comm.size * size for size in SIZES[: len(times)]]
    return _median(world, [fit(sent, times)] if comm.rank == 0 else [])


def _ring(comm: Any, array: npt.NDArray[np.float32]) -> None:
    """Sum `array` over the ranks of `comm`, in place: m - 1 steps of reduce-scatter, then m - 1 of all-gather."""
    parts = np.array_split(array, comm.size)
    received = np.empty_like(parts[0])
    after, before = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    for step in range(comm.size - 1):
        mine, theirs = parts[(comm.rank - step) % comm.size], parts[(comm.rank - step - 1) % comm.size]
        comm.Sendrecv(mine, after, recvbuf=received[: len(theirs)], source=before)
        theirs += received[: len(theirs)]
    for step in range(comm.size - 1):
        mine, theirs = parts[(comm.rank + 1 - step) % comm.size], parts[(comm.rank - step) % comm.size]
        comm.Sendrecv(mine, after, recvbuf=theirs, source=before)


def _median(world: World, found: Sequence[Link]) -> Link:
    """Return the median α and β over the links that all ranks found."""
    links: list[Link] = [link for part in world.comm.allgather(found) for link in part]
    return statistics.median(a for a, _ in links), statistics.median(b for _, b in links)


def _times(run_round: Callable[[int], None], share_rounds: Callable[[int], int], repeats: int) -> list[float]:
    """Return the median seconds of a round for increasing sizes, until a round takes long.

    Args:
        run_round: runs one round with that many bytes.
        share_rounds: returns on every rank the number of rounds that the first rank passes; 0 ends the measurement.
        repeats: largest number of rounds per size.
    """
    medians: list[float] = []
    for size in SIZES:
        expected = 2 * medians[-1] if medians else 0.0
        rounds = max(min(repeats, _FEWEST_ROUNDS), min(repeats, int(_SIZE_S / max(expected, 1e-9))))
        if len(medians) >= _FEWEST_SIZES and medians[-1] > _LONG_ROUND_S:
            rounds = 0
        rounds = share_rounds(rounds)
        if not rounds:
            break
        for _ in range(_WARM_UP if rounds > _FEWEST_ROUNDS else 1):
            run_round(size)
        seconds = []
        for _ in range(rounds):
            began = time.perf_counter()
            run_round(size)
            seconds.append(time.perf_counter() - began)
        medians.append(statistics.median(seconds))
    return medians


def _wait_without_spinning(request: Any) -> None:
    """Wait for an MPI request and sleep in between: the pair being measured may need this core."""
    while not request.Test():
        time.sleep(1e-3)


def _device(world: World) -> tuple[str, str, int]:
    """Return kind, name and memory in bytes of the device that this rank would train on."""
    from pipedream_hpc.cluster.device import choose  # imports torch, which is slow

    device = choose("auto", world)
    if device.kind == "cuda":
        return device.name, device.name, device.memory_bytes
    return "cpu", _cpu_model(), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // world.local_size


def _cpu_model() -> str:
    """Return the CPU model that Linux reports, or else the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "") or platform.machine() or "cpu"
