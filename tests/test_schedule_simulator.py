"""The simulator: closed forms, links and who shares them, stragglers, memory over time."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedules import INSTANT, layout, machine, planned

from pipedream_hpc.observe.metrics import bubble, minibatch_s, split
from pipedream_hpc.planning.topology import Topology
from pipedream_hpc.schedule import registry
from pipedream_hpc.schedule.actions import Forward, Layout, Schedule, ScheduleError
from pipedream_hpc.schedule.flush import ZBH1, ZBH2, Flush
from pipedream_hpc.schedule.gpipe import GPipe, GPipeSplit
from pipedream_hpc.schedule.interleaved import Interleaved, folded
from pipedream_hpc.schedule.memory import peak
from pipedream_hpc.schedule.model_parallel import ModelParallel
from pipedream_hpc.schedule.one_f_one_b import OneFOneB
from pipedream_hpc.schedule.simulator import Simulation, simulate
from pipedream_hpc.schedule.trace import Trace


def simulated(
    schedule: Schedule, links: Topology = INSTANT, slow: dict[int, float] | None = None, **each: Any
) -> Trace:
    return simulate(schedule, planned(schedule.layout, **each), links, slow=slow).trace


def end_s(trace: Trace) -> float:
    return max(span.end_s for span in trace.spans)


def test_reading_the_data_takes_time_where_data_is_read() -> None:
    plan = planned(layout(1, 1, 1), forward_s=1.0, backward_s=2.0)
    ends = (dataclasses.replace(plan.stages[0], read_s=0.25), dataclasses.replace(plan.stages[2], read_s=0.5))
    plan = dataclasses.replace(plan, stages=(ends[0], plan.stages[1], ends[1]))
    trace = simulate(OneFOneB(layout(1, 1, 1), 1), plan, INSTANT).trace
    forwards = {span.rank: span.end_s - span.start_s for span in trace.spans if span.kind == "forward"}
    assert forwards == pytest.approx({0: 1.25, 1: 1.0, 2: 1.5})


def test_time_outside_of_layers_is_spent_on_every_microbatch() -> None:
    plan = planned(layout(1), forward_s=1.0, backward_s=2.0)
    plan = dataclasses.replace(plan, stages=(dataclasses.replace(plan.stages[0], overhead_s=0.5),))
    trace = simulate(GPipe(layout(1), 2, 2), plan, INSTANT, n_microbatches=2).trace
    forwards = [span.end_s - span.start_s for span in trace.spans if span.kind == "forward"]
    assert forwards == pytest.approx([1.0, 1.0])


def test_microbatches_in_flight_hold_what_the_plan_says() -> None:
    plan = planned(layout(1, 1), forward_s=1.0, backward_s=2.0)
    held = [dataclasses.replace(stage, stash_bytes=1000, parameter_bytes=10) for stage in plan.stages]
    memory = simulate(OneFOneB(layout(1, 1), 9), dataclasses.replace(plan, stages=tuple(held)), INSTANT).memory
    # Two microbatches in flight and two versions on the first rank, one of each on the last.
    assert [max(size for _, size in memory[rank]) for rank in (0, 1)] == [2020, 1010]


# --- closed forms ---------------------------------------------------------------------------------

DEPTHS = [(1, 5), (2, 8), (4, 4), (4, 20), (8, 16)]


@pytest.mark.parametrize(("p", "m"), DEPTHS)
@pytest.mark.parametrize(
    "schedule", [OneFOneB, lambda ranks, m: Flush(ranks, m, m), lambda ranks, m: GPipe(ranks, m, m)]
)
def test_a_balanced_pipeline_has_only_the_bubble_of_start_up_and_drain(schedule: Any, p: int, m: int) -> None:
    # (p - 1) forwards until the last stage begins, m microbatches there, (p - 1) backwards after it.
    trace = simulated(schedule(layout(*[1] * p), m), forward_s=1.0, backward_s=2.0)
    assert end_s(trace) == pytest.approx((p - 1 + m) * 3.0)
    assert bubble(split(trace)) == pytest.approx((p - 1) / (m + p - 1))


@pytest.mark.parametrize(("p", "v", "m"), [(2, 2, 2), (2, 2, 8), (4, 2, 8), (4, 3, 4), (8, 4, 16), (3, 1, 5)])
def test_interleaving_makes_the_bubble_so_many_times_as_short(p: int, v: int, m: int) -> None:
    members = folded(layout(*[1] * (p * v)), v)
    trace = simulated(Interleaved(members, m, m), forward_s=1.0, backward_s=2.0)
    assert end_s(trace) == pytest.approx((v * m + p - 1) * 3.0)
    assert bubble(split(trace)) == pytest.approx((p - 1) / (v * m + p - 1))


@pytest.mark.parametrize("replicas", [(1,), (1, 1), (1, 1, 1, 1), (2, 2, 2)])
def test_balanced_1f1b_has_no_bubble_in_the_steady_state(replicas: tuple[int, ...]) -> None:
    trace = simulated(OneFOneB(layout(*replicas), 60), forward_s=1.0, backward_s=2.0)
    assert minibatch_s(trace) == pytest.approx(3.0 / replicas[0])
    for members in trace.layout:
        for rank in members:
            own = [s for s in trace.spans if s.rank == rank and s.kind in ("forward", "backward")]
            first = next(i for i, s in enumerate(own) if s.kind == "backward")
            last = max(i for i, s in enumerate(own) if s.kind == "forward")
            steady = own[first + 2 * len(trace.stages_of) : last]
            assert all(after.start_s - before.end_s < 1e-9 for before, after in pairwise(steady)), f"rank {rank}"


def test_a_stage_with_twice_the_work_and_two_replicas_is_balanced() -> None:
    # 2-1: the front takes 6 s per minibatch on two replicas, the back 3 s on one.
    schedule = OneFOneB(layout(2, 1), 40)
    plan = planned(schedule.layout, 1.0, 2.0)
    heavy = planned(schedule.layout, 2.0, 4.0).stages[0]
    trace = simulate(schedule, type(plan)("t", 1, "1f1b-rr", "c", (heavy, plan.stages[1]), 3.0, 9.0), INSTANT).trace
    assert minibatch_s(trace) == pytest.approx(3.0)


@pytest.mark.parametrize("p", [1, 2, 5])
def test_without_pipelining_one_stage_works_at_a_time(p: int) -> None:
    trace = simulated(ModelParallel(layout(*[1] * p), 6), forward_s=1.0, backward_s=2.0)
    assert end_s(trace) == pytest.approx(6 * p * 3.0)
    assert bubble(split(trace)) == pytest.approx(1 - 1 / p)


def test_flushes_cost_a_bubble_in_every_minibatch() -> None:
    schedule = Flush(layout(1, 1, 1), 80, 8)
    trace = simulate(schedule, planned(schedule.layout, 8.0, 16.0), INSTANT, n_microbatches=8).trace
    assert minibatch_s(trace) == pytest.approx((8 + 2) * 3.0)
    twice = simulate(
        registry.make("2bw", layout(1, 1, 1), 80, n_microbatches=8), planned(schedule.layout, 8.0, 16.0), INSTANT
    )
    assert end_s(twice.trace) == pytest.approx((80 + 2) * 24.0)


@pytest.mark.parametrize(("whole", "split", "left"), [(Flush, ZBH1, 1), (GPipe, GPipeSplit, 2)])
@pytest.mark.parametrize(("p", "m"), [(2, 2), (2, 4), (3, 3), (3, 7), (4, 8), (8, 16)])
def test_split_backwards_make_the_bubble_smaller(
    p: int, m: int, whole: type[Flush | GPipe], split: type[Flush | GPipe], left: int
) -> None:
    # Forward and both parts of the backward take a second each. Of ZB-H1's bubble (p - 1)(F + B - W) is left.
    def ends_s(kind: type[Flush | GPipe]) -> float:
        schedule = kind(layout(*[1] * p), m, m)
        return end_s(simulated(schedule, forward_s=1.0, backward_s=2.0, weight_gradient_s=1.0))

    assert ends_s(whole) == pytest.approx(3 * (m + p - 1))
    assert ends_s(split) == pytest.approx(3 * m + (p - 1) * left)


class ZBH1SplitsAll(ZBH1):
    """ZB-H1 as published: every backward is split."""

    _replicated = True  # type: ignore[assignment]


class ZBH2SplitsAll(ZBH2):
    """ZB-H2 as published: every backward is split."""

    _replicated = True  # type: ignore[assignment]


class GPipeSplitsAll(GPipeSplit):
    """GPipe with every backward split."""

    _replicated = True  # type: ignore[assignment]


@given(
    st.integers(2, 5),
    st.integers(1, 12),
    st.integers(1, 3),
    st.sampled_from([(ZBH1, ZBH1SplitsAll), (ZBH2, ZBH2SplitsAll), (GPipeSplit, GPipeSplitsAll)]),
    st.floats(0.1, 2.0),
    st.floats(0.1, 2.0),
    st.floats(0.1, 1.0),
)
def test_splitting_more_backwards_than_the_first_and_the_last_gains_nothing(
    p: int,
    m: int,
    minibatches: int,
    kinds: tuple[type[Flush | GPipe], type[Flush | GPipe]],
    forward_s: float,
    input_s: float,
    ratio: float,
) -> None:
    # All stages take equally long. The weights' part of a backward takes as long as the input's, or less: it is half
    # of a matrix product's backward, and nothing in other layers.
    weight_s = ratio * input_s

    def ends_s(kind: type[Flush | GPipe]) -> float:
        schedule = kind(layout(*[1] * p), minibatches * m, m)
        times = {"forward_s": forward_s, "backward_s": input_s + weight_s, "weight_gradient_s": weight_s}
        return end_s(simulated(schedule, **times))

    some, all_of_them = map(ends_s, kinds)
    assert some <= all_of_them + 1e-9


@pytest.mark.parametrize("longer", [1.0, 1.05, 1.1])
def test_gpipe_has_a_lead_for_an_output_stage_that_takes_longer(longer: float) -> None:
    # F, B and W of a second each, and of `longer` on the output stage.
    schedule = GPipeSplit(layout(1, 1), 8, 8)
    plan = planned(schedule.layout, 8.0, 16.0, weight_gradient_s=8.0)
    last = dataclasses.replace(
        plan.stages[1], forward_s=8 * longer, backward_s=16 * longer, weight_gradient_s=8 * longer
    )
    trace = simulate(
        schedule, dataclasses.replace(plan, stages=(plan.stages[0], last)), INSTANT, n_microbatches=8
    ).trace
    # The input stage waits for its first gradient only, unless the output stage is not done by then.
    first_gradient_s, busy_s = 1 + 9 * longer, 24 * longer
    assert end_s(trace) == pytest.approx(max(first_gradient_s + 16, 1 + busy_s))


def test_where_stages_have_replicas_all_backwards_are_split() -> None:
    schedule = ZBH1(layout(1, 2, 1), 16, 16)
    forwards = [action for rank in range(4) for action in schedule.actions(rank) if isinstance(action, Forward)]
    assert {(action.stage, action.split) for action in forwards} == {(0, False), (1, True), (2, True)}
    # A replicated stage takes twice as long for each: 73 seconds with whole backwards, as many as 70 with few split.
    stages = [
        dataclasses.replace(stage, forward_s=n, backward_s=2.0 * n, weight_gradient_s=n)
        for stage, n in zip(planned(schedule.layout).stages, (1.0, 2.0, 1.0), strict=True)
    ]
    plan = dataclasses.replace(planned(schedule.layout), stages=tuple(stages))
    assert end_s(simulate(schedule, plan, INSTANT).trace) == 60


@pytest.mark.parametrize(("p", "m"), [(2, 4), (2, 7), (3, 6), (4, 8), (4, 13)])
def test_with_zb_h2_no_stage_waits_at_an_optimizer_step(p: int, m: int) -> None:
    schedule = ZBH2(layout(*[1] * p), 6 * m, m)
    plan = planned(schedule.layout, m * 1.0, m * 2.0, weight_gradient_s=m * 1.0)
    trace = simulate(schedule, plan, INSTANT, n_microbatches=m).trace
    for stage in range(p):
        steps = [span.end_s for span in trace.spans if span.kind == "optimizer-step" and span.stage == stage]
        # All but the first minibatch, which has to fill the pipeline.
        assert [after - before for before, after in pairwise(steps)] == pytest.approx([3 * m] * 5)
    assert all(schedule.in_flight(stage) == 2 * p - 1 for stage in range(p))


def test_a_microbatch_is_in_flight_until_its_weight_backward_has_ended() -> None:
    # seconds   0  1  2  3  4  5  6  7
    # rank 0    F0 F1 .  B0 B0 B1 B1
    # rank 1    .  F0 B0 F1 B1 W0 W1
    schedule = ZBH1(layout(1, 1), 2, 2)
    sizes = {"parameter_bytes": 100, "output_bytes": 1, "waiting_bytes": 10}
    plan = planned(schedule.layout, 1.0, 2.0, weight_gradient_s=1.0, **sizes)
    memory = simulate(schedule, plan, INSTANT).memory
    assert memory[1] == [(0.0, 100), (1.0, 101), (2.0, 111), (3.0, 112), (4.0, 122), (6.0, 111), (7.0, 100)]


# --- links ----------------------------------------------------------------------------------------


def test_messages_take_latency_and_bandwidth() -> None:
    # One minibatch through two stages: F, message, F, B, message, B.
    trace = simulated(OneFOneB(layout(1, 1), 1), machine((2, 0.25, 1000)), backward_s=2.0, output_bytes=500)
    assert end_s(trace) == pytest.approx(2 * 3.0 + 2 * (0.25 + 0.5))


def test_a_slow_link_becomes_the_bottleneck() -> None:
    # A round trip of two messages of 10 s and the compute of both stages, 3 s each, is shared by
    # the two minibatches in flight.
    ten, twenty = (
        end_s(simulated(OneFOneB(layout(1, 1), n), machine((2, 0.0, 1000)), backward_s=2.0, output_bytes=10_000))
        for n in (10, 20)
    )
    assert (twenty - ten) / 10 == pytest.approx((2 * 10 + 2 * 3) / 2)


def test_ranks_of_a_node_share_its_adapter() -> None:
    # Two pipelines of two stages side by side: ranks 0 and 1 in one node send to 2 and 3 in another.
    #
    #   rank 0  F0 ════ message 0 ════►
    #   rank 1  F1 ...................  ════ message 1 ════►        4 s each, one after the other
    schedule = registry.make("forward-only", ((0, 1), (2, 3)), 2)
    shared = simulated(schedule, machine((2, 0.0, 1e9), (2, 0.0, 1000)), output_bytes=4000)
    assert end_s(shared) == pytest.approx(1 + 4 + 4 + 1)
    alone = simulated(schedule, machine((4, 0.0, 1000)), output_bytes=4000)
    assert end_s(alone) == pytest.approx(1 + 4 + 1)


def test_an_adapter_serves_in_order_of_time_and_both_ways_at_once() -> None:
    # Rank 1 is slow, so rank 0's second message goes before its first.
    schedule = registry.make("forward-only", ((0, 1), (2, 3)), 4)
    trace = simulated(schedule, machine((2, 0.0, 1e9), (2, 0.0, 1000)), {1: 4.0}, output_bytes=1000)
    starts = {s.microbatch: s.start_s for s in trace.spans if s.kind == "forward" and s.stage == 1}
    assert starts == pytest.approx({0: 2.0, 2: 3.0, 1: 5.0, 3: 9.0})
    # Activations in one direction do not delay gradients in the other.
    both = simulated(OneFOneB(layout(1, 1), 20), machine((1, 0.0, 1e9), (2, 0.0, 1000)), output_bytes=2000)
    assert (
        end_s(both) - end_s(simulated(OneFOneB(layout(1, 1), 10), machine((2, 0.0, 1000)), output_bytes=2000))
    ) / 10 == (pytest.approx((2 * 2 + 2 * 2) / 2))


def test_the_level_between_two_ranks() -> None:
    links = machine((2, 0, 1), (3, 0, 1), (2, 0, 1))  # nodes of 2, racks of 3 nodes, 2 racks
    assert [links.level_between(0, rank) for rank in range(12)] == [0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2]
    assert links.level_between(6, 7) == 0
    with pytest.raises(ValueError, match="rank 12 has no device: the levels multiply to 12"):
        links.level_between(0, 12)


@pytest.mark.parametrize(
    ("ranks", "expected_s"),
    [
        ((0, 1), 2 * (1 + 600 / 2 / 100)),  # one node
        ((0, 2), 2 * (5 + 600 / 2 / 10)),  # one rank in each of two nodes
        ((0, 1, 2, 3), 2 * (1 + 600 / 2 / 100) + 2 * (5 + 600 / 2 / 10)),
        ((0, 1, 2, 3, 4, 5), 2 * (1 + 600 / 2 / 100) + 4 * (5 + 600 / 3 / 10)),
    ],
)
def test_an_all_reduce_goes_level_by_level(ranks: tuple[int, ...], expected_s: float) -> None:
    schedule = registry.make("data-parallel", (ranks,), len(ranks))
    plan = planned(layout(len(ranks)), parameter_bytes=600)
    trace = simulate(schedule, plan, machine((2, 1.0, 100), (3, 5.0, 10))).trace
    assert {round(s.end_s - s.start_s, 9) for s in trace.spans if s.kind == "reduce-gradients"} == {
        round(expected_s, 9)
    }


# --- stragglers -----------------------------------------------------------------------------------


def test_a_straggler_sets_the_pace() -> None:
    for slow, each_s in (({}, 3.0), ({2: 1.5}, 4.5), ({0: 2.0, 2: 1.5}, 6.0)):
        trace = simulated(OneFOneB(layout(1, 1, 1), 40), slow=slow, backward_s=2.0)
        assert minibatch_s(trace) == pytest.approx(each_s)


def test_a_slow_replica_makes_all_wait_at_the_reduction() -> None:
    trace = simulated(registry.make("data-parallel", layout(3), 9), slow={1: 2.0})
    waited = {s.rank: s.end_s - s.start_s for s in trace.spans if s.kind == "reduce-gradients" and s.start_s < 4.5}
    assert waited == pytest.approx({0: 2.0, 1: 0.0, 2: 2.0})
    assert end_s(trace) == pytest.approx(3 * 4.0)


def test_what_cannot_be_simulated() -> None:
    schedule = OneFOneB(layout(1, 1), 4)
    with pytest.raises(ScheduleError, match=r"rank 7 cannot be 2 times as slow: name ranks 0 to 1"):
        simulate(schedule, planned(schedule.layout), INSTANT, slow={7: 2.0})
    with pytest.raises(ScheduleError, match=r"rank 1 has no device: the topology has 1 devices"):
        simulate(schedule, planned(schedule.layout), machine((1, 0.0, 1.0)))
    with pytest.raises(ScheduleError, match=r"the schedule has 2 stages, but the plan has 3"):
        simulate(schedule, planned(layout(1, 1, 1)), INSTANT)


# --- memory ---------------------------------------------------------------------------------------


def remembered(schedule: Schedule) -> Simulation:
    """Simulate with weights of 100 bytes and microbatches of 1 byte."""
    return simulate(schedule, planned(schedule.layout, parameter_bytes=100, output_bytes=1), INSTANT)


def test_memory_of_1f1b_over_time() -> None:
    # seconds   0  1  2  3  4  5  6  7
    # rank 0    F0 F1 .  B0 F2 B1 .  B2      an optimizer step follows every backward
    # rank 1    .  F0 B0 F1 B1 F2 B2
    memory = remembered(OneFOneB(layout(1, 1), 3)).memory
    assert memory[0] == [(0.0, 100), (0.0, 101), (1.0, 102), (4.0, 101), (4.0, 201), (4.0, 202),
                         (6.0, 101), (6.0, 201), (8.0, 100)]  # fmt: skip
    assert peak(memory[1]) == 101


@pytest.mark.parametrize(
    ("kind", "peaks"),
    [
        ("1f1b", [404, 303, 202, 101]),
        ("vertical-sync", [404, 403, 402, 401]),
        ("1f1b-flush", [104, 103, 102, 101]),
        ("gpipe", [108, 108, 108, 108]),
        ("2bw", [204, 203, 202, 201]),
        ("model-parallel", [101, 101, 101, 101]),
    ],
)
def test_peaks_are_versions_and_microbatches_in_flight(kind: str, peaks: list[int]) -> None:
    schedule = registry.make(kind, layout(1, 1, 1, 1), 48, n_microbatches=8 if registry.cuts_minibatches(kind) else 1)
    assert [peak(points) for points in remembered(schedule).memory.values()] == peaks


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(["1f1b", "1f1b-flush", "gpipe", "2bw"]), st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_memory_ends_with_one_version_and_nothing_in_flight(kind: str, replicas: list[int]) -> None:
    members: Layout = layout(*replicas)
    schedule = registry.make(kind, members, 24, n_microbatches=12 if registry.cuts_minibatches(kind) else 1)
    for rank, points in remembered(schedule).memory.items():
        stage = next(index for index, ranks in enumerate(members) if rank in ranks)
        assert points[-1][1] == 100
        assert peak(points) <= 100 * schedule.versions(stage) + schedule.in_flight(stage)


# --- the trace ------------------------------------------------------------------------------------


def test_the_simulated_trace_holds_every_action() -> None:
    schedule = OneFOneB(layout(1, 1, 1), 7)
    spans = simulated(schedule).spans
    assert len(spans) == sum(1 for rank in range(3) for _ in schedule.actions(rank))
    for rank in range(3):
        own = [s for s in spans if s.rank == rank]
        assert all(a.end_s <= b.start_s + 1e-12 for a, b in pairwise(own)), "one thing at a time"


def test_a_simulation_comes_out_the_same_every_time() -> None:
    links = machine((3, 1e-3, 1e6), (2, 1e-2, 1e5))
    runs = {simulated(OneFOneB(layout(2, 3, 1), 20), links, {1: 1.5}, output_bytes=10_000) for _ in range(3)}
    assert len(runs) == 1
