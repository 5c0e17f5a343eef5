"""Stall report: when a rank has waited too long, find out which ranks wait for which, and which one is silent.

Every rank that has waited too long sends its report to all others, then listens for a moment. So the first rank
that gives up can show the whole picture, and the rank that sent no report is the one to look at::

    rank 0 ──waits──► rank 1 ──waits──► rank 2 ──waits──► rank 3    ... silence
"""

from __future__ import annotations

import time

from pipedream_hpc.cluster.world import World
from pipedream_hpc.errors import PipedreamError

_TAG = 9
#: Ranks began to wait at about the same time, so they give up at about the same time.
_LISTEN_S = 2.0


class StallReportError(PipedreamError):
    """The reports of all stalled ranks in one message."""


def is_stall(error: BaseException) -> bool:
    """Return whether `error`, or its cause, is the core's StallError."""
    return any(type(each).__name__ == "StallError" for each in (error, error.__cause__))


def report(world: World, own_message: str) -> StallReportError:
    """Exchange reports with the other stalled ranks and return the error to raise.

    Args:
        world: all ranks.
        own_message: what this rank waited for.
    """
    if world.comm is None or world.size == 1:
        return StallReportError(own_message)
    others = [rank for rank in range(world.size) if rank != world.rank]
    requests = [world.comm.isend(own_message, dest=rank, tag=_TAG) for rank in others]
    received = {world.rank: own_message}
    deadline = time.monotonic() + _LISTEN_S
    while time.monotonic() < deadline and len(received) < world.size:
        for rank in others:
            if rank not in received and world.comm.iprobe(source=rank, tag=_TAG):
                received[rank] = world.comm.recv(source=rank, tag=_TAG)
        time.sleep(0.01)
    del requests  # not waited for: a silent rank never receives them
    silent = [str(rank) for rank in others if rank not in received]
    messages = "; ".join(received[rank] for rank in sorted(received))
    if not silent:
        return StallReportError(f"every rank waits for another: {messages}")
    named = f"rank{'s' if len(silent) > 1 else ''} {', '.join(silent)}"
    return StallReportError(
        f"no answer from {named}, which may be stuck in the loss, the data or the model, or be slower than the stall "
        f"limit: see what it does with py-spy dump. The others: {messages}"
    )
