"""What the user may give as a plan, and the Plan that it becomes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from networks import chain

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.files import save
from pipedream_hpc.planning.even import even_plan
from pipedream_hpc.planning.plan import COUNTED, Plan
from pipedream_hpc.planning.profile import Profile
from pipedream_hpc.planning.resolve import parse_plan, resolve_plan

#: Six layers; the activations after the third one are small.
PROFILE = chain([(1.0, 2.0, 10**9 if layer != 2 else 10, 100, 10) for layer in range(6)])
PLAN = even_plan(PROFILE, (2, 1))


def counted() -> Profile:
    return PROFILE


def not_needed() -> Profile:
    raise AssertionError("a plan needs no counted profile")


@pytest.mark.parametrize(
    ("given", "schedule", "layout"),
    [
        # a number: stages of one replica each ...
        (3, None, ((0,), (1,), (2,))),
        ("3", None, ((0,), (1,), (2,))),
        ("03", None, ((0,), (1,), (2,))),
        (1, None, ((0,),)),
        ("3", "1f1b-flush", ((0,), (1,), (2,))),
        # ... but with data parallelism replicas of one stage
        (3, "data-parallel", ((0, 1, 2),)),
        ("3", "data-parallel", ((0, 1, 2),)),
        # replicas per stage
        ("2-1-1", None, ((0, 1), (2,), (3,))),
        ((2, 1, 1), None, ((0, 1), (2,), (3,))),
        ("1-1", "data-parallel", ((0,), (1,))),
        ((3,), None, ((0, 1, 2),)),
    ],
)
def test_a_number_or_replicas_become_a_counted_plan(
    given: Any, schedule: str | None, layout: tuple[tuple[int, ...], ...]
) -> None:
    plan = resolve_plan(parse_plan(given), counted, schedule)
    assert plan.layout == layout
    assert COUNTED in plan.notes
    assert not plan.timed
    assert [name for stage in plan.stages for name in stage.layers] == [layer.name for layer in PROFILE.layers]


def test_a_number_is_cut_by_the_solver_and_replicas_evenly_by_compute() -> None:
    assert resolve_plan(2, counted).stages[0].boundary_s > 0
    assert resolve_plan((1, 1), counted).stages[0].boundary_s == 0


def test_a_plan_is_returned_unchanged() -> None:
    assert parse_plan(PLAN) is PLAN
    assert resolve_plan(PLAN, not_needed, "data-parallel") is PLAN


@pytest.mark.parametrize("kind", [str, Path])
def test_a_plan_file_is_read(kind: Any, tmp_path: Path) -> None:
    save(PLAN, tmp_path / "plan.json")
    assert parse_plan(kind(tmp_path / "plan.json")) == PLAN


def test_a_file_named_by_digits_is_read_only_through_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(PLAN, Path("4"))
    assert parse_plan("4") == 4
    assert parse_plan(Path("4")) == PLAN
    assert parse_plan("./4") == PLAN


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (0, "plan 0: a pipeline needs at least one stage: give a number of stages such as 4"),
        (-2, "plan -2: a pipeline needs at least one stage"),
        ("0", "plan 0: a pipeline needs at least one stage"),
        ("-1", "plan '-1' is neither a number of stages, nor replicas per stage, nor a file: give a number"),
        ("2-0-1", "plan '2-0-1' is neither a number of stages"),
        ("2--1", "plan '2--1' is neither a number of stages"),
        ("2-", "plan '2-' is neither a number of stages"),
        ("4x1", "plan '4x1' is neither a number of stages"),
        ("x", "plan 'x' is neither a number of stages"),
        ("", "plan '' is neither a number of stages"),
        (" ", "plan ' ' is neither a number of stages"),
        (".", "plan '.' is neither a number of stages"),
        ("1.5", "plan '1.5' is neither a number of stages"),
        ("9" * 5000, "a plan has at most 1048576 ranks"),
        ("99999999-1", "plan 99999999-1: a plan has at most 1048576 ranks"),
        (1 << 40, "plan 1099511627776: a plan has at most 1048576 ranks"),
        (True, "plan should not be True, a bool: give a number of stages such as 4, replicas per stage"),
        (2.0, "plan should not be 2.0, a float"),
        (None, "plan should not be None, a NoneType"),
        ((), "plan () should be the number of replicas of every stage, 1 or more"),
        ((2, 0), "plan (2, 0) should be the number of replicas of every stage"),
        ((2, True), "plan (2, True) should be the number of replicas of every stage"),
        ("absent.json", "plan absent.json: there is no such file: give a number"),
        (Path("absent.json"), "absent.json: cannot be read: No such file or directory"),
        ("a\0b", "there is no such file"),
    ],
)
def test_anything_else_is_refused_in_one_sentence(given: Any, message: str) -> None:
    with pytest.raises(PipedreamError) as caught:
        parse_plan(given)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_of_an_older_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    save(PLAN, path)
    path.write_text(path.read_text().replace(f'"version": {Plan.VERSION}', '"version": 1'))
    with pytest.raises(PipedreamError, match="field 'version' is 1, but this pipedream reads version 2"):
        parse_plan(path)


@pytest.mark.parametrize("given", ["7", "1-1-1-1-1-1-1"])
def test_more_stages_than_layers_are_refused(given: str) -> None:
    with pytest.raises(PipedreamError, match="has 6 layers and cannot be cut into 7 stages: use fewer stages"):
        resolve_plan(parse_plan(given), counted)
