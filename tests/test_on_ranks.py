"""Run the files of tests/mpi on their numbers of ranks, in child processes with a time limit."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
import ranks

FOLDER = Path(__file__).parent / "mpi"


def files_by_ranks() -> dict[int, list[Path]]:
    """Return the files to run on every number of ranks, from their RANKS."""
    found: dict[int, list[Path]] = {}
    for file in sorted(FOLDER.glob("test_*.py")):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "RANKS":
                for count in ast.literal_eval(node.value):
                    found.setdefault(count, []).append(file)
    return found


def test_every_file_says_its_ranks() -> None:
    assert {file for files in files_by_ranks().values() for file in files} == set(FOLDER.glob("test_*.py")) != set()


@pytest.mark.parametrize(("count", "files"), files_by_ranks().items(), ids=str)
def test_on_ranks(count: int, files: list[Path]) -> None:
    # -m mpi4py: a rank that fails ends all of them. The thread method is the only time limit that
    # fires inside an MPI call. The ranks assert the size of their world themselves.
    options = ("-x", "--with-mpi", "--timeout", "60", "--timeout-method=thread", "-p", "no:cacheprovider")
    finished = ranks.mpirun(count, sys.executable, "-m", "mpi4py", "-m", "pytest", *options, *files, timeout=240)
    assert finished.status == 0, finished.output
    assert finished.output.count(" passed") == count, finished.output
