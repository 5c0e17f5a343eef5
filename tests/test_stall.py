"""What the ranks that have waited too long find out from each other's reports."""

from __future__ import annotations

from typing import Any

import pytest

from pipedream_hpc.cluster.world import World
from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.runtime.comm import stall
from pipedream_hpc.runtime.comm.stall import StallReportError, is_stall, report

pytestmark = pytest.mark.alone


class Comm:
    """The reports of other ranks; a rank without one is silent."""

    def __init__(self, reports: dict[int, str]) -> None:
        self.reports, self.sent = reports, []

    def isend(self, message: str, dest: int, tag: int) -> object:
        self.sent.append((dest, message))
        return object()

    def iprobe(self, source: int, tag: int) -> bool:
        return source in self.reports

    def recv(self, source: int, tag: int) -> str:
        return self.reports[source]


def waiting(rank: int, other: int) -> str:
    return f"rank {rank} waits for rank {other}"


@pytest.mark.parametrize(
    ("reports", "words"),
    [
        (
            {1: waiting(1, 2), 2: waiting(2, 3)},
            "^no answer from rank 3, which may be stuck in the loss, the data or the model, .*: see what it does with "
            "py-spy dump. The others: rank 0 waits for rank 1; rank 1 waits for rank 2; rank 2 waits for rank 3$",
        ),
        ({1: waiting(1, 2)}, "^no answer from ranks 2, 3, which may be stuck .* The others: rank 0 .*; rank 1 .*"),
        (
            {1: waiting(1, 2), 2: waiting(2, 3), 3: waiting(3, 0)},
            "^every rank waits for another: rank 0 waits for rank 1; .*; rank 3 waits for rank 0$",
        ),
    ],
    ids=["one silent", "two silent", "a circle"],
)
def test_the_silent_rank_is_named(reports: dict[int, str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """rank 0 ──waits──► rank 1 ──waits──► rank 2 ──waits──► rank 3"""
    monkeypatch.setattr(stall, "_LISTEN_S", 0.05)
    comm = Comm(reports)
    error = report(World(0, 4, 0, 4, "n1", comm), waiting(0, 1))
    with pytest.raises(StallReportError, match=words):
        raise error
    assert comm.sent == [(rank, waiting(0, 1)) for rank in (1, 2, 3)], "every rank can show the whole picture"


def test_a_single_rank_has_nobody_to_ask() -> None:
    assert str(report(World(0, 1, 0, 1, "n1"), "waits for itself")) == "waits for itself"


def test_what_is_a_stall() -> None:
    class StallError(Exception):
        """As the core calls it."""

    def caused(error: Exception, cause: BaseException) -> Any:
        error.__cause__ = cause
        return error

    assert is_stall(StallError())
    assert is_stall(caused(PipedreamError("rank 1 at epoch 0"), StallError()))
    assert not is_stall(caused(PipedreamError("rank 1 at epoch 0"), ValueError()))
