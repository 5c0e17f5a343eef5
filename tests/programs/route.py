"""Let ranks choose a GPU route without a GPU: host memory stands in for device memory."""

import os
import sys

from pipedream_hpc.cluster.device import Device
from pipedream_hpc.cluster.world import join
from pipedream_hpc.runtime.comm import gpu_route, ping_pong

case = sys.argv[1]
world = join()
gpu_route.memory_on = lambda device: "host"
if case == "child" and world.rank == 0:
    gpu_route.child_command = lambda memory, index: [sys.executable, "-c", "import ctypes; ctypes.string_at(0)"]
if case == "bytes" and world.rank == 2:
    right = ping_pong.pattern

    def pattern(nbytes, rank, round):
        """Return the pattern with a wrong first byte."""
        made = right(nbytes, rank, round)
        if rank == 1:
            made[0] ^= 1
        return made

    ping_pong.pattern = pattern
if case not in ("good", "child", "bytes") and world.rank == 0:
    os.environ[gpu_route.ROUTE_VARIABLE] = case
chosen = gpu_route.choose_route(world, Device("cuda", world.host), limit_s=30.0)
description = chosen.description.replace(world.host, "HOST")
print(f"rank {world.rank} of {world.size}: {chosen.staged} {description}", flush=True)
