"""The ranks of a job and which one a process is; launchers that do not work with the process's MPI."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import ranks

from pipedream_hpc.cluster import threads
from pipedream_hpc.cluster.world import World, check_size, check_threads, launched, refuse_torch_launchers
from pipedream_hpc.errors import PipedreamError

CORES = len(os.sched_getaffinity(0))
#: Set only in processes that srun started.
STEP = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"OMPI_COMM_WORLD_RANK": "0"}, True),
        ({"PMI_RANK": "3"}, True),
        ({"PMIX_RANK": "0"}, True),
        ({"PALS_RANKID": "0"}, True),
        ({"ALPS_APP_PE": "0"}, True),
        ({"FLUX_TASK_RANK": "1", "FLUX_JOB_SIZE": "2"}, True),
        ({"FLUX_TASK_RANK": "0", "FLUX_JOB_SIZE": "1"}, False),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, True),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}, False),
        # The shell of a batch script or of salloc.
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
        ({**STEP, "SLURM_STEP_NUM_TASKS": "4", "PMIX_RANK": "0"}, "this MPI does not support the PMIx of this Slurm"),
        # Hydra in a batch job starts a helper on each of two nodes with srun.
        (
            {**STEP, "SLURM_STEP_NUM_TASKS": "2", "PMI_SIZE": "4", "PMI_RANK": "0", "MPI_LOCALNRANKS": "2"},
            "use the mpirun that belongs to Open MPI v5",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "use the mpirun that belongs to Open MPI v5"),
        ({"PMI_SIZE": "4", "PMI_RANK": "0"}, "use the mpirun that belongs to Open MPI v5"),
        ({"ALPS_APP_PE": "3"}, "use the mpirun that belongs to Open MPI v5"),
        ({"FLUX_TASK_RANK": "0", "FLUX_JOB_SIZE": "4"}, "use the mpirun that belongs to Open MPI v5"),
    ],
)
def test_tasks_that_mpi_does_not_connect_are_refused(environment: dict[str, str], remedy: str) -> None:
    with pytest.raises(PipedreamError, match=r"started 4 tasks, but MPI .* sees only this one") as caught:
        check_size(environment, 1, "Open MPI v5")
    assert remedy in str(caught.value)


def test_matching_sizes_are_accepted() -> None:
    check_size({}, 1, "Open MPI v5")
    check_size({"OMPI_COMM_WORLD_SIZE": "1"}, 1, "Open MPI v5")
    check_size({**STEP, "SLURM_NTASKS": "4"}, 4, "Open MPI v5")
    # `mpirun -n 1` in a batch job of four tasks.
    check_size({"OMPI_COMM_WORLD_SIZE": "1", "SLURM_NTASKS": "4"}, 1, "Open MPI v5")
    check_size({"PMIX_RANK": "0", "SLURM_NTASKS": "4"}, 1, "Open MPI v5")


def test_an_mpi_without_thread_support_is_refused() -> None:
    check_threads(True, "Open MPI v5")
    with pytest.raises(PipedreamError, match="Open MPI v5 runs without MPI_THREAD_MULTIPLE"):
        check_threads(False, "Open MPI v5")


def test_a_process_without_a_launcher_does_not_import_mpi() -> None:
    assert ranks.python(0, "place.py").output == "alone 0/1 mpi4py loaded: False\n"


def test_ranks_of_one_node() -> None:
    finished = ranks.python(3, "place.py", timeout=60)
    assert finished.output.strip() == str([(rank, 3, rank, 3, CORES) for rank in range(3)])


def test_an_inherited_local_rank_of_slurm_is_ignored() -> None:
    """With MPICH's mpiexec in a Slurm job, every rank inherits SLURM_LOCALID=0 from the helper process."""
    script = (
        "import os, runpy\n"
        "own = os.environ.pop('OMPI_COMM_WORLD_LOCAL_RANK')\n"
        "os.environ.update(SLURM_LOCALID='0', MPI_LOCALRANKID=own)\n"
        f"runpy.run_path({str(ranks.PROGRAMS / 'place.py')!r}, run_name='__main__')\n"
    )
    finished = ranks.mpirun(2, sys.executable, "-c", script, timeout=60)
    assert finished.output.strip() == str([(rank, 2, rank, 2, CORES) for rank in range(2)])


def test_the_cores_of_a_node_are_the_union_of_the_cpusets() -> None:
    # Rank r may only use core r mod CORES.
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
    # MPICH's mpiexec sets these variables; Open MPI ignores them and starts with one rank.
    finished = ranks.without_launcher("env", "PMI_RANK=0", "PMI_SIZE=4", sys.executable, ranks.PROGRAMS / "place.py")
    if "Open MPI" in finished.output:
        assert "pipedream: the launcher started 4 tasks, but MPI (Open MPI" in finished.output
        assert "use the mpirun that belongs to Open MPI" in finished.output
    else:
        pytest.skip("this MPI supports MPICH's launcher")
    assert finished.status != 0


@pytest.mark.parametrize(
    ("setting", "on_node", "expected"),
    [(None, 4, 2), (None, 3, 2), (None, 16, 1), (None, 0, 8), ("3", 4, 3), ("5,2", 4, 5), ("0", 4, 2), ("many", 4, 2)],
)
def test_threads_per_rank(monkeypatch: pytest.MonkeyPatch, setting: str | None, on_node: int, expected: int) -> None:
    monkeypatch.setattr(threads, "join", lambda: World(0, 4, 0, 4, "a", cpusets=(frozenset(range(8)),) * 4))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if setting is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", setting)
    assert threads.threads_per_rank(on_node) == expected


def test_ranks_are_oversubscribed_when_they_need_more_cores_than_the_node_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "join", lambda: World(0, 4, 0, 4, "a", cpusets=(frozenset(range(8)),) * 4))
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert not threads.oversubscribed(4)
    assert threads.oversubscribed(5)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert not threads.oversubscribed(8)  # an even share each
    assert threads.oversubscribed(9)


STARTED_BY_TORCH = """
import sys, torch
from pipedream_hpc.cluster.world import join
from pipedream_hpc.errors import PipedreamError

def main(number=0):
    try:
        print("alone, rank", join().rank, flush=True)
    except PipedreamError as error:
        print("refused:", error, flush=True)

if __name__ == "__main__":
    if sys.argv[1:]:
        torch.multiprocessing.spawn(main, nprocs=2)
    else:
        main()
"""


@pytest.mark.parametrize(
    ("launcher", "words", "said"),
    [
        (["-m", "torch.distributed.run", "--nproc-per-node", "2"], [], "torchrun (or a launcher like it) started"),
        ([], ["spawn"], "torch.multiprocessing.spawn started"),
    ],
)
def test_launchers_of_torch_are_refused(launcher: list[str], words: list[str], said: str, tmp_path: Path) -> None:
    """In each process, in one sentence; and a process is alone where torchrun has started one."""
    program = tmp_path / "program.py"
    program.write_text(STARTED_BY_TORCH)
    finished = ranks.without_launcher(sys.executable, *launcher, program, *words)
    assert finished.output.count(f"refused: {said} this process, and each process would train the whole") == 2
    assert "`mpirun -n " in finished.output
    assert "alone" not in finished.output.replace("model alone", "")


def test_torchrun_with_one_process_is_a_process_alone() -> None:
    refuse_torch_launchers({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"})
    refuse_torch_launchers({"WORLD_SIZE": "4"})
    with pytest.raises(PipedreamError, match="`mpirun -n 4 python PROGRAM`"):
        refuse_torch_launchers({"WORLD_SIZE": "4", "RANK": "3"})
