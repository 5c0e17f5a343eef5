"""Profiles and topologies: constructed from figures, and drawn by hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

from pipedream_hpc.planning.profile import LayerProfile, Profile
from pipedream_hpc.planning.topology import Level, Topology


def flat(devices: int, bandwidth: float) -> Topology:
    """Return a topology of one level without latency; bandwidth in bytes per second."""
    return Topology((Level("network", devices, 0.0, bandwidth),), device="test")


def dag(layers: list[tuple[float, float, int, int, int]], edges: list[tuple[int, int]]) -> Profile:
    """Return a profile of layers (forward_s, backward_s, output_bytes, parameter_bytes, stash_bytes)."""
    made = tuple(LayerProfile(f"l{i}", "Test", *layer) for i, layer in enumerate(layers))
    return Profile("test", "test", 1, made, tuple(sorted(edges)))


def chain(layers: list[tuple[float, float, int, int, int]]) -> Profile:
    """Return the profile of layers in a row, with figures as in `dag`."""
    return dag(layers, [(i, i + 1) for i in range(len(layers) - 1)])


seconds = st.floats(0, 10) | st.sampled_from([0.0, 1.0])
size = st.integers(0, 1000)
layer = st.tuples(seconds, seconds, size, size, size)
chains = st.lists(layer, min_size=1, max_size=8).map(chain)


@st.composite
def dags(draw: st.DrawFn) -> Profile:
    """Draw a chain with branches: every layer reads one of the last few layers, and some read one more."""
    layers = draw(st.lists(layer, min_size=2, max_size=6))
    edges = set()
    for index in range(1, len(layers)):
        edges.add((draw(st.integers(max(0, index - 2), index - 1)), index))
        if draw(st.booleans()):
            edges.add((draw(st.integers(0, index - 1)), index))
    return dag(layers, list(edges))


@st.composite
def topologies(draw: st.DrawFn, most: int = 6) -> Topology:
    """Draw a topology of one or two levels with at most `most` devices."""
    two_levels = [(2, 2), (3, 2), (2, 3)] if most > 4 else [(2, 2)]
    counts = draw(st.sampled_from([*((n,) for n in range(1, most + 1)), *two_levels]))
    levels = (
        Level(f"level{i}", count, draw(st.sampled_from([0.0, 0.0, 0.1])), draw(st.floats(10, 1e4)))
        for i, count in enumerate(counts)
    )
    return Topology(tuple(levels), device="test")
