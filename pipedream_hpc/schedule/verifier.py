"""Verifier: prove that a schedule finishes within its memory, with the right weights, before it is launched."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

from pipedream_hpc.schedule.actions import Backward, Forward, Layout, Schedule, Update
from pipedream_hpc.schedule.play import ScheduleError, Step, play


@dataclass(frozen=True)
class Proof:
    """What was proved.

    Attributes:
        actions: how many were played.
        in_flight: most minibatches alive at once on a rank, by stage.
        versions: most weight versions alive at once on a rank, by stage.
    """

    actions: int
    in_flight: tuple[int, ...]
    versions: tuple[int, ...]


@dataclass
class _Account:
    """What one rank holds."""

    newest: int = 0
    held: dict[int, int] = field(default_factory=dict)  # minibatch -> version
    forwards: int = 0
    backwards: int = 0
    most_in_flight: int = 0
    most_versions: int = 1


def verify(schedule: Schedule) -> Proof:
    """Play `schedule` with blocking sends and bounded slots and check every step.

    Proved are: it finishes; every message is the one its receiver expects; the backward of a
    minibatch uses the weight version of its forward, and the forward the newest; minibatches and
    versions alive stay within `in_flight`; every minibatch passes every stage once; replicas end on
    the same version.

    Raises:
        ScheduleError: names the rank and the action, or the chain of waiting ranks.
    """
    accounts = {rank: _Account() for members in schedule.layout for rank in members}
    actions = 0
    for step in play(schedule):
        actions += 1
        _check(step, accounts[step.rank], schedule)
    for stage, members in enumerate(schedule.layout):
        _check_stage(stage, [accounts[rank] for rank in members], schedule)
    return Proof(
        actions,
        tuple(max(accounts[rank].most_in_flight for rank in members) for members in schedule.layout),
        tuple(max(accounts[rank].most_versions for rank in members) for members in schedule.layout),
    )


def shortened(layout: Layout, minibatches: int) -> int:
    """The smallest number of minibatches that proves as much as `minibatches`.

    Between start-up and drain a round-robin schedule repeats itself every lcm(replicas)
    minibatches, so whole periods beyond a few can be left out.
    """
    period = math.lcm(*(len(members) for members in layout))
    enough = 4 * (sum(len(members) for members in layout) + period)
    return minibatches if minibatches <= enough else enough + (minibatches - enough) % period


def _check(step: Step, account: _Account, schedule: Schedule) -> None:
    action, where = step.action, f"rank {step.rank} (stage {step.stage}) at '{step.action}'"
    limit = schedule.in_flight(step.stage)
    if isinstance(action, Forward):
        if action.version != account.newest:
            raise ScheduleError(f"{where}: the newest version is {account.newest}")
        account.forwards += 1
        if schedule.training:
            account.held[action.minibatch] = action.version
            account.most_in_flight = max(account.most_in_flight, len(account.held))
            if len(account.held) > limit:
                raise ScheduleError(f"{where}: {len(account.held)} minibatches in flight, planned are {limit}")
        else:
            account.most_in_flight = 1
    elif isinstance(action, Backward):
        held = account.held.pop(action.minibatch, None)
        if held != action.version:
            raise ScheduleError(f"{where}: its forward used version {held}")
        account.backwards += 1
    elif isinstance(action, Update):
        if action.version != account.newest + 1:
            raise ScheduleError(f"{where}: the newest version is {account.newest}")
        alive = {*account.held.values(), account.newest}
        if account.newest in account.held.values():
            alive.add(action.version)  # needs a slab of its own
        account.newest = action.version
        account.most_versions = max(account.most_versions, len(alive))
        if len(alive) > limit:
            raise ScheduleError(f"{where}: {len(alive)} weight versions alive, planned are {limit}")


def _check_stage(stage: int, accounts: list[_Account], schedule: Schedule) -> None:
    counted = Counter(forwards=sum(a.forwards for a in accounts), backwards=sum(a.backwards for a in accounts))
    if counted["forwards"] != schedule.minibatches:
        raise ScheduleError(f"stage {stage} runs {counted['forwards']} of {schedule.minibatches} forwards")
    if schedule.training and counted["backwards"] != schedule.minibatches:
        raise ScheduleError(f"stage {stage} runs {counted['backwards']} of {schedule.minibatches} backwards")
    if len({account.newest for account in accounts}) > 1:
        raise ScheduleError(f"stage {stage}: its replicas end on versions {[a.newest for a in accounts]}")
