"""The search for large problems: compared with the exact solver on small ones, and run on large ones."""

from __future__ import annotations

import itertools

import pytest
import ranks
from hypothesis import example, given, settings
from hypothesis import strategies as st
from networks import chain, chains, dag, dags, flat, topologies

from pipedream_hpc.planning.cost import NAMES, formula
from pipedream_hpc.planning.memory import MemoryRule
from pipedream_hpc.planning.profile import Profile
from pipedream_hpc.planning.solver import exact, search, solve
from pipedream_hpc.planning.solver.cuts import cuts_of
from pipedream_hpc.planning.solver.placement import device_rows
from pipedream_hpc.planning.solver.problem import Problem
from pipedream_hpc.planning.topology import Level, Topology


@settings(max_examples=100, deadline=None)
@given(
    profile=st.one_of(chains, dags()),
    topology=topologies(),
    cost=st.sampled_from(NAMES),
    limit=st.none() | st.integers(1000, 40_000),
    recompute=st.sampled_from(["never", "auto", "always"]),
)
def test_the_search_is_as_good_as_the_exact_solver_or_bounded_by_it(profile, topology, cost, limit, recompute) -> None:  # type: ignore[no-untyped-def]
    for row in device_rows(topology):
        problem = Problem(cuts_of(profile), row, formula(cost), MemoryRule(), limit, recompute, fewer=True)
        best = exact.pipeline(problem)
        found = search.pipeline(problem)
        if found is None:
            assert best is None or len(topology.levels) > 1
            continue
        assert best is not None
        assert found.bound_s <= problem.bottleneck_s(best) * (1 + 1e-9) + 1e-12
        assert found.time_s >= problem.bottleneck_s(best) * (1 - 1e-9)
        if len(topology.levels) == 1:
            assert found.time_s == pytest.approx(problem.bottleneck_s(best), rel=1e-8, abs=1e-12)


@settings(max_examples=200, deadline=None)
@given(
    profile=st.one_of(chains, dags()),
    topology=topologies(),
    cost=st.sampled_from(NAMES),
    fractions=st.lists(st.floats(0.01, 1.5), min_size=1, max_size=4),
)
@example(chain([(1.0, 5.0, 125, 314, 160)] * 3), flat(5, 11.5), "ring", [0.75])
def test_the_inner_loop_agrees_with_the_formulas(
    profile: Profile, topology: Topology, cost: str, fractions: list[float]
) -> None:
    """A pipeline found within a time takes no longer by the formulas; if none is found, none exists."""
    for row in device_rows(topology):
        problem = Problem(cuts_of(profile), row, formula(cost), MemoryRule(), fewer=True)
        reach, best_s = search._Reach(problem), problem.bottleneck_s(exact.pipeline(problem) or [])
        for fraction in fractions:
            time_s = fraction * max(best_s, float(problem.cuts.time_s[-1]), 1e-6)
            stages = reach.within(time_s)
            if stages is not None:
                assert problem.bottleneck_s(stages) <= time_s * (1 + 1e-9)
            elif len(topology.levels) == 1:
                assert best_s > time_s * (1 - 1e-9)


def test_a_model_with_too_many_cuts() -> None:
    # Ten parallel branches of three layers: 4^10 cuts.
    branches = 10
    layers = [(1.0, 2.0, 1, 1, 0)] * (3 * branches + 2)
    edges = []
    for branch in range(branches):
        run = [0, *range(1 + 3 * branch, 4 + 3 * branch), 3 * branches + 1]
        edges += list(itertools.pairwise(run))
    plan = solve(dag(layers, edges), flat(4, 1e9))
    assert plan.notes == (
        "the model branches too much to consider every cut: 20 layers were cut only between whole branches, or in "
        "one fixed order",
    )
    assert plan.bottleneck_s == pytest.approx(3 * 32 / 4)


def test_a_thousand_layers_on_a_thousand_devices() -> None:
    profile = chain([(1.0, 2.0, 100, 1000, 0)] * 1000)
    nodes = Topology((Level("node", 128, 0.0, 1e9), Level("network", 8, 0.0, 1e8)), device="test")
    plan = solve(profile, nodes)
    assert plan.ranks == 1024
    assert plan.bottleneck_s == pytest.approx(3000 / 1024)
    assert plan.bound_s <= plan.bottleneck_s


@pytest.mark.parametrize("kind", ["blocks", "lanes", "random", "skips"])
def test_1300_layers_that_branch_heavily(kind: str) -> None:
    """The plan contains every layer once, its data flows forwards, and planning takes less than 2 GiB."""
    finished = ranks.python(0, "plan_branches.py", kind, timeout=120)
    assert finished.status == 0, finished.output
    assert "above the bound" in finished.output
