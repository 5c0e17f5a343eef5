"""Wiring: make the channels between the ranks of a plan.

::

    rank 0  activation_out ─── tag 0 ──► activation_in   rank 1  activation_out ─── tag 2 ──►  ...
            gradient_in    ◄── tag 1 ─── gradient_out            gradient_in    ◄── tag 3 ───
"""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipedream_hpc.cluster.threads import crowded
from pipedream_hpc.cluster.world import World
from pipedream_hpc.core import load_core
from pipedream_hpc.runtime.transport import Boundary, LocalChannel, LocalOutbox, MpiInbox, MpiOutbox
from pipedream_hpc.runtime.worker import Ports
from pipedream_hpc.schedule.actions import Layout
from pipedream_hpc.schedule.play import GRADIENT_SLOTS


@dataclass(frozen=True)
class Wiring:
    """Channel ends of the ranks that live in this process.

    Attributes:
        ports: by rank.
        common_epoch_ns: a moment that is the same on all ranks, on this process's clock
            (time.perf_counter_ns); collective.
        close: gives the channels back; collective, harmless when called twice.
    """

    ports: dict[int, Ports]
    common_epoch_ns: Callable[[], int]
    close: Callable[[], None]


def local_wiring(layout: Layout, boundaries: Sequence[Boundary], activation_slots: Sequence[int]) -> Wiring:
    """All ranks in this process."""
    ports = {rank: Ports() for ranks in layout for rank in ranks}
    for stage, boundary in enumerate(boundaries):
        upstream, downstream = ports[layout[stage][0]], ports[layout[stage + 1][0]]
        forth = LocalChannel(boundary, activation_slots[stage + 1], "activation")
        back = LocalChannel(boundary, GRADIENT_SLOTS, "gradient")
        upstream.activation_out, downstream.activation_in = LocalOutbox(forth), forth
        downstream.gradient_out, upstream.gradient_in = LocalOutbox(back), back
    return Wiring(ports, time.perf_counter_ns, lambda: None)


def mpi_wiring(
    world: World,
    layout: Layout,
    boundaries: Sequence[Boundary],
    activation_slots: Sequence[int],
    stall_limit_s: float,
) -> Wiring:
    """This process's rank; its neighbours are other processes. Collective."""
    stage = next(index for index, ranks in enumerate(layout) if world.rank in ranks)
    progress = load_core().Progress(world.comm, crowded=crowded(world.local_size))
    ports = Ports()
    # Receives are posted before anybody sends: a message never waits for its receiver.
    if stage > 0:
        boundary, peer, tag = boundaries[stage - 1], layout[stage - 1][0], 2 * (stage - 1)
        slots = activation_slots[stage]
        ports.activation_in = MpiInbox(progress, peer, tag, boundary, "activation", slots, stall_limit_s)
        ports.gradient_out = MpiOutbox(progress, peer, tag + 1, boundary, "gradient", stall_limit_s)
    if stage < len(boundaries):
        boundary, peer, tag = boundaries[stage], layout[stage + 1][0], 2 * stage
        ports.gradient_in = MpiInbox(progress, peer, tag + 1, boundary, "gradient", GRADIENT_SLOTS, stall_limit_s)
        ports.activation_out = MpiOutbox(progress, peer, tag, boundary, "activation", stall_limit_s)
    offset_ns = _clock_offset_ns(world)

    def common_epoch_ns() -> int:
        now = time.perf_counter_ns() if world.rank == 0 else None
        return int(world.comm.bcast(now, root=0)) + offset_ns

    atexit.register(progress.close)  # runs before mpi4py finalises MPI: it was registered later
    return Wiring({world.rank: ports}, common_epoch_ns, progress.close)


def _clock_offset_ns(world: World, rounds: int = 20) -> int:
    """This rank's clock minus rank 0's, from the quickest of some round trips (error: half of it)."""
    comm, best, offset = world.comm, None, 0
    for peer in range(1, world.size):
        for _ in range(rounds):
            if world.rank == 0:
                comm.recv(source=peer)
                comm.send(time.perf_counter_ns(), dest=peer)
            elif world.rank == peer:
                asked = time.perf_counter_ns()
                comm.send(None, dest=0)
                theirs = comm.recv(source=0)
                answered = time.perf_counter_ns()
                if best is None or answered - asked < best:
                    best, offset = answered - asked, (asked + answered) // 2 - theirs
    return offset
