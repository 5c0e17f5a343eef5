"""Let ranks choose a GPU route without a GPU: host memory stands in for device memory. Run it: python route.py CASE."""

import os
import sys
from contextlib import ExitStack
from unittest.mock import patch

import numpy as np

from pipedream_hpc.cluster.device import Device
from pipedream_hpc.cluster.world import join
from pipedream_hpc.runtime.comm import gpu_route, ping_pong
from pipedream_hpc.runtime.comm.handshake import exchange


def choose(case: str) -> list[str]:
    """Return what every rank says of its choice.

    good: nothing fails. child: only rank 0's child does. bytes: only rank 2 receives wrong bytes. Anything else: rank 0
    sets the route to it.
    """
    world = join()
    right = ping_pong.pattern

    def wrong(nbytes: int, rank: int, round: int) -> np.ndarray:
        made = right(nbytes, rank, round)
        made[0] ^= rank == 1
        return made

    with ExitStack() as patched:
        patched.enter_context(patch.object(gpu_route, "memory_on", lambda device: "host"))
        if case == "child" and world.rank == 0:
            failing = [sys.executable, "-c", "import ctypes; ctypes.string_at(0)"]
            patched.enter_context(patch.object(gpu_route, "child_command", lambda memory, index: failing))
        if case == "bytes" and world.rank == 2:
            patched.enter_context(patch.object(ping_pong, "pattern", wrong))
        if case not in ("good", "child", "bytes") and world.rank == 0:
            patched.enter_context(patch.dict(os.environ, {gpu_route.ROUTE_VARIABLE: case}))
        chosen = gpu_route.choose_route(world, Device("cuda", world.host), limit_s=30.0)
    text = f"rank {world.rank} of {world.size}: {chosen.staged} {chosen.description.replace(world.host, 'HOST')}"
    return [answer["text"] for answer in exchange(world, {"text": text}, limit_s=30.0)]


if __name__ == "__main__":
    choose(sys.argv[1])
