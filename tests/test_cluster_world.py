"""Who a process is among the ranks, and launchers that do not know its MPI."""

from __future__ import annotations

import os
import sys

import pytest
import ranks

from pipedream_hpc.cluster import threads
from pipedream_hpc.cluster.world import World, check_size, check_threads, launched
from pipedream_hpc.errors import PipedreamError

CORES = len(os.sched_getaffinity(0))
#: In what srun starts, and only there.
STEP = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"OMPI_COMM_WORLD_RANK": "0"}, True),
        ({"PMI_RANK": "3"}, True),
        ({"PMIX_RANK": "0"}, True),
        ({"PALS_RANKID": "0"}, True),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, True),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}, False),
        # The shell of a batch script, and of salloc.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, False),
        ({"SLURM_NTASKS": "4"}, False),
    ],
)
def test_whether_a_launcher_started_this_process(environment: dict[str, str], expected: bool) -> None:
    assert launched(environment) is expected


@pytest.mark.parametrize(
    ("environment", "remedy"),
    [
        ({**STEP, "SLURM_NTASKS": "4"}, "use `srun --mpi=pmix`"),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "8"}, "use `srun --mpi=pmix`"),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "4", "PMI_SIZE": "4", "PMI_RANK": "0"}, "(`srun --mpi=list` shows"),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "4", "PMIX_RANK": "0"}, "it does not understand the PMIx of this Slurm"),
        # Hydra in a batch job: it starts a helper on each of two nodes with srun.
        (
            {**STEP, "SLURM_STEP_NUM_TASKS": "2", "PMI_SIZE": "4", "PMI_RANK": "0", "MPI_LOCALNRANKS": "2"},
            "use the mpirun that belongs to Open MPI v5",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "use the mpirun that belongs to Open MPI v5"),
        ({"PMI_SIZE": "4", "PMI_RANK": "0"}, "use the mpirun that belongs to Open MPI v5"),
    ],
)
def test_several_tasks_that_are_alone_each(environment: dict[str, str], remedy: str) -> None:
    with pytest.raises(PipedreamError, match=r"started 4 tasks, but MPI .* sees only this one") as caught:
        check_size(environment, 1, "Open MPI v5")
    assert remedy in str(caught.value)


def test_sizes_that_are_right() -> None:
    check_size({}, 1, "Open MPI v5")
    check_size({"OMPI_COMM_WORLD_SIZE": "1"}, 1, "Open MPI v5")
    check_size({**STEP, "SLURM_NTASKS": "4"}, 4, "Open MPI v5")
    # `mpirun -n 1` in a batch job of four tasks.
    check_size({"OMPI_COMM_WORLD_SIZE": "1", "SLURM_NTASKS": "4"}, 1, "Open MPI v5")
    check_size({"PMIX_RANK": "0", "SLURM_NTASKS": "4"}, 1, "Open MPI v5")


def test_an_mpi_without_threads() -> None:
    check_threads(True, "Open MPI v5")
    with pytest.raises(PipedreamError, match="Open MPI v5 runs without MPI_THREAD_MULTIPLE"):
        check_threads(False, "Open MPI v5")


def test_a_process_by_itself_leaves_mpi_alone() -> None:
    assert ranks.python(0, "place.py").output == "alone 0/1 mpi4py loaded: False\n"


def test_ranks_of_one_node() -> None:
    finished = ranks.python(3, "place.py", timeout=60)
    assert finished.output.strip() == str([(rank, 3, rank, 3, CORES) for rank in range(3)])


def test_a_local_rank_that_all_ranks_of_a_node_inherit_does_not_count() -> None:
    """MPICH's mpiexec in a Slurm job: SLURM_LOCALID is that of its helper, 0 for every rank."""
    script = (
        "import os, runpy\n"
        "own = os.environ.pop('OMPI_COMM_WORLD_LOCAL_RANK')\n"
        "os.environ.update(SLURM_LOCALID='0', MPI_LOCALRANKID=own)\n"
        f"runpy.run_path({str(ranks.PROGRAMS / 'place.py')!r}, run_name='__main__')\n"
    )
    finished = ranks.mpirun(2, sys.executable, "-c", script, timeout=60)
    assert finished.output.strip() == str([(rank, 2, rank, 2, CORES) for rank in range(2)])


def test_ranks_bound_to_a_core_each_share_out_them_all() -> None:
    # Rank r may use core r mod CORES and no other; together they have the union.
    program = ranks.PROGRAMS / "place.py"
    script = (
        "import os, runpy\n"
        "own = sorted(os.sched_getaffinity(0))\n"
        "os.sched_setaffinity(0, [own[int(os.environ['OMPI_COMM_WORLD_RANK']) % len(own)]])\n"
        f"runpy.run_path({str(program)!r}, run_name='__main__')\n"
    )
    finished = ranks.mpirun(2, sys.executable, "-c", script, timeout=60)
    assert finished.output.strip() == str([(rank, 2, rank, 2, min(2, CORES)) for rank in range(2)])


def test_a_launcher_of_another_mpi() -> None:
    # MPICH's mpiexec sets these; Open MPI, not knowing them, comes up alone.
    finished = ranks.alone("env", "PMI_RANK=0", "PMI_SIZE=4", sys.executable, ranks.PROGRAMS / "place.py")
    if "Open MPI" in finished.output:
        assert "pipedream: the launcher started 4 tasks, but MPI (Open MPI" in finished.output
        assert "use the mpirun that belongs to Open MPI" in finished.output
    else:
        pytest.skip("this MPI knows MPICH's launcher")
    assert finished.status != 0


@pytest.mark.parametrize(
    ("given", "on_node", "expected"),
    [(None, 4, 2), (None, 3, 2), (None, 16, 1), (None, 0, 8), ("3", 4, 3), ("5,2", 4, 5), ("0", 4, 2), ("many", 4, 2)],
)
def test_threads_per_rank(monkeypatch: pytest.MonkeyPatch, given: str | None, on_node: int, expected: int) -> None:
    monkeypatch.setattr(threads, "join", lambda: World(0, 4, 0, 4, "a", cpusets=(frozenset(range(8)),) * 4))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert threads.threads_per_rank(on_node) == expected


def test_ranks_are_crowded_when_they_want_more_cores_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "join", lambda: World(0, 4, 0, 4, "a", cpusets=(frozenset(range(8)),) * 4))
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert not threads.crowded(4)
    assert threads.crowded(5)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert not threads.crowded(8)  # an even share each
    assert threads.crowded(9)
