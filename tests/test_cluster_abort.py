"""Whatever ends one rank ends all ranks, and one message names the reason."""

from __future__ import annotations

import os
import re
import sys
import time

import pytest
import ranks

from pipedream_hpc.cluster import abort
from pipedream_hpc.cluster.world import World
from pipedream_hpc.errors import PipedreamError

#: Time limit of a job in seconds; it only joins and fails, so this is generous.
LIMIT_S = 30.0
ALL_RANKS = -1


def fail(how: str, rank: int) -> ranks.Finished:
    """Run four ranks of which `rank` fails."""
    return ranks.python(4, "uncaught.py", how, rank, timeout=LIMIT_S)


def printing_ranks(output: str) -> list[str]:
    """Return the rank of every line that a rank printed, in order."""
    return re.findall(r"^\[rank (\d)/4 \S+\] ", output, flags=re.MULTILINE)


@pytest.mark.parametrize("rank", [0, 2, 3])
def test_invalid_input_on_one_rank_prints_one_sentence(rank: int) -> None:
    finished = fail("input", rank)
    assert printing_ranks(finished.output) == [str(rank)], finished.output
    assert "] pipedream: plan.json: cannot be read: put it there\n" in finished.output
    assert "Traceback" not in finished.output
    assert finished.status == abort.BAD_INPUT


def test_the_same_invalid_input_on_all_ranks_prints_one_sentence() -> None:
    finished = fail("input", ALL_RANKS)
    assert finished.output.count("cannot be read") == 1, finished.output
    assert finished.status == abort.BAD_INPUT


def test_a_bug_on_one_rank_prints_one_traceback() -> None:
    finished = fail("bug", 1)
    assert set(printing_ranks(finished.output)) == {"1"}, finished.output
    assert finished.output.count("Traceback") == finished.output.count("ZeroDivisionError: no samples") == 1
    assert finished.status == abort.FAILED


def test_a_killed_rank_ends_the_others() -> None:
    finished = fail("kill", 1)
    assert printing_ranks(finished.output) == []
    # The launcher wraps its lines at arbitrary places.
    assert re.search(r"rank 1 .*signal\s+9", finished.output, flags=re.DOTALL), finished.output
    assert finished.status != 0


def test_messages_and_statuses() -> None:
    assert abort.message(PipedreamError("no plan")) == "pipedream: no plan\n"
    assert abort.message(ValueError("x")) == "ValueError: x\n"
    assert [abort.status(e) for e in (PipedreamError(""), ValueError(), KeyboardInterrupt())] == [2, 1, 130]


def test_lower_ranks_print_first_and_no_rank_waits_long() -> None:
    delays = [abort.report_delay_s(rank) for rank in range(100)]
    assert delays[0] == 0
    assert delays[:6] == sorted(set(delays[:6]))
    assert max(delays) <= 2.4


def test_a_single_process_keeps_its_hook() -> None:
    assert not abort.installed()
    abort.abort_others(SystemExit(3))  # returns, since there are no other ranks


class Aborted(BaseException):
    """Takes the place of MPI_Abort, which does not return."""


class Comm:
    def Abort(self, status: int) -> None:  # noqa: N802 - as mpi4py calls it
        raise Aborted(status)


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> World:
    """Rank 1 of 2, whose uncaught exceptions stop both."""
    world = World(1, 2, 1, 2, "n1", Comm())
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    abort.install(world)
    assert abort.installed()
    return world


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (PipedreamError("plan.json: cannot be read"), 2, "[rank 1/2 n1] pipedream: plan.json: cannot be read\n"),
        (ValueError("x"), 1, "[rank 1/2 n1] ValueError: x\n"),
    ],
)
def test_an_uncaught_exception_is_printed_and_stops_all_ranks(
    error: Exception, status: int, said: str, two_ranks: World, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Aborted) as stopped:
        sys.excepthook(type(error), error, None)
    assert stopped.value.args == (status,)
    assert capsys.readouterr().err == said


def test_an_interrupt_is_not_printed_by_every_rank(two_ranks: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(status: int) -> None:
        raise Aborted(status)

    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(Aborted) as stopped:
        sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert stopped.value.args == (130,)


@pytest.mark.parametrize(("code", "status"), [(3, 3), ("a sentence", 1)])
def test_an_exit_with_an_error_stops_the_others(code: object, status: int, two_ranks: World) -> None:
    with pytest.raises(Aborted) as stopped:
        abort.abort_others(SystemExit(code))
    assert stopped.value.args == (status,)


def test_one_rank_needs_no_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    abort.install(World(0, 1, 0, 1, "n1"))
    assert not abort.installed()
