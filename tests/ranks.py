"""Run programs on real ranks, in a child process with a time limit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

BIN = Path(sys.prefix) / "bin"
PROGRAMS = Path(__file__).parent / "programs"

ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",  # containers run as root
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_mpi_yield_when_idle": "1",  # more ranks than cores take turns
    "OMPI_MCA_btl": "^ofi",  # one node: no fabric to look for, MPI starts faster
    "OMP_NUM_THREADS": "1",
    "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
}


@dataclass(frozen=True)
class Finished:
    """A process that has ended: exit status, everything it printed, and when it ended (time.time)."""

    status: int
    output: str
    ended: float


def without_launcher(*command: object, timeout: float = 120) -> Finished:
    """Run a command without a launcher."""
    return _run([str(word) for word in command], timeout)


def mpirun(ranks: int, *command: object, timeout: float = 120) -> Finished:
    """Run a command on `ranks` ranks. A hang ends the whole process group and fails the test."""
    launcher = [str(BIN / "mpirun"), "-n", str(ranks), "--oversubscribe", "--bind-to", "none"]
    return _run([*launcher, *(str(word) for word in command)], timeout)


def python(ranks: int, program: str, *args: object, timeout: float = 120) -> Finished:
    """Run one of tests/programs on `ranks` ranks, or without a launcher for 0."""
    command = (sys.executable, PROGRAMS / program, *args)
    return mpirun(ranks, *command, timeout=timeout) if ranks else without_launcher(*command, timeout=timeout)


def pipedream(ranks: int, *words: object, timeout: float = 120) -> Finished:
    """Run the command line on `ranks` ranks, or without a launcher for 0."""
    command = (sys.executable, "-m", "pipedream_hpc.cli", *words)
    return mpirun(ranks, *command, timeout=timeout) if ranks else without_launcher(*command, timeout=timeout)


def _run(command: list[str], timeout: float) -> Finished:
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **ENVIRONMENT},
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"still running after {timeout} s: {' '.join(command)}\n{output}") from None
    return Finished(process.returncode, output, time.time())
