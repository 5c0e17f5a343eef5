"""Resolve what the user gave as a plan into a Plan.

=====================  ==================================================================================
`4`, `"4"`             four stages of one replica each; with the schedule `data-parallel`: one stage of
                       four replicas
`"2-1-1"`, `(2, 1, 1)` three stages, the first one with two replicas
`"plan.json"`, a Path  a plan file, written by `pipedream partition`
a Plan                 itself
=====================  ==================================================================================

A number or replicas alone say nothing about costs; such plans are made from counted operations. Cut points say with
which modules the stages of such a plan begin.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.files import load
from pipedream_hpc.planning.even import even_plan, parse_replicas, plan_with_cuts
from pipedream_hpc.planning.plan import COUNTED, Plan
from pipedream_hpc.planning.profile import Profile
from pipedream_hpc.planning.solver import Request, solve
from pipedream_hpc.planning.topology import Level, Topology

#: What `parse_plan` returns: a plan, the replicas of every stage, or a number of stages.
PlanRequest = Plan | tuple[int, ...] | int

#: Upper limit of ranks in a plan that is given without a file.
_MOST_RANKS = 1 << 20

_FORMS = "give a number of stages such as 4, replicas per stage such as 2-1-1, or a plan file"


def parse_plan(plan: Plan | str | Path | int | tuple[int, ...]) -> PlanRequest:
    """Return the plan, the replicas per stage or the number of stages that the user gave; reads a plan file.

    A text that consists of digits is always a number, even if there is a file of that name.

    Raises:
        PipedreamError: `plan` has none of the forms in the module docstring, or the file cannot be read.
    """
    if isinstance(plan, Plan):
        return plan
    if isinstance(plan, Path):
        return load(Plan, plan)
    if isinstance(plan, str):
        return _parse_text(plan)
    if isinstance(plan, tuple | list):
        if not plan or not all(_is_count(each) for each in plan):
            raise PipedreamError(f"plan {plan!r} should be the number of replicas of every stage, 1 or more: {_FORMS}")
        return _checked("-".join(map(str, plan)), tuple(plan))
    if not isinstance(plan, int) or isinstance(plan, bool):
        raise PipedreamError(f"plan should not be {plan!r}, a {type(plan).__name__}: {_FORMS}")
    return _checked(plan, plan)


def check_cut_points(cut_points: Sequence[str], request: PlanRequest, schedule: str | None = None) -> None:
    """Refuse cut points that no model could be cut at under this plan.

    Args:
        cut_points: names of the modules that stages begin with; none for a cut by costs.
        request: result of `parse_plan`.
        schedule: as for `resolve_plan`.

    Raises:
        PipedreamError: they are no list of names, have a name twice, or their number does not fit the plan.
    """
    if isinstance(cut_points, str) or not all(isinstance(each, str) for each in cut_points):
        raise PipedreamError(
            f"cut_points should be a list of names of modules, not {cut_points!r}: give the names that the model has "
            "for them, such as ['layers.8', 'layers.16']"
        )
    if not cut_points:
        return
    if isinstance(request, Plan):
        raise PipedreamError(
            "the plan says itself where stages begin: leave cut_points out, or give a number of stages or replicas per "
            "stage as the plan"
        )
    if twice := [name for name in cut_points if cut_points.count(name) > 1]:
        raise PipedreamError(f"cut_points has '{twice[0]}' twice: name every module once")
    needed = len(_replicas(request, schedule)) - 1
    if len(cut_points) != needed:
        raise PipedreamError(
            f"the plan's {needed + 1} stages need {needed} cut points, for the first begins with the model, but "
            f"cut_points has {len(cut_points)}: give a plan of {len(cut_points) + 1} stages, or {needed} cut points"
        )


def resolve_plan(
    request: PlanRequest, counted: Callable[[], Profile], schedule: str | None = None, cuts: Sequence[int] = ()
) -> Plan:
    """Return the plan for a parsed request.

    Args:
        request: result of `parse_plan`; a Plan is returned unchanged.
        counted: returns a profile of the model made from counted operations; not called for a Plan.
        schedule: name of the schedule, if it is not the plan's: for `data-parallel` a number is that of the
            replicas of a single stage.
        cuts: number of the first layer of every stage but the first, where the user has named them; their number has
            been checked by `check_cut_points`.

    Raises:
        PipedreamError: the model cannot be cut into so many stages.
    """
    if isinstance(request, Plan):
        return request
    profile = counted()
    if cuts:
        plan = plan_with_cuts(profile, _replicas(request, schedule), cuts)
    elif isinstance(request, int) and schedule != "data-parallel":
        if request > len(profile.layers):
            raise PipedreamError(
                f"plan {request}: '{profile.model}' has {len(profile.layers)} layers and cannot be cut into "
                f"{request} stages: use fewer stages"
            )
        flat = Topology((Level("node", request, 0.0, 1e9),), device="counted")
        plan = solve(profile, flat, Request(straight=True))
    else:
        plan = even_plan(profile, _replicas(request, schedule))
    return dataclasses.replace(plan, notes=(*plan.notes, COUNTED))


def _replicas(request: tuple[int, ...] | int, schedule: str | None) -> tuple[int, ...]:
    """Return the replicas of every stage."""
    if isinstance(request, tuple):
        return request
    return (request,) if schedule == "data-parallel" else (1,) * request


def _parse_text(text: str) -> PlanRequest:
    if re.fullmatch(r"[0-9]+", text):
        return _checked(text, int(text) if len(text) <= 9 else _MOST_RANKS + 1)
    if (replicas := parse_replicas(text)) is not None:
        return _checked(text, replicas)
    # Without a letter other than x it was not meant as the name of a file.
    if re.fullmatch(r"[\d\sxX.,:+-]*", text) and not Path(text).is_file():
        raise PipedreamError(
            f"plan '{text}' is neither a number of stages, nor replicas per stage, nor a file: {_FORMS}"
        )
    if not Path(text).is_file():
        raise PipedreamError(f"plan {text}: there is no such file: {_FORMS}")
    return load(Plan, text)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _checked(given: object, request: tuple[int, ...] | int) -> tuple[int, ...] | int:
    """Return `request` if its number of ranks is possible; errors quote `given`."""
    ranks = request if isinstance(request, int) else sum(request)
    if ranks < 1:
        raise PipedreamError(f"plan {given}: a pipeline needs at least one stage: {_FORMS}")
    if ranks > _MOST_RANKS:
        raise PipedreamError(f"plan {given}: a plan has at most {_MOST_RANKS} ranks: {_FORMS}")
    return request
