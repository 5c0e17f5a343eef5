"""Wiring: make the channels and reductions between the ranks of a plan.

Every link has two tags, one for each direction; between replicas there is a channel for each pair that
shares a unit::

    2-1      stage 0 a ──┐                     rank 0 ─── tag 0 ──► rank 2     rank 0 ◄── tag 1 ─── rank 2
             stage 0 b ──┴── stage 1           rank 1 ─── tag 0 ──► rank 2     rank 1 ◄── tag 1 ─── rank 2
"""

from __future__ import annotations

import atexit
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pipedream_hpc.cluster.cores import Cores
from pipedream_hpc.cluster.threads import crowded
from pipedream_hpc.cluster.world import World
from pipedream_hpc.core import load_core
from pipedream_hpc.runtime.reduction import Buckets, Meeting, MpiReduction, Reduction
from pipedream_hpc.runtime.route import ON_CPU, Route
from pipedream_hpc.runtime.stage import Port, Ports
from pipedream_hpc.runtime.transport import (
    Boundary,
    Inbox,
    Lines,
    LocalInbox,
    LocalOutbox,
    MpiInbox,
    MpiOutbox,
    NoBox,
    Outbox,
)
from pipedream_hpc.runtime.view import CPU
from pipedream_hpc.schedule.actions import Layout, Payload, Schedule
from pipedream_hpc.schedule.play import activation_slots, channels, gradient_slots

if TYPE_CHECKING:
    from pipedream_hpc._core import Progress

#: (stage, rank): a replica.
Place = tuple[int, int]


@dataclass(frozen=True)
class Wiring:
    """Channel ends of the replicas that live in this process.

    Attributes:
        ports: by stage and rank.
        reduce: makes the reduction of what of one replica of a stage, or with None for the stage that
            of a rank over all ranks; collective, in the same order on all ranks concerned.
        common_epoch_ns: a moment that is the same on all ranks, on this process's clock
            (time.perf_counter_ns); collective.
        close: gives the channels back; collective, harmless when called twice.
    """

    ports: dict[Place, Ports]
    reduce: Callable[[int | None, str, Buckets], Reduction]
    common_epoch_ns: Callable[[], int]
    close: Callable[[], None]


@dataclass(frozen=True)
class _Pipe:
    """One link between two replicas, in one direction."""

    source: Place
    target: Place
    payload: Payload
    boundaries: tuple[Boundary, ...]
    tag: int
    slots: int

    @property
    def sends_as(self) -> Port:
        """What the source calls it."""
        return (self.payload, *self.target)

    @property
    def arrives_as(self) -> Port:
        """What the target calls it."""
        return (self.payload, *self.source)


def _pipes(schedule: Schedule, lines: Lines) -> Iterator[_Pipe]:
    """Everything that travels, in an order all ranks agree about."""
    layout, tag = schedule.layout, 0
    for (source, target), boundaries in sorted(lines.items()):
        returning = tuple(boundary for boundary in boundaries if boundary.gradient)
        forth, back = activation_slots(schedule, source, target), gradient_slots(schedule, source, target)
        for sender, receiver in channels(layout, source, target):
            near, far = (source, sender), (target, receiver)
            yield _Pipe(near, far, "activation", boundaries, tag, forth)
            yield _Pipe(far, near, "gradient", returning, tag + 1, back)
        tag += 2


def local_wiring(schedule: Schedule, lines: Lines, device: torch.device = CPU) -> Wiring:
    """All ranks in this process, on one device."""
    ports: dict[Place, Ports] = defaultdict(Ports)
    for stage, ranks in enumerate(schedule.layout):
        for rank in ranks:
            ports[stage, rank] = Ports()
    for pipe in _pipes(schedule, lines):
        _join(pipe, ports, device)
    meetings: dict[tuple[int | None, str], Meeting] = defaultdict(Meeting)
    return Wiring(
        ports, lambda stage, what, buckets: meetings[stage, what].join(buckets), time.perf_counter_ns, lambda: None
    )


def _join(pipe: _Pipe, ports: dict[Place, Ports], device: torch.device) -> None:
    """Both ends in this process."""
    inbox = LocalInbox(pipe.boundaries, pipe.slots, pipe.payload, device)
    ports[pipe.source].outboxes[pipe.sends_as] = LocalOutbox(inbox)
    ports[pipe.target].inboxes[pipe.arrives_as] = inbox


def mpi_wiring(
    world: World,
    schedule: Schedule,
    lines: Lines,
    stall_limit_s: float,
    *,
    ordered: bool,
    route: Route = ON_CPU,
    cores: Cores,
) -> Wiring:
    """This process's rank; the others are other processes. Collective.

    Args:
        schedule: of the training.
        lines: what travels between stages.
        stall_limit_s: seconds that a rank waits for another.
        ordered: whether sums over replicas are in the order of the ranks.
        route: that boundary tensors take.
        cores: that this process has.
    """
    layout: Layout = schedule.layout
    crowd = crowded(world.local_size)
    progress = load_core().Progress(
        world.comm, crowded=crowd, device=route.index, cores=sorted(cores.progress), spare=cores.spare
    )
    own = {(stage, world.rank): Ports() for stage, ranks in enumerate(layout) if world.rank in ranks}
    for pipe in _pipes(schedule, lines):
        if pipe.source in own and pipe.target in own:
            _join(pipe, own, route.device)
        elif pipe.target in own:
            # Receives are posted before anybody sends: a message never waits for its receiver.
            own[pipe.target].inboxes[pipe.arrives_as] = _inbox(progress, pipe, stall_limit_s, route)
        elif pipe.source in own:
            own[pipe.source].outboxes[pipe.sends_as] = _outbox(progress, pipe, stall_limit_s, route)
    offset_ns = _clock_offset_ns(world)

    def common_epoch_ns() -> int:
        now = time.perf_counter_ns() if world.rank == 0 else None
        return int(world.comm.bcast(now, root=0)) + offset_ns

    def reduce(stage: int | None, what: str, buckets: Buckets) -> Reduction:
        ranks = range(world.size) if stage is None else layout[stage]
        group = world.comm.Get_group().Incl(list(ranks))
        comm = world.comm.Create_group(group, tag=0 if stage is None else stage + 1)
        label = f"{what} of all ranks" if stage is None else f"{what} of stage {stage} over its replicas"
        try:
            return MpiReduction(progress, comm, buckets, label, stall_limit_s, ordered=ordered)
        finally:
            comm.Free()  # the reduction has duplicates of its own
            group.Free()

    atexit.register(progress.close)  # runs before mpi4py finalises MPI: it was registered later
    return Wiring(own, reduce, common_epoch_ns, progress.close)


def _inbox(progress: Progress, pipe: _Pipe, stall_limit_s: float, route: Route) -> Inbox:
    if not pipe.boundaries:
        return NoBox()
    peer = pipe.source[1]
    return MpiInbox(progress, peer, pipe.tag, pipe.boundaries, pipe.payload, pipe.slots, stall_limit_s, route)


def _outbox(progress: Progress, pipe: _Pipe, stall_limit_s: float, route: Route) -> Outbox:
    if not pipe.boundaries:
        return NoBox()
    return MpiOutbox(progress, pipe.target[1], pipe.tag, pipe.boundaries, pipe.payload, stall_limit_s, route)


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
