"""Terminal: output for a terminal or for the log of a batch job."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from rich.console import Console

#: Columns of a batch log; without a terminal, rich would wrap tables at 80 columns.
_LOG_WIDTH = 120
_LAUNCHERS = ("mpirun", "mpiexec", "prterun", "orterun")


def console(*, quiet: bool = False) -> Console:
    """Return a console on stdout: colours and progress bars on a terminal, plain lines elsewhere."""
    terminal = watched_terminal()
    width = None if terminal == "/dev/stdout" else _columns(terminal)
    # Names of layers and files are printed unchanged: brackets in them are not markup.
    return Console(
        quiet=quiet,
        force_terminal=terminal is not None,
        width=None if "COLUMNS" in os.environ else width,
        markup=False,
        emoji=False,
        highlight=False,
    )


def watched_terminal(parent: Path | None = None) -> str | None:
    """Return the terminal that displays this process's stdout; None if it goes to a file or a pipe.

    mpirun gives its ranks a pseudo-terminal for stdout even if its own output goes to a file, but never
    for stderr. If only stdout is a terminal, mpirun's own stdout therefore decides; ranks on mpirun's
    node can look it up.

    Args:
        parent: the parent process's folder in /proc; default: the real parent.
    """
    if not sys.stdout.isatty():
        return None
    if sys.stderr.isatty():
        return "/dev/stdout"
    parent = parent or Path(f"/proc/{os.getppid()}")
    try:
        launched = (parent / "comm").read_text().strip() in _LAUNCHERS
        target = os.readlink(parent / "fd" / "1")
    except OSError:  # a process of another user, or no /proc
        return None
    if not launched:
        return "/dev/stdout"  # only stderr was redirected
    return target if target.startswith(("/dev/pts/", "/dev/tty")) else None


def _columns(terminal: str | None) -> int:
    if terminal is None:
        return _LOG_WIDTH
    try:
        handle = os.open(terminal, os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return _LOG_WIDTH
    try:
        return os.get_terminal_size(handle).columns or _LOG_WIDTH
    except OSError:
        return _LOG_WIDTH
    finally:
        os.close(handle)
