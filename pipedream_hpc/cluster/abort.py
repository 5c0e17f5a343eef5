"""One rank fails: one message, and every rank stops.

An exception that nobody catches would end its own rank and leave the others waiting for ever. The
hook prints it once, with the rank, and takes the whole job down.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from types import TracebackType

from pipedream_hpc.cluster.world import World
from pipedream_hpc.errors import PipedreamError

#: Bad input is usually the same on all ranks. Rank 0 speaks at once, the others later and later, so
#: that its abort silences them, while a rank that fails alone is heard all the same.
_HEAD_START_S = 0.3
_MOST_HEAD_STARTS = 8

BAD_INPUT, FAILED = 2, 1


def message(error: BaseException) -> str:
    """One sentence for bad input, the traceback for anything else."""
    if isinstance(error, PipedreamError):
        return f"pipedream: {error}\n"
    return "".join(traceback.format_exception(error))


def stop_everybody(world: World, error: BaseException) -> None:
    """Print `error` once for the whole job and end all its ranks; does not return."""
    status = BAD_INPUT if isinstance(error, PipedreamError) else FAILED
    time.sleep(_HEAD_START_S * min(world.rank, _MOST_HEAD_STARTS))
    prefix = f"[rank {world.rank}/{world.size} on {world.host}] "
    text = "".join(prefix + line for line in message(error).splitlines(keepends=True))
    sys.stdout.flush()
    sys.stderr.write(text)
    sys.stderr.flush()
    world.comm.Abort(status)


def install(world: World) -> None:
    """From now on an uncaught exception of this rank stops all ranks. Nothing to do for a single one."""
    if world.comm is None or world.size == 1:
        return

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, KeyboardInterrupt):
            os._exit(130)  # every rank got the interrupt; nobody is left waiting
        stop_everybody(world, error.with_traceback(trace))

    sys.excepthook = hook
