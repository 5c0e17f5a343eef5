"""Play a schedule on paper: every rank's actions in order, messages through bounded slots.

The verifier and the simulator both stand on this. The rules are the runtime's, at their strictest:

- a send is blocking: it begins only when the receiver has a free slot, and the rank goes on only
  then (the runtime lets two sends wait meanwhile);
- every link has a channel per pair of ranks and direction, with `activation_slots` or `gradient_slots`
  slots. An activation's is free again when its unit's gradient has been sent on upstream, a
  gradient's after the backward that used it; both not before the weight gradient where backward is split;
- a reduction begins when all replicas of the stage have come to it, an agreement when all ranks have.

With a Clockwork all this takes time. A rank runs ahead on its own clock until it wants a port of the
network; ports are given out in the order of time, once nobody can run further without one. What a
port is asked for later is caused by something that was waiting, so it cannot be earlier.
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
    Agree,
    Backward,
    Forward,
    Layout,
    Payload,
    Receive,
    Reduce,
    Schedule,
    ScheduleError,
    Send,
    Update,
    WeightGradient,
)

#: One gradient is at work in backward, the next may arrive meanwhile.
GRADIENT_SLOTS = 2

#: (rank, action, start in seconds, end in seconds). A plain tuple: a simulation makes millions.
Step = tuple[int, Action, float, float]


def channels(layout: Layout, source: int, target: int) -> list[tuple[int, int]]:
    """Ranks of stage `source` and ranks of stage `target` that have units in common.

    Unit k is that of replica k mod R in a stage of R: of replicas i and j if their difference is a multiple of the
    greatest common divisor of the stages' numbers.
    """
    apart = math.gcd(len(layout[source]), len(layout[target]))
    return [(a, b) for i, a in enumerate(layout[source]) for j, b in enumerate(layout[target]) if (i - j) % apart == 0]


def activation_slots(schedule: Schedule, source: int, target: int) -> int:
    """Slots of an activation channel: those in flight in the target, and one to receive ahead.

    A skip connection overtakes what goes through the stages between, so all that are in flight in
    the source may wait in the target.
    """
    if source + 1 == target:
        return schedule.in_flight(target) + 1
    return max(schedule.in_flight(source), schedule.in_flight(target)) + 1


def gradient_slots(schedule: Schedule, source: int, target: int) -> int:
    """Slots of a gradient channel from `target` back to `source`; likewise."""
    # Gradients that weights' are still to be computed from stay in theirs.
    adjacent = GRADIENT_SLOTS + schedule.lag(source)
    return adjacent if source + 1 == target else max(adjacent, schedule.in_flight(source))


@dataclass(slots=True)
class Port:
    """One direction of a network adapter: carries one message at a time."""

    free_s: float = 0.0


@dataclass(frozen=True)
class Link:
    """How a message gets over: it holds all `ports` for `occupied_s` and arrives `latency_s` later."""

    ports: tuple[Port, ...]
    occupied_s: float
    latency_s: float


class Clockwork(Protocol):
    """How long things take, in seconds."""

    def compute(self, rank: int, action: Forward | Backward | WeightGradient | Update) -> float: ...

    def link(self, source: int, target: int, cut: int) -> Link:
        """What carries the messages from `source` to `target` over the cut behind stage `cut`."""
        ...

    def reduce(self, action: Reduce) -> float: ...


class _Channel:
    """The slots of one cut between two ranks, in one direction."""

    __slots__ = ("arrived", "free_since", "link", "reader", "writer")

    def __init__(self, slots: int, link: Link | None) -> None:
        self.free_since = deque([0.0] * slots)  # of every free slot
        self.arrived: deque[tuple[int, float]] = deque()  # (unit, when)
        self.link = link
        self.reader: _Rank | None = None  # asleep until something arrives
        self.writer: _Rank | None = None  # asleep until a slot is free


class _Rank:
    """Where a rank stands."""

    __slots__ = ("action", "began_s", "clock_s", "done_with", "entries", "inbox", "outbox", "rank", "todo")

    def __init__(self, rank: int, todo: Iterator[Action]) -> None:
        self.rank, self.todo = rank, todo
        self.action = next(todo, None)
        self.clock_s = 0.0
        self.began_s = -1.0  # of a send that waits for its ports; negative while there is none
        # Channels by (stage, payload, peer, far stage); None where the link is not played.
        self.inbox: dict[tuple[int, Payload, int, int], _Channel | None] = {}
        self.outbox: dict[tuple[int, Payload, int, int], _Channel | None] = {}
        # (stage, unit) -> whose slots are free when its backward is whole.
        self.done_with: dict[tuple[int, int], list[_Channel]] = {}
        self.entries: list[_Channel] = []  # forward only: whose slots are held


def play(schedule: Schedule, clockwork: Clockwork | None = None, stages: range | None = None) -> Iterator[Step]:
    """Carry out all actions of all ranks; nothing takes any time without a clockwork.

    Args:
        schedule: what is played.
        clockwork: how long things take.
        stages: play these stages only; messages over other cuts are taken to be there and to go at once.

    Raises:
        ScheduleError: ranks wait for each other for ever (the chain is printed), or a message comes
            that is not the one to be received.
    """
    played = range(len(schedule.layout)) if stages is None else stages
    ranks = {rank: _Rank(rank, schedule.actions(rank)) for s in played for rank in dict.fromkeys(schedule.layout[s])}
    channels: dict[tuple[int, int, int, int, Payload], _Channel] = {}
    meetings: dict[tuple[int, int], dict[int, float]] = defaultdict(dict)  # who has come, and when
    runnable = deque(ranks.values())
    requests: list[tuple[float, int, _Rank]] = []  # for ports: (when, rank's number, rank)
    training, ends = schedule.training, [not schedule.targets(stage) for stage in range(len(schedule.layout))]

    def channel(sender: int, receiver: int, source: int, target: int, payload: Payload) -> _Channel | None:
        """Of the link between the stages `source` and `target`."""
        if source not in played or target not in played:
            return None
        key = (source, target, sender, receiver, payload)
        if key not in channels:
            slots = (activation_slots if payload == "activation" else gradient_slots)(schedule, source, target)
            link = clockwork.link(sender, receiver, source) if clockwork is not None else None
            channels[key] = _Channel(min(slots, schedule.minibatches), link)
        return channels[key]

    def inbox(me: _Rank, action: Receive) -> _Channel | None:
        source, target = min(action.stage, action.far), max(action.stage, action.far)
        line = channel(action.peer, me.rank, source, target, action.payload)
        me.inbox[action.stage, action.payload, action.peer, action.far] = line
        return line

    def outbox(me: _Rank, action: Send) -> _Channel | None:
        source, target = min(action.stage, action.far), max(action.stage, action.far)
        line = channel(me.rank, action.peer, source, target, action.payload)
        me.outbox[action.stage, action.payload, action.peer, action.far] = line
        return line

    def free(line: _Channel, time_s: float) -> None:
        line.free_since.append(time_s)
        if line.writer is not None:
            runnable.append(line.writer)
            line.writer = None

    while runnable or requests:
        me = runnable.popleft() if runnable else heappop(requests)[2]
        while (action := me.action) is not None:
            kind, start = type(action), me.clock_s
            if kind is Forward or kind is Backward or kind is Update or kind is WeightGradient:
                if clockwork is not None:
                    me.clock_s = start + clockwork.compute(me.rank, action)  # type: ignore[arg-type]
                if kind is WeightGradient or (
                    isinstance(action, Backward) and not schedule.puts_off(action.stage, action.minibatch)
                ):
                    for held in me.done_with.pop((action.stage, action.minibatch), ()):  # type: ignore[union-attr]
                        free(held, me.clock_s)
                elif not training and ends[action.stage]:
                    for held in me.entries:
                        free(held, me.clock_s)
                    me.entries = []
            elif kind is Receive:
                assert isinstance(action, Receive)
                try:
                    line = me.inbox[action.stage, action.payload, action.peer, action.far]
                except KeyError:
                    line = inbox(me, action)
                if line is not None:
                    if not line.arrived:
                        line.reader = me
                        break
                    unit, time_s = line.arrived.popleft()
                    if unit != action.minibatch:
                        raise ScheduleError(
                            f"rank {me.rank} (stage {action.stage}) is to {action}, but the next {action.payload} from "
                            f"rank {action.peer} is that of minibatch {unit}"
                        )
                    if time_s > start:
                        me.clock_s = time_s
                    if action.payload == "gradient":
                        me.done_with.setdefault((action.stage, unit), []).append(line)
                    elif not training:
                        me.entries.append(line)
            elif kind is Send:
                assert isinstance(action, Send)
                try:
                    line = me.outbox[action.stage, action.payload, action.peer, action.far]
                except KeyError:
                    line = outbox(me, action)
                gone_s = start
                if line is not None:
                    if me.began_s < 0:
                        if not line.free_since:
                            line.writer = me
                            break
                        free_s = line.free_since.popleft()
                        if free_s > start:
                            me.clock_s = free_s
                        if line.link is not None:
                            me.began_s = start
                            heappush(requests, (me.clock_s, me.rank, me))
                            break
                        gone_s = me.clock_s
                    else:
                        assert line.link is not None
                        start, me.began_s, gone_s = me.began_s, -1.0, me.clock_s
                        for port in line.link.ports:
                            gone_s = max(gone_s, port.free_s)
                        gone_s += line.link.occupied_s
                        for port in line.link.ports:
                            port.free_s = gone_s
                        gone_s += line.link.latency_s
                    line.arrived.append((action.minibatch, gone_s))
                    if line.reader is not None:
                        runnable.append(line.reader)
                        line.reader = None
                # What came in is done with: when the gradient has gone upstream, or without training
                # the last activation downstream.
                if not training:
                    if action.far == schedule.targets(action.stage)[-1]:
                        for held in me.entries:
                            free(held, gone_s)
                        me.entries = []
                elif action.payload == "gradient":
                    entry = me.inbox.get((action.stage, "activation", action.peer, action.far))
                    if entry is not None and schedule.puts_off(action.stage, action.minibatch):
                        me.done_with.setdefault((action.stage, action.minibatch), []).append(entry)
                    elif entry is not None:
                        free(entry, gone_s)
            else:
                assert isinstance(action, Reduce | Agree)
                agreement = isinstance(action, Agree)
                members = tuple(ranks) if agreement else schedule.layout[action.stage]
                present = meetings[-1 if agreement else action.stage, action.round]
                if me.rank not in present:
                    present[me.rank] = start
                    if len(present) < len(members):
                        break
                    took_s = clockwork.reduce(action) if clockwork is not None and isinstance(action, Reduce) else 0.0
                    ended_s = max(present.values()) + took_s
                    for member in members:
                        ranks[member].clock_s = ended_s
                        if member != me.rank:
                            runnable.append(ranks[member])
                start = present[me.rank]
            yield me.rank, action, start, me.clock_s
            me.action = next(me.todo, None)
    waiting = {rank: me.action for rank, me in ranks.items() if me.action is not None}
    if waiting:
        raise ScheduleError(_deadlock(schedule, waiting))


def _deadlock(schedule: Schedule, waiting: dict[int, Action]) -> str:
    """Follow who waits for whom until a rank comes up again."""
    chain: dict[int, str] = {}
    rank = next(iter(waiting))
    while rank in waiting and rank not in chain:
        action = waiting[rank]
        if isinstance(action, Send | Receive):
            peer = action.peer
        else:  # a reduction waits for a replica that is elsewhere
            members = tuple(waiting) if isinstance(action, Agree) else schedule.layout[action.stage]
            peer = next((other for other in members if waiting.get(other) != action), rank)
        chain[rank] = f"rank {rank} (stage {action.stage}) waits in '{action}' for rank {peer}"
        rank = peer
    if rank not in chain:
        return f"the schedule deadlocks: {', '.join(chain.values())}; rank {rank} has finished"
    # Ranks before the circle only wait for it: leave them out.
    circle = list(chain)[list(chain).index(rank) :]
    return f"the schedule deadlocks: {', '.join(chain[each] for each in circle)}, where this began"
