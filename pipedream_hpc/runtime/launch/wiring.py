"""Wiring: the channels and all-reduces between the ranks of a plan.

Every edge between two stages has two tags, one for each direction. Between replicas there is a channel for each pair
that shares a microbatch::

    2-1      stage 0 a ──┐                     rank 0 ─── tag 0 ──► rank 2     rank 0 ◄── tag 1 ─── rank 2
             stage 0 b ──┴── stage 1           rank 1 ─── tag 0 ──► rank 2     rank 1 ◄── tag 1 ─── rank 2
"""

from __future__ import annotations

import atexit
import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pipedream_hpc.cluster.cores import Cores
from pipedream_hpc.cluster.threads import oversubscribed
from pipedream_hpc.cluster.world import World
from pipedream_hpc.core import load_comm
from pipedream_hpc.runtime.comm.allreduce import AllReduce, Buckets, LocalGroup, MpiAllReduce
from pipedream_hpc.runtime.comm.channels import (
    ChannelSpec,
    EdgeTensors,
    Endpoint,
    LocalRecvChannel,
    LocalSendChannel,
    MpiRecvChannel,
    MpiSendChannel,
    NullChannel,
    RecvChannel,
    SendChannel,
    StageChannels,
)
from pipedream_hpc.runtime.comm.gpu_route import ON_CPU, Route
from pipedream_hpc.runtime.comm.loss_board import LossBoard, local_loss_board, mpi_loss_board
from pipedream_hpc.runtime.comm.tensor_view import CPU
from pipedream_hpc.schedule.actions import Schedule
from pipedream_hpc.schedule.replay import activation_slots, channels, gradient_slots

if TYPE_CHECKING:
    from pipedream_hpc._comm import Progress


@dataclass(frozen=True)
class Wiring:
    """The channel ends of the replicas in this process.

    Attributes:
        channels: by stage and rank.
        all_reduce: creates an all-reduce over a stage's replicas; with None for the stage, over all ranks. Collective,
            in the same order on all ranks concerned.
        losses: answers what loss a microbatch had, wherever its output stage is.
        common_epoch_ns: returns a moment that is the same on all ranks, on this process's clock
            (time.perf_counter_ns). Collective.
        set_position: tells the core how messages count microbatches: (pass, number of its first, per minibatch).
        connect: creates further channels, for other tensors. In the same order on all ranks.
        close: releases the channels. Collective; harmless when called twice.
    """

    channels: dict[Endpoint, StageChannels]
    all_reduce: Callable[[int | None, str, Buckets], AllReduce]
    losses: LossBoard
    common_epoch_ns: Callable[[], int]
    set_position: Callable[[str, int, int], None]
    connect: Callable[[EdgeTensors], dict[Endpoint, StageChannels]]
    close: Callable[[], None]


def channel_specs(schedule: Schedule, edge_tensors: EdgeTensors, generation: int = 0) -> Iterator[ChannelSpec]:
    """Yield every channel of a schedule, in the same order on all ranks; each generation has tags of its own."""
    layout, tag = schedule.layout, 2 * len(edge_tensors) * generation
    for (source, target), tensors in sorted(edge_tensors.items()):
        returned = tuple(tensor for tensor in tensors if tensor.has_gradient)
        forward, back = activation_slots(schedule, source, target), gradient_slots(schedule, source, target)
        for sender, receiver in channels(layout, source, target):
            before, after = (source, sender), (target, receiver)
            yield ChannelSpec(before, after, "activation", tensors, tag, forward)
            yield ChannelSpec(after, before, "gradient", returned, tag + 1, back)
        tag += 2


def local_wiring(schedule: Schedule, edge_tensors: EdgeTensors, device: torch.device = CPU) -> Wiring:
    """Connect all ranks within this process, on one device."""

    def connect(tensors: EdgeTensors) -> dict[Endpoint, StageChannels]:
        own = {(stage, rank): StageChannels() for stage, ranks in enumerate(schedule.layout) for rank in ranks}
        for spec in channel_specs(schedule, tensors):
            _connect(spec, own, device)
        return own

    groups: dict[tuple[int | None, str], LocalGroup] = defaultdict(LocalGroup)
    return Wiring(
        connect(edge_tensors),
        lambda stage, what, buckets: groups[stage, what].join(buckets),
        local_loss_board(),
        time.perf_counter_ns,
        lambda where, first, n_microbatches: None,
        connect,
        lambda: None,
    )


def mpi_wiring(
    world: World,
    schedule: Schedule,
    edge_tensors: EdgeTensors,
    stall_limit_s: float,
    *,
    ordered: bool,
    route: Route = ON_CPU,
    cores: Cores,
) -> Wiring:
    """Connect this process's rank to the other processes. Collective.

    Args:
        world: all ranks.
        schedule: of the training.
        edge_tensors: the tensors that cross every edge.
        stall_limit_s: seconds that a rank waits for another.
        ordered: sums over replicas are taken in the order of the ranks.
        route: how boundary tensors travel.
        cores: the cores of this process.
    """
    layout = schedule.layout
    progress = load_comm().Progress(
        world.comm,
        oversubscribed=oversubscribed(world.local_size),
        device=route.index,
        cores=sorted(cores.progress),
        spare=cores.progress_is_dedicated,
    )
    generations = itertools.count()

    def connect(tensors: EdgeTensors) -> dict[Endpoint, StageChannels]:
        own = {(stage, world.rank): StageChannels() for stage, ranks in enumerate(layout) if world.rank in ranks}
        for spec in channel_specs(schedule, tensors, next(generations)):
            if spec.source in own and spec.target in own:
                _connect(spec, own, route.device)
            elif spec.target in own:
                # Receives are posted before anybody sends: a message never waits for its receiver.
                own[spec.target].recv[spec.recv_key] = _recv_channel(progress, spec, stall_limit_s, route)
            elif spec.source in own:
                own[spec.source].send[spec.send_key] = _send_channel(progress, spec, stall_limit_s, route)
        return own

    own = connect(edge_tensors)
    offset_ns = _clock_offset_ns(world)

    def common_epoch_ns() -> int:
        now = time.perf_counter_ns() if world.rank == 0 else None
        return int(world.comm.bcast(now, root=0)) + offset_ns

    def all_reduce(stage: int | None, what: str, buckets: Buckets) -> AllReduce:
        ranks = range(world.size) if stage is None else layout[stage]
        group = world.comm.Get_group().Incl(list(ranks))
        comm = world.comm.Create_group(group, tag=0 if stage is None else stage + 1)
        label = f"{what} of all ranks" if stage is None else f"{what} of stage {stage} over its replicas"
        try:
            return MpiAllReduce(progress, comm, buckets, label, stall_limit_s, ordered=ordered)
        finally:
            comm.Free()  # the all-reduce has duplicates of its own
            group.Free()

    losses = mpi_loss_board(progress, stall_limit_s)
    atexit.register(progress.close)  # registered after mpi4py's own finalizer, so it runs before MPI ends
    return Wiring(own, all_reduce, losses, common_epoch_ns, progress.set_position, connect, progress.close)


def _connect(spec: ChannelSpec, own: dict[Endpoint, StageChannels], device: torch.device) -> None:
    """Create both ends of a channel within this process."""
    receiving = LocalRecvChannel(spec.tensors, spec.slots, spec.payload, device)
    own[spec.source].send[spec.send_key] = LocalSendChannel(receiving)
    own[spec.target].recv[spec.recv_key] = receiving


def _recv_channel(progress: Progress, spec: ChannelSpec, stall_limit_s: float, route: Route) -> RecvChannel:
    if not spec.tensors:
        return NullChannel()
    return MpiRecvChannel(
        progress, spec.source[1], spec.tag, spec.tensors, spec.payload, spec.slots, stall_limit_s, route
    )


def _send_channel(progress: Progress, spec: ChannelSpec, stall_limit_s: float, route: Route) -> SendChannel:
    if not spec.tensors:
        return NullChannel()
    return MpiSendChannel(progress, spec.target[1], spec.tag, spec.tensors, spec.payload, stall_limit_s, route)


def _clock_offset_ns(world: World, rounds: int = 20) -> int:
    """Return this rank's clock minus rank 0's, from the fastest of some round trips (error: half of it)."""
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
