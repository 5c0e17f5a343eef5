"""Presets: named topologies, and the errors for unknown names and wrong counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.files import load, save
from pipedream_hpc.planning import presets
from pipedream_hpc.planning.presets import NAMES, preset
from pipedream_hpc.planning.topology import Level, Topology

TWO_LEVELS = ("sosp19-v100", "dgx-a100", "dgx-h100")


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_goes_to_disk_and_back(name: str, tmp_path: Path) -> None:
    topology = preset(name, (8, 2) if name in TWO_LEVELS else (4,))
    save(topology, tmp_path / "topology.json")
    assert load(Topology, tmp_path / "topology.json") == topology
    assert topology.devices == (16 if name in TWO_LEVELS else 4)


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_is_in_the_table_of_the_module(name: str) -> None:
    assert f"| {name} " in (presets.__doc__ or "")


def test_the_clusters_of_the_papers() -> None:
    a, b, sosp = preset("cluster-a", [16]), preset("cluster-b", [8]), preset("sosp19-v100", [4, 4])
    assert (a.devices, a.device, a.device_memory_bytes) == (16, "Titan X", 12_000_000_000)
    assert (b.devices, b.device, b.device_memory_bytes) == (8, "V100", 16_000_000_000)
    assert (a.bandwidth, b.bandwidth) == (25e9 / 8, 10e9 / 8)
    assert [(level.name, level.count, level.bandwidth) for level in sosp.levels] == [
        ("node", 4, 10e9),
        ("network", 4, 1.25e9),
    ]


@pytest.mark.parametrize(
    ("name", "gpus", "expected"),
    [("dgx-a100", 8, 200e9), ("dgx-a100", 2, 50e9), ("dgx-h100", 8, 370e9), ("dgx-h100", 4, 200e9)],
)
def test_an_all_reduce_drives_the_card_of_every_gpu(name: str, gpus: int, expected: float) -> None:
    node, network = preset(name, (gpus, 4)).levels
    assert node.reduce_bandwidth is None
    # One message uses one card; an all-reduce uses one card per GPU, limited by NVLink.
    assert network.bandwidth < network.reduce_bandwidth == expected  # type: ignore[operator]
    assert network.reduce_latency_s == pytest.approx(2 * (4 * gpus - 1) * network.latency_s)


@pytest.mark.parametrize(
    ("name", "counts", "expected"),
    [
        ("dgx-a1000", (8, 1), "there is no preset 'dgx-a1000': choose one of cluster-a, "),
        ("dgx-a100", (8,), "field 'counts' of preset 'dgx-a100' should be 2 numbers, one for each level (node, net"),
        ("cluster-b", (), "field 'counts' of preset 'cluster-b' should be 1 number, one for each level (network), b"),
        ("cluster-b", (4, 4), "field 'counts' of preset 'cluster-b' should be 1 number, one for each level (netwo"),
        ("dgx-h100", (8, 0), "field 'counts[1]' of preset 'dgx-h100' should be 1 or more but is 0"),
    ],
)
def test_each_error_is_one_sentence(name: str, counts: tuple[int, ...], expected: str) -> None:
    with pytest.raises(PipedreamError) as caught:
        preset(name, counts)
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)


def test_a_level_needs_both_reduce_fields_or_neither() -> None:
    with pytest.raises(ValueError, match="reduce_latency_s and reduce_bandwidth go together"):
        Level("node", 2, 0.0, 1e9, reduce_bandwidth=1e9)


def test_every_device_needs_a_name() -> None:
    with pytest.raises(ValueError, match="devices_of names 1 ranks but the levels multiply to 2"):
        Topology((Level("node", 2, 0.0, 1e9),), "cpu", devices_of=("a",))


def test_a_file_without_optional_fields_is_read(tmp_path: Path) -> None:
    (tmp_path / "topology.json").write_text(
        '{"format": "pipedream-topology", "version": 1, "device": "cpu",'
        ' "levels": [{"name": "node", "count": 2, "latency_s": 0.0, "bandwidth": 1e9}]}'
    )
    assert load(Topology, tmp_path / "topology.json") == Topology((Level("node", 2, 0.0, 1e9),), "cpu")
