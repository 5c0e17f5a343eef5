"""Terminal: where a person or a batch log reads along."""

from __future__ import annotations

import os
import sys

from rich.console import Console

#: Columns of a batch log, so that tables are not broken for the 80 of a terminal that is not there.
_LOG_WIDTH = 120


def console(*, quiet: bool = False) -> Console:
    """A console on stdout: colours and moving bars on a terminal, plain lines everywhere else.

    mpirun gives its ranks a pseudo-terminal for stdout even where its own output goes to a file,
    but never for stderr: only where both are terminals does somebody watch.
    """
    watched = sys.stdout.isatty() and sys.stderr.isatty()
    # Names of layers and files are printed as they are: brackets in them are no markup.
    return Console(
        quiet=quiet,
        force_terminal=watched,
        width=None if watched or "COLUMNS" in os.environ else _LOG_WIDTH,
        markup=False,
        emoji=False,
        highlight=False,
    )
