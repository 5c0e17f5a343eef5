"""Verifier: prove that a schedule finishes within its memory, with the right weights, before it is launched.

`verify` plays the whole schedule. At a launch on many ranks that would take longer than the
launch; `verify_around` proves as much of it as concerns one rank, and every rank calls it. Three
facts make its part small (measured: benchmarks/deadlocks.py --launch):

**Blocks.** Ranks that wait for each other for ever form a circle in the graph of who talks to whom. A
circle does not pass one rank twice, so it cannot pass a stage of a single rank and come back (unless a
skip connection leads around that stage): it lies between two such stages. And because order on a rank
and on a channel is fixed, whether ranks get stuck does not depend on timing: if a block gets stuck
within the whole, it does so when played alone, with all other messages there at once. So the blocks
are played one by one::

    ranks    0 ─┐
             1 ─┴─ 2 ─── 3 ─── 4 ─┬─ 5
                                  └─ 6
    blocks   [0 1  2]                        A straight pipeline of p stages is p - 1 pairs, and a
                  [2     3]                  rank belongs to two at most.
                        [3     4]
                              [4    5 6]

**Symmetry.** If all numbers of replicas (and microbatches to a minibatch) have a common divisor g,
units k and k' meet on a rank only if k = k' mod g: the schedule is g equal pipelines that share
nothing but reductions, at which all of them are at the same point. One of them is played, that with
the most units; another may be one unit shorter, which leaves out actions but adds no order.

**Periods.** Between start-up and drain the rest repeats itself (`shortened`).
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from pipedream_hpc.schedule.actions import (
    Backward,
    Forward,
    Layout,
    Links,
    Reduce,
    Schedule,
    ScheduleError,
    Update,
    WeightGradient,
)
from pipedream_hpc.schedule.kinds import AnySchedule
from pipedream_hpc.schedule.play import Step, play
from pipedream_hpc.schedule.routed import Microbatched


@dataclass(frozen=True)
class Proof:
    """What was proved.

    Attributes:
        actions: how many were played.
        in_flight: most units alive at once on a replica, by stage; 0 where none was looked at.
        versions: most weight versions alive at once on a replica, by stage; likewise.
    """

    actions: int
    in_flight: tuple[int, ...]
    versions: tuple[int, ...]


class _Account:
    """What one replica of one stage holds."""

    __slots__ = (
        "backwards",
        "forwards",
        "held",
        "limit",
        "most_in_flight",
        "most_versions",
        "newest",
        "put_off",
        "slabs",
    )

    def __init__(self, limit: int, slabs: int) -> None:
        self.limit, self.slabs = limit, slabs
        self.held: dict[int, int] = {}  # unit -> version
        self.put_off: set[int] = set()  # units whose weight gradients are to come
        self.newest = self.forwards = self.backwards = self.most_in_flight = 0
        self.most_versions = 1


def verify(schedule: Schedule, stages: range | None = None) -> Proof:
    """Play `schedule` with blocking sends and bounded slots and check every step.

    Proved are: it finishes; every message is the one its receiver expects; the backward of a unit
    uses the weight version of its forward; a version is used only while it is kept, which the
    `versions` newest are, and is the newest where the schedule promises that; units in flight stay
    within `in_flight`; every reduction divides by the true count; every unit passes every stage
    once; replicas end on the same version.

    Args:
        schedule: what is to be proved.
        stages: look at these only (see above); all by default.

    Raises:
        ScheduleError: names the rank and the action, or the chain of waiting ranks.
    """
    looked_at = range(len(schedule.layout)) if stages is None else stages
    accounts = {
        (rank, stage): _Account(schedule.in_flight(stage), schedule.versions(stage))
        for stage in looked_at
        for rank in schedule.layout[stage]
    }
    actions = 0
    for step in play(schedule, stages=stages):
        actions += 1
        _check(step, accounts[step[0], step[1].stage], schedule)
    most_in_flight, most_versions = [0] * len(schedule.layout), [0] * len(schedule.layout)
    for stage in looked_at:
        own = [accounts[rank, stage] for rank in schedule.layout[stage]]
        _check_stage(stage, own, schedule)
        most_in_flight[stage] = max(account.most_in_flight for account in own)
        most_versions[stage] = max(account.most_versions for account in own)
    return Proof(actions, tuple(most_in_flight), tuple(most_versions))


def verify_around(schedule: AnySchedule, rank: int | None) -> None:
    """Prove what concerns `rank`; when every rank has, the schedule is proved. None: all of it.

    Raises:
        ScheduleError: as `verify`.
    """
    smaller = representative(schedule)
    stages = {stage for stage, ranks in enumerate(schedule.layout) if rank is None or rank in ranks}
    for block in blocks(smaller.layout, smaller.links):
        if stages.intersection(block):
            verify(smaller, block)


def blocks(layout: Layout, links: Links | None = None) -> list[range]:
    """Runs of stages within which ranks can wait for each other in a circle, in order."""
    last = len(layout) - 1
    around = {stage for source, target in links or () for stage in range(source + 1, target)}
    if sum(map(len, layout)) > len({rank for ranks in layout for rank in ranks}) or not last:
        return [range(last + 1)]  # ranks come round again: all is one circle
    ends = [0, *(stage for stage in range(1, last) if len(layout[stage]) == 1 and stage not in around), last]
    return [range(first, end + 1) for first, end in pairwise(ends)]


def representative(schedule: AnySchedule) -> AnySchedule:
    """The smallest schedule that proves as much as `schedule`: one of equal pipelines, shortened."""
    sizes = [len(ranks) for ranks in schedule.layout]
    if isinstance(schedule, Microbatched):
        equal = math.gcd(*sizes, schedule.microbatches)
        microbatches = schedule.microbatches // equal
        layout, units = _every(schedule, equal, [microbatches])
        return dataclasses.replace(schedule, layout=layout, minibatches=units, microbatches=microbatches)
    equal = math.gcd(*sizes)
    layout, units = _every(schedule, equal, [size // equal * schedule.accumulate for size in sizes])
    return dataclasses.replace(schedule, layout=layout, minibatches=units)


def _every(schedule: Schedule, step: int, per_update: Sequence[int]) -> tuple[Layout, int]:
    layout = tuple(ranks[::step] for ranks in schedule.layout)
    return layout, shortened(layout, -(-schedule.minibatches // step), per_update)


def shortened(layout: Layout, units: int, per_update: Sequence[int]) -> int:
    """The smallest number of units that proves as much as `units`.

    Between start-up and drain a round-robin schedule repeats itself every lcm(replicas, units to an
    update) units, so whole periods beyond a few can be left out. Start-up is over when every stage has
    made an update for a unit of the steady state: after twice as many units as ranks at most.
    """
    period = math.lcm(*per_update, *(len(members) for members in layout))
    enough = 2 * (sum(len(members) for members in layout) + period)
    return units if units <= enough else enough + (units - enough) % period


def _check(step: Step, account: _Account, schedule: Schedule) -> None:
    action = step[1]
    kind = type(action)
    if kind is Forward:
        assert isinstance(action, Forward)
        if schedule.newest and action.version != account.newest:
            raise ScheduleError(f"{_where(step)}: the newest version is {account.newest}")
        _check_alive(step, account, action.version)
        account.forwards += 1
        if schedule.training:
            account.held[action.minibatch] = action.version
        account.most_in_flight = max(account.most_in_flight, len(account.held), 1)
        if len(account.held) > account.limit:
            raise ScheduleError(
                f"{_where(step)}: {len(account.held)} minibatches in flight, planned are {account.limit}"
            )
    elif kind is Backward:
        assert isinstance(action, Backward)
        held = account.held.get(action.minibatch)
        if schedule.stashes and held != action.version:
            raise ScheduleError(f"{_where(step)}: its forward used version {held}")
        _check_alive(step, account, action.version)
        account.backwards += 1
        if schedule.puts_off(action.stage, action.minibatch):
            account.put_off.add(action.minibatch)
        else:
            account.held.pop(action.minibatch, None)
    elif kind is WeightGradient:
        assert isinstance(action, WeightGradient)
        if action.minibatch not in account.put_off:
            raise ScheduleError(f"{_where(step)}: no backward of it has put anything off")
        account.put_off.remove(action.minibatch)
        if account.held.pop(action.minibatch) != action.version:
            raise ScheduleError(f"{_where(step)}: its backward used another version")
        _check_alive(step, account, action.version)
    elif kind is Update:
        assert isinstance(action, Update)
        if action.version != account.newest + 1:
            raise ScheduleError(f"{_where(step)}: the newest version is {account.newest}")
        if account.put_off:
            missing = ", ".join(map(str, sorted(account.put_off)))
            raise ScheduleError(f"{_where(step)}: the weight gradient of minibatch {missing} is still to come")
        account.newest = action.version
        # The oldest unit is enough: what else is no longer kept is found at its backward.
        if schedule.stashes:
            _check_alive(step, account, next(iter(account.held.values()), action.version))
    elif kind is Reduce:
        assert isinstance(action, Reduce)
        units = schedule.per_update(action.stage)
        true = min(units, schedule.minibatches - action.round * units)
        if action.round != account.newest or action.minibatches != true:
            raise ScheduleError(f"{_where(step)}: due is round {account.newest} over {true} minibatches")


def _check_alive(step: Step, account: _Account, version: int) -> None:
    """Versions are kept in a ring of slabs: version v in slab v mod slabs."""
    alive = account.newest - version + 1
    if alive > account.slabs:
        raise ScheduleError(
            f"{_where(step)}: {alive} weight versions alive, planned are {account.slabs} "
            f"(version {version} to {account.newest})"
        )
    if alive < 1:
        raise ScheduleError(f"{_where(step)}: the newest version is {account.newest}")
    account.most_versions = max(account.most_versions, alive)


def _where(step: Step) -> str:
    return f"rank {step[0]} (stage {step[1].stage}) at '{step[1]}'"


def _check_stage(stage: int, accounts: list[_Account], schedule: Schedule) -> None:
    counted = Counter(forwards=sum(a.forwards for a in accounts), backwards=sum(a.backwards for a in accounts))
    for what in ("forwards", "backwards") if schedule.training else ("forwards",):
        if counted[what] != schedule.minibatches:
            raise ScheduleError(f"stage {stage} runs {counted[what]} of {schedule.minibatches} {what}")
    if len({account.newest for account in accounts}) > 1:
        raise ScheduleError(f"stage {stage}: its replicas end on versions {[a.newest for a in accounts]}")
    updates = -(-schedule.minibatches // schedule.per_update(stage)) if schedule.training else 0
    if accounts[0].newest != updates:
        raise ScheduleError(f"stage {stage} ends on version {accounts[0].newest}, but {updates} updates are due")
