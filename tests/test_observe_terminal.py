"""Progress bars on a terminal and plain lines in a log, also under mpirun, which gives ranks a pseudo-terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import ranks

from pipedream_hpc.observe.terminal import _LOG_WIDTH, _columns, watched_terminal

PRINT_KIND = "from pipedream_hpc.observe.terminal import console; print('terminal' if console().is_terminal else 'log')"
MPIRUN = [str(ranks.BIN / "mpirun"), "-n", "1", "--oversubscribe", "--bind-to", "none"]


def on_a_terminal(*command: str, stderr_too: bool = True) -> str:
    """Return the output of a command whose stdout is a terminal."""
    parent_end, child_end = pty.openpty()
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=child_end,
        stderr=child_end if stderr_too else subprocess.DEVNULL,
        env={**os.environ, **ranks.ENVIRONMENT},
    )
    os.close(child_end)
    output = b""
    while True:
        try:
            chunk = os.read(parent_end, 4096)
        except OSError:  # Linux: the last writer has closed the terminal
            break
        if not chunk:
            break
        output += chunk
    process.wait(timeout=60)
    os.close(parent_end)
    return output.decode()


def in_a_log(*command: str) -> str:
    return ranks.without_launcher(*command).output


PYTHON = (sys.executable, "-c", PRINT_KIND)


def test_without_a_launcher() -> None:
    assert "terminal" in on_a_terminal(*PYTHON)
    assert "terminal" in on_a_terminal(*PYTHON, stderr_too=False)
    assert "log" in in_a_log(*PYTHON)


def test_under_mpirun() -> None:
    assert "terminal" in on_a_terminal(*MPIRUN, *PYTHON)
    assert "log" in in_a_log(*MPIRUN, *PYTHON)


def test_a_log_of_a_training_run_has_no_control_characters(tmp_path: Path) -> None:
    job = ranks.PROGRAMS / "small_job.py"
    command = (sys.executable, "-m", "pipedream_hpc.cli", "train", job, "--plan", 1, "--out", tmp_path, "--epochs", 1)
    words = [str(word) for word in command]
    assert "\x1b" not in in_a_log(*MPIRUN, *words)
    assert "\x1b" in on_a_terminal(*MPIRUN, *words), "there is a progress bar"


@pytest.mark.parametrize(
    ("parent", "stdout", "found"),
    [
        ("mpirun", "/dev/pts/3", "/dev/pts/3"),
        ("prterun", "/dev/tty1", "/dev/tty1"),
        ("mpirun", "/home/user/train.log", None),
        ("bash", "/home/user/train.log", "/dev/stdout"),  # only stderr was redirected
        (None, None, None),  # a process of another user
    ],
)
def test_the_launchers_own_stdout_decides(
    parent: str | None, stdout: str | None, found: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if parent is not None and stdout is not None:
        (tmp_path / "comm").write_text(f"{parent}\n")
        (tmp_path / "fd").mkdir()
        (tmp_path / "fd" / "1").symlink_to(stdout)
    # stdout is a terminal and stderr is not, as under mpirun.
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: False))
    assert watched_terminal(tmp_path) == found


def test_the_width_of_a_terminal_that_cannot_be_asked(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert _columns(None) == _columns(str(tmp_path / "missing")) == _columns(str(tmp_path / "file")) == _LOG_WIDTH
