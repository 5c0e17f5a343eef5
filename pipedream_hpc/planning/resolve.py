"""Resolve what the user gave as a plan into a Plan.

=====================  ==================================================================================
`4`, `"4"`             four stages of one replica each; with the schedule `data-parallel`: one stage of
                       four replicas
`"2-1-1"`, `(2, 1, 1)` three stages, the first one with two replicas
`"plan.json"`, a Path  a plan file, written by `pipedream partition`
a Plan                 itself
=====================  ==================================================================================

A number or replicas alone say nothing about costs; such plans are made from counted operations.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.files import load
from pipedream_hpc.planning.even import even_plan, parse_replicas
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


def resolve_plan(request: PlanRequest, counted: Callable[[], Profile], schedule: str | None = None) -> Plan:
    """Return the plan for a parsed request.

    Args:
        request: result of `parse_plan`; a Plan is returned unchanged.
        counted: returns a profile of the model made from counted operations; not called for a Plan.
        schedule: name of the schedule, if it is not the plan's: for `data-parallel` a number is that of the
            replicas of a single stage.

    Raises:
        PipedreamError: the model cannot be cut into so many stages.
    """
    if isinstance(request, Plan):
        return request
    if isinstance(request, int) and schedule == "data-parallel":
        request = (request,)
    profile = counted()
    if isinstance(request, int):
        if request > len(profile.layers):
            raise PipedreamError(
                f"plan {request}: '{profile.model}' has {len(profile.layers)} layers and cannot be cut into "
                f"{request} stages: use fewer stages"
            )
        flat = Topology((Level("node", request, 0.0, 1e9),), device="counted")
        plan = solve(profile, flat, Request(straight=True))
    else:
        plan = even_plan(profile, request)
    return dataclasses.replace(plan, notes=(*plan.notes, COUNTED))


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
