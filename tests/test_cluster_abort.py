"""Whatever ends one rank ends them all, and one message says why."""

from __future__ import annotations

import re

import pytest
import ranks

from pipedream_hpc.cluster import abort
from pipedream_hpc.errors import PipedreamError

#: Seconds within which a job must be over; it does nothing but join and fail, so this is mostly slack.
SOON = 30.0
EVERYBODY = -1


def end(how: str, who: int) -> ranks.Finished:
    return ranks.python(4, "uncaught.py", how, who, timeout=SOON)


def spoken(output: str) -> list[str]:
    """The ranks that said something, in order of appearance, one entry per line."""
    return re.findall(r"^\[rank (\d)/4 \S+\] ", output, flags=re.MULTILINE)


@pytest.mark.parametrize("who", [0, 2, 3])
def test_bad_input_on_one_rank_is_one_sentence(who: int) -> None:
    finished = end("input", who)
    assert spoken(finished.output) == [str(who)], finished.output
    assert "] pipedream: plan.json: cannot be read: put it there\n" in finished.output
    assert "Traceback" not in finished.output
    assert finished.status == abort.BAD_INPUT


def test_the_same_bad_input_on_all_ranks_is_one_sentence() -> None:
    finished = end("input", EVERYBODY)
    assert finished.output.count("cannot be read") == 1, finished.output
    assert finished.status == abort.BAD_INPUT


def test_a_bug_on_one_rank_is_one_traceback() -> None:
    finished = end("bug", 1)
    assert set(spoken(finished.output)) == {"1"}, finished.output
    assert finished.output.count("Traceback") == finished.output.count("ZeroDivisionError: no samples") == 1
    assert finished.status == abort.FAILED


def test_a_rank_killed_from_outside_takes_the_others_along() -> None:
    finished = end("kill", 1)
    assert spoken(finished.output) == []
    # The launcher breaks its lines wherever they happen to be full.
    assert re.search(r"rank 1 .*signal\s+9", finished.output, flags=re.DOTALL), finished.output
    assert finished.status != 0


def test_messages_and_statuses() -> None:
    assert abort.message(PipedreamError("no plan")) == "pipedream: no plan\n"
    assert abort.message(ValueError("x")) == "ValueError: x\n"
    assert [abort.status(e) for e in (PipedreamError(""), ValueError(), KeyboardInterrupt())] == [2, 1, 130]


def test_lower_ranks_speak_first_and_nobody_waits_long() -> None:
    starts = [abort.head_start_s(rank) for rank in range(100)]
    assert starts[0] == 0
    assert starts[:6] == sorted(set(starts[:6]))
    assert max(starts) <= 2.4


def test_a_process_by_itself_keeps_its_hook() -> None:
    assert not abort.installed()
    abort.take_others_along(SystemExit(3))  # returns: there are no others
