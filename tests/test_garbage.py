"""Python's collector during a pass."""

from __future__ import annotations

import gc
import weakref

import pytest

from pipedream_hpc.runtime import garbage


class Knot:
    """Refers to itself: only the collector frees it."""

    def __init__(self) -> None:
        self.self = self


def test_nothing_is_collected_unasked_and_everything_is_as_it_was() -> None:
    assert gc.isenabled()
    frozen = gc.get_freeze_count()
    with garbage.no_stalls():
        assert not gc.isenabled()
        assert gc.get_freeze_count() > frozen
    assert gc.isenabled()
    assert gc.get_freeze_count() == frozen


def test_what_somebody_else_has_frozen_stays_frozen() -> None:
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        with garbage.no_stalls():
            assert not gc.isenabled()
        assert gc.get_freeze_count() >= frozen - 100  # objects may die meanwhile
    finally:
        gc.unfreeze()


def test_it_is_given_back_when_training_fails() -> None:
    with pytest.raises(RuntimeError), garbage.no_stalls():
        raise RuntimeError
    assert gc.isenabled()


def test_what_users_leave_behind_is_collected_between_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage, "EVERY_S", 0.0)
    with garbage.no_stalls() as collector:
        knot = weakref.ref(Knot())
        assert knot() is not None
        collector.between_updates()
        assert knot() is None
