"""Schedules, drawn as the timelines they are; the verifier; the simulator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipedream_hpc.planning.plan import Plan, StagePlan
from pipedream_hpc.planning.topology import Level, Topology
from pipedream_hpc.schedule.actions import (
    Action,
    Backward,
    Forward,
    Layout,
    Reduce,
    Schedule,
    Send,
    Update,
)
from pipedream_hpc.schedule.forward_only import ForwardOnly
from pipedream_hpc.schedule.one_f_one_b import OneFOneB
from pipedream_hpc.schedule.play import ScheduleError
from pipedream_hpc.schedule.simulator import simulate
from pipedream_hpc.schedule.verifier import shortened, verify


def layout(*replicas: int) -> Layout:
    """Ranks numbered stage by stage: layout(2, 1) is ((0, 1), (2,))."""
    ranks = iter(range(sum(replicas)))
    return tuple(tuple(next(ranks) for _ in range(count)) for count in replicas)


def lanes(schedule: Schedule) -> list[str]:
    """What each rank computes, in order: F0 F1 B0 R U ..."""

    def word(action: Action) -> str:
        if isinstance(action, Forward | Backward):
            return f"{type(action).__name__[0]}{action.minibatch}"
        return {Reduce: "R", Update: "U"}.get(type(action), "")

    ranks = sorted(rank for members in schedule.layout for rank in members)
    return [" ".join(filter(None, map(word, schedule.actions(rank)))) for rank in ranks]


def test_1f1b_on_four_stages() -> None:
    # start-up     steady state            drain
    assert lanes(OneFOneB(layout(1, 1, 1, 1), 5)) == [
        "F0 F1 F2 F3 B0 U F4 B1 U B2 U B3 U B4 U",
        "F0 F1 F2 B0 U F3 B1 U F4 B2 U B3 U B4 U",
        "F0 F1 B0 U F2 B1 U F3 B2 U F4 B3 U B4 U",
        "F0 B0 U F1 B1 U F2 B2 U F3 B3 U F4 B4 U",
    ]


def test_1f1b_with_fewer_minibatches_than_stages() -> None:
    assert lanes(OneFOneB(layout(1, 1, 1, 1), 2)) == [
        "F0 F1 B0 U B1 U",
        "F0 F1 B0 U B1 U",
        "F0 F1 B0 U B1 U",
        "F0 B0 U F1 B1 U",
    ]
    assert lanes(OneFOneB(layout(1, 1), 0)) == ["", ""]


def test_1f1b_rr_two_replicas_then_one() -> None:
    # Minibatch 4 is alone in its round: the other replica reduces and updates with it all the same.
    assert lanes(OneFOneB(layout(2, 1), 5)) == [
        "F0 F2 B0 R U F4 B2 R U B4 R U",
        "F1 F3 B1 R U B3 R U R U",
        "F0 B0 U F1 B1 U F2 B2 U F3 B3 U F4 B4 U",
    ]


def test_messages_and_versions_of_an_inner_stage() -> None:
    assert list(map(str, OneFOneB(layout(1, 1, 1), 3).actions(1))) == [
        "receive activation 0 from rank 0",
        "forward 0 on version 0",
        "send activation 0 to rank 2",
        "receive activation 1 from rank 0",
        "forward 1 on version 0",
        "send activation 1 to rank 2",
        "receive gradient 0 from rank 2",
        "backward 0 on version 0",
        "send gradient 0 to rank 0",
        "update to version 1",
        "receive activation 2 from rank 0",
        "forward 2 on version 1",
        "send activation 2 to rank 2",
        "receive gradient 1 from rank 2",
        "backward 1 on version 0",
        "send gradient 1 to rank 0",
        "update to version 2",
        "receive gradient 2 from rank 2",
        "backward 2 on version 1",
        "send gradient 2 to rank 0",
        "update to version 3",
    ]


def test_the_gradient_goes_upstream_before_the_reduction() -> None:
    kinds = [type(action) for action in OneFOneB(layout(1, 2), 4).actions(1)]
    assert kinds.index(Send) < kinds.index(Reduce) < kinds.index(Update)


def test_reductions_know_the_true_count() -> None:
    rounds = [a for a in OneFOneB(layout(3, 1), 8).actions(2) if isinstance(a, Reduce)]
    assert rounds == [Reduce(0, 3), Reduce(1, 3), Reduce(2, 2)]


def test_forward_only() -> None:
    assert lanes(ForwardOnly(layout(1, 2), 3)) == ["F0 F1 F2", "F0 F2", "F1"]


# --- the verifier ---------------------------------------------------------------------------------


def test_every_combination_of_up_to_four_stages_and_five_replicas_finishes() -> None:
    combinations = [layout(*replicas) for stages in (2, 3, 4) for replicas in product(range(1, 6), repeat=stages)]
    assert len(combinations) == 775
    for members in combinations:
        for minibatches in (0, 1, 5, 13):
            verify(OneFOneB(members, minibatches))
            verify(ForwardOnly(members, minibatches))


@settings(max_examples=100, deadline=None)
@given(replicas=st.lists(st.integers(1, 5), min_size=1, max_size=5), minibatches=st.integers(0, 60))
def test_the_bounds_are_reached_and_kept(replicas: list[int], minibatches: int) -> None:
    schedule = OneFOneB(layout(*replicas), minibatches)
    proof = verify(schedule)
    for stage, count in enumerate(replicas):
        most_local = -(-minibatches // count)
        assert proof.in_flight[stage] == min(schedule.in_flight(stage), most_local)
        assert proof.versions[stage] <= schedule.in_flight(stage)


def test_straight_pipelines_use_every_slab_they_are_given() -> None:
    assert verify(OneFOneB(layout(1, 1, 1, 1), 40)).versions == (4, 3, 2, 1)


@pytest.mark.parametrize("replicas", [(1, 1, 1), (2, 1), (4, 3, 1), (3, 5, 2)])
def test_a_shortened_schedule_proves_as_much(replicas: tuple[int, ...]) -> None:
    members = layout(*replicas)
    for minibatches in (300, 301, 307):
        fewer = shortened(members, minibatches)
        assert fewer < minibatches
        whole, part = verify(OneFOneB(members, minibatches)), verify(OneFOneB(members, fewer))
        assert (whole.in_flight, whole.versions) == (part.in_flight, part.versions)


@dataclass(frozen=True)
class Tampered:
    """A schedule in which each rank's actions were changed by a function."""

    base: OneFOneB
    change: object

    @property
    def layout(self) -> Layout:
        return self.base.layout

    @property
    def minibatches(self) -> int:
        return self.base.minibatches

    training = True

    def in_flight(self, stage: int) -> int:
        return self.base.in_flight(stage)

    def actions(self, rank: int) -> Iterator[Action]:
        return iter(self.change(rank, list(self.base.actions(rank))))  # type: ignore[operator]


def reduce_first(_: int, actions: list[Action]) -> list[Action]:
    """Put the upstream send behind the reduction, as naive implementations have it."""
    changed = list(actions)
    for i in range(len(changed) - 1):
        sends_back = isinstance(changed[i], Send) and changed[i].payload == "gradient"
        if sends_back and isinstance(changed[i + 1], Reduce):
            changed[i], changed[i + 1] = changed[i + 1], changed[i]
    return changed


def test_finds_the_deadlocks_of_reducing_before_sending_upstream() -> None:
    deadlocked = []
    for replicas in ((4, 3, 1), (1, 3, 1), (9, 7), (2, 1), (1, 1)):
        try:
            verify(Tampered(OneFOneB(layout(*replicas), 24), reduce_first))
        except ScheduleError as error:
            deadlocked.append(replicas)
            assert "deadlocks: rank" in str(error)
            assert "waits in 'reduce round" in str(error)
    assert (4, 3, 1) in deadlocked
    assert (1, 1) not in deadlocked


def test_finds_a_message_that_is_not_the_one_expected() -> None:
    def swap(rank: int, actions: list[Action]) -> list[Action]:
        if rank != 0:
            return actions
        first, second = (i for i, a in enumerate(actions[:4]) if isinstance(a, Send))
        actions[first], actions[second] = actions[second], actions[first]
        return actions

    with pytest.raises(ScheduleError, match=r"rank 1 is to receive activation 0 from rank 0, but .* minibatch 1"):
        verify(Tampered(OneFOneB(layout(1, 1, 1), 6), swap))


def test_finds_a_backward_on_another_version_than_its_forward() -> None:
    def newest(rank: int, actions: list[Action]) -> list[Action]:
        return [Backward(a.minibatch, a.version + 1) if a == Backward(3, 1) else a for a in actions]

    with pytest.raises(
        ScheduleError, match=r"rank 0 \(stage 0\) at 'backward 3 on version 2': its forward used version 1"
    ):
        verify(Tampered(OneFOneB(layout(1, 1, 1), 6), newest))


def test_finds_more_in_flight_than_planned() -> None:
    def eager(rank: int, actions: list[Action]) -> list[Action]:
        if rank != 0:
            return actions
        forwards = [a for a in actions if isinstance(a, (Forward, Send))]
        return [Forward(a.minibatch, 0) if isinstance(a, Forward) else a for a in forwards] + [
            a for a in actions if a not in forwards
        ]

    with pytest.raises(ScheduleError, match=r"rank 0 .*: 3 minibatches in flight, planned are 2"):
        verify(Tampered(OneFOneB(layout(1, 1), 6), eager))


def test_finds_a_rank_that_stops_early() -> None:
    with pytest.raises(ScheduleError, match=r"deadlocks: rank 0 waits in 'receive gradient 5 from rank 1'.*finished"):
        verify(Tampered(OneFOneB(layout(1, 1), 6), lambda rank, a: a[:-4] if rank == 1 else a))


# --- the simulator --------------------------------------------------------------------------------


def planned(stages: int, forward_s: float, backward_s: float, output_bytes: int = 0) -> Plan:
    each = {
        "forward_s": forward_s,
        "backward_s": backward_s,
        "compute_s": forward_s + backward_s,
        "sync_s": 0.0,
        "boundary_s": 0.0,
        "in_flight": 1,
        "parameter_bytes": 0,
        "output_bytes": output_bytes,
        "output_shape": None,
        "output_dtype": None,
        "limit": "compute",
    }
    made = tuple(StagePlan(layers=(f"l{i}",), ranks=(i,), **each) for i in range(stages))  # type: ignore[arg-type]
    return Plan("test", 1, "1f1b", "paper2018", made, forward_s + backward_s, stages * (forward_s + backward_s))


def end_s(plan: Plan, minibatches: int, latency_s: float = 0.0, bandwidth: float = 1e9) -> float:
    links = Topology((Level("node", plan.ranks, latency_s, bandwidth),), "test")
    return max(s.end_s for s in simulate(OneFOneB(plan.layout, minibatches), plan, links).spans)


@pytest.mark.parametrize(("stages", "minibatches"), [(1, 5), (2, 8), (4, 4), (4, 20), (8, 16)])
def test_a_balanced_pipeline_has_only_the_bubble_of_start_up_and_drain(stages: int, minibatches: int) -> None:
    # (p - 1) forwards until the last stage begins, m minibatches there, (p - 1) backwards after it.
    forward_s, backward_s = 1.0, 2.0
    expected = (stages - 1 + minibatches) * (forward_s + backward_s)
    assert end_s(planned(stages, forward_s, backward_s), minibatches) == pytest.approx(expected)


def test_messages_take_latency_and_bandwidth() -> None:
    # One minibatch through two stages: F, message, F, B, message, B.
    plan = planned(2, 1.0, 2.0, output_bytes=500)
    assert end_s(plan, 1, latency_s=0.25, bandwidth=1000) == pytest.approx(2 * 3.0 + 2 * (0.25 + 0.5))


def test_a_slow_link_becomes_the_bottleneck() -> None:
    # A round trip of two messages of 10 s and the compute of both stages, 3 s each, is shared by
    # the two minibatches in flight.
    plan = planned(2, 1.0, 2.0, output_bytes=10_000)
    ten, twenty = (end_s(plan, count, bandwidth=1000) for count in (10, 20))
    assert (twenty - ten) / 10 == pytest.approx((2 * 10 + 2 * 3) / 2)


def test_the_simulated_trace_holds_every_action() -> None:
    plan = planned(3, 1.0, 1.0)
    schedule = OneFOneB(plan.layout, 7)
    links = Topology((Level("node", 3, 0.0, 1e9),), "test")
    spans = simulate(schedule, plan, links).spans
    assert len(spans) == sum(1 for rank in range(3) for _ in schedule.actions(rank))
    for rank in range(3):
        own = [s for s in spans if s.rank == rank]
        assert all(a.end_s <= b.start_s + 1e-12 for a, b in pairwise(own)), "one thing at a time"
