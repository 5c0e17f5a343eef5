"""Replay: carry out a schedule on paper. Every rank's actions run in order, messages go through bounded slots.

The verifier and the simulator are built on this. The rules are the runtime's, at their strictest:

- a send is blocking: it begins only when the receiver has a free slot, and the rank goes on only
  then (the runtime lets two sends wait meanwhile);
- every edge has a channel per pair of ranks and direction, with `activation_slots` or `gradient_slots`
  slots. The slot of an activation is free again when the gradient of its microbatch has been sent upstream, that of a
  gradient after the backward that used it; where the backward is split, both after BackwardWeight;
- ReduceGradients begins when all replicas of the stage have come to it, AllReduceGradNorm when all ranks have.

With a CostModel all this takes time. A rank runs ahead on its own clock until it needs ports of the
network; ports are granted in the order of time, once no rank can run further without one. Later requests cannot carry
earlier times, so grants are final.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Protocol

from pipedream_hpc.schedule.actions import (
    Action,
    AllReduceGradNorm,
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    Layout,
    OptimizerStep,
    Payload,
    Recv,
    ReduceGradients,
    Schedule,
    ScheduleError,
    Send,
)
from pipedream_hpc.schedule.text import where

#: One gradient is used in backward, the next may arrive meanwhile.
GRADIENT_SLOTS = 2

#: (rank, action, start in seconds, end in seconds). A plain tuple: a simulation makes millions.
Replayed = tuple[int, Action, float, float]

Compute = Forward | Backward | BackwardInput | BackwardWeight | OptimizerStep


def channels(layout: Layout, source: int, target: int) -> list[tuple[int, int]]:
    """Return the pairs of ranks of stage `source` and ranks of stage `target` that have microbatches in common.

    Replica k mod R of a stage with R replicas runs microbatch k, so replicas i and j have some in common if their
    difference is a multiple of the greatest common divisor of the stages' numbers of replicas.
    """
    apart = math.gcd(len(layout[source]), len(layout[target]))
    return [(a, b) for i, a in enumerate(layout[source]) for j, b in enumerate(layout[target]) if (i - j) % apart == 0]


def activation_slots(schedule: Schedule, source: int, target: int) -> int:
    """Return the slots of an activation channel: the microbatches in flight in the target, and one to receive ahead.

    A skip connection overtakes what goes through the stages between, so all that are in flight in
    the source may wait in the target.
    """
    if source + 1 == target:
        return schedule.in_flight(target) + 1
    return max(schedule.in_flight(source), schedule.in_flight(target)) + 1


def gradient_slots(schedule: Schedule, source: int, target: int) -> int:
    """Return the slots of a gradient channel from `target` back to `source`."""
    # A gradient stays in its slot until the gradients of the weights have been computed from it.
    adjacent = GRADIENT_SLOTS + schedule.lag(source)
    return adjacent if source + 1 == target else max(adjacent, schedule.in_flight(source))


@dataclass(slots=True)
class NicPort:
    """One direction of a network adapter. It carries one message at a time."""

    free_s: float = 0.0


@dataclass(frozen=True)
class Transfer:
    """How a message travels: it occupies all `ports` for `occupied_s` and arrives `latency_s` later."""

    ports: tuple[NicPort, ...]
    occupied_s: float
    latency_s: float


class CostModel(Protocol):
    """How long actions take, in seconds."""

    def compute(self, rank: int, action: Compute) -> float: ...

    def transfer(self, source: int, target: int, boundary: int) -> Transfer:
        """How messages from rank `source` to rank `target` cross the boundary behind stage `boundary`."""
        ...

    def reduce(self, action: ReduceGradients) -> float: ...


class _Channel:
    """The slots of one edge between two ranks, in one direction."""

    __slots__ = ("arrived", "free_since", "reader", "transfer", "writer")

    def __init__(self, slots: int, transfer: Transfer | None) -> None:
        self.free_since = deque([0.0] * slots)  # of every free slot
        self.arrived: deque[tuple[int, float]] = deque()  # (microbatch, when)
        self.transfer = transfer
        self.reader: _Rank | None = None  # asleep until something arrives
        self.writer: _Rank | None = None  # asleep until a slot is free


class _Rank:
    """How far a rank has come."""

    __slots__ = ("action", "began_s", "clock_s", "held", "rank", "received", "recv", "send", "split", "todo")

    def __init__(self, rank: int, todo: Iterator[Action]) -> None:
        self.rank, self.todo = rank, todo
        self.action = next(todo, None)
        self.clock_s = 0.0
        self.began_s = -1.0  # of a send that waits for its ports; negative while there is none
        # Channels by (stage, payload, peer stage, peer rank); None where the edge is not replayed.
        self.recv: dict[tuple[int, Payload, int, int], _Channel | None] = {}
        self.send: dict[tuple[int, Payload, int, int], _Channel | None] = {}
        # (stage, microbatch) -> channels with a slot that is freed at the end of its backward.
        self.held: dict[tuple[int, int], list[_Channel]] = {}
        self.split: set[tuple[int, int]] = set()  # (stage, microbatch) between the two parts of a backward
        self.received: list[_Channel] = []  # forward only: channels with a slot in use


def replay(schedule: Schedule, costs: CostModel | None = None, stages: range | None = None) -> Iterator[Replayed]:
    """Carry out all actions of all ranks and yield each with its times.

    Args:
        schedule: what is replayed.
        costs: how long actions take; without it they take no time.
        stages: replay these stages only; messages over other edges arrive and leave at once.

    Raises:
        ScheduleError: ranks wait for each other for ever (the chain is printed), or a message arrives
            that is not the one to be received.
    """
    replayed = range(len(schedule.layout)) if stages is None else stages
    ranks = {rank: _Rank(rank, schedule.actions(rank)) for s in replayed for rank in dict.fromkeys(schedule.layout[s])}
    channels: dict[tuple[int, int, int, int, Payload], _Channel] = {}
    arrivals: dict[tuple[int, int], dict[int, float]] = defaultdict(dict)  # who has come to an all-reduce, and when
    runnable = deque(ranks.values())
    requests: list[tuple[float, int, _Rank]] = []  # for ports: (when, rank's number, rank)
    training, ends = schedule.training, [not schedule.targets(stage) for stage in range(len(schedule.layout))]

    def channel(sender: int, receiver: int, source: int, target: int, payload: Payload) -> _Channel | None:
        """Return the channel of the edge from stage `source` to stage `target`."""
        if source not in replayed or target not in replayed:
            return None
        key = (source, target, sender, receiver, payload)
        if key not in channels:
            slots = (activation_slots if payload == "activation" else gradient_slots)(schedule, source, target)
            transfer = costs.transfer(sender, receiver, source) if costs is not None else None
            channels[key] = _Channel(min(slots, schedule.total_microbatches), transfer)
        return channels[key]

    def recv_channel(me: _Rank, action: Recv) -> _Channel | None:
        source, target = min(action.stage, action.peer_stage), max(action.stage, action.peer_stage)
        found = channel(action.peer_rank, me.rank, source, target, action.payload)
        me.recv[action.stage, action.payload, action.peer_stage, action.peer_rank] = found
        return found

    def send_channel(me: _Rank, action: Send) -> _Channel | None:
        source, target = min(action.stage, action.peer_stage), max(action.stage, action.peer_stage)
        found = channel(me.rank, action.peer_rank, source, target, action.payload)
        me.send[action.stage, action.payload, action.peer_stage, action.peer_rank] = found
        return found

    def free(held: _Channel, time_s: float) -> None:
        held.free_since.append(time_s)
        if held.writer is not None:
            runnable.append(held.writer)
            held.writer = None

    while runnable or requests:
        me = runnable.popleft() if runnable else heappop(requests)[2]
        while (action := me.action) is not None:
            kind, start = type(action), me.clock_s
            if kind is Recv:
                incoming: Recv = action  # type: ignore[assignment]
                try:
                    line = me.recv[incoming.stage, incoming.payload, incoming.peer_stage, incoming.peer_rank]
                except KeyError:
                    line = recv_channel(me, incoming)
                if line is not None:
                    if not line.arrived:
                        line.reader = me
                        break
                    microbatch, time_s = line.arrived.popleft()
                    if microbatch != incoming.microbatch:
                        raise ScheduleError(
                            f"{where(me.rank, action)}: the next {incoming.payload} from rank {incoming.peer_rank} is "
                            f"that of microbatch {microbatch}"
                        )
                    if time_s > start:
                        me.clock_s = time_s
                    if incoming.payload == "gradient":
                        me.held.setdefault((incoming.stage, microbatch), []).append(line)
                    elif not training:
                        me.received.append(line)
            elif kind is Send:
                outgoing: Send = action  # type: ignore[assignment]
                try:
                    line = me.send[outgoing.stage, outgoing.payload, outgoing.peer_stage, outgoing.peer_rank]
                except KeyError:
                    line = send_channel(me, outgoing)
                gone_s = start
                if line is not None:
                    if me.began_s < 0:
                        if not line.free_since:
                            line.writer = me
                            break
                        free_s = line.free_since.popleft()
                        if free_s > start:
                            me.clock_s = free_s
                        if line.transfer is not None:
                            me.began_s = start
                            heappush(requests, (me.clock_s, me.rank, me))
                            break
                        gone_s = me.clock_s
                    else:
                        assert line.transfer is not None
                        start, me.began_s, gone_s = me.began_s, -1.0, me.clock_s
                        for port in line.transfer.ports:
                            gone_s = max(gone_s, port.free_s)
                        gone_s += line.transfer.occupied_s
                        for port in line.transfer.ports:
                            port.free_s = gone_s
                        gone_s += line.transfer.latency_s
                    line.arrived.append((outgoing.microbatch, gone_s))
                    if line.reader is not None:
                        runnable.append(line.reader)
                        line.reader = None
                # The slot of the activation is free when the gradient has gone upstream, or without
                # training the last activation downstream.
                if not training:
                    if outgoing.peer_stage == schedule.targets(outgoing.stage)[-1]:
                        for held in me.received:
                            free(held, gone_s)
                        me.received = []
                elif outgoing.payload == "gradient":
                    came = me.recv.get((outgoing.stage, "activation", outgoing.peer_stage, outgoing.peer_rank))
                    if came is None:
                        pass
                    elif me.split and (outgoing.stage, outgoing.microbatch) in me.split:
                        me.held.setdefault((outgoing.stage, outgoing.microbatch), []).append(came)
                    else:
                        free(came, gone_s)
            elif kind is ReduceGradients or kind is AllReduceGradNorm:
                assert isinstance(action, ReduceGradients | AllReduceGradNorm)
                over_all = kind is AllReduceGradNorm
                members = tuple(ranks) if over_all else schedule.layout[action.stage]
                present = arrivals[-1 if over_all else action.stage, action.round]
                if me.rank not in present:
                    present[me.rank] = start
                    if len(present) < len(members):
                        break
                    took_s = costs.reduce(action) if costs is not None and isinstance(action, ReduceGradients) else 0.0
                    ended_s = max(present.values()) + took_s
                    for member in members:
                        ranks[member].clock_s = ended_s
                        if member != me.rank:
                            runnable.append(ranks[member])
                start = present[me.rank]
            else:
                if costs is not None:
                    me.clock_s = start + costs.compute(me.rank, action)  # type: ignore[arg-type]
                if training:
                    if kind is Backward or kind is BackwardWeight:
                        ended = action.stage, action.microbatch  # type: ignore[union-attr]
                        for held in me.held.pop(ended, ()):
                            free(held, me.clock_s)
                        if kind is BackwardWeight:
                            me.split.discard(ended)
                    elif kind is BackwardInput:
                        me.split.add((action.stage, action.microbatch))  # type: ignore[union-attr]
                elif ends[action.stage]:
                    for held in me.received:
                        free(held, me.clock_s)
                    me.received = []
            yield me.rank, action, start, me.clock_s
            me.action = next(me.todo, None)
    waiting = {rank: me.action for rank, me in ranks.items() if me.action is not None}
    if waiting:
        raise ScheduleError(_deadlock(schedule, waiting))


def _deadlock(schedule: Schedule, waiting: dict[int, Action]) -> str:
    """Follow who waits for whom until a rank appears again."""
    chain: dict[int, str] = {}
    rank = next(iter(waiting))
    while rank in waiting and rank not in chain:
        action = waiting[rank]
        if isinstance(action, Send | Recv):
            peer_rank = action.peer_rank
        else:  # an all-reduce waits for a rank that is elsewhere
            members = tuple(waiting) if isinstance(action, AllReduceGradNorm) else schedule.layout[action.stage]
            peer_rank = next((other for other in members if waiting.get(other) != action), rank)
        chain[rank] = f"{where(rank, action)} waits for rank {peer_rank}"
        rank = peer_rank
    if rank not in chain:
        return f"the schedule deadlocks: {', '.join(chain.values())}; rank {rank} has finished"
    # Ranks before the circle only wait for it: leave them out.
    circle = list(chain)[list(chain).index(rank) :]
    return f"the schedule deadlocks: {', '.join(chain[each] for each in circle)}, where the circle began"
