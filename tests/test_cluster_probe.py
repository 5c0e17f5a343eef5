"""The probe: α and β from message times, and levels from hosts."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import ranks

from pipedream_hpc.cluster.fit import fit
from pipedream_hpc.cluster.probe import MOST_PAIRS, SIZES, group_by_host, measure, pairs_across, pairs_within
from pipedream_hpc.cluster.world import World
from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.files import load
from pipedream_hpc.planning.topology import Topology


@pytest.mark.parametrize(("latency_s", "bandwidth"), [(2e-6, 1e10), (5e-5, 1.25e9), (1e-3, 1e8)])
def test_a_link_is_recovered_from_its_times(latency_s: float, bandwidth: float) -> None:
    assert fit(SIZES, [latency_s + size / bandwidth for size in SIZES]) == pytest.approx((latency_s, bandwidth))


def test_small_messages_count_as_much_as_large_ones() -> None:
    # One large message takes 20 % longer. α is thousands of times smaller, but must not change by more than that.
    times = [1e-6 + size / 1e9 for size in SIZES]
    times[-1] *= 1.2
    latency_s, bandwidth = fit(SIZES, times)
    assert latency_s == pytest.approx(1e-6, rel=0.2)
    assert bandwidth == pytest.approx(1e9, rel=0.2)


@pytest.mark.parametrize("seed", range(10))
def test_a_link_is_recovered_through_noise(seed: int) -> None:
    noise = np.random.default_rng(seed).uniform(0.9, 1.1, len(SIZES))
    times = [(3e-5 + size / 1.25e9) * late for size, late in zip(SIZES, noise, strict=True)]
    assert fit(SIZES, times) == pytest.approx((3e-5, 1.25e9), rel=0.15)


@pytest.mark.parametrize("largest", [1 << 24, 1 << 25, 1 << 26])
@pytest.mark.parametrize("burst", [500_000, 2_000_000])
def test_the_sustained_rate_is_found_in_spite_of_a_burst(burst: int, largest: int) -> None:
    # A token bucket of 1 Gbit/s on a 10 Gbit/s link: bytes that fit in the bucket travel at 10 Gbit/s.
    #
    #   seconds │       ╱  1 Gbit/s
    #           │    ╱
    #           │__╱───── bucket empty
    #           └──────── bytes
    sizes = [size for size in SIZES if size <= largest]
    times = [2e-5 + min(size, burst) / 1.25e9 + max(size - burst, 0) / 125e6 for size in sizes]
    latency_s, bandwidth = fit(sizes, times)
    assert bandwidth == pytest.approx(125e6, rel=0.05)
    assert latency_s == pytest.approx(2e-5, rel=0.2)


def test_times_of_a_shaped_link() -> None:
    # Measured half round trips over TCP on a link with a token bucket of 1 Gbit/s and 500 kB; iperf3
    # reports 957 Mbit/s. A fit up to 4 MiB yields more than twice the sustained rate.
    times = [
        *(1.325e-5, 1.330e-5, 1.434e-5, 1.674e-5, 2.150e-5, 1.334e-4, 2.732e-4, 5.484e-4, 1.097e-3, 2.195e-3),
        *(4.925e-3, 1.373e-2, 3.155e-2, 6.647e-2, 1.3655e-1, 2.7717e-1),
    ]
    latency_s, bandwidth = fit(SIZES[: len(times)], times)
    assert bandwidth == pytest.approx(957e6 / 8, rel=0.02)
    assert latency_s == pytest.approx(1.3e-5, rel=0.1)


@pytest.mark.parametrize("times", [[1e-5] * len(SIZES), [size / 1e10 for size in reversed(SIZES)]])
def test_noise_yields_no_impossible_link(times: list[float]) -> None:
    latency_s, bandwidth = fit(SIZES, times)
    assert latency_s >= 0
    assert bandwidth > 0


def test_hosts_become_nodes() -> None:
    assert group_by_host(["a", "a", "b", "b"]) == [[0, 1], [2, 3]]
    assert group_by_host(["a", "b"]) == [[0], [1]]


def test_nodes_with_different_numbers_of_ranks_are_refused() -> None:
    with pytest.raises(PipedreamError, match=r"a has 2, b has 1: set --ntasks-per-node"):
        group_by_host(["a", "a", "b"])


def test_interleaved_ranks_are_refused() -> None:
    with pytest.raises(PipedreamError, match=r"a has ranks \[0, 2\]: use --distribution=block"):
        group_by_host(["a", "b", "a", "b"])


def test_few_pairs_are_all_measured_and_many_are_sampled() -> None:
    nodes = [[0, 1, 2], [3, 4, 5]]
    assert pairs_within(nodes) == [(0, 1), (0, 2), (1, 2), (3, 4), (3, 5), (4, 5)]
    assert len(pairs_across(nodes)) == 9
    assert all(a < 3 <= b for a, b in pairs_across(nodes))
    many = [list(range(first, first + 64)) for first in range(0, 4096, 64)]
    within, across = pairs_within(many), pairs_across(many)
    assert len(within) == len(across) == MOST_PAIRS
    assert all(a < b and a // 64 == b // 64 for a, b in within)
    assert all(a < b and a // 64 != b // 64 for a, b in across)
    # Every rank must choose the same pairs independently.
    assert (within, across) == (pairs_within(many), pairs_across(many))


def test_one_rank_has_no_link() -> None:
    with pytest.raises(PipedreamError, match=r"only one rank was started.*mpirun -n 4 pipedream probe"):
        measure(World(0, 1, 0, 1, "a"))


@pytest.mark.alone
def test_four_ranks_of_this_machine(tmp_path: Path) -> None:
    path = tmp_path / "topology.json"
    finished = ranks.mpirun(4, sys.executable, "-m", "pipedream_hpc.cli", "probe", "-o", path, timeout=120)
    assert finished.status == 0, finished.output
    topology = load(Topology, path)
    (level,) = topology.levels
    assert (level.name, level.count, len(set(topology.hosts))) == ("node", 4, 1)
    # Shared memory: under 10 ms and over 1 MB/s.
    assert level.latency_s < 1e-2
    assert level.bandwidth > 1e6
    assert level.reduce_latency_s is not None
    assert 0 <= level.reduce_latency_s < 1e-1
    assert level.reduce_bandwidth is not None
    assert level.reduce_bandwidth > 1e6
    assert topology.device_memory_bytes
    assert len(topology.devices_of) == 4
    assert all(topology.devices_of)
    assert f"hosts: 4 x {topology.hosts[0]}" in finished.output
    assert f"devices: 4 x {topology.devices_of[0]}" in finished.output
    assert finished.output.count("written to") == 1
    assert "\x1b" not in finished.output


def test_two_hosts_make_two_levels() -> None:
    # One machine that reports two host names: ranks 0 and 1 on `a`, 2 and 3 on `b`.
    script = (
        "import dataclasses\n"
        "from pipedream_hpc.cluster.probe import measure\n"
        "from pipedream_hpc.cluster.world import join\n"
        "world = join()\n"
        "topology = measure(dataclasses.replace(world, host='aabb'[world.rank]), repeats=2)\n"
        "same = len(set(world.comm.allgather(topology))) == 1 and all(x.reduce_bandwidth for x in topology.levels)\n"
        "if world.is_root: print(same, [(x.name, x.count) for x in topology.levels], topology.hosts)\n"
    )
    finished = ranks.mpirun(4, sys.executable, "-c", script, timeout=120)
    assert finished.output.strip() == "True [('node', 2), ('network', 2)] ('a', 'a', 'b', 'b')"


@pytest.mark.parametrize("size", [2, 3, 5])
def test_the_ring_sums_every_part(size: int) -> None:
    # With arrays shorter than the ring, some parts are empty.
    script = (
        "import numpy as np\n"
        "from pipedream_hpc.cluster.probe import _ring\n"
        "from pipedream_hpc.cluster.world import join\n"
        "world = join()\n"
        "for length in (0, 1, 4, 1000):\n"
        "    array = np.arange(length, dtype=np.float32) + world.rank\n"
        "    _ring(world.comm, array)\n"
        "    ranks = world.size\n"
        "    assert (array == ranks * np.arange(length) + ranks * (ranks - 1) // 2).all(), array\n"
        "if world.is_root: print('sums')\n"
    )
    assert ranks.mpirun(size, sys.executable, "-c", script, timeout=60).output.strip() == "sums"


def test_hosts_with_different_numbers_of_ranks_print_one_sentence() -> None:
    script = (
        "import dataclasses\n"
        "from pipedream_hpc.cluster.probe import measure\n"
        "from pipedream_hpc.cluster.world import join\n"
        "world = join()\n"
        "measure(dataclasses.replace(world, host='aab'[world.rank]))\n"
    )
    finished = ranks.mpirun(3, sys.executable, "-c", script, timeout=60)
    assert finished.status == 2, finished.output
    assert finished.output.count("every node needs the same number of ranks, but a has 2, b has 1") == 1
