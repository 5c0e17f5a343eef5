"""Written schedules: what is counted along their actions, repeats, and mistakes that the verifier finds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from schedules import any_schedule, layout

from pipedream_hpc.planning.plan import Edge
from pipedream_hpc.schedule import registry
from pipedream_hpc.schedule.actions import (
    AllReduceGradNorm,
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    OptimizerStep,
    ReduceGradients,
    ScheduleError,
)
from pipedream_hpc.schedule.interleaved import folded
from pipedream_hpc.schedule.text import format_actions, format_schedule, parse_schedule
from pipedream_hpc.schedule.verifier import representative, verify, verify_around
from pipedream_hpc.schedule.written import Written


def written(name: str, members: Any, minibatches: int, n_microbatches: int = 1, **options: Any) -> Written:
    """Return a schedule of the registry as one that was written by hand."""
    made = registry.make(name, members, minibatches * n_microbatches, n_microbatches=n_microbatches, **options)
    return parse_schedule(format_schedule(made))


def rewritten(schedule: Any) -> Written:
    """Return a schedule of the registry as one that was written by hand, where it can be one."""
    per_minibatch = getattr(schedule, "n_microbatches", 1)
    assume(schedule.stashes and schedule.total_microbatches > 0 and schedule.total_microbatches % per_minibatch == 0)
    return parse_schedule(format_schedule(schedule))


def text(n_microbatches: int, layout: str, *ranks: str) -> Written:
    """Return the schedule of these lines."""
    header = ["pipedream-schedule 1", f"layout {layout}", f"n_microbatches {n_microbatches}"]
    return parse_schedule("\n".join([*header, *(f"rank {rank}: {line}" for rank, line in enumerate(ranks))]))


# --- what is counted along the actions ------------------------------------------------------------


@settings(deadline=None)
@given(any_schedule())
def test_counts_are_those_that_the_verifier_finds(schedule: Any) -> None:
    again = rewritten(schedule)
    proof = verify(again)
    stages = range(len(again.layout))
    assert proof == verify(schedule)
    assert proof.in_flight == tuple(map(again.in_flight, stages))
    assert proof.versions == tuple(map(again.versions, stages))
    for stage in stages:
        assert again.sources(stage) == schedule.sources(stage)
        assert again.targets(stage) == schedule.targets(stage)
        assert again.lag(stage) <= schedule.lag(stage)
        assert again.waiting(stage) <= schedule.waiting(stage)
        assert again.training == schedule.training


def test_all_of_a_pipeline_with_split_backwards() -> None:
    #            F0 F1 .  B0 B0 F2 B1 B1 F3 B2 B2 B3 B3
    #            .  F0 B0 F1 B1 B1 F2 B2 B2 F3 B3 W0 W3
    zb_h1 = written("zb-h1", layout(1, 1), 2, 4)
    assert (zb_h1.minibatches, zb_h1.total_microbatches, zb_h1.edges) == (2, 8, (Edge(0, 1),))
    assert [zb_h1.in_flight(stage) for stage in (0, 1)] == [2, 2]
    assert [zb_h1.splits(stage) for stage in (0, 1)] == [False, True]
    assert [zb_h1.lag(stage) for stage in (0, 1)] == [0, 1]
    assert [zb_h1.waiting(stage) for stage in (0, 1)] == [0, 2]
    assert [zb_h1.round_size(0, round) for round in (0, 1, 2)] == [4, 4, 0]
    assert not zb_h1.all_reduce_grad_norm


def test_a_schedule_that_no_generator_makes() -> None:
    # Backwards in the order of a stack; the second one is the last of the round.
    stack = text(
        2,
        "0 | 1",
        "0F0v0 0SEND_F0>1r1 0F1v0 0SEND_F1>1r1 0RECV_B1<1r1 0B1v0 0RECV_B0<1r1 0B0v0l 0STEP1n2",
        "1RECV_F0<0r0 1F0v0 1RECV_F1<0r0 1F1v0 1B1v0 1SEND_B1>0r0 1B0v0l 1SEND_B0>0r0 1STEP1n2",
    )
    proof = verify(stack.for_minibatches(3))
    assert (proof.in_flight, proof.versions) == ((2, 2), (1, 1))


# --- repeats --------------------------------------------------------------------------------------


def test_a_repeat_goes_on_where_the_last_one_ended() -> None:
    once = written("1f1b", layout(2, 1), 2)
    assert once.minibatches == 2
    twice = once.for_minibatches(4)
    assert twice.total_microbatches == 4
    assert format_actions(twice.actions(0)) == (
        "0F0v0 0SEND_F0>1r2 0RECV_B0<1r2 0B0v0l 0REDUCE0n2 0STEP1n2 "
        "0F2v1 0SEND_F2>1r2 0RECV_B2<1r2 0B2v1l 0REDUCE1n2 0STEP2n2"
    )
    assert format_actions(twice.actions(2)).endswith("1RECV_F3<0r1 1F3v3 1B3v3l 1SEND_B3>0r1 1STEP4n1")
    verify(twice)
    assert list(once.for_minibatches(0).actions(0)) == []
    verify(once.for_minibatches(0))


def test_numbers_of_minibatches_that_no_repeat_reaches() -> None:
    with pytest.raises(
        ScheduleError,
        match=r"describes 4 minibatches and cannot be repeated for 10: use a multiple of 4 minibatches, or write a",
    ):
        written("gpipe", layout(1, 1), 4, 2).for_minibatches(10)
    uneven = written("1f1b", layout(2, 1), 3)
    verify(uneven.for_minibatches(3))
    with pytest.raises(ScheduleError, match=r"3 microbatches, so its 2 replicas of stage 0 do not take equal turns"):
        uneven.for_minibatches(6)


def test_two_repeats_prove_as_much_as_many() -> None:
    many = written("2bw", layout(1, 1), 2, 4).for_minibatches(2000)
    assert representative(many) == many.for_minibatches(4)
    for rank in (0, 1, None):
        verify_around(many, rank)


# --- a plan and a model ---------------------------------------------------------------------------


def test_a_schedule_for_another_plan_or_model() -> None:
    schedule = written("1f1b", layout(1, 2, 1), 2)
    straight = (Edge(0, 1), Edge(1, 2))
    schedule.check_against(layout(1, 2, 1), straight)
    with pytest.raises(ScheduleError, match=r"has layout 0 \| 1,2 \| 3, but the plan has 0,1 \| 2 \| 3: write the"):
        schedule.check_against(layout(2, 1, 1), straight)
    with pytest.raises(ScheduleError, match=r"nothing from stage 0 to stage 2, but tensors of the model go there"):
        schedule.check_against(layout(1, 2, 1), (*straight, Edge(0, 2)))
    with pytest.raises(ScheduleError, match=r"sends from stage 0 to stage 1, but no tensor of the model goes there"):
        schedule.check_against(layout(1, 2, 1), (Edge(1, 2),))


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "wrong", "complaint"),
    [
        ("1F2v0", "1F2v0s", "1B2v0 (backward of microbatch 2 on version 0): its forward says that the backward is"),
        ("1F0v0s", "1F0v0", "1I0v0 (input backward of microbatch 0 on version 0): its forward does not say that the"),
        ("1W0v0", "", "1STEP1n4 (optimizer step to version 1 over 4 microbatches): the weight backward of micro"),
        ("1W3v0l", "1W3v0", "1STEP1n4 (optimizer step to version 1 over 4 microbatches): no backward of round 0 is"),
        ("1W0v0", "1W0v0l", "1W3v0l (weight backward of microbatch 3 on version 0): the gradients of round 0 are"),
        ("1STEP1n4", "1STEP1n3", "rank 1 (stage 1) takes round 0 for one of 3 microbatches, but it has 4"),
        ("1STEP1n4", "", "1F4v1s (forward of microbatch 4 on version 1): the newest version is 0"),
        ("1STEP1n4", "1REDUCE0n4 1STEP1n4", "1REDUCE0n4 (reduce the gradients of round 0 over 4 microbatches): the"),
        ("1SEND_B1>0r0", "", "0RECV_B1<1r1 (receive gradient 1 from rank 1): the next gradient from rank 1 is that of"),
        ("1RECV_F1<0r0", "", "1F1v0 (forward of microbatch 1 on version 0): the activation from stage 0 has not been"),
        ("1B1v0 1SEND_B1>0r0", "1SEND_B1>0r0 1B1v0", "1SEND_B1>0r0 (send gradient 1 to rank 0): the backward of the"),
        ("0B0v0", "0B0v1", "0B0v1 (backward of microbatch 0 on version 1): its forward used version 0"),
        ("0F4v1 0SEND_F4>1r1", "", "1RECV_F4<0r0 (receive activation 4 from rank 0): the next activation from rank 0"),
    ],
)  # fmt: skip
def test_mistakes_are_named(right: str, wrong: str, complaint: str) -> None:
    made = format_schedule(written("zb-h1", layout(1, 1), 2, 4))
    assert made.count(f" {right} ") == 1
    with pytest.raises(ScheduleError) as caught:
        verify(parse_schedule(made.replace(f" {right} ", f" {wrong} ")))
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_mistakes_that_concern_several_ranks() -> None:
    # Each rank has its own words for the all-reduce of gradients and norms.
    made = format_schedule(written("gpipe", layout(2, 2), 2, 4, all_reduce_grad_norm=True))
    assert made.count("REDUCE0n4") == made.count("NORM0n4") == 4
    for right, wrong, complaint in (
        (r"0REDUCE0n4", "", "have not been reduced"),
        (r".REDUCE0n4", "", "have not been reduced"),
        (r".NORM0n4", "", r"at .NORM1n4 .*: the round is 1, and 0 rounds before it have exchanged their norm"),
        (r".NORM1n4", "", r"the gradient norm of round 1 has not been exchanged"),
        (r"0F2v0", r"0F3v0", r"rank 0 .* at 0F3v0 .*: the microbatch belongs to rank 1"),
    ):
        with pytest.raises(ScheduleError, match=complaint):
            verify(parse_schedule(re.sub(right, wrong, made)))


def test_a_norm_needs_an_empty_pipeline() -> None:
    # 1F1B in which both ranks exchange the norm of every minibatch: microbatch 1 is in flight meanwhile.
    with pytest.raises(
        ScheduleError, match=r"rank 0 .* at 0STEP1n1 .*: microbatch 1 is in flight, which forbids to exchange gradient"
    ):
        verify(
            text(
                1,
                "0 | 1",
                "0F0v0 0SEND_F0>1r1 0F1v0 0SEND_F1>1r1 0RECV_B0<1r1 0B0v0l 0NORM0n1 0STEP1n1 "
                "0RECV_B1<1r1 0B1v0l 0NORM1n1 0STEP2n1",
                "1RECV_F0<0r0 1F0v0 1B0v0l 1SEND_B0>0r0 1NORM0n1 1STEP1n1 "
                "1RECV_F1<0r0 1F1v1 1B1v1l 1SEND_B1>0r0 1NORM1n1 1STEP2n1",
            )
        )


def test_split_backwards_need_one_weight_version() -> None:
    with pytest.raises(ScheduleError, match=r"stage 1 splits backwards and needs 2 weight versions: where backwards"):
        verify(
            text(
                1,
                "0 | 1",
                "0F0v0 0SEND_F0>1r1 0F1v0 0SEND_F1>1r1 0RECV_B0<1r1 0B0v0l 0STEP1n1 0RECV_B1<1r1 0B1v0l 0STEP2n1",
                "1RECV_F0<0r0 1F0v0s 1RECV_F1<0r0 1F1v0s 1I0v0 1SEND_B0>0r0 1W0v0l 1STEP1n1 "
                "1I1v0 1SEND_B1>0r0 1W1v0l 1STEP2n1",
            )
        )


def test_a_round_is_one_minibatch_where_minibatches_are_cut() -> None:
    made = format_schedule(registry.make("1f1b-flush", layout(1, 1), 8, n_microbatches=4), 2)
    with pytest.raises(ScheduleError, match=r"at 1B2v0 .*: the microbatch is one of minibatch 1, but the round is 0"):
        verify(parse_schedule(made))


# --- every word changed ---------------------------------------------------------------------------

BASES = {
    "1f1b on 2-1": written("1f1b", layout(2, 1), 3),
    "1f1b on 1-1-1 with a skip connection": written(
        "1f1b", layout(1, 1, 1), 3, edges=(Edge(0, 1), Edge(0, 2), Edge(1, 2))
    ),
    "vertical-sync on 1-1-1": written("vertical-sync", layout(1, 1, 1), 4),
    "zb-h1 on 1-1-1": written("zb-h1", layout(1, 1, 1), 2, 3),
    "zb-h1 on 1-2": written("zb-h1", layout(1, 2), 2, 3),
    "2bw on 1-1": written("2bw", layout(1, 1), 3, 2),
    "gpipe on 2-2 with norms": written("gpipe", layout(2, 2), 2, 2, all_reduce_grad_norm=True),
    "interleaved with norms": written("interleaved", folded(layout(1, 1, 1, 1), 2), 2, 2, all_reduce_grad_norm=True),
}


def meaning(schedule: Written) -> object:
    """Return what training depends on: versions of forwards and backwards, and the microbatches of every round."""
    runs, rounds = set(), {}
    for stage, ranks in enumerate(schedule.layout):
        for rank in ranks:
            round, ended = 0, set()
            for action in schedule.actions(rank):
                if action.stage != stage:
                    continue
                if isinstance(action, Forward | Backward | BackwardInput | BackwardWeight):
                    runs.add((type(action), stage, action.microbatch, action.version))
                if isinstance(action, Backward | BackwardWeight):
                    ended.add(action.microbatch)
                elif isinstance(action, ReduceGradients | AllReduceGradNorm):
                    rounds[type(action), stage, rank, action.round] = action.n_microbatches
                elif isinstance(action, OptimizerStep):
                    rounds[type(action), stage, rank, round] = (action.version, action.n_microbatches, frozenset(ended))
                    round, ended = round + 1, set()
            runs.add((stage, rank, frozenset(ended)))
    return runs, rounds


def variants(words: list[str], at: int) -> Iterator[list[str]]:
    """Yield the words with one of them dropped, doubled, swapped with the next, or with other numbers and flags."""
    word, before, behind = words[at], words[:at], words[at + 1 :]
    yield before + behind
    yield [*before, word, word, *behind]
    if behind:
        yield [*before, behind[0], word, *behind[1:]]
    for number in re.finditer("[0-9]+", word):
        for other in (int(number[0]) - 1, int(number[0]) + 1):
            if other >= 0:
                yield [*before, word[: number.start()] + str(other) + word[number.end() :], *behind]
    yield [*before, word[:-1] if word[-1] in "sl" else word + "s", *behind]
    yield [*before, word + "l", *behind]
    for letter, others in {"F": "B", "B": "FIW", "I": "BW", "W": "BI"}.items():
        for other in others:
            if re.fullmatch(rf"[0-9]+{letter}[0-9].*", word):
                yield [*before, word.replace(letter, other), *behind]


def mutants(schedule: Written) -> Iterator[tuple[str, str]]:
    """Yield (what was changed, text) for every change of a single word."""
    lines = format_schedule(schedule).splitlines()
    for number, line in enumerate(lines):
        if not line.startswith("rank"):
            continue
        label, _, rest = line.partition(": ")
        words = rest.split()
        for at, word in enumerate(words):
            for changed in variants(words, at):
                yield (
                    f"{label}: {word}",
                    "\n".join([*lines[:number], f"{label}: {' '.join(changed)}", *lines[number + 1 :]]),
                )


@pytest.mark.parametrize("base", BASES)
def test_a_word_that_was_changed_is_found_or_changes_nothing(base: str) -> None:
    schedule = BASES[base]
    verify(schedule)
    expected, found, harmless = meaning(schedule), 0, 0
    for what, changed in mutants(schedule):
        try:
            mutant = parse_schedule(changed)
            verify(mutant)
        except ScheduleError as error:
            assert "\n" not in str(error)
            found += 1
        else:
            assert meaning(mutant) == expected, what
            harmless += 1
    assert harmless < found / 5


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.filter_too_much])
@given(schedule=any_schedule(), data=st.data())
def test_any_schedule_with_a_word_changed(schedule: Any, data: st.DataObject) -> None:
    base = rewritten(schedule)
    assume(base.training and base.total_microbatches < 25)
    rank = data.draw(st.integers(0, len(base.rank_actions) - 1))
    words = format_actions(base.rank_actions[rank]).split()
    assume(words)
    changed = data.draw(st.sampled_from(list(variants(words, data.draw(st.integers(0, len(words) - 1))))))
    lines = format_schedule(base).splitlines()
    lines[3 + rank] = f"rank {rank}: {' '.join(changed)}"
    try:
        mutant = parse_schedule("\n".join(lines))
        verify(mutant)
    except ScheduleError:
        return
    if mutant.all_reduce_grad_norm == base.all_reduce_grad_norm:  # a run that needs norms refuses a file without them
        assert meaning(mutant) == meaning(base)
