"""Handshake: ranks compare what they were started with before they depend on each other.

Everything goes through rank 0, point to point and with a time limit, so that a rank that never answers, or that was
started with something else, is named before the first collective call.
"""

from __future__ import annotations

import time
from typing import Any

from pipedream_hpc.cluster.world import World
from pipedream_hpc.errors import PipedreamError

_TAG = 7


def exchange(world: World, facts: dict[str, Any], *, limit_s: float) -> list[dict[str, Any]]:
    """Exchange `facts` between all ranks and return the facts of every rank, in rank order. Collective.

    Raises:
        PipedreamError: a rank did not answer within `limit_s` seconds.
    """
    if world.comm is None or world.size == 1:
        return [facts]
    deadline = time.monotonic() + limit_s
    if world.rank != 0:
        sent = world.comm.isend(facts, dest=0, tag=_TAG)
        answers: list[dict[str, Any]] = _receive(world, 0, deadline, limit_s)
        sent.wait()
        return answers
    gathered = [facts, *(_receive(world, rank, deadline, limit_s) for rank in range(1, world.size))]
    for request in [world.comm.isend(gathered, dest=rank, tag=_TAG) for rank in range(1, world.size)]:
        request.wait()
    return gathered


def require_equal(answers: list[dict[str, Any]], remedies: dict[str, str]) -> None:
    """Check that all ranks have the same value for every key of `remedies`.

    Raises:
        PipedreamError: names two ranks, their values and the key's remedy.
    """
    for key, remedy in remedies.items():
        for rank, answer in enumerate(answers):
            if answer[key] != answers[0][key]:
                raise PipedreamError(
                    f"ranks disagree about the {key}: {answers[0][key]} on rank 0, "
                    f"{answer[key]} on rank {rank}: {remedy}"
                )


def _receive(world: World, rank: int, deadline: float, limit_s: float) -> Any:
    """Receive an object of any size from `rank`, with a time limit."""
    pause = 1e-4
    while not world.comm.iprobe(source=rank, tag=_TAG):
        if time.monotonic() > deadline:
            raise PipedreamError(
                f"rank {rank} did not answer within {limit_s:.0f} s: look at that rank's log, or raise the limit "
                "with RunConfig(stall_limit_s=...)"
            )
        time.sleep(pause)
        pause = min(2 * pause, 0.01)
    return world.comm.recv(source=rank, tag=_TAG)
