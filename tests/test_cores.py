"""Which cores each rank of a node gets, drawn as one line per rank; and that threads really run there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import ranks
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipedream_hpc.cluster.cores import Cores, assign_cores, numa_order, parse_cpu_list
from pipedream_hpc.cluster.threads import bind_rank
from pipedream_hpc.cluster.world import World

FREE = [frozenset(range(8))] * 4
#: Two NUMA domains with hyper-threading: 0 and 4 are threads of one physical core.
PAIRS = [0, 4, 1, 5, 2, 6, 3, 7]


def drawn(cpusets: list[frozenset[int]], threads: int, order: list[int] | None = None) -> list[str]:
    """Return one line per rank: c for a core of its compute threads, p for a core of its progress thread only."""
    lines = []
    for index in range(len(cpusets)):
        cores = assign_cores(cpusets, index, threads, order)
        lines.append(
            "".join("c" if core in cores.compute else "p" if core in cores.progress else "." for core in range(8))
        )
    return lines


def test_ranks_with_the_same_cpuset_divide_it() -> None:
    """The progress thread has no dedicated core here: it may run anywhere in the cpuset."""
    assert drawn(FREE, threads=2) == [
        "ccpppppp",
        "ppccpppp",
        "ppppccpp",
        "ppppppcc",
    ]
    shared = assign_cores(FREE, 1, threads=2)
    assert shared == Cores(frozenset({2, 3}), frozenset(range(8)))
    assert not shared.progress_is_dedicated
    assert assign_cores(FREE, 1, threads=1).progress_is_dedicated


def test_with_fewer_threads_than_cores_the_progress_thread_gets_one() -> None:
    assert drawn(FREE, threads=1) == [
        "cp......",
        "..cp....",
        "....cp..",
        "......cp",
    ]


def test_threads_of_a_core_stay_together() -> None:
    assert drawn(FREE[:2], threads=2, order=PAIRS) == [
        "cc..cp..",
        "..cc..cp",
    ]


def test_ranks_with_disjoint_cpusets_keep_them() -> None:
    assert drawn([frozenset({0, 1, 2}), frozenset({5, 6, 7})], threads=2) == [
        "ccp.....",
        ".....ccp",
    ]


@pytest.mark.parametrize(
    "cpusets",
    [
        [frozenset({0, 1})] * 3,  # more ranks than cores
        [frozenset({0, 1, 2}), frozenset({2, 3, 4})],  # they overlap as the launcher set them
    ],
)
def test_other_ranks_are_not_bound(cpusets: list[frozenset[int]]) -> None:
    assert [assign_cores(cpusets, index, 1) for index in range(len(cpusets))] == [Cores()] * len(cpusets)
    assert not Cores().progress_is_dedicated


@given(st.integers(1, 12), st.sets(st.integers(0, 63), min_size=1), st.integers(1, 8), st.randoms())
def test_shares_are_disjoint_and_even(count: int, cpuset: set[int], threads: int, random: object) -> None:
    order = list(range(64))
    random.shuffle(order)  # type: ignore[attr-defined]
    assigned = [assign_cores([frozenset(cpuset)] * count, index, threads, order) for index in range(count)]
    if len(cpuset) < count:
        assert set(assigned) == {Cores()}
        return
    shares = [each.compute | each.progress if each.progress_is_dedicated else each.compute for each in assigned]
    assert frozenset().union(*shares) == cpuset
    assert sum(map(len, shares)) == len(cpuset)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert all(each.compute for each in assigned)
    # The progress thread gets a dedicated core only if the compute threads do not need it.
    assert all(len(each.compute) >= min(threads, len(share)) for each, share in zip(assigned, shares, strict=True))


def test_cores_are_sorted_by_numa_domain(tmp_path: Path) -> None:
    """Two domains of two cores with two threads each, numbered as Linux does."""
    for node, cores in enumerate(("0-1,4-5", "2-3,6-7")):
        (tmp_path / f"node/node{node}").mkdir(parents=True)
        (tmp_path / f"node/node{node}/cpulist").write_text(f"{cores}\n")
    for core in range(8):
        (tmp_path / f"cpu/cpu{core}/topology").mkdir(parents=True)
        (tmp_path / f"cpu/cpu{core}/topology/thread_siblings_list").write_text(f"{core % 4},{core % 4 + 4}\n")
    assert numa_order(tmp_path) == PAIRS
    assert numa_order(tmp_path / "nothing") is None
    assert parse_cpu_list("") == []


@pytest.mark.parametrize(
    ("size", "local_size", "plan", "threads"),
    [
        (16, 8, 16, 8),  # two nodes of 64 cores: the cores of each node are divided among the ranks of that node
        (8, 8, 8, 8),
        (1, 1, 4, 16),  # all ranks of the plan run in this process
    ],
)
def test_threads_of_a_rank(
    size: int, local_size: int, plan: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("PIPEDREAM_BIND", "0")
    monkeypatch.setattr("pipedream_hpc.cluster.threads.core_count", lambda: 64)
    numbers: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    bind_rank(World(0, size, 0, local_size, "n1", cpusets=(frozenset(range(64)),) * local_size), plan)
    assert numbers == [threads]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
@pytest.mark.parametrize("bind", [True, False])
def test_threads_run_where_they_should(bind: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks with one compute thread each run on different cores, unless PIPEDREAM_BIND=0."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    if not bind:
        monkeypatch.setenv("PIPEDREAM_BIND", "0")
    finished = ranks.python(2, "cores.py")
    assert finished.status == 0, finished.output
    lines = sorted(line for line in finished.output.splitlines() if line.startswith("rank"))
    computes = [set(parse_cpu_list(line.split("compute ")[1].split()[0])) for line in lines]
    assert len(lines) == 2
    whole = os.sched_getaffinity(0)
    if bind:
        assert computes[0].isdisjoint(computes[1])
        assert all("progress thread is where it should be" in line for line in lines), lines
    else:
        assert computes == [whole, whole]
