"""One rank fails: one message, and every rank stops.

An exception that nobody catches would end its own rank and leave the others waiting for ever. The
hook prints it once, with the rank, and takes the whole job down::

    rank 0   raises ── speaks ── MPI_Abort
    rank 1   raises ── waits 1.2 s ──────── ✕     the same bad input everywhere: one message
    rank 2   raises ── waits 1.5 s ──────── ✕
    rank 3   computes, or waits in MPI ──── ✕

A rank killed from outside says nothing; there the launcher's SIGTERM ends the others, whose default
handler is left in place for that.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from pipedream_hpc.errors import PipedreamError

if TYPE_CHECKING:
    from pipedream_hpc.cluster.world import World

#: Seconds that rank 0 may come later than the others, as it does where ranks outnumber cores.
_FIRST_S = 0.9
_HEAD_START_S = 0.3
_MOST_HEAD_STARTS = 5
#: Seconds for the launcher to pass the message on before its own words about the abort get in between.
_DELIVERY_S = 0.2

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130


def head_start_s(rank: int) -> float:
    """Seconds `rank` keeps silent so that a lower one with the same to say is heard alone.

    Rank 0 speaks at once. A rank that fails by itself is heard all the same, after 2.4 s at most.
    """
    return _FIRST_S + _HEAD_START_S * min(rank, _MOST_HEAD_STARTS) if rank else 0.0


def message(error: BaseException) -> str:
    """One sentence for bad input, the traceback for anything else; ends in a newline."""
    if isinstance(error, PipedreamError):
        return f"pipedream: {error}\n"
    return "".join(traceback.format_exception(error))


def status(error: BaseException) -> int:
    """Exit status: 2 for bad input, 130 for an interrupt, 1 for anything else."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return BAD_INPUT if isinstance(error, PipedreamError) else FAILED


def stop_everybody(world: World, error: BaseException) -> None:
    """Print `error` once for the whole job and end all its ranks. Does not return."""
    time.sleep(head_start_s(world.rank))
    try:
        prefix = f"[rank {world.rank}/{world.size} {world.host}] "
        sys.stdout.flush()
        # In one write, so that lines of other ranks do not get in between.
        sys.stderr.write("".join(prefix + line for line in message(error).splitlines(keepends=True)))
        sys.stderr.flush()
        time.sleep(_DELIVERY_S)
    finally:
        world.comm.Abort(status(error))


@dataclass(frozen=True)
class _Hook:
    """What Python calls with an exception that nobody caught."""

    world: World

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, KeyboardInterrupt):
            os._exit(INTERRUPTED)  # every rank got the interrupt; nobody is left waiting
        stop_everybody(self.world, error.with_traceback(trace))


def install(world: World) -> None:
    """From now on an uncaught exception of this rank stops all ranks. Nothing to do for a single one."""
    if world.size > 1:
        sys.excepthook = _Hook(world)


def installed() -> bool:
    """Whether an uncaught exception of this process stops all ranks."""
    return isinstance(sys.excepthook, _Hook)


def take_others_along(leaving: SystemExit) -> None:
    """A rank that leaves with a failing status ends the others too, which would wait for it in vain.

    Returns where there are no others.
    """
    hook = sys.excepthook
    if isinstance(hook, _Hook):
        sys.stdout.flush()
        sys.stderr.flush()
        hook.world.comm.Abort(leaving.code if isinstance(leaving.code, int) else FAILED)
