"""Topologies given on the command line."""

from __future__ import annotations

import pytest

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.planning.topology import Level, Topology, parse_counts, parse_topology


@pytest.mark.parametrize(("text", "counts"), [("16", (16,)), ("8x2", (8, 2)), ("4X2x3", (4, 2, 3))])
def test_counts(text: str, counts: tuple[int, ...]) -> None:
    assert parse_counts(text) == counts


@pytest.mark.parametrize("text", ["", "x", "8x", "0", "-1", "1.5", "²", "2097152", "8,2"])
def test_invalid_counts(text: str) -> None:
    with pytest.raises(PipedreamError, match=f"--devices should be a number such as 16, .* not '{text}'"):
        parse_counts(text)


def test_levels_are_listed_from_the_inside_out() -> None:
    assert parse_topology((4,), "1e9", device="cpu") == Topology((Level("network", 4, 0.0, 1e9),), "cpu")
    assert parse_topology((8, 2, 3), "30e9,3e9,1e9", "1e-6,2e-6,3e-6", device="V100") == Topology(
        (
            Level("node", 8, 1e-6, 30e9),
            Level("network", 2, 2e-6, 3e9),
            Level("level2", 3, 3e-6, 1e9),
        ),
        "V100",
    )


@pytest.mark.parametrize(
    ("bandwidth", "latency", "message"),
    [
        ("fast,slow", None, "--bandwidth should be numbers separated by commas, not 'fast,slow'"),
        ("1e9", None, "--bandwidth should be 2 numbers, one per level, not '1e9'"),
        ("1e9,inf", None, "--bandwidth should be 2 numbers, one per level, not '1e9,inf'"),
        ("1e9,nan", None, "--bandwidth should be 2 numbers, one per level, not '1e9,nan'"),
        ("1e9,0", None, "--bandwidth should be at least 0.001 bytes per second, but is 0"),
        ("1e9,1e9", "0", "--latency should be 2 numbers, one per level, not '0'"),
        ("1e9,1e9", "0,-1", "--latency should be from 0 to 1e+09 seconds, not '0,-1'"),
    ],
)
def test_invalid_numbers(bandwidth: str, latency: str | None, message: str) -> None:
    with pytest.raises(PipedreamError) as caught:
        parse_topology((8, 2), bandwidth, latency, device="cpu")
    assert str(caught.value) == message
