"""Verifier: prove that a schedule finishes within its memory and trains as planned, before it is launched.

`verify` replays the whole schedule. At a launch on many ranks that would take longer than the
launch; `verify_around` proves as much of it as concerns one rank, and every rank calls it. Three
facts make its part small (measured: benchmarks/deadlocks.py --launch):

**Blocks.** Ranks that wait for each other for ever form a circle in the graph of who exchanges messages. A
circle does not pass one rank twice, so it cannot pass a stage of a single rank and come back (unless a
skip connection leads around that stage): it lies between two such stages. And because order on a rank
and on a channel is fixed, whether ranks get stuck does not depend on timing: if a block gets stuck
within the whole, it does so when replayed alone, with all other messages there at once. So the blocks
are replayed one by one::

    ranks    0 ─┐
             1 ─┴─ 2 ─── 3 ─── 4 ─┬─ 5
                                  └─ 6
    blocks   [0 1  2]                        A straight pipeline of p stages is p - 1 pairs, and a
                  [2     3]                  rank belongs to two at most.
                        [3     4]
                              [4    5 6]

**Symmetry.** If all numbers of replicas (and of microbatches per round) have a common divisor g,
microbatches k and k' meet on a rank only if k = k' mod g: the schedule is g equal pipelines that share
nothing but reductions, at which all of them are at the same point. One of them is replayed, that with
the most microbatches; another may be one microbatch shorter, which leaves out actions but adds no order.

**Periods.** Between start-up and drain the rest repeats itself (`shortened`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NoReturn

from pipedream_hpc.planning.plan import Edge
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
from pipedream_hpc.schedule.registry import AnySchedule
from pipedream_hpc.schedule.replay import replay
from pipedream_hpc.schedule.routed import Microbatched
from pipedream_hpc.schedule.text import where
from pipedream_hpc.schedule.written import Written


@dataclass(frozen=True)
class Proof:
    """What was proved.

    Attributes:
        actions: how many were replayed.
        in_flight: most microbatches in flight at once on a replica, by stage; 0 for stages that were not replayed.
        versions: most weight versions in use at once on a replica, by stage; 0 for stages that were not replayed.
    """

    actions: int
    in_flight: tuple[int, ...]
    versions: tuple[int, ...]


class _Stage:
    """What a stage must do with every microbatch, as bits of an integer: one for each of its actions.

    ::

        RECV_F from every source, FORWARD, SEND_F to every target,
        RECV_B from every target, BACKWARD, SEND_B to every source, WEIGHTS

    A whole Backward is both BACKWARD and WEIGHTS.
    """

    __slots__ = (
        "backward",
        "before_backward",
        "before_forward",
        "before_weights",
        "complete",
        "forward",
        "index",
        "limit",
        "names",
        "per_round",
        "ranks",
        "recv",
        "send",
        "sizes",
        "slabs",
        "split",
        "weights",
    )

    def __init__(self, schedule: Schedule, index: int) -> None:
        self.index, self.ranks = index, schedule.layout[index]
        self.limit, self.slabs = schedule.in_flight(index), schedule.versions(index)
        self.sizes: dict[int, int] = {}  # of rounds, as far as they were looked up
        #: Microbatches of a minibatch that is cut; 0 where minibatches are whole.
        self.per_round = n_microbatches if (n_microbatches := _per_round(schedule)) > 1 else 0
        self.names: dict[int, str] = {}
        bit = 1

        def new(name: str) -> int:
            nonlocal bit
            made, bit = bit, bit << 1
            self.names[made] = name
            return made

        sources, targets = schedule.sources(index), schedule.targets(index)
        #: (payload, peer stage) -> bit of the message, bits that must be there before.
        self.recv: dict[tuple[Payload, int], tuple[int, int]] = {}
        self.send: dict[tuple[Payload, int], tuple[int, int]] = {}
        for source in sources:
            self.recv["activation", source] = new(f"activation from stage {source}"), 0
        self.before_forward = bit - 1
        self.forward = new("forward")
        for target in targets:
            self.send["activation", target] = new(f"send of the activation to stage {target}"), self.forward
        self.split = 0
        if schedule.training:
            for target in targets:
                self.recv["gradient", target] = new(f"gradient from stage {target}"), self.forward
            self.before_backward = bit - 1
            self.backward = new("backward")
            for source in sources:
                self.send["gradient", source] = new(f"send of the gradient to stage {source}"), self.backward
            self.before_weights = bit - 1
            self.weights = new("weight backward")
        else:
            self.before_backward = self.backward = self.before_weights = self.weights = 0
        self.complete = bit - 1
        self.split = bit  # whether its backward is split; no action of its own

    def missing(self, have: int, needed: int) -> str:
        """Return the name of the first action of `needed` that is not in `have`."""
        return next(name for bit, name in self.names.items() if needed & bit and not have & bit)


class _Account:
    """What one replica of one stage holds and has done."""

    __slots__ = (
        "closed",
        "deferred",
        "done",
        "held",
        "in_order",
        "in_round",
        "latest",
        "most_in_flight",
        "most_versions",
        "newest",
        "norms",
        "rank",
        "reduced",
        "rounds",
        "stage",
    )

    def __init__(self, rank: int, stage: _Stage) -> None:
        self.rank, self.stage = rank, stage
        self.done: dict[int, int] = {}  # microbatch -> bits of its actions that ran
        self.held: dict[int, int] = {}  # microbatch in flight -> version
        self.deferred: set[int] = set()  # microbatches that wait for BackwardWeight
        self.in_order, self.latest = True, 0  # whether versions of forwards never go back, and that of the last one
        self.newest = self.most_in_flight = self.norms = 0
        self.most_versions = 1
        self.in_round = 0  # microbatches of the round under way whose backward has ended
        self.closed = self.reduced = False  # whether its gradients are complete here; reduced
        self.rounds: list[tuple[int, int]] = []  # (microbatches here, microbatches as the step has it)


def verify(schedule: Schedule, stages: range | None = None) -> Proof:
    """Replay `schedule` with blocking sends and bounded slots, and check every action.

    Proved are:

    - the schedule finishes, and every message is the one that its receiver expects;
    - every microbatch passes every stage once, on replica k mod R: activations before the forward, gradients before
      the backward, the gradient for upstream after it;
    - a backward uses the weight version of its forward (where the schedule stashes weights); a version is used only
      while it is kept, which the `versions` newest are, and is the newest where the schedule promises that;
    - a backward has two parts exactly where its forward says so, and both come before the optimizer step;
    - `last` marks the last backward of every round; a round has as many microbatches as its actions say, on all
      replicas alike; it is exactly one minibatch where minibatches are cut;
    - gradients are reduced before the step exactly where a stage has replicas; gradient norms are exchanged in every
      round or in none, with nothing in flight;
    - microbatches in flight stay within `in_flight`.

    Args:
        schedule: the schedule.
        stages: replay these only (see above); all by default.

    Raises:
        ScheduleError: names the rank and the action, or the chain of waiting ranks.
    """
    looked_at = range(len(schedule.layout)) if stages is None else stages
    accounts: dict[int, dict[int, _Account]] = {}  # by rank, then by stage
    for index in looked_at:
        stage = _Stage(schedule, index)
        for rank in schedule.layout[index]:
            accounts.setdefault(rank, {})[index] = _Account(rank, stage)
    actions, checks = 0, _CHECKS
    for rank, action, _, _ in replay(schedule, stages=stages):
        actions += 1
        if type(action) is AllReduceGradNorm:
            _check_norm(accounts[rank].values(), action, schedule)
        else:
            checks[type(action)](accounts[rank][action.stage], action, schedule)
    most_in_flight, most_versions = [0] * len(schedule.layout), [0] * len(schedule.layout)
    for index in looked_at:
        own = [accounts[rank][index] for rank in schedule.layout[index]]
        _check_end(index, own, schedule)
        most_in_flight[index] = max(account.most_in_flight for account in own)
        most_versions[index] = max(account.most_versions for account in own)
    return Proof(actions, tuple(most_in_flight), tuple(most_versions))


def verify_around(schedule: AnySchedule, rank: int | None) -> None:
    """Prove what concerns `rank`; when every rank has, the schedule is proved. None: prove all of it.

    Raises:
        ScheduleError: names the rank and the action, or the chain of waiting ranks.
    """
    smaller = representative(schedule)
    stages = {stage for stage, ranks in enumerate(schedule.layout) if rank is None or rank in ranks}
    whole = isinstance(smaller, Written) and smaller.all_reduce_grad_norm  # for which all ranks wait
    for block in [range(len(smaller.layout))] if whole else blocks(smaller.layout, smaller.edges):
        if stages.intersection(block):
            verify(smaller, block)


def blocks(layout: Layout, edges: Sequence[Edge] | None = None) -> list[range]:
    """Return the runs of stages within which ranks can wait for each other in a circle, in order."""
    last = len(layout) - 1
    around = {stage for source, target in edges or () for stage in range(source + 1, target)}
    if sum(map(len, layout)) > len({rank for ranks in layout for rank in ranks}) or not last:
        return [range(last + 1)]  # ranks hold several stages: all is one circle
    ends = [0, *(stage for stage in range(1, last) if len(layout[stage]) == 1 and stage not in around), last]
    return [range(first, end + 1) for first, end in pairwise(ends)]


def representative(schedule: AnySchedule) -> AnySchedule:
    """Return the smallest schedule that proves as much as `schedule`: one of the equal pipelines, shortened.

    A Written schedule may have any order: two repeats are enough, what is described and the seam between two.
    """
    if isinstance(schedule, Written):
        return dataclasses.replace(schedule, repeats=min(schedule.repeats, 2))
    sizes = [len(ranks) for ranks in schedule.layout]
    if isinstance(schedule, Microbatched):
        equal = math.gcd(*sizes, schedule.n_microbatches)
        n_microbatches = schedule.n_microbatches // equal
        layout, microbatches = _every(schedule, equal, [n_microbatches])
        return dataclasses.replace(
            schedule, layout=layout, total_microbatches=microbatches, n_microbatches=n_microbatches
        )
    equal = math.gcd(*sizes)
    layout, microbatches = _every(
        schedule, equal, [size // equal * schedule.gradient_accumulation_steps for size in sizes]
    )
    return dataclasses.replace(schedule, layout=layout, total_microbatches=microbatches)


def _every(schedule: Schedule, step: int, round_sizes: Sequence[int]) -> tuple[Layout, int]:
    layout = tuple(ranks[::step] for ranks in schedule.layout)
    return layout, shortened(layout, -(-schedule.total_microbatches // step), round_sizes)


def shortened(layout: Layout, microbatches: int, round_sizes: Sequence[int]) -> int:
    """Return the smallest number of microbatches that proves as much as `microbatches`.

    Between start-up and drain a round-robin schedule repeats itself every lcm(replicas, round sizes)
    microbatches, so whole periods beyond a few can be left out. Start-up is over when every stage has
    made a version for a microbatch of the steady state: after twice as many microbatches as ranks at most.
    """
    period = math.lcm(*round_sizes, *(len(members) for members in layout))
    enough = 2 * (sum(len(members) for members in layout) + period)
    return microbatches if microbatches <= enough else enough + (microbatches - enough) % period


def _per_round(schedule: Schedule) -> int:
    """Return the microbatches of a round where a round is one minibatch; 1 where minibatches are whole."""
    return schedule.n_microbatches if isinstance(schedule, Microbatched | Written) else 1


def _fail(account: _Account, action: Action, problem: str) -> NoReturn:
    raise ScheduleError(f"{where(account.rank, action)}: {problem}")


def _check_message(account: _Account, action: Recv | Send, schedule: Schedule) -> None:
    stage, done = account.stage, account.done
    messages = stage.recv if type(action) is Recv else stage.send
    found = messages.get((action.payload, action.peer_stage))
    if found is None:
        _fail(account, action, f"no such message passes between stages {stage.index} and {action.peer_stage}")
    bit, needed = found
    have = done.get(action.microbatch, 0)
    if have & bit:
        _fail(account, action, "this message has been received or sent already")
    if have & needed != needed:
        _fail(account, action, f"the {stage.missing(have, needed)} of the microbatch comes later")
    done[action.microbatch] = have | bit


def _check_forward(account: _Account, action: Forward, schedule: Schedule) -> None:
    stage, held, version = account.stage, account.held, action.version
    microbatch, ranks = action.microbatch, stage.ranks
    have = account.done.get(microbatch, 0)
    if have != stage.before_forward:
        if have & stage.forward:
            _fail(account, action, "this forward has run already")
        _fail(account, action, f"the {stage.missing(have, stage.before_forward)} has not been received")
    if ranks[microbatch % len(ranks)] != account.rank:
        _fail(account, action, f"the microbatch belongs to rank {ranks[microbatch % len(ranks)]}")
    if schedule.newest and version != account.newest:
        _fail(account, action, f"the newest version is {account.newest}")
    _check_kept(account, action, version)
    account.done[microbatch] = have | stage.forward | (stage.split if action.split else 0)
    if schedule.training:
        if version < account.latest:
            account.in_order = False
        account.latest = version
        held[microbatch] = version
    in_flight = len(held) or 1
    if in_flight > account.most_in_flight:
        account.most_in_flight = in_flight
        if in_flight > stage.limit:
            _fail(account, action, f"{in_flight} microbatches are in flight, but {stage.limit} are planned")


def _check_backward(account: _Account, action: Backward | BackwardInput | BackwardWeight, schedule: Schedule) -> None:
    stage, microbatch = account.stage, action.microbatch
    have = account.done.get(microbatch, 0)
    split, kind = have & stage.split, type(action)
    if kind is not BackwardWeight:
        if have & ~stage.split != stage.before_backward:
            if have & stage.backward:
                _fail(account, action, "this backward has run already")
            _fail(account, action, f"the {stage.missing(have, stage.before_backward)} of the microbatch comes later")
        bits = stage.backward
        if kind is Backward:
            bits |= stage.weights
            if split:
                _fail(account, action, "its forward says that the backward is split")
        elif not split:
            _fail(account, action, "its forward does not say that the backward is split")
        else:
            account.deferred.add(microbatch)
    else:
        if microbatch not in account.deferred:
            _fail(account, action, "no input backward of the microbatch waits for it")
        if have & ~stage.split != stage.before_weights:
            _fail(account, action, f"the {stage.missing(have, stage.before_weights)} of the microbatch comes later")
        account.deferred.remove(microbatch)
        bits = stage.weights
    account.done[microbatch] = have | bits
    held = account.held[microbatch]
    if held != action.version and (schedule.stashes or kind is not Backward):
        _fail(account, action, f"its forward used version {held}")
    _check_kept(account, action, action.version)
    if kind is BackwardInput:
        return
    del account.held[microbatch]
    if account.closed:
        _fail(account, action, f"the gradients of round {account.newest} are complete already")
    account.in_round += 1
    account.closed = action.last  # type: ignore[union-attr]
    if stage.per_round and microbatch // stage.per_round != account.newest:
        _fail(
            account,
            action,
            f"the microbatch is one of minibatch {microbatch // stage.per_round}, but the round is {account.newest}",
        )


def _check_reduction(account: _Account, action: ReduceGradients, schedule: Schedule) -> None:
    if len(account.stage.ranks) == 1:
        _fail(account, action, "the stage has a single replica")
    if account.reduced or action.round != account.newest:
        _fail(account, action, f"the round that has not been reduced is {account.newest + account.reduced}")
    _check_complete(account, action, action.round, schedule)
    account.closed = account.reduced = True


def _check_norm(own: Iterable[_Account], action: AllReduceGradNorm, schedule: Schedule) -> None:
    """Check an AllReduceGradNorm of a rank with these accounts."""
    for account in own:
        if account.norms != account.newest or action.round != account.newest:
            _fail(
                account,
                action,
                f"the round is {account.newest}, and {account.norms} rounds before it have exchanged their norm",
            )
        if len(account.stage.ranks) > 1 and not account.reduced:
            _fail(account, action, f"the gradients of stage {account.stage.index} have not been reduced")
        _check_complete(account, action, action.round, schedule)
        account.closed = True
        account.norms += 1


def _check_step(account: _Account, action: OptimizerStep, schedule: Schedule) -> None:
    if action.version != account.newest + 1:
        _fail(account, action, f"the newest version is {account.newest}")
    _check_complete(account, action, account.newest, schedule)
    if len(account.stage.ranks) > 1 and not account.reduced:
        _fail(account, action, f"the gradients of round {account.newest} have not been reduced over the replicas")
    if account.norms and account.norms != action.version:
        _fail(account, action, f"the gradient norm of round {account.newest} has not been exchanged")
    if account.norms and account.held:
        _fail(account, action, f"microbatch {min(account.held)} is in flight, which forbids to exchange gradient norms")
    account.rounds.append((account.in_round, action.n_microbatches))
    account.in_round, account.closed, account.reduced = 0, False, False
    account.newest = action.version
    if schedule.stashes and account.held:
        held = account.held.values()
        _check_kept(account, action, next(iter(held)) if account.in_order else min(held))


def _check_complete(
    account: _Account, action: ReduceGradients | AllReduceGradNorm | OptimizerStep, round: int, schedule: Schedule
) -> None:
    """Check that all gradients of the round are there, and that the action has the round's size."""
    if account.deferred:
        missing = ", ".join(map(str, sorted(account.deferred)))
        _fail(account, action, f"the weight backward of microbatch {missing} comes later")
    if account.in_round and not account.closed:
        _fail(account, action, f"no backward of round {round} is marked as the last")
    size = account.stage.sizes.get(round)
    if size is None:
        size = account.stage.sizes[round] = schedule.round_size(action.stage, round)
    if action.n_microbatches != size:
        _fail(account, action, f"the number of microbatches in round {round} is {size}")


def _check_kept(account: _Account, action: Action, version: int) -> None:
    """Check that `version` is kept: versions are in a ring of slabs, version v in slab v mod slabs."""
    alive = account.newest - version + 1
    if alive > account.stage.slabs:
        _fail(
            account,
            action,
            f"{alive} weight versions are in use, {version} to {account.newest}, but {account.stage.slabs} are planned",
        )
    if alive < 1:
        _fail(account, action, f"the newest version is {account.newest}")
    if alive > account.most_versions:
        account.most_versions = alive


_CHECKS: dict[type, Callable[[_Account, Any, Schedule], None]] = {
    Recv: _check_message,
    Send: _check_message,
    Forward: _check_forward,
    Backward: _check_backward,
    BackwardInput: _check_backward,
    BackwardWeight: _check_backward,
    ReduceGradients: _check_reduction,
    OptimizerStep: _check_step,
}


def _check_end(index: int, accounts: list[_Account], schedule: Schedule) -> None:
    """Check what the replicas of a stage have done together."""
    stage, total = accounts[0].stage, schedule.total_microbatches
    if schedule.splits(index) and stage.slabs > 1:
        raise ScheduleError(
            f"stage {index} splits backwards and needs {stage.slabs} weight versions: where backwards are split, no "
            "microbatch may be in flight at an optimizer step"
        )
    complete = stage.complete
    for account in accounts:
        for microbatch, done in account.done.items():
            if not 0 <= microbatch < total or done & complete != complete:
                raise ScheduleError(
                    f"rank {account.rank} (stage {index}) ends without the {stage.missing(done, complete)} of "
                    f"microbatch {microbatch}"
                )
        if account.in_round:
            raise ScheduleError(
                f"rank {account.rank} (stage {index}) ends with gradients that no optimizer step has used, of "
                f"{account.in_round} microbatches"
            )
        if account.norms and account.norms != account.newest:
            raise ScheduleError(f"rank {account.rank} (stage {index}) exchanges no gradient norm in some rounds")
    passed = sum(len(account.done) for account in accounts)
    if passed != total:
        seen = {microbatch for account in accounts for microbatch in account.done}
        missing = next(microbatch for microbatch in range(total) if microbatch not in seen)
        raise ScheduleError(f"stage {index} never runs microbatch {missing}, one of {total}")
    if len({account.newest for account in accounts}) > 1:
        raise ScheduleError(
            f"the replicas of stage {index} end on versions {', '.join(str(each.newest) for each in accounts)}: they "
            "should take the same number of optimizer steps"
        )
    for round, parts in enumerate(zip(*(account.rounds for account in accounts), strict=True)):
        true = sum(here for here, _ in parts)
        for account, (_, planned) in zip(accounts, parts, strict=True):
            if planned != true:
                raise ScheduleError(
                    f"rank {account.rank} (stage {index}) takes round {round} for one of {planned} microbatches, but "
                    f"it has {true}"
                )
