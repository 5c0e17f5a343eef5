"""Solver: cut a model into stages and give each its devices (paper, section 3.2).

::

    Profile ──► Cuts ───┐
                        ├──► Problem, one per kind of Row ──► exact or search ──► the fastest ──► Plan
    Topology ──► Rows ──┘

Every plan weighed is a pipeline along one row of devices, or copies of one side by side
(planning.solver.placement); among those the one is returned whose slowest stage or boundary is fastest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.planning.cost import DEFAULT, formula
from pipedream_hpc.planning.memory import MemoryRule, Recompute
from pipedream_hpc.planning.plan import Plan
from pipedream_hpc.planning.profile import Profile
from pipedream_hpc.planning.solver import exact, search
from pipedream_hpc.planning.solver.assemble import assemble
from pipedream_hpc.planning.solver.cuts import Cuts, cuts_of
from pipedream_hpc.planning.solver.placement import rows_of
from pipedream_hpc.planning.solver.problem import Piece, Problem
from pipedream_hpc.planning.topology import Topology

#: Problems of at most so many (pairs of cuts) x (pairs of devices) are solved exactly.
_EXACT = 4e8

#: By schedule: weight versions kept (None: one per minibatch in flight), and whether a flush ends
#: every minibatch with all its microbatches in flight (GPipe).
_VERSIONS: dict[str, int | None] = {"1f1b": None, "2bw": 2, "1f1b-flush": 1, "gpipe": 1}
SCHEDULES = tuple(_VERSIONS)


@dataclass(frozen=True)
class Request:
    """What is asked for beside a model and devices.

    Attributes:
        cost: name of the cost formula (planning.cost).
        straight: one replica per stage, as many stages as devices.
        fewer: whether devices may be left unused.
        memory_bytes: of one device; None: the topology's, if it says.
        optimizer: kind, for its state in memory (planning.memory.OPTIMIZERS).
        recompute: whether stages may, or must, run their forward again to save memory.
        schedule: one of SCHEDULES; `1f1b` keeps a weight version per minibatch in flight.
        microbatches: pieces a minibatch is passed on in; more than 1 for all but `1f1b`.
        cut_behind: names of layers behind which a stage must end.
        together: groups of names of layers that must share a stage, such as those with tied weights.
    """

    cost: str = DEFAULT
    straight: bool = False
    fewer: bool = False
    memory_bytes: int | None = None
    optimizer: str = "momentum"
    recompute: Recompute = "never"
    schedule: str = "1f1b"
    microbatches: int = 1
    cut_behind: Sequence[str] = ()
    together: Sequence[Sequence[str]] = ()


def solve(profile: Profile, topology: Topology, request: Request | None = None, *, cuts: Cuts | None = None) -> Plan:
    """The plan whose slowest stage or boundary is as fast as can be.

    Of several equally fast ones it is one with few stages. Very large problems (millions of times
    millions) are searched, not solved: then `Plan.bound_s` says how far from the best it can be.

    Args:
        cuts: of the profile, if they are known already.

    Raises:
        PipedreamError: no plan does what is asked; says what stands in the way.
    """
    request = request or Request()
    cuts = cuts or cuts_of(profile)
    problems = _problems(profile, topology, request, cuts)
    best: tuple[Problem, list[Piece], float] | None = None
    bound_s = np.inf
    for problem in problems:
        size = (len(cuts) * problem.row.devices) ** 2 / 4
        if size <= _EXACT:
            pieces = exact.pipeline(problem)
            lower_s = np.inf if pieces is None else problem.price_of(pieces)
        else:
            found = search.pipeline(problem, np.inf if best is None else best[2])
            pieces = None if found is None else found.pieces
            lower_s = (0.0 if best is None else best[2]) if found is None else found.bound_s
        bound_s = min(bound_s, lower_s)
        if pieces is not None and (best is None or problem.price_of(pieces) < best[2] * (1 - 1e-12)):
            best = (problem, pieces, problem.price_of(pieces))
    if best is None:
        raise PipedreamError(_why_none(profile, problems, request))
    return assemble(profile, best[0], best[1], schedule=request.schedule, bound_s=min(bound_s, best[2]))


def _problems(profile: Profile, topology: Topology, request: Request, cuts: Cuts) -> list[Problem]:
    if request.schedule not in _VERSIONS:
        raise PipedreamError(
            f"there is no schedule '{request.schedule}' to plan for: choose one of {', '.join(SCHEDULES)}"
        )
    if (request.schedule == "1f1b") != (request.microbatches == 1):
        asked = "whole minibatches: leave out" if request.schedule == "1f1b" else "microbatches: say 2 or more with"
        raise PipedreamError(f"schedule '{request.schedule}' takes {asked} --microbatches")
    rule = MemoryRule(
        optimizer=request.optimizer,
        versions=_VERSIONS[request.schedule],
        microbatches=request.microbatches,
        all_in_flight=request.schedule == "gpipe",
    )
    index = {layer.name: position for position, layer in enumerate(profile.layers)}
    together = [*([_index(index, name, "--together") for name in group] for group in request.together)]
    behind = [_index(index, name, "--cut-behind") for name in request.cut_behind]
    rows = rows_of(topology)
    return [
        Problem(
            cuts=cuts,
            row=row,
            formula=formula(request.cost),
            rule=rule,
            memory_bytes=topology.device_memory_bytes if request.memory_bytes is None else request.memory_bytes,
            recompute=request.recompute,
            straight=request.straight,
            fewer=request.fewer,
            cut_behind=tuple((layer, tuple(b for a, b in profile.edges if a == layer)) for layer in behind),
            together=tuple(tuple(group) for group in together),
        )
        for row in (rows[:1] if request.straight else rows)
    ]


def _index(index: dict[str, int], name: str, option: str) -> int:
    if name not in index:
        known = ", ".join(list(index)[:5])
        raise PipedreamError(f"{option}: the profile has no layer '{name}'; its layers are {known}, ...")
    return index[name]


def _why_none(profile: Profile, problems: list[Problem], request: Request) -> str:
    """One sentence on why there is no plan."""
    free = [dataclasses.replace(problem, memory_bytes=None) for problem in problems]
    devices = free[0].row.devices
    if request.straight and (most := _most_stages(free[0])) < devices:
        return (
            f"{devices} stages were asked for, but '{profile.model}' can be cut into {most} at most: "
            f"use {most} devices or fewer, or allow replicas (without --straight)"
        )
    smallest = [least for problem in problems if (least := _least_memory(problem)) is not None]
    if not smallest:
        return (
            f"no plan of '{profile.model}' satisfies --cut-behind and --together on {devices} devices: "
            "leave out one of them, or allow fewer devices (--fewer)"
        )
    exactly = (len(problems[0].cuts) * devices) ** 2 / 4 <= _EXACT
    smallest_that = "the smallest that would do have" if exactly else "it does on devices that have"
    hint = "" if request.recompute == "auto" else ", or allow --recompute auto"
    return (
        f"'{profile.model}' does not fit on {devices} devices of {problems[0].memory_bytes:,} bytes: "
        f"{smallest_that} {min(smallest):,} bytes (--memory {min(smallest)}); or use more devices{hint}"
    )


def _least_memory(problem: Problem) -> int | None:
    size = (len(problem.cuts) * problem.row.devices) ** 2 / 4
    if size > _EXACT:  # a stricter question of the same kind, on fewer cuts
        problem = problem.thinned(max(2, int(2 * _EXACT**0.5 / problem.row.devices)))
    return exact.least_memory(problem)


def _most_stages(problem: Problem) -> int:
    most = np.full(len(problem.cuts), -1)
    most[-1] = 0
    for first in reversed(range(len(problem.cuts) - 1)):
        reached = most[problem.ends(first)]
        if len(reached) and reached.max() >= 0:
            most[first] = reached.max() + 1
    return int(most[0])
