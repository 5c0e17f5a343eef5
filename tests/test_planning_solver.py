"""The solver against exhaustive search over all cuts, replicas and placements, with independent cost formulas."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import chain, chains, dags, flat, layer, topologies

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.planning.cost import NAMES
from pipedream_hpc.planning.plan import Plan
from pipedream_hpc.planning.profile import LayerProfile, Profile
from pipedream_hpc.planning.solver import Request, solve
from pipedream_hpc.planning.solver.placement import DeviceRow, device_rows
from pipedream_hpc.planning.topology import Level, Topology

CLOSE = {"rel": 1e-9, "abs": 1e-15}


# ------------------------------------------------------------------ the reference


@dataclass(frozen=True)
class Stage:
    """Layers of a stage, and its devices in the first row."""

    layers: frozenset[int]
    devices: tuple[int, ...]


@dataclass(frozen=True)
class ReferenceCost:
    """The tables in planning/cost.py and planning/memory.py, computed with sets and loops."""

    profile: Profile
    topology: Topology
    cost: str
    copies: int  # parallel rows
    limit: int | None = None

    def consumers(self, layer: int) -> set[int]:
        return {b for a, b in self.profile.edges if a == layer}

    def ancestors(self, layer: int) -> set[int]:
        direct = {a for a, b in self.profile.edges if b == layer}
        return direct | {x for each in direct for x in self.ancestors(each)}

    def crossing(self, before: frozenset[int]) -> int:
        """Return the bytes that cross the cut after the layers `before`."""
        everything = set(range(len(self.profile.layers)))
        if not before or before == everything:
            return 0
        if self.cost in ("paper2018", "reference_code"):
            counted = set()
            for last in (x for x in before if not self.consumers(x) & before):
                counted |= {last}
                for x in self.ancestors(last):
                    if self.consumers(x) - self.ancestors(last) - {last}:
                        counted |= {x}
        else:
            counted = {x for x in before if self.consumers(x) - before}
        return sum(self.profile.layers[x].output_bytes for x in counted)

    def sizes(self) -> list[int]:
        """Return the number of devices in a component of each level, beginning with a single device."""
        return list(itertools.accumulate([1, *(level.count for level in self.topology.levels)], lambda a, b: a * b))

    def spans(self, devices: tuple[int, ...]) -> list[int]:
        row = self.topology.devices // self.copies
        everywhere = [copy * row + device for copy in range(self.copies) for device in devices]
        spans = []
        for inner, outer in itertools.pairwise(self.sizes()):
            used = {d // inner for d in everywhere}
            spans.append(max(sum(x * inner // outer == y for x in used) for y in {d // outer for d in everywhere}))
        return spans

    def round_s(self, size: int, devices: tuple[int, ...]) -> float:
        factor = 2 if self.cost.startswith("ring") else 4
        return sum(
            factor * (n - 1) * (level.latency_s + size / (n * level.bandwidth))
            for n, level in zip(self.spans(devices), self.topology.levels, strict=True)
        )

    def side_s(self, size: int, devices: tuple[int, ...], nearest: int) -> float:
        """Return the time of a boundary over the links of the stage on one side of it."""
        if size == 0:
            return 0.0
        worst = 0.0
        for (inner, outer), level in zip(itertools.pairwise(self.sizes()), self.topology.levels, strict=True):
            if outer > self.topology.devices // self.copies:
                continue  # rows do not exchange activations
            within = [d for d in devices if d // outer == nearest // outer]
            near = [d for d in within if d // inner == nearest // inner]
            if near:
                most = len(within) - len(near)
            else:
                most = max((sum(d // inner == x for d in within) for x in {d // inner for d in within}), default=0)
            share = most / len(devices) / self.copies
            if self.cost == "paper2018":
                share = float(share > 0)
            worst = max(worst, 2 * (level.latency_s + size / level.bandwidth) * share)
        return worst

    def bottleneck_s(self, stages: list[Stage], recompute: bool = False) -> float:
        """Return the time of the slowest stage or boundary; infinite if a stage does not fit into memory."""
        worst, before = 0.0, frozenset[int]()
        later_devices = sum(len(stage.devices) for stage in stages)
        for index, stage in enumerate(stages):
            layers = [self.profile.layers[x] for x in stage.layers]
            replicas = len(stage.devices) * self.copies
            compute = sum(x.forward_s * (2 if recompute else 1) + x.backward_s for x in layers) / replicas
            sync = self.round_s(sum(x.parameter_bytes for x in layers), stage.devices) / replicas
            worst = max(worst, compute + sync if self.cost in ("ring-no-overlap", "reference_code") else compute, sync)
            entering, before = self.crossing(before), before | stage.layers
            leaving = self.crossing(before)
            worst = max(worst, self.side_s(entering, stage.devices, stage.devices[0] - 1))
            if index > 0 or self.cost != "reference_code":
                worst = max(worst, self.side_s(leaving, stage.devices, stage.devices[-1] + 1))
            later_devices -= len(stage.devices)
            if self.limit is not None and self.memory(stage, later_devices, entering, leaving, recompute) > self.limit:
                return np.inf
        return worst

    def memory(self, stage: Stage, later_devices: int, entering: int, leaving: int, recompute: bool = False) -> float:
        """Return the bytes of one replica, with momentum SGD and weight stashing."""
        weights = sum(self.profile.layers[x].parameter_bytes for x in stage.layers)
        stash = sum(self.profile.layers[x].stash_bytes for x in stage.layers)
        in_flight = -(-later_devices // len(stage.devices)) + 1
        kept = stash if recompute else in_flight * stash
        return in_flight * weights + weights + weights + kept + (in_flight + 1) * entering + 2 * leaving


def prefixes(profile: Profile) -> list[frozenset[int]]:
    """Return all sets of layers that contain, with every layer, all layers that feed it."""
    count = len(profile.layers)
    found = [
        frozenset(chosen)
        for size in range(count + 1)
        for chosen in itertools.combinations(range(count), size)
        if all(a in chosen for a, b in profile.edges if b in chosen)
    ]
    return sorted(found, key=len)


def pipelines(sets: list[frozenset[int]], begin: frozenset[int], first: int, devices: int) -> Iterator[list[Stage]]:
    """Yield every pipeline for the layers after `begin` on devices first to devices - 1."""
    everything = sets[-1]
    for last in range(first + 1, devices + 1):
        taken = tuple(range(first, last))
        if last == devices:
            yield [Stage(everything - begin, taken)]
            continue
        for end in sets:
            if begin < end < everything:
                for rest in pipelines(sets, end, last, devices):
                    yield [Stage(end - begin, taken), *rest]


def exhaustive(profile: Profile, topology: Topology, cost: str, limit: int | None = None, *, fewer: bool) -> float:
    """Return the time of the fastest of all plans."""
    sets, best = prefixes(profile), np.inf
    counts = [level.count for level in topology.levels]
    rows = {topology.devices, *(d for d in itertools.accumulate(counts, lambda a, b: a * b) if d > 1)}
    for row in rows:
        reference = ReferenceCost(profile, topology, cost, topology.devices // row, limit)
        for unused in range(row) if fewer else (0,):
            for stages in pipelines(sets, frozenset(), unused, row):
                best = min(best, reference.bottleneck_s(stages))
    return best


def stages_of(plan: Plan, profile: Profile, topology: Topology) -> tuple[list[Stage], int]:
    """Return the plan's stages and the number of its rows, derived from its ranks."""
    index = {layer.name: position for position, layer in enumerate(profile.layers)}
    for row in device_rows(topology):
        if any(stage.replicas % row.copies for stage in plan.stages):
            continue
        widths = [stage.replicas // row.copies for stage in plan.stages]
        unused = row.devices - sum(widths)
        firsts = list(itertools.accumulate(widths, initial=unused))
        stages = [
            Stage(frozenset(index[name] for name in stage.layers), tuple(range(first, first + width)))
            for stage, first, width in zip(plan.stages, firsts, widths, strict=False)
        ]
        used = row.devices - unused
        # Ranks count the used devices row by row; with unused devices in one row of several nodes, from its end.
        forwards = [[c * used + d - unused for d in stage.devices for c in range(row.copies)] for stage in stages]
        backwards = [[row.devices - 1 - d for d in stage.devices] for stage in stages]
        expected = backwards if unused > 0 and row.copies == 1 and len(topology.levels) > 1 else forwards
        if [list(stage.ranks) for stage in plan.stages] == expected:
            return stages, row.copies
    raise AssertionError("the plan's ranks do not correspond to any placement")


# ------------------------------------------------------------------ equality


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(profile=chains, topology=topologies(), cost=st.sampled_from(NAMES), fewer=st.booleans())
def test_chains_equal_exhaustive_search(profile: Profile, topology: Topology, cost: str, fewer: bool) -> None:
    plan = solve(profile, topology, Request(cost=cost, fewer=fewer))
    assert plan.bottleneck_s == pytest.approx(exhaustive(profile, topology, cost, fewer=fewer), **CLOSE)
    assert plan.bound_s == pytest.approx(plan.bottleneck_s, **CLOSE)
    assert fewer or plan.ranks == topology.devices
    # The returned plan really takes this time by the reference formulas.
    stages, copies = stages_of(plan, profile, topology)
    assert ReferenceCost(profile, topology, cost, copies).bottleneck_s(stages) == pytest.approx(
        plan.bottleneck_s, **CLOSE
    )


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(profile=dags(), topology=topologies(most=4), cost=st.sampled_from(NAMES))
def test_branches_equal_exhaustive_search(profile: Profile, topology: Topology, cost: str) -> None:
    plan = solve(profile, topology, Request(cost=cost))
    assert plan.bottleneck_s == pytest.approx(exhaustive(profile, topology, cost, fewer=False), **CLOSE)
    assert sorted(name for stage in plan.stages for name in stage.layers) == sorted(x.name for x in profile.layers)
    stages, copies = stages_of(plan, profile, topology)
    assert ReferenceCost(profile, topology, cost, copies).bottleneck_s(stages) == pytest.approx(
        plan.bottleneck_s, **CLOSE
    )


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    profile=st.one_of(st.lists(layer, min_size=1, max_size=7).map(chain), dags()),
    topology=topologies(most=5),
    cost=st.sampled_from(NAMES),
    limit=st.integers(0, 30_000),
)
def test_memory_limits_equal_exhaustive_search(profile: Profile, topology: Topology, cost: str, limit: int) -> None:
    best = exhaustive(profile, topology, cost, limit, fewer=False)
    request = Request(cost=cost, memory_bytes=limit)
    if np.isinf(best):
        with pytest.raises(PipedreamError, match="it needs at least") as refused:
            solve(profile, topology, request)
        smallest = int(str(refused.value).split("(--memory ")[1].split(")")[0])
        solve(profile, topology, Request(cost=cost, memory_bytes=smallest))
        if smallest > 0:
            with pytest.raises(PipedreamError):
                solve(profile, topology, Request(cost=cost, memory_bytes=smallest - 1))
        return
    plan = solve(profile, topology, request)
    assert plan.bottleneck_s == pytest.approx(best, **CLOSE)
    assert all(stage.memory is not None and stage.memory.total <= limit for stage in plan.stages)


@settings(max_examples=100, deadline=None)
@given(profile=chains, devices=st.integers(1, 6), bandwidth=st.floats(10, 1e4))
def test_straight_equals_exhaustive_search(profile: Profile, devices: int, bandwidth: float) -> None:
    if devices > len(profile.layers):
        with pytest.raises(PipedreamError, match=f"cannot be cut into {devices} stages"):
            solve(profile, flat(devices, bandwidth), Request(straight=True))
        return
    plan = solve(profile, flat(devices, bandwidth), Request(straight=True))
    assert plan.config == "-".join("1" * devices)
    reference = ReferenceCost(profile, flat(devices, bandwidth), "ring", 1)
    straight = (
        stages
        for stages in pipelines(prefixes(profile), frozenset(), 0, devices)
        if all(len(stage.devices) == 1 for stage in stages)
    )
    assert plan.bottleneck_s == pytest.approx(min(reference.bottleneck_s(stages) for stages in straight), **CLOSE)


# ------------------------------------------------------------------ more resources never make a plan slower


@settings(max_examples=60, deadline=None)
@given(profile=st.one_of(chains, dags()), cost=st.sampled_from(NAMES), bandwidth=st.floats(10, 1e4))
def test_more_devices_bandwidth_or_memory_never_make_a_plan_slower(
    profile: Profile, cost: str, bandwidth: float
) -> None:
    def seconds(devices: int, speed: float, limit: int | None = None) -> float:
        request = Request(cost=cost, fewer=True, memory_bytes=limit)
        try:
            return solve(profile, flat(devices, speed), request).bottleneck_s
        except PipedreamError:
            return np.inf

    def falls(values: list[float]) -> bool:
        return all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(values))

    assert falls([seconds(devices, bandwidth) for devices in range(1, 7)])
    assert falls([seconds(4, bandwidth * factor) for factor in (1, 2, 5, 100)])
    assert falls([seconds(4, bandwidth, limit) for limit in (2_000, 5_000, 10_000, 50_000)])


# ------------------------------------------------------------------ known plans


def test_in_flight_and_limits_of_a_known_plan() -> None:
    #          layers without weights to synchronise       | last layer with heavy weights
    profile = chain([(1.0, 2.0, 10, 0, 5), (1.0, 2.0, 10, 0, 5), (0.5, 1.0, 1, 10_000_000, 5)])
    plan = solve(profile, flat(4, 1e6), Request(cost="paper2018"))
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
    assert front.memory is not None
    assert back.memory is not None
    #      versions |w|  gradient  momentum    activations  slots: received, gradients
    assert front.memory.total == 0 + 0 + 0 + 2 * 10 + (0 + 2 * 10)
    assert back.memory.total == 10_000_000 * 3 + 5 + 2 * 10


def test_15_1_on_four_nodes_of_four() -> None:
    # The last layer's weights are too heavy to synchronise; the other layers are divided evenly among 15 devices.
    profile = chain([(1.0, 2.0, 10, 10, 0)] * 15 + [(1.0, 2.0, 10, 10**11, 0)])
    nodes = Topology((Level("node", 4, 0.0, 1e9), Level("network", 4, 0.0, 1e7)), device="test")
    plan = solve(profile, nodes)
    assert plan.config == "15-1"
    assert plan.layout == (tuple(range(15)), (15,))


def test_boundaries_stay_inside_nodes() -> None:
    # The model is too large for one device and its activations are too heavy for the network: one pipeline per
    # node, with its two stages replicated over the nodes.
    #   node 0: stage 0 on rank 0, stage 1 on rank 1;  node 1: ranks 2 and 3; ...
    profile = chain([(1.0, 2.0, 10**6, 100, 10)] * 2)
    nodes = Topology((Level("node", 2, 0.0, 1e9), Level("network", 3, 0.0, 1e5)), device="test")
    plan = solve(profile, nodes)
    assert plan.config == "6"
    limited = solve(profile, nodes, Request(memory_bytes=5_000_000))
    assert limited.config == "6"
    split = solve(profile, nodes, Request(cut_after=["l0"]))
    assert split.layout == ((0, 2, 4), (1, 3, 5))
    assert split.stages[0].boundary_s == pytest.approx(2 * 10**6 / 1e9 / 3)


def test_equal_plans_prefer_fewer_stages() -> None:
    assert solve(chain([(0.0, 0.0, 0, 0, 0)] * 5), flat(4, 1.0)).config == "4"


def test_modules_stand_for_the_layers_in_them() -> None:
    names = ["embed", "blocks.0.a", "blocks.0.b", "add", "blocks.1.a", "blocks.10.a"]
    layers = tuple(LayerProfile(name, "Linear", 1e-3, 2e-3, 10, 10) for name in names)
    profile = Profile("net", "cpu", 8, layers, tuple((n, n + 1) for n in range(len(names) - 1)))

    def stage_of(*group: str) -> list[int]:
        plan = solve(profile, flat(3, 1e9), Request(straight=True, together=[group]))
        return [index for name in names for index, stage in enumerate(plan.stages) if name in stage.layers]

    assert len(set(stage_of("blocks.0", "blocks.1")[1:5])) == 1
    assert len(set(stage_of("blocks.1", "blocks.10.a")[4:])) == 1
    assert len(set(stage_of("embed", "add")[:4])) == 1
    words = r"--together: the profile has no layer or module 'blocks\.11'; near are blocks\.1, blocks\.10,"
    with pytest.raises(PipedreamError, match=words):
        stage_of("blocks.11")
    with pytest.raises(
        PipedreamError, match=r"'blocks\.0' is no layer, but has the layers blocks\.0\.a, blocks\.0\.b: na"
    ):
        solve(profile, flat(2, 1e9), Request(cut_after=["blocks.0"]))


def test_stages_that_must_end_or_stay_together() -> None:
    profile = chain([(1.0, 2.0, 1, 1, 0)] * 4)
    plan = solve(profile, flat(2, 1e9), Request(cut_after=["l0"]))
    assert [stage.layers for stage in plan.stages] == [("l0",), ("l1", "l2", "l3")]
    plan = solve(profile, flat(4, 1e9), Request(cut_after=["l2"], together=[["l0", "l2"]]))
    assert [stage.layers for stage in plan.stages] == [("l0", "l1", "l2"), ("l3",)]
    with pytest.raises(PipedreamError, match="--cut-after and --together"):
        solve(profile, flat(4, 1e9), Request(cut_after=["l1"], together=[["l0", "l2"]]))
    with pytest.raises(PipedreamError, match="--together: the profile has no layer or module 'l9'; near are l3"):
        solve(profile, flat(4, 1e9), Request(together=[["l0", "l9"]]))


def test_recompute_makes_room() -> None:
    profile = chain([(1.0, 2.0, 10, 10, 1000)] * 4)
    with pytest.raises(PipedreamError, match="or allow --recompute auto"):
        solve(profile, flat(4, 1e9), Request(straight=True, memory_bytes=2_000))
    plan = solve(profile, flat(4, 1e9), Request(straight=True, memory_bytes=2_000, recompute="auto"))
    #  four in flight on the first stage, one on the last, which therefore does not need to recompute
    assert [stage.recompute for stage in plan.stages] == [True, True, True, False]
    assert plan.bottleneck_s == pytest.approx(4.0)
    assert [stage.memory.activations for stage in plan.stages if stage.memory] == [1000] * 4


def test_optimizers_take_their_memory() -> None:
    profile = chain([(1.0, 2.0, 0, 1000, 0)])
    totals = [
        solve(profile, flat(1, 1.0), Request(optimizer=kind)).stages[0].memory
        for kind in ("sgd", "momentum", "adam", "adam-bf16")
    ]
    assert [parts.total for parts in totals if parts] == [2000, 3000, 4000, 8000]


def test_fewer_devices_where_more_do_not_help() -> None:
    # One heavy layer that cannot be split and must not be synchronised.
    profile = chain([(1.0, 2.0, 10, 10**9, 0), (0.1, 0.2, 10, 10**9, 0)])
    assert solve(profile, flat(4, 10.0), Request(fewer=True)).ranks == 2
    # Three devices used on nodes of two: ranks are numbered so that the full node comes first.
    profile = chain([(1.0, 2.0, 10, 10**9, 0)] * 3)
    nodes = Topology((Level("node", 2, 0.0, 10.0), Level("network", 3, 0.0, 10.0)), device="test")
    plan = solve(profile, nodes, Request(fewer=True))
    assert plan.layout == ((2,), (1,), (0,))


def test_unknown_names() -> None:
    profile = chain([(1.0, 1.0, 1, 1, 0)])
    with pytest.raises(PipedreamError, match="no cost formula 'paper': choose one of ring, ring-no-overlap, paper2018"):
        solve(profile, flat(1, 1.0), Request(cost="paper"))
    with pytest.raises(PipedreamError, match="no optimizer kind 'lion': choose one of sgd"):
        solve(profile, flat(1, 1.0), Request(optimizer="lion"))
    with pytest.raises(PipedreamError, match="no schedule 'zb' to plan for: choose one of 1f1b"):
        solve(profile, flat(1, 1.0), Request(schedule="zb"))
    with pytest.raises(PipedreamError, match="schedule '1f1b' does not cut minibatches: leave out --n-microbatches"):
        solve(profile, flat(1, 1.0), Request(n_microbatches=2))
    with pytest.raises(PipedreamError, match="schedule 'gpipe' needs at least 2 microbatches: set --n-microbatches"):
        solve(profile, flat(1, 1.0), Request(schedule="gpipe"))


def test_rows() -> None:
    nodes = Topology((Level("node", 4, 0.0, 1.0), Level("network", 2, 0.0, 1.0)), device="test")
    whole, node = device_rows(nodes)
    assert (whole, node) == (DeviceRow(nodes, 8, 1), DeviceRow(nodes, 4, 2))
    #              0 1 2 3 │ 4 5 6 7        spans: most in one node, nodes
    assert [int(n) for n in whole.spans(2, 6)] == [2, 2]
    assert [int(n) for n in whole.spans(1, 8)] == [4, 2]
    assert [int(n) for n in node.spans(0, 3)] == [3, 2]
    #              the stage on 2 3 │ 4 5 next to device 6: 1/4 per device, half of the traffic from the other node
    assert [float(s) for s in whole.shares(2, 6, output=True)] == [1 / 4, 1 / 2]
    #              the stage on 0 1 2 3 next to device 4: all traffic crosses the network
    assert [float(s) for s in whole.shares(0, 4, output=True)] == [0, 1]
    assert node.ranks(1, 3) == (1, 5, 2, 6)
