"""Ranks choose a route for GPUs that are none: host memory takes the place of a device's."""

import os
import sys

from pipedream_hpc.cluster.device import Device
from pipedream_hpc.cluster.world import join
from pipedream_hpc.runtime import ping_pong, route

case = sys.argv[1]
world = join()
route.memory_on = lambda device: "host"
if case == "child" and world.rank == 0:
    route.command = lambda memory, index: [sys.executable, "-c", "import ctypes; ctypes.string_at(0)"]
if case == "bytes" and world.rank == 2:
    right = ping_pong.pattern

    def pattern(nbytes, rank, round):
        """The first byte is another one."""
        made = right(nbytes, rank, round)
        if rank == 1:
            made[0] ^= 1
        return made

    ping_pong.pattern = pattern
if case not in ("good", "child", "bytes") and world.rank == 0:
    os.environ[route.WISH] = case
chosen = route.choose_route(world, Device("cuda", world.host), limit_s=30.0)
words = chosen.words.replace(world.host, "HOST")
print(f"rank {world.rank} of {world.size}: {chosen.staged} {words}", flush=True)
