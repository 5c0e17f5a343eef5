"""Schedules, drawn as the timelines they are."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from schedules import drawn, lanes, layout, versions

from pipedream_hpc.schedule import registry
from pipedream_hpc.schedule.actions import (
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    OptimizerStep,
    ReduceGradients,
    ScheduleError,
    Send,
)
from pipedream_hpc.schedule.data_parallel import DataParallel
from pipedream_hpc.schedule.flush import ZBH1, ZBH2, Flush
from pipedream_hpc.schedule.forward_only import ForwardOnly
from pipedream_hpc.schedule.gpipe import GPipe, GPipeSplit
from pipedream_hpc.schedule.interleaved import Interleaved, folded
from pipedream_hpc.schedule.model_parallel import ModelParallel
from pipedream_hpc.schedule.one_f_one_b import OneFOneB
from pipedream_hpc.schedule.text import format_actions, parse_actions
from pipedream_hpc.schedule.two_bw import TwoBW
from pipedream_hpc.schedule.vertical_sync import VerticalSync

# --- 1F1B -----------------------------------------------------------------------------------------


def test_1f1b_on_four_stages() -> None:
    # start-up           steady state                    drain
    assert drawn(OneFOneB(layout(1, 1, 1, 1), 7)) == [
        "F0 F1 F2 F3 .  .  .  B0 F4 B1 F5 B2 F6 B3 .  B4 .  B5 .  B6",
        ".  F0 F1 F2 .  .  B0 F3 B1 F4 B2 F5 B3 F6 B4 .  B5 .  B6",
        ".  .  F0 F1 .  B0 F2 B1 F3 B2 F4 B3 F5 B4 F6 B5 .  B6",
        ".  .  .  F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6",
    ]


def test_1f1b_takes_a_step_after_every_backward() -> None:
    assert lanes(OneFOneB(layout(1, 1, 1), 5)) == [
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


def test_1f1b_rr_two_replicas_then_one() -> None:
    # Minibatch 4 is alone in its round: the other replica takes part in reduction and step all the same.
    assert lanes(OneFOneB(layout(2, 1), 5)) == [
        "F0 F2 B0 R U F4 B2 R U B4 R U",
        "F1 F3 B1 R U B3 R U R U",
        "F0 B0 U F1 B1 U F2 B2 U F3 B3 U F4 B4 U",
    ]


def test_messages_and_versions_of_an_inner_stage() -> None:
    assert tuple(OneFOneB(layout(1, 1, 1), 3).actions(1)) == parse_actions(
        """
        1RECV_F0<0r0 1F0v0  1SEND_F0>2r2
        1RECV_F1<0r0 1F1v0  1SEND_F1>2r2
        1RECV_B0<2r2 1B0v0l 1SEND_B0>0r0 1STEP1n1
        1RECV_F2<0r0 1F2v1  1SEND_F2>2r2
        1RECV_B1<2r2 1B1v0l 1SEND_B1>0r0 1STEP2n1
        1RECV_B2<2r2 1B2v1l 1SEND_B2>0r0 1STEP3n1
        """
    )


@pytest.mark.parametrize("kind", ["1f1b", "vertical-sync", "1f1b-flush", "gpipe", "2bw", "model-parallel"])
def test_the_gradient_goes_upstream_before_the_reduction(kind: str) -> None:
    n_microbatches = 4 if registry.cuts_minibatches(kind) else 1
    actions = list(registry.make(kind, layout(1, 2), 8, n_microbatches=n_microbatches).actions(1))
    for before, after in pairwise(actions):
        assert isinstance(after, Send) == isinstance(before, Backward), "directly after the backward"
    assert sum(isinstance(action, ReduceGradients) for action in actions) == (2 if n_microbatches > 1 else 4)


def test_reductions_and_steps_hold_the_true_size_of_the_round() -> None:
    def rounds(schedule: OneFOneB | Flush, rank: int) -> str:
        return format_actions(a for a in schedule.actions(rank) if isinstance(a, ReduceGradients | OptimizerStep))

    assert rounds(OneFOneB(layout(3, 1), 8), 2) == "0REDUCE0n3 0STEP1n3 0REDUCE1n3 0STEP2n3 0REDUCE2n2 0STEP3n2"
    # Microbatches: 5 and 3 of them, whichever replica has them.
    for rank in (0, 1, 2):
        assert rounds(Flush(layout(3, 1), 8, 5), rank) == "0REDUCE0n5 0STEP1n5 0REDUCE1n3 0STEP2n3"


# --- vertical sync --------------------------------------------------------------------------------


def test_vertical_sync_uses_the_version_of_the_input_stage_on_all_stages() -> None:
    schedule = VerticalSync(layout(1, 1, 1), 6)
    assert lanes(schedule) == lanes(OneFOneB(layout(1, 1, 1), 6))
    assert versions(schedule, 0) == "F0v0 F1v0 F2v0 B0v0 F3v1 B1v0 F4v2 B2v0 F5v3 B3v1 B4v2 B5v3"
    assert versions(schedule, 1) == "F0v0 F1v0 B0v0 F2v0 B1v0 F3v1 B2v0 F4v2 B3v1 F5v3 B4v2 B5v3"
    assert versions(schedule, 2) == "F0v0 B0v0 F1v0 B1v0 F2v0 B2v0 F3v1 B3v1 F4v2 B4v2 F5v3 B5v3"
    # With stashing alone the last stage would run on its newest.
    assert versions(OneFOneB(layout(1, 1, 1), 6), 2).endswith("B5v5")


def test_vertical_sync_over_stages_that_update_at_different_rates() -> None:
    # The input stage's version v has learnt from 2v minibatches, so the second stage uses its 2v.
    schedule = VerticalSync(layout(2, 1), 8)
    assert versions(schedule, 1) == " ".join(f"{w}{k}v{2 * max(0, k // 2 - 1)}" for k in range(8) for w in "FB")


# --- microbatches ---------------------------------------------------------------------------------


def test_1f1b_with_flush() -> None:
    # Microbatches 0 to 3 are minibatch 0, then the pipeline is empty; 4 to 7 are minibatch 1.
    assert drawn(Flush(layout(1, 1, 1), 8, 4)) == [
        "F0 F1 F2 .  .  B0 F3 B1 .  B2 .  B3 F4 F5 F6 .  .  B4 F7 B5 .  B6 .  B7",
        ".  F0 F1 .  B0 F2 B1 F3 B2 .  B3 .  .  F4 F5 .  B4 F6 B5 F7 B6 .  B7",
        ".  .  F0 B0 F1 B1 F2 B2 F3 B3 .  .  .  .  F4 B4 F5 B5 F6 B6 F7 B7",
    ]


def test_gpipe() -> None:
    assert drawn(GPipe(layout(1, 1, 1), 8, 4)) == [
        "F0 F1 F2 F3 .  .  .  .  B0 B1 B2 B3 F4 F5 F6 F7 .  .  .  .  B4 B5 B6 B7",
        ".  F0 F1 F2 F3 .  .  B0 B1 B2 B3 .  .  F4 F5 F6 F7 .  .  B4 B5 B6 B7",
        ".  .  F0 F1 F2 F3 B0 B1 B2 B3 .  .  .  .  F4 F5 F6 F7 B4 B5 B6 B7",
    ]


@pytest.mark.parametrize("kind", ["1f1b-flush", "gpipe"])
def test_one_version_per_minibatch_and_gradients_in_order(kind: str) -> None:
    schedule = registry.make(kind, layout(1, 1), 7, n_microbatches=3)
    for stage in (0, 1):
        backwards = [word for word in versions(schedule, stage).split() if word.startswith("B")]
        assert " ".join(backwards) == "B0v0 B1v0 B2v0 B3v1 B4v1 B5v1 B6v2"
    assert lanes(schedule)[0].count("U") == 3  # the last minibatch is of one microbatch


def test_2bw_never_drains() -> None:
    # Minibatches of two; U where two microbatches have come back.
    assert drawn(TwoBW(layout(1, 1, 1), 7, 2)) == [
        "F0 F1 F2 .  .  B0 F3 B1 F4 B2 F5 B3 F6 B4 .  B5 .  B6",
        ".  F0 F1 .  B0 F2 B1 F3 B2 F4 B3 F5 B4 F6 B5 .  B6",
        ".  .  F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6",
    ]
    assert lanes(TwoBW(layout(1, 1), 5, 2)) == [
        "F0 F1 B0 F2 B1 U F3 B2 F4 B3 U B4 U",
        "F0 B0 F1 B1 U F2 B2 F3 B3 U F4 B4 U",
    ]


def test_2bw_runs_on_the_version_before_the_newest_but_for_the_first_two() -> None:
    forwards = [word for word in versions(TwoBW(layout(1, 1, 1), 8, 2), 1).split() if word.startswith("F")]
    assert " ".join(forwards) == "F0v0 F1v0 F2v0 F3v0 F4v1 F5v1 F6v2 F7v2"


def test_2bw_needs_as_many_microbatches_as_the_pipeline_is_deep() -> None:
    with pytest.raises(ScheduleError, match=r"2bw needs at least 3 microbatches per minibatch on 1-1-1-1 ranks, not 2"):
        TwoBW(layout(1, 1, 1, 1), 8, 2)
    with pytest.raises(ScheduleError, match=r"at least 4 .* on 2-3 ranks"):  # ceil(3 / 2) on each of 2
        TwoBW(layout(2, 3), 8, 3)


def test_a_replica_without_a_microbatch_takes_part_in_the_reduction() -> None:
    # Microbatch k on replica k mod 2: minibatches of one, so replica 1 has none of minibatch 0.
    assert lanes(Flush(layout(2), 3, 1)) == ["F0 B0 R U R U F2 B2 R U", "R U F1 B1 R U R U"]
    assert lanes(TwoBW(layout(2), 3, 1)) == lanes(Flush(layout(2), 3, 1))


def test_interleaved_with_two_chunks_each() -> None:
    # Small letters: the second chunk, stages 2 and 3.
    assert drawn(Interleaved(folded(layout(1, 1, 1, 1), 2), 4, 4)) == [
        "F0 F1 f0 f1 F2 b0 F3 b1 f2 B0 f3 B1 .  b2 .  b3 B2 B3",
        ".  F0 F1 f0 b0 f1 b1 F2 B0 F3 B1 f2 b2 f3 b3 B2 B3",
    ]


def test_interleaved_with_a_short_last_minibatch() -> None:
    assert drawn(Interleaved(folded(layout(1, 1, 1, 1), 2), 3, 4)) == [
        "F0 F1 f0 f1 F2 b0 .  b1 f2 B0 B1 .  b2 .  B2",
        ".  F0 F1 f0 b0 f1 b1 F2 B0 B1 f2 b2 .  B2",
    ]


def test_interleaved_with_one_chunk_is_1f1b_with_flush() -> None:
    assert lanes(Interleaved(layout(1, 1, 1), 7, 4)) == lanes(Flush(layout(1, 1, 1), 7, 4))


def test_interleaved_refuses_other_layouts_and_numbers() -> None:
    with pytest.raises(ScheduleError, match=r"a multiple of 2 \(2 ranks in turn, 1 replicas\), not 3"):
        Interleaved(folded(layout(1, 1, 1, 1), 2), 6, 3)
    with pytest.raises(ScheduleError, match=r"stage s on rank s mod p"):
        Interleaved(((0,), (1,), (1,), (0,)), 6, 2)
    with pytest.raises(ScheduleError, match=r"3 stages cannot be distributed 2 per rank: .* a multiple of 2"):
        folded(layout(1, 1, 1), 2)


# --- backwards in two parts -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("replicas", "whole", "zb_h1"),
    [
        (
            (1, 1),
            [
                "F0 F1 .  .  B0 B0 F2 B1 B1 F3 B2 B2 .  B3 B3",
                ".  F0 B0 B0 F1 B1 B1 F2 B2 B2 F3 B3 B3",
            ],
            [
                "F0 F1 .  B0 B0 F2 B1 B1 F3 B2 B2 B3 B3",
                ".  F0 B0 F1 B1 B1 F2 B2 B2 F3 B3 W0 W3",
            ],
        ),
        (
            (1, 1, 1),
            [
                "F0 F1 F2 .  .  .  .  B0 B0 F3 B1 B1 .  B2 B2 .  B3 B3",
                ".  F0 F1 .  .  B0 B0 F2 B1 B1 F3 B2 B2 .  B3 B3",
                ".  .  F0 B0 B0 F1 B1 B1 F2 B2 B2 F3 B3 B3",
            ],
            [
                "F0 F1 F2 .  .  B0 B0 F3 B1 B1 B2 B2 B3 B3",
                ".  F0 F1 .  B0 F2 B1 B1 F3 B2 W0 B3 W2 W3",
                ".  .  F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3",
            ],
        ),
    ],
    ids=["two", "three"],
)
def test_zb_h1(replicas: tuple[int, ...], whole: list[str], zb_h1: list[str]) -> None:
    # The input stage's are whole: nobody waits for them.
    members = layout(*replicas)
    assert drawn(Flush(members, 4, 4), backward_s=2.0) == whole
    assert drawn(ZBH1(members, 4, 4), backward_s=2.0, weight_gradient_s=1.0) == zb_h1


def test_zb_h2_has_no_bubble() -> None:
    # Two minibatches: the second begins where the first ends.
    assert drawn(ZBH2(layout(1, 1), 8, 4), backward_s=2.0, weight_gradient_s=1.0) == [
        "F0 F1 F2 B0 B0 F3 B1 B1 B2 B2 B3 B3 F4 F5 F6 B4 B4 F7 B5 B5 B6 B6 B7 B7",
        ".  F0 B0 F1 B1 F2 B2 B2 F3 B3 W0 W1 W3 F4 B4 F5 B5 F6 B6 B6 F7 B7 W4 W5 W7",
    ]


def test_gpipe_with_split_backwards() -> None:
    assert drawn(GPipe(layout(1, 1, 1), 4, 4), backward_s=2.0) == [
        "F0 F1 F2 F3 .  .  .  .  .  .  B0 B0 B1 B1 B2 B2 B3 B3",
        ".  F0 F1 F2 F3 .  .  .  B0 B0 B1 B1 B2 B2 B3 B3",
        ".  .  F0 F1 F2 F3 B0 B0 B1 B1 B2 B2 B3 B3",
    ]
    assert drawn(GPipeSplit(layout(1, 1, 1), 4, 4), backward_s=2.0, weight_gradient_s=1.0) == [
        "F0 F1 F2 F3 .  .  .  .  B0 B0 B1 B1 B2 B2 B3 B3",
        ".  F0 F1 F2 F3 .  .  B0 B1 B2 B2 B3 B3 W0 W1",
        ".  .  F0 F1 F2 F3 B0 B1 B2 B3 W0 W1 W2 W3",
    ]


def test_replicas_defer_as_many_weight_backwards_as_there_are_ranks_before_them() -> None:
    assert lanes(ZBH1(layout(2, 1, 2), 6, 6)) == [
        "F0 F2 F4 B0 B2 B4 R U",
        "F1 F3 F5 B1 B3 B5 R U",
        "F0 F1 F2 B0 F3 B1 F4 B2 W0 F5 B3 W1 B4 W2 B5 W3 W4 W5 U",
        "F0 B0 F2 B2 F4 B4 W0 W2 W4 R U",
        "F1 B1 F3 B3 F5 B5 W1 W3 W5 R U",
    ]
    # A replica with fewer microbatches than that defers all of them.
    assert lanes(ZBH1(layout(1, 2), 3, 3)) == [
        "F0 F1 F2 B0 B1 B2 U",
        "F0 B0 F2 B2 W0 W2 R U",
        "F1 B1 W1 R U",
    ]


@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=4),
    st.integers(1, 9),
    st.integers(0, 20),
    st.sampled_from([ZBH1, ZBH2, GPipeSplit]),
)
def test_only_the_first_and_the_last_backwards_of_a_minibatch_are_split(
    replicas: list[int], n_microbatches: int, microbatches: int, kind: type[ZBH1 | ZBH2 | GPipeSplit]
) -> None:
    schedule = kind(layout(*replicas), microbatches, n_microbatches)
    for stage, ranks in enumerate(schedule.layout):
        for rank in ranks:
            split: set[int] = set()
            waiting: list[int] = []
            last: list[bool] = []  # of every backward since the last step
            pattern = ""  # of a minibatch: s for a split backward, w for a whole one
            for action in schedule.actions(rank):
                if isinstance(action, Forward) and action.split:
                    split.add(action.microbatch)
                elif isinstance(action, Backward):
                    assert action.microbatch not in split
                    last.append(action.last)
                    pattern += "w"
                elif isinstance(action, BackwardInput):
                    assert action.microbatch in split
                    waiting.append(action.microbatch)
                    pattern += "s"
                elif isinstance(action, BackwardWeight):
                    assert action.microbatch == waiting.pop(0), "the oldest first"
                    last.append(action.last)
                elif isinstance(action, OptimizerStep):
                    assert waiting == []
                    assert last == [*[False] * len(last), True][1:]
                    assert re.fullmatch("s*w*s*" if stage else "w*", pattern), "the input stage's are whole"
                    last, pattern = [], ""
                assert len(waiting) <= schedule.lag(stage) + 1


# --- the gradient norm over all stages -----------------------------------------------------------


def test_the_gradient_norm_is_exchanged_between_reduction_and_step() -> None:
    schedule = Flush(layout(2, 2), 4, 4, all_reduce_grad_norm=True)
    assert format_actions(schedule.actions(0)).endswith("0B2v0l 0REDUCE0n4 0NORM0n4 0STEP1n4")
    # A rank exchanges it once for all its chunks.
    chunks = Interleaved(folded(layout(1, 1, 1, 1), 2), 2, 2, all_reduce_grad_norm=True)
    assert format_actions(chunks.actions(1)).endswith("1NORM0n2 1STEP1n2 3STEP1n2")


def test_the_gradient_norm_needs_a_flush_and_equal_stages() -> None:
    with pytest.raises(
        ScheduleError, match=r"some stages have more replicas than others, here 1-2-1: give every stage as many"
    ):
        Flush(layout(1, 2, 1), 4, 4, all_reduce_grad_norm=True)
    with pytest.raises(ScheduleError, match=r"each stage updates by itself: use 1f1b-flush, zb-h1 or gpipe"):
        registry.make("1f1b", layout(1, 1), 4, all_reduce_grad_norm=True)


# --- one at a time --------------------------------------------------------------------------------


def test_model_parallel_works_on_one_stage_at_a_time() -> None:
    assert drawn(ModelParallel(layout(1, 1, 1), 2)) == [
        "F0 .  .  .  .  B0 F1 .  .  .  .  B1",
        ".  F0 .  .  B0 .  .  F1 .  .  B1",
        ".  .  F0 B0 .  .  .  .  F1 B1",
    ]


def test_data_parallel() -> None:
    assert lanes(DataParallel(layout(3), 8)) == [
        "F0 B0 R U F3 B3 R U F6 B6 R U",
        "F1 B1 R U F4 B4 R U F7 B7 R U",
        "F2 B2 R U F5 B5 R U R U",
    ]
    with pytest.raises(ScheduleError, match="the plan has 2 stages"):
        DataParallel(layout(1, 1), 8)


def test_forward_only() -> None:
    assert lanes(ForwardOnly(layout(1, 2), 3)) == ["F0 F1 F2", "F0 F2", "F1"]


# --- by name --------------------------------------------------------------------------------------


def test_every_schedule_has_a_name() -> None:
    for kind in registry.NAMES:
        members = folded(layout(1, 1), 2) if kind == "interleaved" else layout(1)
        assert list(registry.make(kind, members, 0).actions(0)) == [], "nothing to do"
    assert type(registry.make("1f1b-rr", layout(2, 1), 4)) is OneFOneB


def test_names_and_numbers_that_make_no_schedule() -> None:
    with pytest.raises(ScheduleError, match=r"there is no schedule '1f2b': choose from 1f1b, 1f1b-rr, vertical-sync"):
        registry.make("1f2b", layout(1), 4)
    with pytest.raises(
        ScheduleError, match=r"1f1b passes whole minibatches and does not cut them into 4 .* 1f1b-flush, zb-h1"
    ):
        registry.make("1f1b", layout(1), 4, n_microbatches=4)
    with pytest.raises(ScheduleError, match=r"at least one microbatch, not 0"):
        registry.make("gpipe", layout(1), 4, n_microbatches=0)
    with pytest.raises(ScheduleError, match=r"rank 0 holds stages 0, 1, which only the interleaved schedule can run"):
        list(OneFOneB(((0,), (0,)), 4).actions(0))
