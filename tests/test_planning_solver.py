"""The solver against exhaustive search: every way to cut, every way to replicate."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.planning.profile import LayerProfile, Profile
from pipedream_hpc.planning.solver import solve
from pipedream_hpc.planning.topology import Level, Topology


def flat(devices: int, bandwidth: float) -> Topology:
    return Topology((Level("network", devices, 0.0, bandwidth),), device="test")


def chain(layers: list[tuple[float, float, int, int]]) -> Profile:
    """A chain of layers (forward_s, backward_s, output_bytes, parameter_bytes)."""
    made = tuple(LayerProfile(f"l{i}", "Test", *layer) for i, layer in enumerate(layers))
    return Profile("test", "test", 1, made, tuple((i, i + 1) for i in range(len(made) - 1)))


def compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to write `total` as an ordered sum of `parts` positive numbers."""
    for bars in combinations(range(1, total), parts - 1):
        marks = (0, *bars, total)
        yield tuple(b - a for a, b in pairwise(marks))


def slowest(profile: Profile, sizes: tuple[int, ...], replicas: tuple[int, ...], b: float, factor: int) -> float:
    """Time of the slowest stage or boundary, written as plainly as the paper has it."""
    worst, first = 0.0, 0
    for size, m in zip(sizes, replicas, strict=True):
        layers = profile.layers[first : first + size]
        compute = sum(layer.forward_s + layer.backward_s for layer in layers)
        sync = sum(factor * (m - 1) * layer.parameter_bytes / (m * b) for layer in layers)
        worst = max(worst, max(compute, sync) / m)
        first += size
        if first < len(profile.layers):
            worst = max(worst, 2 * layers[-1].output_bytes / b)
    return worst


def exhaustive(profile: Profile, devices: int, b: float, factor: int, *, straight: bool) -> float:
    n = len(profile.layers)
    return min(
        slowest(profile, sizes, replicas, b, factor)
        for stages in range(1, min(n, devices) + 1)
        for sizes in compositions(n, stages)
        for replicas in compositions(devices, stages)
        if not straight or set(replicas) == {1}
    )


seconds = st.floats(0, 10) | st.sampled_from([0.0, 1.0])
size = st.integers(0, 1000)
layer = st.tuples(seconds, seconds, size, size)
chains = st.lists(layer, min_size=1, max_size=8).map(chain)


@settings(max_examples=300, deadline=None)
@given(
    profile=chains, devices=st.integers(1, 5), bandwidth=st.floats(10, 1e4), cost=st.sampled_from(["paper2018", "ring"])
)
def test_equals_exhaustive_search(profile: Profile, devices: int, bandwidth: float, cost: str) -> None:
    factor = {"paper2018": 4, "ring": 2}[cost]
    plan = solve(profile, flat(devices, bandwidth), cost=cost)
    best = exhaustive(profile, devices, bandwidth, factor, straight=False)
    assert plan.bottleneck_s == pytest.approx(best, rel=1e-12, abs=1e-15)
    # The plan returned is one that costs this, by the test's own arithmetic.
    sizes, replicas = (tuple(len(s.layers) for s in plan.stages), tuple(s.replicas for s in plan.stages))
    assert sum(replicas) == devices
    assert [name for s in plan.stages for name in s.layers] == [each.name for each in profile.layers]
    assert slowest(profile, sizes, replicas, bandwidth, factor) == pytest.approx(best, rel=1e-12, abs=1e-15)


@settings(max_examples=200, deadline=None)
@given(profile=chains, devices=st.integers(1, 5), bandwidth=st.floats(10, 1e4))
def test_straight_equals_exhaustive_search(profile: Profile, devices: int, bandwidth: float) -> None:
    if devices > len(profile.layers):
        with pytest.raises(PipedreamError, match=f"{devices} stages were asked for"):
            solve(profile, flat(devices, bandwidth), straight=True)
        return
    plan = solve(profile, flat(devices, bandwidth), straight=True)
    assert plan.config == "-".join("1" * devices)
    best = exhaustive(profile, devices, bandwidth, 4, straight=True)
    assert plan.bottleneck_s == pytest.approx(best, rel=1e-12, abs=1e-15)


def test_in_flight_and_limits_of_a_known_plan() -> None:
    #          fast front, costly to synchronise nothing   | heavy weights behind
    profile = chain([(1.0, 2.0, 10, 0), (1.0, 2.0, 10, 0), (0.5, 1.0, 1, 10_000_000)])
    plan = solve(profile, flat(4, 1e6))
    assert plan.config == "3-1"
    front, back = plan.stages
    assert front.layers == ("l0", "l1")
    assert (front.in_flight, back.in_flight) == (2, 1)  # ceil(1 / 3) + 1, and 0 + 1
    assert front.compute_s == pytest.approx(2.0)
    assert front.boundary_s == pytest.approx(2 * 10 / 1e6)
    assert front.sync_s == 0.0
    assert plan.bottleneck_s == pytest.approx(2.0)
    assert (front.limit, back.limit) == ("compute", "compute")
    assert plan.layout == ((0, 1, 2), (3,))


def test_equal_plans_prefer_fewer_stages() -> None:
    assert solve(chain([(0.0, 0.0, 0, 0)] * 5), flat(4, 1.0)).config == "4"


def test_branches_are_not_cut() -> None:
    #   l0 ──► l1 ──► l2 ──► l4      l1's output is needed by both branches: cuts are possible behind
    #          └────► l3 ────┘       l0 and l1 only
    profile = Profile("dag", "test", 1, chain([(1.0, 1.0, 1, 1)] * 5).layers, ((0, 1), (1, 2), (1, 3), (2, 4), (3, 4)))
    plan = solve(profile, flat(3, 1e9), straight=True)
    assert [stage.layers for stage in plan.stages] == [("l0",), ("l1",), ("l2", "l3", "l4")]
    with pytest.raises(PipedreamError, match="can be cut into 3 at most"):
        solve(profile, flat(4, 1e9), straight=True)


def test_unknown_formula() -> None:
    with pytest.raises(PipedreamError, match="no cost formula 'paper': choose one of paper2018, ring"):
        solve(chain([(1.0, 1.0, 1, 1)]), flat(1, 1.0), cost="paper")
