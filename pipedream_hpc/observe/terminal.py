"""Terminal: where a person or a batch log reads along."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from rich.console import Console

#: Columns of a batch log, so that tables are not broken for the 80 of a terminal that is not there.
_LOG_WIDTH = 120
_LAUNCHERS = ("mpirun", "mpiexec", "prterun", "orterun")


def console(*, quiet: bool = False) -> Console:
    """A console on stdout: colours and moving bars on a terminal, plain lines everywhere else."""
    terminal = watched_terminal()
    width = None if terminal == "/dev/stdout" else _columns(terminal)
    # Names of layers and files are printed as they are: brackets in them are no markup.
    return Console(
        quiet=quiet,
        force_terminal=terminal is not None,
        width=None if "COLUMNS" in os.environ else width,
        markup=False,
        emoji=False,
        highlight=False,
    )


def watched_terminal(parent: Path | None = None) -> str | None:
    """The terminal on which somebody sees this process's stdout; None if it goes to a file or pipe.

    mpirun gives its ranks a pseudo-terminal for stdout even where its own output goes to a file,
    but never for stderr. So where only stdout is a terminal, mpirun's own stdout decides, which can
    be seen from ranks on mpirun's node.

    Args:
        parent: the parent's folder in /proc.
    """
    if not sys.stdout.isatty():
        return None
    if sys.stderr.isatty():
        return "/dev/stdout"
    parent = parent or Path(f"/proc/{os.getppid()}")
    try:
        launched = (parent / "comm").read_text().strip() in _LAUNCHERS
        target = os.readlink(parent / "fd" / "1")
    except OSError:  # another user's process, or no /proc
        return None
    if not launched:
        return "/dev/stdout"  # somebody sent stderr elsewhere, and watches stdout
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
