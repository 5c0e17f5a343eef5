"""Run programs on real ranks, in a child process with a time limit."""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

BIN = Path(sys.prefix) / "bin"
PROGRAMS = Path(__file__).parent / "programs"
T = TypeVar("T")

ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",  # containers run as root
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_mpi_yield_when_idle": "1",  # more ranks than cores take turns
    "OMPI_MCA_btl": "^ofi",  # one node: no fabric to look for, MPI starts faster
    "OMP_NUM_THREADS": "1",
    "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
}


def _environment(folder: str | Path) -> dict[str, str]:
    """Return the variables of a launch, whose launcher keeps its own files in `folder`.

    All of Open MPI's launchers on a node share a folder by default. One that ends removes it while another one that
    starts puts its files there, which then fails ("The PMIx server's listener thread failed to start"): 8 of 12,000
    launches in fours did, and none with folders of their own.
    """
    return {**os.environ, **ENVIRONMENT, "PRTE_MCA_prte_tmpdir_base": str(folder)}


@dataclass(frozen=True)
class Finished:
    """A process that has ended: exit status, everything it printed, and when it ended (time.time)."""

    status: int
    output: str
    ended: float


class Team:
    """Ranks that are launched once and then serve many tests; a launch of four takes seconds.

    Args:
        count: number of ranks.
    """

    def __init__(self, count: int) -> None:
        self._folder, self._tasks = Path(tempfile.mkdtemp(prefix="team-")), 0
        self._output = (self._folder / "output").open("w+")
        launcher = [BIN / "mpirun", "-n", count, "--oversubscribe", "--bind-to", "none"]
        self._process = subprocess.Popen(
            [str(word) for word in (*launcher, sys.executable, PROGRAMS / "serve.py", self._folder, os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env=_environment(self._folder),
            start_new_session=True,
        )
        atexit.register(self.end)

    @property
    def ended(self) -> bool:
        """Whether a task that failed, or hung, has ended the ranks."""
        return self._process.poll() is not None

    def call(self, function: Callable[[Any], T], argument: Any, timeout: float) -> T:
        """Call a function of a module in tests on every rank; return what it returns on rank 0."""
        task, result = (self._folder / f"{name}-{self._tasks}" for name in ("task", "result"))
        self._tasks += 1
        task.with_suffix(".new").write_bytes(pickle.dumps((function, argument)))
        task.with_suffix(".new").rename(task)
        deadline = time.monotonic() + timeout
        while not result.exists():
            if self.ended or time.monotonic() > deadline:
                how = f"ended with status {self._process.poll()}" if self.ended else f"still running after {timeout} s"
                self.end()
                output = (self._folder / "output").read_text()
                raise AssertionError(f"{how}: {function.__module__}.{function.__name__}\n{output}")
            time.sleep(0.005)
        returned: T = pickle.loads(result.read_bytes())
        return returned

    def end(self) -> None:
        """End the ranks. The launcher ends them when it is told to terminate, but not when it is killed."""
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._output.close()


_teams: dict[int, Team] = {}


def call(count: int, function: Callable[[Any], T], argument: Any, timeout: float = 240) -> T:
    """Call function(argument) on `count` ranks that serve all tests; return what it returns on rank 0.

    The function is in a module of tests/ or tests/programs/. If it raises, the ranks end, and the test fails with what
    they printed.
    """
    if count not in _teams or _teams[count].ended:
        _teams[count] = Team(count)
    return _teams[count].call(function, argument, timeout)


def command(count: int, *words: object, timeout: float = 240) -> str:
    """Run the command line on `count` ranks that serve all tests; return what rank 0 printed. It must succeed."""
    return call(count, _command, [str(word) for word in words], timeout)


def _command(words: list[str]) -> str:
    from typer.testing import CliRunner

    from pipedream_hpc.cli import app
    from pipedream_hpc.cluster.world import join

    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return f"{join().size} ranks\n{result.output}"


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
    with tempfile.TemporaryDirectory(prefix="launch-", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=_environment(folder),
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            raise AssertionError(f"still running after {timeout} s: {' '.join(command)}\n{output}") from None
        return Finished(process.returncode, output, time.time())
