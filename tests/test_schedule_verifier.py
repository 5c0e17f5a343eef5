"""The verifier: what it proves, what it finds, and how it says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise, product

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from schedules import ReduceFirst, Tampered, layout

from pipedream_hpc.schedule import kinds
from pipedream_hpc.schedule.actions import (
    Action,
    Backward,
    Forward,
    Layout,
    Reduce,
    ScheduleError,
    Send,
    WeightGradient,
)
from pipedream_hpc.schedule.flush import Flush
from pipedream_hpc.schedule.forward_only import ForwardOnly
from pipedream_hpc.schedule.one_f_one_b import OneFOneB
from pipedream_hpc.schedule.two_bw import TwoBW
from pipedream_hpc.schedule.verifier import blocks, representative, shortened, verify, verify_around
from pipedream_hpc.schedule.vertical_sync import VerticalSync

#: All of 2 to 4 stages with 1 to 5 replicas each.
COMBINATIONS = [replicas for stages in (2, 3, 4) for replicas in product(range(1, 6), repeat=stages)]


# --- what it proves -------------------------------------------------------------------------------


def test_every_combination_of_up_to_four_stages_and_five_replicas_finishes() -> None:
    # All lengths from 1 to 60: benchmarks/deadlocks.py.
    assert len(COMBINATIONS) == 775
    for replicas in COMBINATIONS:
        for minibatches in (0, 1, 5, 13):
            verify(OneFOneB(layout(*replicas), minibatches))


@st.composite
def schedules(draw: st.DrawFn, most_accumulated: int = 3) -> kinds.AnySchedule:
    """Any kind on up to five stages of up to five replicas, for up to 60 units."""
    kind = draw(st.sampled_from(kinds.NAMES))
    replicas = draw(st.lists(st.integers(1, 5), min_size=1, max_size=1 if kind == "data-parallel" else 5))
    microbatches = draw(st.integers(1, 12)) if kinds.takes_microbatches(kind) else 1
    members: Layout = layout(*replicas)
    if kind == "interleaved":
        each, chunks = replicas[0], draw(st.integers(1, 4))
        members = layout(*[each] * len(replicas)) * chunks
        microbatches = draw(st.integers(1, 3)) * each * len(replicas)
    stages, links = len(members), None
    if kind != "interleaved" and draw(st.booleans()):
        # Skip connections: each stage with the next, and any others with any behind them.
        skips = [(a, b) for a in range(stages) for b in range(a + 2, stages)]
        chosen = draw(st.lists(st.sampled_from(skips), unique=True)) if skips else []
        links = tuple(sorted({*pairwise(range(stages)), *chosen}))
    accumulate = 1 if kind == "interleaved" else draw(st.integers(1, most_accumulated))
    units = draw(st.integers(0, 60 // microbatches)) * microbatches
    split = kind in ("1f1b-flush", "gpipe") and draw(st.booleans())
    zero_bubble = split and kind == "1f1b-flush" and draw(st.booleans())
    try:
        return kinds.make(
            kind,
            members,
            units,
            microbatches=microbatches,
            links=links,
            accumulate=accumulate,
            split=split,
            zero_bubble=zero_bubble,
        )
    except ScheduleError:
        assert kind == "2bw", "no other is refused here"
        assume(False)
        raise


def test_interleaved_takes_no_skip_connections() -> None:
    with pytest.raises(ScheduleError, match="skip connections go over stages: cut where one tensor is alive"):
        kinds.make("interleaved", layout(1, 1) * 2, 8, microbatches=4, links=((0, 1), (0, 2), (1, 2), (2, 3)))


@settings(max_examples=200, deadline=None)
@given(schedule=schedules())
def test_any_schedule_of_any_length_is_proved(schedule: kinds.AnySchedule) -> None:
    proof = verify(schedule)
    for stage in range(len(schedule.layout)):
        assert proof.in_flight[stage] <= schedule.in_flight(stage)
        assert proof.versions[stage] <= schedule.versions(stage)
    verify_around(schedule, None)


@settings(max_examples=100, deadline=None)
@given(schedule=schedules(most_accumulated=1))
def test_the_bounds_are_reached_once_there_is_enough_to_do(schedule: kinds.AnySchedule) -> None:
    enough = 4 * (sum(map(len, schedule.layout)) + getattr(schedule, "microbatches", 1)) + 20
    schedule = replace(schedule, minibatches=enough)
    proof = verify(schedule)
    stages = range(len(schedule.layout))
    assert proof.in_flight == tuple(schedule.in_flight(stage) for stage in stages)
    # Two-version schedules need no second on a stage where nothing is in flight at an update.
    if not isinstance(schedule, TwoBW):
        assert proof.versions == tuple(schedule.versions(stage) for stage in stages)


def test_memory_of_the_schedules_side_by_side() -> None:
    four, many = layout(1, 1, 1, 1), 48
    bounds = {
        kind: (proof.in_flight, proof.versions)
        for kind, microbatches in (("1f1b", 1), ("vertical-sync", 1), ("1f1b-flush", 8), ("gpipe", 8), ("2bw", 8))
        for proof in [verify(kinds.make(kind, four, many, microbatches=microbatches))]
    }
    assert bounds == {
        "1f1b": ((4, 3, 2, 1), (4, 3, 2, 1)),
        "vertical-sync": ((4, 3, 2, 1), (4, 4, 4, 4)),
        "1f1b-flush": ((4, 3, 2, 1), (1, 1, 1, 1)),
        "gpipe": ((8, 8, 8, 8), (1, 1, 1, 1)),
        "2bw": ((4, 3, 2, 1), (2, 2, 2, 2)),
    }


# --- what it finds --------------------------------------------------------------------------------


def test_finds_the_deadlocks_of_reducing_before_sending_upstream() -> None:
    # An independent simulation found 221 of the 775, with 60 minibatches as here.
    stuck = []
    for replicas in COMBINATIONS:
        try:
            verify(ReduceFirst(layout(*replicas), 60))
        except ScheduleError as error:
            assert str(error).startswith("the schedule deadlocks: rank ")
            stuck.append(replicas)
    assert len(stuck) == 221
    assert {len(replicas) for replicas in stuck} == {3, 4}
    assert {(4, 3, 1), (1, 3, 1)} <= set(stuck)


def test_a_deadlock_is_told_as_the_chain_of_those_who_wait() -> None:
    # Stage 1 has three replicas; rank 1 holds the gradient of 0 back until rank 3 has one to reduce.
    with pytest.raises(ScheduleError) as caught:
        verify(ReduceFirst(layout(1, 3, 1), 24))
    assert str(caught.value) == (
        "the schedule deadlocks: "
        "rank 0 (stage 0) waits in 'receive gradient 0 from rank 1' for rank 1, "
        "rank 1 (stage 1) waits in 'reduce round 0 over 3 minibatches' for rank 3, "
        "rank 3 (stage 1) waits in 'receive activation 5 from rank 0' for rank 0, where this began"
    )


def test_finds_a_message_that_is_not_the_one_expected() -> None:
    def swap(rank: int, actions: list[Action]) -> list[Action]:
        if rank != 0:
            return actions
        first, second = (i for i, a in enumerate(actions[:4]) if isinstance(a, Send))
        actions[first], actions[second] = actions[second], actions[first]
        return actions

    with pytest.raises(
        ScheduleError, match=r"rank 1 \(stage 1\) is to receive activation 0 from rank 0, but .* minibatch 1"
    ):
        verify(Tampered(OneFOneB(layout(1, 1, 1), 6), swap))


def test_finds_a_backward_on_another_version_than_its_forward() -> None:
    def newest(rank: int, actions: list[Action]) -> list[Action]:
        return [replace(a, version=2) if a == Backward(0, 3, 1) else a for a in actions]

    with pytest.raises(
        ScheduleError, match=r"rank 0 \(stage 0\) at 'backward 3 on version 2': its forward used version 1"
    ):
        verify(Tampered(OneFOneB(layout(1, 1, 1), 6), newest))


def test_finds_a_forward_that_is_not_on_the_newest_version_where_that_is_promised() -> None:
    def older(rank: int, actions: list[Action]) -> list[Action]:
        return [replace(a, version=0) if isinstance(a, Forward) else a for a in actions]

    with pytest.raises(ScheduleError, match=r"'forward 1 on version 0': the newest version is 1"):
        verify(Tampered(OneFOneB(layout(1, 1), 6), older))


def test_finds_a_version_that_is_not_kept() -> None:
    def stuck(rank: int, actions: list[Action]) -> list[Action]:
        return [replace(a, version=0) if isinstance(a, Forward | Backward) else a for a in actions]

    with pytest.raises(
        ScheduleError,
        match=r"rank 1 .*'update to version 3': 4 weight versions alive, planned are 3 \(version 0 to 3\)",
    ):
        verify(Tampered(VerticalSync(layout(1, 1, 1), 6), lambda rank, a: stuck(rank, a) if rank == 1 else a))


def test_finds_what_too_small_a_minibatch_would_do_to_2bw() -> None:
    class Unchecked(TwoBW):
        def __post_init__(self) -> None:
            pass

    verify(Unchecked(layout(1, 1, 1, 1), 24, 3))
    with pytest.raises(ScheduleError, match=r"rank 0 .*'forward 4 on version 1': the newest version is 0"):
        verify(Unchecked(layout(1, 1, 1, 1), 24, 2))


def test_finds_more_in_flight_than_planned() -> None:
    def eager(rank: int, actions: list[Action]) -> list[Action]:
        if rank != 0:
            return actions
        forwards = [a for a in actions if isinstance(a, Forward | Send)]
        return forwards + [a for a in actions if a not in forwards]

    with pytest.raises(ScheduleError, match=r"rank 0 .*: 3 minibatches in flight, planned are 2"):
        verify(Tampered(Flush(layout(1, 1), 6, 6), eager))


def test_finds_a_reduction_by_the_wrong_count() -> None:
    def full(rank: int, actions: list[Action]) -> list[Action]:
        return [replace(a, minibatches=2) if isinstance(a, Reduce) else a for a in actions]

    with pytest.raises(ScheduleError, match=r"'reduce round 2 over 2 minibatches': due is round 2 over 1 minibatches"):
        verify(Tampered(OneFOneB(layout(2, 1), 5), full))


def test_finds_a_rank_that_stops_early() -> None:
    with pytest.raises(
        ScheduleError,
        match=r"rank 0 \(stage 0\) waits in 'receive gradient 5 from rank 1' for rank 1; rank 1 has finished",
    ):
        verify(Tampered(OneFOneB(layout(1, 1), 6), lambda rank, a: a[:-4] if rank == 1 else a))


def test_finds_an_update_that_is_missing() -> None:
    with pytest.raises(ScheduleError, match=r"stage 1 ends on version 5, but 6 updates are due"):
        verify(Tampered(OneFOneB(layout(1, 1), 6), lambda rank, a: a[:-1] if rank == 1 else a))


# --- at a launch: as much as concerns one rank ----------------------------------------------------


def test_finds_an_update_before_the_weight_gradients_are_there() -> None:
    def late(rank: int, actions: list[Action]) -> list[Action]:
        return sorted(actions, key=lambda action: isinstance(action, WeightGradient))

    with pytest.raises(ScheduleError) as caught:
        verify(Tampered(Flush(layout(1, 1), 2, 2, split=True), late))
    assert (
        str(caught.value)
        == "rank 1 (stage 1) at 'update to version 1': the weight gradient of minibatch 0, 1 is still to come"
    )


def test_finds_weight_gradients_that_nobody_put_off() -> None:
    def twice(rank: int, actions: list[Action]) -> list[Action]:
        return [each for action in actions for each in [action] * (1 + isinstance(action, WeightGradient))]

    with pytest.raises(ScheduleError, match=r"at 'weight gradient 0 on version 0': no backward of it has put anything"):
        verify(Tampered(Flush(layout(1, 1), 2, 2, split=True), twice))


def test_blocks_lie_between_stages_of_a_single_rank() -> None:
    assert blocks(layout(1, 1, 1)) == [range(2), range(1, 3)]
    assert blocks(layout(2, 1, 1, 1, 2)) == [range(2), range(1, 3), range(2, 4), range(3, 5)]
    assert blocks(layout(2, 3, 1, 2, 2)) == [range(3), range(2, 5)]
    assert blocks(layout(2, 2, 2)) == [range(3)]
    assert blocks(layout(4)) == [range(1)]
    assert blocks(layout(1, 1) * 2) == [range(4)]  # ranks come round again


def test_equal_pipelines_are_played_once() -> None:
    assert representative(OneFOneB(layout(4, 2, 2), 9)) == OneFOneB(((0, 2), (4,), (6,)), 5)
    assert representative(Flush(layout(2, 2), 9, 6)) == Flush(((0,), (2,)), 5, 3)
    assert representative(Flush(layout(2, 2), 9, 3)) == Flush(layout(2, 2), 9, 3)  # 3 is not even


@pytest.mark.parametrize("replicas", [(1, 1, 1), (2, 1), (4, 3, 1), (3, 5, 2)])
@pytest.mark.parametrize("kind", ["1f1b", "vertical-sync", "1f1b-flush", "gpipe", "2bw", "model-parallel"])
def test_a_shortened_schedule_proves_as_much(replicas: tuple[int, ...], kind: str) -> None:
    members, microbatches = layout(*replicas), 9 if kinds.takes_microbatches(kind) else 1
    for units in (400, 401, 407):
        fewer = shortened(members, units, [microbatches])
        assert fewer < units
        whole, part = (verify(kinds.make(kind, members, n, microbatches=microbatches)) for n in (units, fewer))
        assert (whole.in_flight, whole.versions) == (part.in_flight, part.versions)


def test_blocks_find_the_deadlocks_that_the_whole_has() -> None:
    found = 0
    for replicas in product((1, 2, 3), repeat=4):
        schedule = ReduceFirst(layout(*replicas), 40)
        results = []
        for parts in ([range(4)], blocks(schedule.layout)):
            try:
                for part in parts:
                    verify(schedule, part)
                results.append("finishes")
            except ScheduleError:
                results.append("deadlocks")
        assert results[0] == results[1], replicas
        found += results[0] == "deadlocks"
    assert 0 < found < 81


@settings(max_examples=100, deadline=None)
@given(replicas=st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=2, max_size=4), units=st.integers(0, 150))
def test_every_rank_together_finds_what_the_whole_has(replicas: list[int], units: int) -> None:
    schedule = ReduceFirst(layout(*replicas), units)

    def deadlocks(prove: Callable[[], object]) -> bool:
        try:
            prove()
        except ScheduleError:
            return True
        return False

    ranks = [rank for members in schedule.layout for rank in members]
    parts = [deadlocks(partial(verify_around, schedule, rank)) for rank in ranks]
    assert any(parts) == deadlocks(partial(verify_around, schedule, None)) == deadlocks(partial(verify, schedule))


def test_forward_only_is_proved_too() -> None:
    for replicas in COMBINATIONS[:150]:
        verify_around(ForwardOnly(layout(*replicas), 13), None)
