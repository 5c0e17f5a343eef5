"""The text form: every action and every schedule comes back as it was, and mistakes are named with their place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from schedules import any_schedule, layout

from pipedream_hpc.schedule import registry
from pipedream_hpc.schedule.actions import (
    Action,
    AllReduceGradNorm,
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    OptimizerStep,
    Recv,
    ReduceGradients,
    ScheduleError,
    Send,
)
from pipedream_hpc.schedule.text import (
    format_action,
    format_actions,
    format_schedule,
    parse_action,
    parse_actions,
    parse_schedule,
    read_schedule,
)

NUMBERS = st.integers(0, 10**9 - 1)
PAYLOADS = st.sampled_from(["activation", "gradient"])
ACTIONS: st.SearchStrategy[Action] = st.one_of(
    st.builds(Recv, NUMBERS, NUMBERS, PAYLOADS, NUMBERS, NUMBERS),
    st.builds(Send, NUMBERS, NUMBERS, PAYLOADS, NUMBERS, NUMBERS),
    st.builds(Forward, NUMBERS, NUMBERS, NUMBERS, st.booleans()),
    st.builds(Backward, NUMBERS, NUMBERS, NUMBERS, st.booleans()),
    st.builds(BackwardInput, NUMBERS, NUMBERS, NUMBERS),
    st.builds(BackwardWeight, NUMBERS, NUMBERS, NUMBERS, st.booleans()),
    st.builds(ReduceGradients, NUMBERS, NUMBERS, NUMBERS),
    st.builds(AllReduceGradNorm, NUMBERS, NUMBERS, NUMBERS),
    st.builds(OptimizerStep, NUMBERS, NUMBERS, NUMBERS),
)


@pytest.mark.parametrize(
    ("word", "action", "in_words"),
    [
        ("2F0v1", Forward(2, 0, 1), "forward of microbatch 0 on version 1"),
        ("2F0v1s", Forward(2, 0, 1, split=True), "forward of microbatch 0 on version 1"),
        ("2B4v1", Backward(2, 4, 1), "backward of microbatch 4 on version 1"),
        ("2B4v1l", Backward(2, 4, 1, last=True), "backward of microbatch 4 on version 1"),
        ("2I4v1", BackwardInput(2, 4, 1), "input backward of microbatch 4 on version 1"),
        ("2W4v1", BackwardWeight(2, 4, 1), "weight backward of microbatch 4 on version 1"),
        ("2W4v1l", BackwardWeight(2, 4, 1, last=True), "weight backward of microbatch 4 on version 1"),
        ("2RECV_F0<1r3", Recv(2, 0, "activation", 1, 3), "receive activation 0 from rank 3"),
        ("2SEND_F0>3r5", Send(2, 0, "activation", 3, 5), "send activation 0 to rank 5"),
        ("2RECV_B0<3r5", Recv(2, 0, "gradient", 3, 5), "receive gradient 0 from rank 5"),
        ("2SEND_B0>1r3", Send(2, 0, "gradient", 1, 3), "send gradient 0 to rank 3"),
        ("2REDUCE0n4", ReduceGradients(2, 0, 4), "reduce the gradients of round 0 over 4 microbatches"),
        ("2NORM0n1", AllReduceGradNorm(2, 0, 1), "all-reduce the gradient norm of round 0 over 1 microbatch"),
        ("2STEP1n4", OptimizerStep(2, 1, 4), "optimizer step to version 1 over 4 microbatches"),
    ],
)
def test_the_words(word: str, action: Action, in_words: str) -> None:
    assert format_action(action) == word
    assert parse_action(word) == action
    assert str(action) == in_words


@given(st.lists(ACTIONS, max_size=5))
def test_actions_come_back_as_they_were(actions: list[Action]) -> None:
    assert parse_actions(format_actions(actions)) == tuple(actions)


@settings(deadline=None)
@given(any_schedule())
def test_every_schedule_comes_back_as_it_was(schedule: Any) -> None:
    per_minibatch = getattr(schedule, "n_microbatches", 1)
    assume(schedule.total_microbatches > 0 and schedule.total_microbatches % per_minibatch == 0)
    written = parse_schedule(format_schedule(schedule))
    assert written.layout == schedule.layout
    assert (written.total_microbatches, written.n_microbatches) == (schedule.total_microbatches, per_minibatch)
    for rank in {rank for members in schedule.layout for rank in members}:
        assert list(written.actions(rank)) == list(schedule.actions(rank))
    # And the same text again.
    assert format_schedule(written) == format_schedule(schedule)


def test_a_file(tmp_path: Path) -> None:
    file = tmp_path / "my.schedule"
    text = format_schedule(registry.make("1f1b", layout(1, 1), 1))
    assert text == (
        "pipedream-schedule 1\n"
        "layout 0 | 1\n"
        "n_microbatches 1\n"
        "rank 0: 0F0v0 0SEND_F0>1r1 0RECV_B0<1r1 0B0v0l 0STEP1n1\n"
        "rank 1: 1RECV_F0<0r0 1F0v0 1B0v0l 1SEND_B0>0r0 1STEP1n1\n"
    )
    # White space, order of the lines and comments mean nothing.
    first, *header, rank_0, rank_1 = text.splitlines()
    spaced = "\n".join(["# mine", f"  {first} # 1", "", rank_1.replace(" ", "   "), *header, f" {rank_0}  # 0F1v0"])
    file.write_text(spaced)
    assert read_schedule(file) == parse_schedule(text)


@pytest.mark.parametrize(
    ("word", "complaint"),
    [
        ("F0v0", "'F0v0' should begin with the number of a stage, as in 2F0v0"),
        ("²F0v0", "'²F0v0' should begin with the number of a stage"),
        ("2", "'2' should have one of F, B, I, W, RECV_F, RECV_B, SEND_F, SEND_B, REDUCE, NORM, STEP after the stage, "
         "but has nothing"),
        ("2X0v0", "after the stage, but has 'X'"),
        ("2f0v0", "after the stage, but has nothing"),
        ("2F0", "'2F0' should be written as 2F0v0, with microbatch and version, or 2F0v0s where its backward is split"),
        ("2F0v0l", "should be written as 2F0v0"),
        ("2B0v0s", "or 2B0v0l where it is the last of its round on this rank"),
        ("2I0v0l", "'2I0v0l' should be written as 2I0v0, with microbatch and version"),
        ("2RECV_F0>1r0", "should be written as 2RECV_F0<1r0, with microbatch, stage and rank of the sender"),
        ("2SEND_B0>1", "should be written as 2SEND_B0>1r0, with microbatch, stage and rank of the receiver"),
        ("2REDUCE0", "should be written as 2REDUCE0n4, with the round and the number of its microbatches"),
        ("2STEP1v1", "should be written as 2STEP1n4, with the version that is made"),
        ("2F-1v0", "should be written as 2F0v0"),
        ("2F0v1000000000", "should be written as 2F0v0"),
    ],
)  # fmt: skip
def test_a_word_that_is_none(word: str, complaint: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        parse_action(word)
    assert complaint in str(caught.value)
    with pytest.raises(ScheduleError, match=r"^word 2: "):
        parse_actions(f"0F0v0 {word}")


@given(st.text(max_size=12))
def test_any_other_word_is_refused_in_one_sentence(word: str) -> None:
    try:
        action = parse_action(word)
    except ScheduleError as error:
        assert "should" in str(error)
    else:
        assert parse_action(format_action(action)) == action


HEADER = "pipedream-schedule 1\nlayout 0 | 1\nn_microbatches 1\n"
RANK_0 = "rank 0: 0F0v0 0SEND_F0>1r1 0RECV_B0<1r1 0B0v0l 0STEP1n1\n"
RANK_1 = "rank 1: 1RECV_F0<0r0 1F0v0 1B0v0l 1SEND_B0>0r0 1STEP1n1\n"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "my.schedule, line 1: should be 'pipedream-schedule 1', but is ''"),
        ("{}", "my.schedule, line 1: should be 'pipedream-schedule 1', but is '{}'"),
        ("pipedream-schedule 2\n", "my.schedule, line 1: version 2 cannot be read, only version 1"),
        (HEADER.replace("layout 0 | 1\n", ""), "my.schedule: there is no line 'layout ...'"),
        (HEADER.replace("n_micro", "micro"), "line 3: should be 'layout', 'n_microbatches' or 'rank NUMBER:'"),
        (
            HEADER + "layout 0\n",
            "line 4: should be 'layout', 'n_microbatches' or 'rank NUMBER:', each once, but is 'la",
        ),
        (HEADER.replace("0 | 1", "0 1"), "line 2: a layout should be written as in 0 | 1,2 | 3, not as '0 1'"),
        (HEADER.replace("0 | 1", "0 | 2"), "line 2: the ranks of a layout should be 0 to 1, but are [0, 2]"),
        (HEADER.replace("0 | 1", "0,1 | 1"), "line 2: rank 1 holds several stages and should be the same replica"),
        (HEADER.replace("hes 1", "hes x"), "line 3: n_microbatches should be one number, not 'x'"),
        (HEADER + RANK_0, "my.schedule: there is no line 'rank 1: ...', though the layout has 2 ranks"),
        (HEADER + RANK_0 + RANK_1 + "rank 2:\n", "line 6: the layout has no rank 2"),
        (HEADER + RANK_0 + RANK_0, "line 5: should be 'layout', 'n_microbatches' or 'rank NUMBER:', each once"),
        (HEADER + RANK_0.replace("0B0", "0X0") + RANK_1, "line 4, column 41: '0X0v0l' should have one of F, B"),
        (HEADER + RANK_0 + RANK_1.replace("1F0", "0F0"), "line 5, column 22: '0F0v0': stage 0 is not on rank 1, which"),
        (HEADER + RANK_0.replace("1r1", "0r1", 1) + RANK_1, "an activation is sent to a stage behind stage 0, not to"),
        (HEADER + RANK_0.replace("<1r1", "<1r0") + RANK_1, "'0RECV_B0<1r0': stage 1 is not on rank 0"),
        (
            HEADER + "rank 0:\nrank 1:\n",
            "my.schedule: the actions run 0 microbatches, which is no whole number of mini",
        ),
        (
            HEADER.replace("hes 1", "hes 2") + RANK_0 + RANK_1,
            "1 microbatches, which is no whole number of minibatches of",
        ),
        (HEADER + "rank 0: 0F0v0 0B0v0l 0STEP1n1\nrank 1:\n", "my.schedule: stage 1 receives nothing from the stages"),
    ],
)
def test_a_file_with_a_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, complaint: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.schedule").write_text(text)
    with pytest.raises(ScheduleError) as caught:
        read_schedule("my.schedule")
    assert complaint in str(caught.value)
    assert str(caught.value).startswith("my.schedule")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match=r"none.schedule: cannot be read: No such file"):
        read_schedule(tmp_path / "none.schedule")
    (tmp_path / "bytes.schedule").write_bytes(b"\xff\xfe")
    with pytest.raises(ScheduleError, match=r"bytes.schedule: is no text file; a schedule begins with 'pipedream-sch"):
        read_schedule(tmp_path / "bytes.schedule")
