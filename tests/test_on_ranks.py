"""Run every file of tests/mpi on its numbers of ranks, each in a child process with a time limit."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
import ranks

FOLDER = Path(__file__).parent / "mpi"


def files_and_ranks() -> list[tuple[Path, int]]:
    """Return (file, ranks) for every number in a file's RANKS."""
    pairs = []
    for file in sorted(FOLDER.glob("test_*.py")):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "RANKS":
                pairs += [(file, count) for count in ast.literal_eval(node.value)]
    return pairs


def test_every_file_says_its_ranks() -> None:
    assert {file for file, _ in files_and_ranks()} == set(FOLDER.glob("test_*.py")) != set()


@pytest.mark.parametrize(("file", "count"), files_and_ranks(), ids=lambda value: getattr(value, "stem", value))
def test_on_ranks(file: Path, count: int) -> None:
    # -m mpi4py: a rank that fails ends all of them. The thread method is the only time limit that
    # fires inside an MPI call. The ranks assert the size of their world themselves.
    options = ("-x", "--with-mpi", "--timeout", "60", "--timeout-method=thread", "-p", "no:cacheprovider")
    finished = ranks.mpirun(count, sys.executable, "-m", "mpi4py", "-m", "pytest", *options, file, timeout=240)
    assert finished.status == 0, finished.output
    assert finished.output.count(" passed") == count, finished.output
