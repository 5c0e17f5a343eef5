"""The verifier: what it proves, what it finds, and how it says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedules import ReduceFirst, Tampered, any_schedule, layout

from pipedream_hpc.planning.plan import Edge
from pipedream_hpc.schedule import registry
from pipedream_hpc.schedule.actions import (
    Action,
    Backward,
    BackwardWeight,
    Forward,
    ReduceGradients,
    ScheduleError,
    Send,
)
from pipedream_hpc.schedule.flush import ZBH1, Flush
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


def test_interleaved_takes_no_skip_connections() -> None:
    edges = tuple(Edge(*pair) for pair in ((0, 1), (0, 2), (1, 2), (2, 3)))
    with pytest.raises(
        ScheduleError, match="skip connections go over stages: use a plan that cuts where one tensor is alive"
    ):
        registry.make("interleaved", layout(1, 1) * 2, 8, n_microbatches=4, edges=edges)


@settings(max_examples=200, deadline=None)
@given(schedule=any_schedule())
def test_any_schedule_of_any_length_is_proved(schedule: registry.AnySchedule) -> None:
    proof = verify(schedule)
    for stage in range(len(schedule.layout)):
        assert proof.in_flight[stage] <= schedule.in_flight(stage)
        assert proof.versions[stage] <= schedule.versions(stage)
    verify_around(schedule, None)


@settings(max_examples=100, deadline=None)
@given(schedule=any_schedule(most_accumulated=1))
def test_the_bounds_are_reached_once_there_is_enough_to_do(schedule: registry.AnySchedule) -> None:
    enough = 4 * (sum(map(len, schedule.layout)) + getattr(schedule, "n_microbatches", 1)) + 20
    schedule = replace(schedule, total_microbatches=enough)
    proof = verify(schedule)
    stages = range(len(schedule.layout))
    assert proof.in_flight == tuple(schedule.in_flight(stage) for stage in stages)
    # 2BW needs no second version on a stage where nothing is in flight at an optimizer step.
    if not isinstance(schedule, TwoBW):
        assert proof.versions == tuple(schedule.versions(stage) for stage in stages)


def test_memory_of_the_schedules_side_by_side() -> None:
    four, many = layout(1, 1, 1, 1), 48
    bounds = {
        kind: (proof.in_flight, proof.versions)
        for kind, n_microbatches in (("1f1b", 1), ("vertical-sync", 1), ("1f1b-flush", 8), ("gpipe", 8), ("2bw", 8))
        for proof in [verify(registry.make(kind, four, many, n_microbatches=n_microbatches))]
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


def test_a_deadlock_is_printed_as_the_chain_of_waiting_ranks() -> None:
    # Stage 1 has three replicas; rank 1 does not send gradient 0 before rank 3 has a gradient to reduce.
    with pytest.raises(ScheduleError) as caught:
        verify(ReduceFirst(layout(1, 3, 1), 24))
    assert str(caught.value) == (
        "the schedule deadlocks: "
        "rank 0 (stage 0) at 0RECV_B0<1r1 (receive gradient 0 from rank 1) waits for rank 1, "
        "rank 1 (stage 1) at 1REDUCE0n3 (reduce the gradients of round 0 over 3 microbatches) waits for rank 3, "
        "rank 3 (stage 1) at 1RECV_F5<0r0 (receive activation 5 from rank 0) waits for rank 0, where the circle began"
    )


def test_finds_a_message_that_is_not_the_one_expected() -> None:
    def swap(rank: int, actions: list[Action]) -> list[Action]:
        if rank != 0:
            return actions
        first, send_first, second, send_second, *others = actions
        return [first, second, send_second, send_first, *others]

    with pytest.raises(
        ScheduleError, match=r"rank 1 \(stage 1\) at 1RECV_F0<0r0 .*: the next activation .* that of microbatch 1"
    ):
        verify(Tampered(OneFOneB(layout(1, 1, 1), 6), swap))


def test_finds_a_backward_on_another_version_than_its_forward() -> None:
    def newest(rank: int, actions: list[Action]) -> list[Action]:
        return [replace(a, version=2) if a == Backward(0, 3, 1, True) else a for a in actions]

    with pytest.raises(
        ScheduleError,
        match=r"rank 0 \(stage 0\) at 0B3v2l \(backward of microbatch 3 on version 2\): its forward used version 1",
    ):
        verify(Tampered(OneFOneB(layout(1, 1, 1), 6), newest))


def test_finds_a_forward_that_is_not_on_the_newest_version_where_that_is_promised() -> None:
    def older(rank: int, actions: list[Action]) -> list[Action]:
        return [replace(a, version=0) if isinstance(a, Forward) else a for a in actions]

    with pytest.raises(ScheduleError, match=r"1F1v0 \(forward of microbatch 1 on version 0\): the newest version is 1"):
        verify(Tampered(OneFOneB(layout(1, 1), 6), older))


def test_finds_a_version_that_is_not_kept() -> None:
    def stuck(rank: int, actions: list[Action]) -> list[Action]:
        return [replace(a, version=0) if isinstance(a, Forward | Backward) else a for a in actions]

    with pytest.raises(
        ScheduleError,
        match=r"rank 1 .* at 1STEP3n1 .*: 4 weight versions are in use, 0 to 3, but 3 are planned",
    ):
        verify(Tampered(VerticalSync(layout(1, 1, 1), 6), lambda rank, a: stuck(rank, a) if rank == 1 else a))


def test_finds_what_too_small_a_minibatch_would_do_to_2bw() -> None:
    class Unchecked(TwoBW):
        def __post_init__(self) -> None:
            pass

    verify(Unchecked(layout(1, 1, 1, 1), 24, 3))
    with pytest.raises(ScheduleError, match=r"rank 0 .* at 0F4v1 .*: the newest version is 0"):
        verify(Unchecked(layout(1, 1, 1, 1), 24, 2))


def test_finds_more_in_flight_than_planned() -> None:
    def eager(rank: int, actions: list[Action]) -> list[Action]:
        if rank != 0:
            return actions
        forwards = [a for a in actions if isinstance(a, Forward | Send)]
        return forwards + [a for a in actions if a not in forwards]

    with pytest.raises(ScheduleError, match=r"rank 0 .*: 3 microbatches are in flight, but 2 are planned"):
        verify(Tampered(Flush(layout(1, 1), 6, 6), eager))


def test_finds_a_reduction_by_the_wrong_count() -> None:
    def full(rank: int, actions: list[Action]) -> list[Action]:
        return [replace(a, n_microbatches=2) if isinstance(a, ReduceGradients) else a for a in actions]

    with pytest.raises(ScheduleError, match=r"0REDUCE2n2 .*: the number of microbatches in round 2 is 1"):
        verify(Tampered(OneFOneB(layout(2, 1), 5), full))


def test_finds_a_rank_that_stops_early() -> None:
    with pytest.raises(
        ScheduleError,
        match=r"rank 0 \(stage 0\) at 0RECV_B5<1r1 .* waits for rank 1; rank 1 has finished",
    ):
        verify(Tampered(OneFOneB(layout(1, 1), 6), lambda rank, a: a[:-4] if rank == 1 else a))


def test_finds_a_step_that_is_missing() -> None:
    with pytest.raises(
        ScheduleError, match=r"rank 1 \(stage 1\) ends with gradients that no optimizer step has used, of 1 micro"
    ):
        verify(Tampered(OneFOneB(layout(1, 1), 6), lambda rank, a: a[:-1] if rank == 1 else a))


def test_finds_a_step_before_the_weight_backwards() -> None:
    def late(rank: int, actions: list[Action]) -> list[Action]:
        return sorted(actions, key=lambda action: isinstance(action, BackwardWeight))

    with pytest.raises(ScheduleError) as caught:
        verify(Tampered(ZBH1(layout(1, 1), 2, 2), late))
    assert str(caught.value) == (
        "rank 1 (stage 1) at 1STEP1n2 (optimizer step to version 1 over 2 microbatches): "
        "the weight backward of microbatch 0, 1 comes later"
    )


def test_finds_a_weight_backward_without_an_input_backward() -> None:
    def twice(rank: int, actions: list[Action]) -> list[Action]:
        return [each for action in actions for each in [action] * (1 + isinstance(action, BackwardWeight))]

    with pytest.raises(ScheduleError, match=r"at 1W0v0 .*: no input backward of the microbatch waits for it"):
        verify(Tampered(ZBH1(layout(1, 1), 2, 2), twice))


# --- at a launch: as much as concerns one rank ----------------------------------------------------


def test_blocks_lie_between_stages_of_a_single_rank() -> None:
    assert blocks(layout(1, 1, 1)) == [range(2), range(1, 3)]
    assert blocks(layout(2, 1, 1, 1, 2)) == [range(2), range(1, 3), range(2, 4), range(3, 5)]
    assert blocks(layout(2, 3, 1, 2, 2)) == [range(3), range(2, 5)]
    assert blocks(layout(2, 2, 2)) == [range(3)]
    assert blocks(layout(4)) == [range(1)]
    assert blocks(layout(1, 1) * 2) == [range(4)]  # ranks come round again


def test_equal_pipelines_are_replayed_once() -> None:
    assert representative(OneFOneB(layout(4, 2, 2), 9)) == OneFOneB(((0, 2), (4,), (6,)), 5)
    assert representative(Flush(layout(2, 2), 9, 6)) == Flush(((0,), (2,)), 5, 3)
    assert representative(Flush(layout(2, 2), 9, 3)) == Flush(layout(2, 2), 9, 3)  # 3 is not even


@pytest.mark.parametrize("replicas", [(1, 1, 1), (2, 1), (4, 3, 1), (3, 5, 2)])
@pytest.mark.parametrize("kind", ["1f1b", "vertical-sync", "1f1b-flush", "gpipe", "2bw", "model-parallel"])
def test_a_shortened_schedule_proves_as_much(replicas: tuple[int, ...], kind: str) -> None:
    members, n_microbatches = layout(*replicas), 9 if registry.cuts_minibatches(kind) else 1
    for microbatches in (400, 401, 407):
        fewer = shortened(members, microbatches, [n_microbatches])
        assert fewer < microbatches
        whole, part = (
            verify(registry.make(kind, members, n, n_microbatches=n_microbatches)) for n in (microbatches, fewer)
        )
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
@given(replicas=st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=2, max_size=4), microbatches=st.integers(0, 150))
def test_every_rank_together_finds_what_the_whole_has(replicas: list[int], microbatches: int) -> None:
    schedule = ReduceFirst(layout(*replicas), microbatches)

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
