"""A bar where somebody watches, plain lines in a log, also under mpirun, which pretends to be a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import ranks

WATCHED = "from pipedream_hpc.observe.terminal import console; print('watched' if console().is_terminal else 'log')"
MPIRUN = [str(ranks.BIN / "mpirun"), "-n", "1", "--oversubscribe", "--bind-to", "none"]


def on_a_terminal(*command: str, stderr_too: bool = True) -> str:
    """Output of a command whose stdout is a terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs if stderr_too else subprocess.DEVNULL,
        env={**os.environ, **ranks.ENVIRONMENT},
    )
    os.close(theirs)
    output = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # how Linux says that the last writer has gone
            break
        if not piece:
            break
        output += piece
    process.wait(timeout=60)
    os.close(ours)
    return output.decode()


def in_a_log(*command: str) -> str:
    return ranks.alone(*command).output


PYTHON = (sys.executable, "-c", WATCHED)


def test_alone() -> None:
    assert "watched" in on_a_terminal(*PYTHON)
    assert "watched" in on_a_terminal(*PYTHON, stderr_too=False)
    assert "log" in in_a_log(*PYTHON)


def test_under_mpirun() -> None:
    assert "watched" in on_a_terminal(*MPIRUN, *PYTHON)
    assert "log" in in_a_log(*MPIRUN, *PYTHON)


def test_a_log_of_a_training_run_has_no_control_characters(tmp_path: Path) -> None:
    job = ranks.PROGRAMS / "small_job.py"
    command = (sys.executable, "-m", "pipedream_hpc.cli", "train", job, "--plan", 1, "--out", tmp_path, "--epochs", 1)
    words = [str(word) for word in command]
    assert "\x1b" not in in_a_log(*MPIRUN, *words)
    assert "\x1b" in on_a_terminal(*MPIRUN, *words), "the bar moves"
