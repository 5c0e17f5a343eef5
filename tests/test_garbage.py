"""Python's garbage collector during a pass."""

from __future__ import annotations

import gc
import weakref

import pytest

from pipedream_hpc.garbage import objects_made
from pipedream_hpc.runtime.execution import garbage


class Cycle:
    """An object that refers to itself: only the collector frees it."""

    def __init__(self) -> None:
        self.self = self


def test_automatic_collection_is_off_within_and_restored_after() -> None:
    assert gc.isenabled()
    frozen = gc.get_freeze_count()
    with garbage.deferred_collection():
        assert not gc.isenabled()
        assert gc.get_freeze_count() > frozen
    assert gc.isenabled()
    assert gc.get_freeze_count() == frozen


def test_objects_frozen_by_others_stay_frozen() -> None:
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        with garbage.deferred_collection():
            assert not gc.isenabled()
        assert gc.get_freeze_count() >= frozen - 100  # objects may die meanwhile
    finally:
        gc.unfreeze()


def test_the_collector_is_restored_after_an_error() -> None:
    with pytest.raises(RuntimeError), garbage.deferred_collection():
        raise RuntimeError
    assert gc.isenabled()


def test_cycles_of_users_are_collected_when_due(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage, "INTERVAL_S", 0.0)
    with garbage.deferred_collection() as collector:
        cycle = weakref.ref(Cycle())
        assert cycle() is not None
        collector.collect_if_due()
        assert cycle() is None


@pytest.mark.parametrize("frozen", [False, True])
def test_objects_made_are_told_from_those_before(frozen: bool) -> None:
    before = Cycle()
    if frozen:
        gc.freeze()
    try:
        with objects_made() as made:
            during = Cycle()
        after = Cycle()
        assert [id(each) in made for each in (before, during, after)] == [False, True, False]
        assert (gc.get_freeze_count() > 0) == frozen
    finally:
        gc.unfreeze()
