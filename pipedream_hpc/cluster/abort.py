"""Abort: when one rank fails, print one message and stop all ranks.

An uncaught exception would end its own rank only and leave the others waiting forever. The hook prints
it once, with the rank, and aborts the whole job::

    rank 0   raises ── prints ── MPI_Abort
    rank 1   raises ── waits 1.2 s ──────── ✕     the same invalid input on all ranks: one message
    rank 2   raises ── waits 1.5 s ──────── ✕
    rank 3   computes, or waits in MPI ──── ✕

A rank that is killed by a signal prints nothing. The launcher's SIGTERM then ends the other ranks, so the
default SIGTERM handler must stay in place.
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

#: Seconds that rank 0 may be slower than the others, as it is where ranks outnumber cores.
_FIRST_DELAY_S = 0.9
#: Additional delay per rank, in seconds, and the rank from which on it does not grow.
_DELAY_PER_RANK_S = 0.3
_LAST_DELAYED_RANK = 5
#: Seconds for the launcher to forward the message before it prints its own about the abort.
_DELIVERY_S = 0.2

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130


def report_delay_s(rank: int) -> float:
    """Return the seconds that `rank` waits before it prints, so that of several failing ranks only the lowest prints.

    Rank 0 prints at once. A rank that fails alone prints after at most 2.4 s.
    """
    return _FIRST_DELAY_S + _DELAY_PER_RANK_S * min(rank, _LAST_DELAYED_RANK) if rank else 0.0


def message(error: BaseException) -> str:
    """Return one sentence for invalid input, else the traceback; ends in a newline."""
    if isinstance(error, PipedreamError):
        return f"pipedream: {error}\n"
    return "".join(traceback.format_exception(error))


def status(error: BaseException) -> int:
    """Return the exit status: 2 for invalid input, 130 for an interrupt, else 1."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return BAD_INPUT if isinstance(error, PipedreamError) else FAILED


def abort_job(world: World, error: BaseException) -> None:
    """Print `error` once for the whole job and end all ranks. Does not return."""
    time.sleep(report_delay_s(world.rank))
    try:
        prefix = f"[rank {world.rank}/{world.size} {world.host}] "
        sys.stdout.flush()
        # A single write, so that lines of other ranks do not interleave.
        sys.stderr.write("".join(prefix + line for line in message(error).splitlines(keepends=True)))
        sys.stderr.flush()
        time.sleep(_DELIVERY_S)
    finally:
        world.comm.Abort(status(error))


@dataclass(frozen=True)
class _Hook:
    """The function that Python calls with an uncaught exception (sys.excepthook)."""

    world: World

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, KeyboardInterrupt):
            os._exit(INTERRUPTED)  # every rank received the interrupt, so none is left waiting
        abort_job(self.world, error.with_traceback(trace))


def install(world: World) -> None:
    """Make an uncaught exception of this rank stop all ranks; does nothing if there is only one rank."""
    if world.size > 1:
        sys.excepthook = _Hook(world)


def installed() -> bool:
    """Return whether an uncaught exception of this process stops all ranks."""
    return isinstance(sys.excepthook, _Hook)


def abort_others(leaving: SystemExit) -> None:
    """End all ranks when this one exits with an error, since the others would wait for it forever.

    Returns if there are no other ranks.
    """
    hook = sys.excepthook
    if isinstance(hook, _Hook):
        sys.stdout.flush()
        sys.stderr.flush()
        hook.world.comm.Abort(leaving.code if isinstance(leaving.code, int) else FAILED)
