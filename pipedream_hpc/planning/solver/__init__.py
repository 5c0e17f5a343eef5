"""Solver: cut a model into stages and assign devices to each (paper, section 3.2).

::

    Profile ──► Cuts ─────────┐
                              ├──► Problem, one per DeviceRow ──► exact or search ──► the fastest ──► Plan
    Topology ──► DeviceRows ──┘

Every plan considered is a pipeline along one row of devices, or along several equal rows in parallel
(planning.solver.placement). The solver returns the plan that minimises the slowest stage or boundary.
"""

from __future__ import annotations

import dataclasses
import difflib
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
from pipedream_hpc.planning.solver.placement import device_rows
from pipedream_hpc.planning.solver.problem import PlacedStage, Problem
from pipedream_hpc.planning.topology import Topology

#: Problems with at most this many (pairs of cuts) x (pairs of devices) are solved exactly.
_EXACT = 4e8

#: Weight versions that each schedule keeps; None: one per minibatch in flight.
_VERSIONS: dict[str, int | None] = {"1f1b": None, "2bw": 2, "1f1b-flush": 1, "gpipe": 1}
SCHEDULES = tuple(_VERSIONS)


@dataclass(frozen=True)
class Request:
    """Options of the solver.

    Attributes:
        cost: name of the cost formula (planning.cost).
        straight: one replica per stage, as many stages as devices.
        fewer: whether devices may be left unused.
        memory_bytes: memory of one device; None: the topology's, if known.
        optimizer: optimizer kind, which determines its memory (planning.memory.OPTIMIZERS).
        recompute: whether stages may, or must, run their forward again to save memory.
        schedule: one of SCHEDULES; `1f1b` keeps one weight version per minibatch in flight.
        n_microbatches: microbatches per minibatch; 1 for `1f1b`, more for all other schedules.
        cut_after: names of layers after which a stage must end.
        together: groups of names of layers, or of modules with layers in them, that must share a stage, such as those
            with tied weights.
    """

    cost: str = DEFAULT
    straight: bool = False
    fewer: bool = False
    memory_bytes: int | None = None
    optimizer: str = "momentum"
    recompute: Recompute = "never"
    schedule: str = "1f1b"
    n_microbatches: int = 1
    cut_after: Sequence[str] = ()
    together: Sequence[Sequence[str]] = ()


def solve(profile: Profile, topology: Topology, request: Request | None = None, *, cuts: Cuts | None = None) -> Plan:
    """Return the plan that minimises the time of the slowest stage or boundary.

    Among equally fast plans it prefers few stages. Very large problems are searched instead of solved
    exactly; `Plan.bound_s` then bounds the distance from the optimum.

    Args:
        profile: costs of the model's layers.
        topology: the devices and links.
        request: options; by default those of Request.
        cuts: the profile's cuts, if they are already known.

    Raises:
        PipedreamError: no plan satisfies the request; the message names the reason.
    """
    request = request or Request()
    cuts = cuts or cuts_of(profile)
    problems = _problems(profile, topology, request, cuts)
    best: tuple[Problem, list[PlacedStage], float] | None = None
    bound_s = np.inf
    for problem in problems:
        size = (len(cuts) * problem.row.devices) ** 2 / 4
        if size <= _EXACT:
            stages = exact.pipeline(problem)
            lower_s = np.inf if stages is None else problem.bottleneck_s(stages)
        else:
            found = search.pipeline(problem, np.inf if best is None else best[2])
            stages = None if found is None else found.stages
            lower_s = (0.0 if best is None else best[2]) if found is None else found.bound_s
        bound_s = min(bound_s, lower_s)
        if stages is not None and (best is None or problem.bottleneck_s(stages) < best[2] * (1 - 1e-12)):
            best = (problem, stages, problem.bottleneck_s(stages))
    if best is None:
        raise PipedreamError(_why_none(profile, problems, request))
    return assemble(profile, best[0], best[1], schedule=request.schedule, bound_s=min(bound_s, best[2]))


def _problems(profile: Profile, topology: Topology, request: Request, cuts: Cuts) -> list[Problem]:
    if request.schedule not in _VERSIONS:
        raise PipedreamError(
            f"there is no schedule '{request.schedule}' to plan for: choose one of {', '.join(SCHEDULES)}"
        )
    if (request.schedule == "1f1b") != (request.n_microbatches == 1):
        if request.schedule == "1f1b":
            raise PipedreamError("schedule '1f1b' does not cut minibatches: leave out --n-microbatches")
        raise PipedreamError(f"schedule '{request.schedule}' needs at least 2 microbatches: set --n-microbatches")
    rule = MemoryRule(
        optimizer=request.optimizer,
        versions=_VERSIONS[request.schedule],
        n_microbatches=request.n_microbatches,
        all_in_flight=request.schedule == "gpipe",
    )
    index = {layer.name: position for position, layer in enumerate(profile.layers)}
    together = [
        [layer for name in group for layer in _layers_of(index, name, "--together")] for group in request.together
    ]
    cut_after = [_index(index, name, "--cut-after") for name in request.cut_after]
    rows = device_rows(topology)
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
            cut_after=tuple((layer, tuple(b for a, b in profile.edges if a == layer)) for layer in cut_after),
            together=tuple(tuple(group) for group in together),
        )
        for row in (rows[:1] if request.straight else rows)
    ]


def _index(index: dict[str, int], name: str, option: str) -> int:
    """Return the layer of a name."""
    if name not in index:
        inside = [each for each in index if each.startswith(f"{name}.")]
        if inside:
            raise PipedreamError(f"{option}: '{name}' is no layer, but has the layers {', '.join(inside)}: name one")
        _layers_of(index, name, option)
    return index[name]


def _layers_of(index: dict[str, int], name: str, option: str) -> list[int]:
    """Return the layer of a name, or those in the module of this name."""
    found = [layer for each, layer in index.items() if each == name or each.startswith(f"{name}.")]
    if not found:
        modules = {each.rsplit(".", depth)[0] for each in index for depth in range(each.count(".") + 1)}
        near = difflib.get_close_matches(name, sorted(modules | index.keys()), n=3, cutoff=0.0)
        raise PipedreamError(f"{option}: the profile has no layer or module '{name}'; near are {', '.join(near)}")
    return found


def _why_none(profile: Profile, problems: list[Problem], request: Request) -> str:
    """Return a sentence that says why there is no plan."""
    devices = problems[0].row.devices
    if request.straight:
        unlimited = dataclasses.replace(problems[0], memory_bytes=None)
        if (most := _most_stages(unlimited)) < devices:
            return (
                f"'{profile.model}' cannot be cut into {devices} stages: use at most {most} devices, or allow "
                "replicas (leave out --straight)"
            )
    smallest = [least for problem in problems if (least := _least_memory(problem)) is not None]
    if not smallest:
        return (
            f"no plan of '{profile.model}' satisfies --cut-after and --together on {devices} devices: "
            "leave out one of these options, or allow fewer devices (--fewer)"
        )
    exactly = (len(problems[0].cuts) * devices) ** 2 / 4 <= _EXACT
    needs = "it needs at least" if exactly else "it fits with"
    hint = "" if request.recompute == "auto" else ", or allow --recompute auto"
    return (
        f"'{profile.model}' does not fit on {devices} devices of {problems[0].memory_bytes:,} bytes: "
        f"{needs} {min(smallest):,} bytes per device (--memory {min(smallest)}); or use more devices{hint}"
    )


def _least_memory(problem: Problem) -> int | None:
    size = (len(problem.cuts) * problem.row.devices) ** 2 / 4
    if size > _EXACT:  # fewer cuts: a stricter problem, whose memory is an upper bound
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
