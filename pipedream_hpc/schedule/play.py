"""Play a schedule on paper: every rank's actions in order, messages through bounded slots.

The verifier and the simulator both stand on this. The rules are the runtime's, at their strictest:

- a send is blocking: it begins only when the receiver has a free slot, and the rank goes on only
  then (the runtime lets two sends wait meanwhile);
- a channel has `activation_slots` or GRADIENT_SLOTS slots; an activation's is free again when its
  minibatch's backward has sent the gradient on, a gradient's after the update;
- a reduction begins when all replicas of the stage have come to it.

Because order on a rank and on a channel is fixed, times follow without an event queue: an action
starts at the latest of its rank's clock and of what it waits for.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.schedule.actions import Action, Backward, Forward, Receive, Reduce, Schedule, Send, Update

#: One gradient is at work in backward and update, the next may arrive meanwhile.
GRADIENT_SLOTS = 2


def activation_slots(schedule: Schedule, stage: int) -> int:
    """Slots of an activation channel into `stage`: those in flight, and one to receive ahead."""
    return schedule.in_flight(stage) + 1


class ScheduleError(PipedreamError):
    """A schedule that must not be launched: it would hang, or use the wrong weights."""


class Durations(Protocol):
    """How long things take, in seconds."""

    def compute(self, rank: int, stage: int, action: Forward | Backward | Update) -> float: ...

    def transfer(self, source: int, target: int, stage: int, action: Send) -> float: ...

    def reduce(self, stage: int, action: Reduce) -> float: ...


class Instant:
    """Nothing takes any time: only order counts."""

    def compute(self, rank: int, stage: int, action: Forward | Backward | Update) -> float:
        return 0.0

    def transfer(self, source: int, target: int, stage: int, action: Send) -> float:
        return 0.0

    def reduce(self, stage: int, action: Reduce) -> float:
        return 0.0


@dataclass(frozen=True, slots=True)
class Step:
    """One action of one rank, carried out from start_s to end_s."""

    rank: int
    stage: int
    action: Action
    start_s: float
    end_s: float


@dataclass
class _Channel:
    free_since: deque[float]  # one entry per free slot: when it became free
    arrived: deque[tuple[int, float]] = field(default_factory=deque)  # (minibatch, time)
    link_free_s: float = 0.0


@dataclass
class _Rank:
    stage: int
    todo: Iterator[Action]
    current: Action | None
    clock_s: float = 0.0
    gradient_from: list[int] = field(default_factory=list)  # peers whose gradient slot is held
    activation_from: dict[int, int] = field(default_factory=dict)  # minibatch -> peer


def play(schedule: Schedule, durations: Durations | None = None) -> Iterator[Step]:
    """Carry out all actions of all ranks.

    Raises:
        ScheduleError: ranks wait for each other for ever (the chain is printed), or a message comes
            that is not the one to be received.
    """
    clockwork: Durations = durations or Instant()
    ranks: dict[int, _Rank] = {}
    for stage, members in enumerate(schedule.layout):
        for rank in members:
            todo = schedule.actions(rank)
            ranks[rank] = _Rank(stage, todo, next(todo, None))
    channels: dict[tuple[int, int, str], _Channel] = {}
    reductions: dict[tuple[int, int], dict[int, float]] = defaultdict(dict)  # who has come, and when
    runnable = deque(ranks)
    asleep: dict[object, list[int]] = defaultdict(list)  # what is waited for -> ranks

    def channel(source: int, target: int, payload: str) -> _Channel:
        key = (source, target, payload)
        if key not in channels:
            stage = ranks[target].stage
            slots = activation_slots(schedule, stage) if payload == "activation" else GRADIENT_SLOTS
            channels[key] = _Channel(deque([0.0] * slots))
        return channels[key]

    def wake(key: object) -> None:
        runnable.extend(asleep.pop(key, ()))

    def free(source: int, target: int, payload: str, time_s: float) -> None:
        channel(source, target, payload).free_since.append(time_s)
        wake(("slot", source, target, payload))

    while runnable:
        rank = runnable.popleft()
        me = ranks[rank]
        while (action := me.current) is not None:
            start = me.clock_s
            if isinstance(action, Receive):
                line = channel(action.peer, rank, action.payload)
                if not line.arrived:
                    asleep["message", action.peer, rank, action.payload].append(rank)
                    break
                minibatch, time_s = line.arrived.popleft()
                if minibatch != action.minibatch:
                    raise ScheduleError(
                        f"rank {rank} is to {action}, but the next {action.payload} from rank {action.peer} is "
                        f"that of minibatch {minibatch}"
                    )
                me.clock_s = max(start, time_s)
                if action.payload == "activation":
                    me.activation_from[minibatch] = action.peer
                else:
                    me.gradient_from.append(action.peer)
            elif isinstance(action, Send):
                line = channel(rank, action.peer, action.payload)
                if not line.free_since:
                    asleep["slot", rank, action.peer, action.payload].append(rank)
                    break
                me.clock_s = max(start, line.free_since.popleft())
                begins = max(me.clock_s, line.link_free_s)
                line.link_free_s = begins + clockwork.transfer(rank, action.peer, me.stage, action)
                line.arrived.append((action.minibatch, line.link_free_s))
                wake(("message", rank, action.peer, action.payload))
                finished = action.payload == "gradient" or not schedule.training
                if finished and action.minibatch in me.activation_from:
                    free(me.activation_from.pop(action.minibatch), rank, "activation", line.link_free_s)
            elif isinstance(action, Reduce):
                present = reductions[me.stage, action.round]
                members = schedule.layout[me.stage]
                if rank not in present:
                    present[rank] = start
                    if len(present) < len(members):
                        asleep["reduce", me.stage, action.round].append(rank)
                        break
                    ready = max(ranks[member].clock_s for member in members)
                    for member in members:
                        ranks[member].clock_s = ready + clockwork.reduce(me.stage, action)
                    wake(("reduce", me.stage, action.round))
                start = present[rank]
            else:
                me.clock_s = start + clockwork.compute(rank, me.stage, action)
                is_output = me.stage + 1 == len(schedule.layout)
                if isinstance(action, Forward) and is_output and not schedule.training and me.stage > 0:
                    free(me.activation_from.pop(action.minibatch), rank, "activation", me.clock_s)
                if isinstance(action, Update):
                    for peer in me.gradient_from:
                        free(peer, rank, "gradient", me.clock_s)
                    me.gradient_from.clear()
            yield Step(rank, me.stage, action, start, me.clock_s)
            me.current = next(me.todo, None)
    waiting = {rank: me.current for rank, me in ranks.items() if me.current is not None}
    if waiting:
        raise ScheduleError(_deadlock(schedule, waiting))


def _deadlock(schedule: Schedule, waiting: dict[int, Action]) -> str:
    """Follow who waits for whom until a rank comes up again."""
    stage_of = {rank: members for members in schedule.layout for rank in members}
    rank, chain = next(iter(waiting)), []
    seen: set[int] = set()
    while rank in waiting and rank not in seen:
        seen.add(rank)
        action = waiting[rank]
        if isinstance(action, Send | Receive):
            peer = action.peer
        else:  # a reduction waits for a replica that is elsewhere
            others = [other for other in stage_of[rank] if waiting.get(other) != action]
            peer = others[0] if others else rank
        chain.append(f"rank {rank} waits in '{action}' for rank {peer}")
        rank = peer
    end = f"rank {rank} is where this began" if rank in seen else f"rank {rank} has finished"
    return f"the schedule deadlocks: {', '.join(chain)}; {end}"
