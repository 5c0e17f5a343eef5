"""Which cores a rank gets, as tables of nodes; and that threads really run there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import ranks
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipedream_hpc.cluster.cores import Cores, in_order, numbers, share
from pipedream_hpc.cluster.threads import take_cores
from pipedream_hpc.cluster.world import World

FREE = [frozenset(range(8))] * 4
#: Two NUMA domains, in which cores come in pairs: 0 and 4 are threads of one core.
PAIRS = [0, 4, 1, 5, 2, 6, 3, 7]


def drawn(cpusets: list[frozenset[int]], threads: int, order: list[int] | None = None) -> list[str]:
    """A line for each rank: c where it computes, p where its progress thread is alone."""
    lines = []
    for place in range(len(cpusets)):
        cores = share(cpusets, place, threads, order)
        lines.append(
            "".join("c" if core in cores.compute else "p" if core in cores.progress else "." for core in range(8))
        )
    return lines


def test_nobody_is_bound() -> None:
    """Who computes may be helped by a progress thread anywhere in its cpuset, but others compute there."""
    shared = share(FREE, 1, threads=2)
    assert shared == Cores(frozenset({2, 3}), frozenset(range(8)))
    assert not shared.spare
    assert share(FREE, 1, threads=1).spare
    assert [share(FREE, place, 2).compute for place in range(4)] == [{0, 1}, {2, 3}, {4, 5}, {6, 7}]


def test_fewer_threads_than_cores_leave_one_to_the_progress_thread() -> None:
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


def test_who_is_bound_keeps_what_it_has() -> None:
    assert drawn([frozenset({0, 1, 2}), frozenset({5, 6, 7})], threads=2) == [
        "ccp.....",
        ".....ccp",
    ]


@pytest.mark.parametrize(
    "cpusets",
    [
        [frozenset({0, 1})] * 3,  # more ranks than cores
        [frozenset({0, 1, 2}), frozenset({2, 3, 4})],  # they overlap: the launcher meant something by it
    ],
)
def test_others_are_left_alone(cpusets: list[frozenset[int]]) -> None:
    assert [share(cpusets, place, 1) for place in range(len(cpusets))] == [Cores()] * len(cpusets)
    assert not Cores().spare


@given(st.integers(1, 12), st.sets(st.integers(0, 63), min_size=1), st.integers(1, 8), st.randoms())
def test_shares_are_apart_and_even(count: int, cpuset: set[int], threads: int, random: object) -> None:
    order = list(range(64))
    random.shuffle(order)  # type: ignore[attr-defined]
    found = [share([frozenset(cpuset)] * count, place, threads, order) for place in range(count)]
    if len(cpuset) < count:
        assert set(found) == {Cores()}
        return
    held = [each.compute | (each.progress if each.progress.isdisjoint(each.compute) else frozenset()) for each in found]
    assert frozenset().union(*held) == cpuset
    assert sum(map(len, held)) == len(cpuset)
    assert max(map(len, held)) - min(map(len, held)) <= 1
    assert all(each.compute for each in found)
    # A core is given to the progress thread only if the compute threads do not need it.
    assert all(len(each.compute) >= min(threads, len(own)) for each, own in zip(found, held, strict=True))


def test_the_order_of_a_node(tmp_path: Path) -> None:
    """Two domains of two cores with two threads each, numbered as Linux does."""
    for node, cores in enumerate(("0-1,4-5", "2-3,6-7")):
        (tmp_path / f"node/node{node}").mkdir(parents=True)
        (tmp_path / f"node/node{node}/cpulist").write_text(f"{cores}\n")
    for core in range(8):
        (tmp_path / f"cpu/cpu{core}/topology").mkdir(parents=True)
        (tmp_path / f"cpu/cpu{core}/topology/thread_siblings_list").write_text(f"{core % 4},{core % 4 + 4}\n")
    assert in_order(tmp_path) == PAIRS
    assert in_order(tmp_path / "nothing") is None
    assert numbers("") == []


@pytest.mark.parametrize(
    ("size", "local_size", "plan", "threads"),
    [
        (16, 8, 16, 8),  # two nodes of 64 cores: each shares its own cores out among its own ranks
        (8, 8, 8, 8),
        (1, 1, 4, 16),  # all ranks of the plan in this process
    ],
)
def test_threads_of_a_rank(
    size: int, local_size: int, plan: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("PIPEDREAM_BIND", "0")
    monkeypatch.setattr("pipedream_hpc.cluster.threads.core_count", lambda: 64)
    taken: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    take_cores(World(0, size, 0, local_size, "n1", cpusets=(frozenset(range(64)),) * local_size), plan)
    assert taken == [threads]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
@pytest.mark.parametrize("bind", [True, False])
def test_threads_run_where_they_should(bind: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two ranks with a thread each, on as many cores as there are: compute threads apart, unless told otherwise."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    if not bind:
        monkeypatch.setenv("PIPEDREAM_BIND", "0")
    done = ranks.python(2, "cores.py")
    assert done.status == 0, done.output
    lines = sorted(line for line in done.output.splitlines() if line.startswith("rank"))
    computes = [set(numbers(line.split("compute ")[1].split()[0])) for line in lines]
    assert len(lines) == 2
    whole = os.sched_getaffinity(0)
    if bind:
        assert computes[0].isdisjoint(computes[1])
        assert all("progress thread is where it should be" in line for line in lines), lines
    else:
        assert computes == [whole, whole]
