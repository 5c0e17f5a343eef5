"""Stall: nobody answers any more. Who waits for whom, and who is silent?

Every rank that has waited too long tells all others, then listens for a moment. Whoever speaks
first can so give the whole picture, and the rank that said nothing is the one to look at::

    rank 0 ──waits──► rank 1 ──waits──► rank 2 ──waits──► rank 3    ... silence
"""

from __future__ import annotations

import time

from pipedream_hpc.cluster.world import World
from pipedream_hpc.errors import PipedreamError

_TAG = 9
#: Ranks began to wait at about the same time and so give up at about the same time.
_LISTEN_S = 2.0


class NobodyAnswersError(PipedreamError):
    """What all ranks that were heard have to say."""


def is_stall(error: BaseException) -> bool:
    """Whether the core gave up waiting, itself or as the cause of `error`."""
    return any(type(each).__name__ == "StallError" for each in (error, error.__cause__))


def report(world: World, own_words: str) -> NobodyAnswersError:
    """Exchange `own_words` with the other stalled ranks; returns the error to raise."""
    if world.comm is None or world.size == 1:
        return NobodyAnswersError(own_words)
    others = [rank for rank in range(world.size) if rank != world.rank]
    requests = [world.comm.isend(own_words, dest=rank, tag=_TAG) for rank in others]
    heard = {world.rank: own_words}
    deadline = time.monotonic() + _LISTEN_S
    while time.monotonic() < deadline and len(heard) < world.size:
        for rank in others:
            if rank not in heard and world.comm.iprobe(source=rank, tag=_TAG):
                heard[rank] = world.comm.recv(source=rank, tag=_TAG)
        time.sleep(0.01)
    del requests  # nobody waits for a silent rank to take its copy
    silent = [str(rank) for rank in others if rank not in heard]
    words = "; ".join(heard[rank] for rank in sorted(heard))
    if not silent:
        return NobodyAnswersError(f"every rank waits for another: {words}")
    named = f"rank{'s' if len(silent) > 1 else ''} {', '.join(silent)}"
    return NobodyAnswersError(
        f"nobody answers. No word from {named}: it may be stuck in the loss, the data or the model (see what it "
        f"does with py-spy dump), or be slower than the stall limit. The others: {words}"
    )
