"""The core's own tests (csrc/tests), built and run: in one process without MPI, and on 1 to 4 ranks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import ranks

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "tests"
NAMES = ("host", "ranks-1", "ranks-2", "ranks-3", "ranks-4", "device-1", "device-2")


@pytest.fixture(scope="module")
def built() -> Path:
    options = ("-DPIPEDREAM_TESTS=ON", "-DPIPEDREAM_CUDA=OFF", f"-DPython_EXECUTABLE={sys.executable}")
    # The extension modules are built from the same sources, and installed.
    targets = ("--target", "test_host", "test_ranks", "test_device", "bench_channel", "bench_moves")
    for command in (("-S", ROOT, "-B", BUILD, *options), ("--build", BUILD, "--parallel", "2", *targets)):
        finished = ranks.without_launcher("cmake", *command, timeout=250)
        assert finished.status == 0, finished.output
    return BUILD


def test_the_list_is_whole(built: Path) -> None:
    listed = ranks.without_launcher("ctest", "--test-dir", built, "--show-only").output
    assert all(f": {name}\n" in listed for name in NAMES), listed
    assert f"Total Tests: {len(NAMES)}" in listed


@pytest.mark.parametrize("name", NAMES)
def test_in_cpp(built: Path, name: str) -> None:
    finished = ranks.without_launcher(
        "ctest", "--test-dir", built, "--tests-regex", f"^{name}$", "--no-tests=error", "--verbose", timeout=280
    )
    assert finished.status == 0, finished.output
    processes = 1 if name == "host" else int(name.partition("-")[2])
    assert finished.output.count("Status: SUCCESS!") == processes, finished.output


def test_ranks_really_run(built: Path) -> None:
    """The program counts its ranks, so that no launcher starts one job of one rank four times."""
    finished = ranks.mpirun(2, built / "csrc/tests/test_ranks", "--ranks=3")
    assert finished.status != 0
    assert "2 ranks run, but not --ranks=3" in finished.output
