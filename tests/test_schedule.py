"""Schedules, drawn as the timelines they are."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from schedules import drawn, lanes, layout, versions

from pipedream_hpc.schedule import kinds
from pipedream_hpc.schedule.actions import Backward, Reduce, ScheduleError, Send, Update, WeightGradient
from pipedream_hpc.schedule.data_parallel import DataParallel
from pipedream_hpc.schedule.flush import Flush
from pipedream_hpc.schedule.forward_only import ForwardOnly
from pipedream_hpc.schedule.gpipe import GPipe
from pipedream_hpc.schedule.interleaved import Interleaved, folded
from pipedream_hpc.schedule.model_parallel import ModelParallel
from pipedream_hpc.schedule.one_f_one_b import OneFOneB
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


def test_1f1b_updates_after_every_backward() -> None:
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


@pytest.mark.parametrize("kind", ["1f1b", "vertical-sync", "1f1b-flush", "gpipe", "2bw", "model-parallel"])
def test_the_gradient_goes_upstream_before_the_reduction(kind: str) -> None:
    microbatches = 4 if kinds.takes_microbatches(kind) else 1
    actions = list(kinds.make(kind, layout(1, 2), 8, microbatches=microbatches).actions(1))
    for before, after in pairwise(actions):
        assert isinstance(after, Send) == isinstance(before, Backward), "directly after the backward"
    assert sum(isinstance(action, Reduce) for action in actions) == (2 if microbatches > 1 else 4)


def test_reductions_know_the_true_count() -> None:
    rounds = [a for a in OneFOneB(layout(3, 1), 8).actions(2) if isinstance(a, Reduce)]
    assert rounds == [Reduce(0, 0, 3), Reduce(0, 1, 3), Reduce(0, 2, 2)]
    # Microbatches: 5 and 3 of them, whichever replica has them.
    for rank in (0, 1, 2):
        rounds = [a for a in Flush(layout(3, 1), 8, 5).actions(rank) if isinstance(a, Reduce)]
        assert rounds == [Reduce(0, 0, 5), Reduce(0, 1, 3)]


# --- vertical sync --------------------------------------------------------------------------------


def test_vertical_sync_takes_the_version_of_the_input_stage_along() -> None:
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
    # Microbatches 0 to 3 are minibatch 0, then the pipe is empty; 4 to 7 minibatch 1.
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
    schedule = kinds.make(kind, layout(1, 1), 7, microbatches=3)
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


def test_2bw_needs_minibatches_of_the_pipe_s_depth() -> None:
    with pytest.raises(
        ScheduleError, match=r"2bw needs at least 3 microbatches to a minibatch on 1-1-1-1 ranks, not 2"
    ):
        TwoBW(layout(1, 1, 1, 1), 8, 2)
    with pytest.raises(ScheduleError, match=r"at least 4 .* on 2-3 ranks"):  # ceil(3 / 2) on each of 2
        TwoBW(layout(2, 3), 8, 3)


def test_a_replica_without_a_microbatch_reduces_all_the_same() -> None:
    # Microbatch k on replica k mod 2: minibatches of one, so replica 1 has none of minibatch 0.
    assert lanes(Flush(layout(2), 3, 1)) == ["F0 B0 R U R U F2 B2 R U", "R U F1 B1 R U R U"]
    assert lanes(TwoBW(layout(2), 3, 1)) == lanes(Flush(layout(2), 3, 1))


def test_interleaved_with_two_chunks_each() -> None:
    # Small letters: the second chunk, stages 2 and 3.
    assert drawn(Interleaved(folded(layout(1, 1, 1, 1), 2), 4, 4)) == [
        "F0 F1 f0 f1 F2 b0 F3 b1 f2 B0 f3 B1 .  b2 .  b3 B2 B3",
        ".  F0 F1 f0 b0 f1 b1 F2 B0 F3 B1 f2 b2 f3 b3 B2 B3",
    ]


def test_interleaved_leaves_out_what_a_short_minibatch_lacks() -> None:
    assert drawn(Interleaved(folded(layout(1, 1, 1, 1), 2), 3, 4)) == [
        "F0 F1 f0 f1 F2 b0 .  b1 f2 B0 B1 .  b2 .  B2",
        ".  F0 F1 f0 b0 f1 b1 F2 B0 B1 f2 b2 .  B2",
    ]


def test_interleaved_with_one_chunk_is_1f1b_with_flush() -> None:
    assert lanes(Interleaved(layout(1, 1, 1), 7, 4)) == lanes(Flush(layout(1, 1, 1), 7, 4))


def test_interleaved_says_what_it_needs() -> None:
    with pytest.raises(ScheduleError, match=r"a multiple of 2 \(2 ranks in turn, 1 replicas\), not 3"):
        Interleaved(folded(layout(1, 1, 1, 1), 2), 6, 3)
    with pytest.raises(ScheduleError, match=r"stage s on rank s mod p"):
        Interleaved(((0,), (1,), (1,), (0,)), 6, 2)
    with pytest.raises(ScheduleError, match=r"3 stages cannot be shared out in chunks of 2"):
        folded(layout(1, 1, 1), 2)


# --- backwards in two parts -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("replicas", "whole", "split"),
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
def test_1f1b_flush_with_split_backwards(replicas: tuple[int, ...], whole: list[str], split: list[str]) -> None:
    # The input stage's are whole: nobody waits for them.
    members = layout(*replicas)
    assert drawn(Flush(members, 4, 4), backward_s=2.0) == whole
    assert drawn(Flush(members, 4, 4, split=True), backward_s=2.0, weight_gradient_s=1.0) == split


def test_1f1b_flush_without_a_bubble() -> None:
    # Two minibatches: the second begins where the first ends.
    zero = Flush(layout(1, 1), 8, 4, split=True, zero_bubble=True)
    assert drawn(zero, backward_s=2.0, weight_gradient_s=1.0) == [
        "F0 F1 F2 B0 B0 F3 B1 B1 B2 B2 B3 B3 F4 F5 F6 B4 B4 F7 B5 B5 B6 B6 B7 B7",
        ".  F0 B0 F1 B1 F2 B2 B2 F3 B3 W0 W1 W3 F4 B4 F5 B5 F6 B6 B6 F7 B7 W4 W5 W7",
    ]


def test_gpipe_with_split_backwards() -> None:
    assert drawn(GPipe(layout(1, 1, 1), 4, 4), backward_s=2.0) == [
        "F0 F1 F2 F3 .  .  .  .  .  .  B0 B0 B1 B1 B2 B2 B3 B3",
        ".  F0 F1 F2 F3 .  .  .  B0 B0 B1 B1 B2 B2 B3 B3",
        ".  .  F0 F1 F2 F3 B0 B0 B1 B1 B2 B2 B3 B3",
    ]
    assert drawn(GPipe(layout(1, 1, 1), 4, 4, split=True), backward_s=2.0, weight_gradient_s=1.0) == [
        "F0 F1 F2 F3 .  .  .  .  B0 B0 B1 B1 B2 B2 B3 B3",
        ".  F0 F1 F2 F3 .  .  B0 B1 B2 B2 B3 B3 W0 W1",
        ".  .  F0 F1 F2 F3 B0 B1 B2 B3 W0 W1 W2 W3",
    ]


def test_replicas_put_weight_gradients_off_for_as_many_units_as_there_are_ranks_before_them() -> None:
    assert lanes(Flush(layout(2, 1, 2), 6, 6, split=True)) == [
        "F0 F2 F4 B0 B2 B4 R U",
        "F1 F3 F5 B1 B3 B5 R U",
        "F0 F1 F2 B0 F3 B1 F4 B2 W0 F5 B3 W1 B4 W2 B5 W3 W4 W5 U",
        "F0 B0 F2 B2 F4 B4 W0 W2 W4 R U",
        "F1 B1 F3 B3 F5 B5 W1 W3 W5 R U",
    ]
    # A replica with less than that to do has put off all of it.
    assert lanes(Flush(layout(1, 2), 3, 3, split=True)) == [
        "F0 F1 F2 B0 B1 B2 U",
        "F0 B0 F2 B2 W0 W2 R U",
        "F1 B1 W1 R U",
    ]


@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=4),
    st.integers(1, 9),
    st.integers(0, 20),
    st.sampled_from([Flush, partial(Flush, zero_bubble=True), GPipe]),
)
def test_only_the_first_and_the_last_units_of_a_minibatch_put_anything_off(
    replicas: list[int], microbatches: int, units: int, kind: Callable[..., Flush | GPipe]
) -> None:
    schedule = kind(layout(*replicas), units, microbatches, split=True)
    for stage, ranks in enumerate(schedule.layout):
        for rank in ranks:
            waiting: list[int] = []
            done: list[int] = []  # since the last update
            pattern = ""  # of a minibatch: s for a split backward, w for a whole one
            for action in schedule.actions(rank):
                if isinstance(action, Backward):
                    split = schedule.puts_off(stage, action.minibatch)
                    (waiting if split else done).append(action.minibatch)
                    pattern += "s" if split else "w"
                elif isinstance(action, WeightGradient):
                    assert action.minibatch == waiting.pop(0), "the oldest first"
                    done.append(action.minibatch)
                elif isinstance(action, Update):
                    assert waiting == []
                    assert [schedule.last_of_round(stage, unit) for unit in done] == [*[False] * len(done), True][1:]
                    assert re.fullmatch("s*w*s*" if stage else "w*", pattern), "the input stage's are whole"
                    done, pattern = [], ""
                assert len(waiting) <= schedule.lag(stage) + 1


def test_stages_that_agree_need_as_many_replicas_each() -> None:
    Flush(layout(2, 2), 4, 4, agree=True)
    with pytest.raises(
        ScheduleError, match=r"some have more replicas than others, here 1-2-1: give every stage as many"
    ):
        Flush(layout(1, 2, 1), 4, 4, agree=True)


@pytest.mark.parametrize("kind", sorted({*kinds.NAMES} - {"1f1b-flush", "gpipe"}))
def test_other_schedules_run_backwards_whole(kind: str) -> None:
    with pytest.raises(
        ScheduleError, match=rf"{kind} runs backwards whole: leave split_backward away, or use 1f1b-flush or gpipe"
    ):
        kinds.make(kind, layout(1, 1), 8, microbatches=4 if kinds.takes_microbatches(kind) else 1, split=True)


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
    for kind in kinds.NAMES:
        members = folded(layout(1, 1), 2) if kind == "interleaved" else layout(1)
        assert list(kinds.make(kind, members, 0).actions(0)) == [], "nothing to do"
    assert type(kinds.make("1f1b-rr", layout(2, 1), 4)) is OneFOneB


def test_names_and_numbers_that_make_no_schedule() -> None:
    with pytest.raises(ScheduleError, match=r"there is no schedule '1f2b': choose from 1f1b, 1f1b-rr, vertical-sync"):
        kinds.make("1f2b", layout(1), 4)
    with pytest.raises(ScheduleError, match=r"1f1b sends whole minibatches, not 4 microbatches .* 1f1b-flush, gpipe"):
        kinds.make("1f1b", layout(1), 4, microbatches=4)
    with pytest.raises(ScheduleError, match=r"at least one microbatch, not 0"):
        kinds.make("gpipe", layout(1), 4, microbatches=0)
    with pytest.raises(ScheduleError, match=r"rank 0 stands in stages 0, 1"):
        list(OneFOneB(((0,), (0,)), 4).actions(0))
