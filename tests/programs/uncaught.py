"""Ranks that end in a chosen way, with nothing but `join` before: python uncaught.py HOW RANK."""

import os
import signal
import sys
import time

from pipedream_hpc.cluster.world import join
from pipedream_hpc.errors import PipedreamError


def main() -> None:
    how, who = sys.argv[1], int(sys.argv[2])
    world = join()
    world.comm.Barrier()
    if who in (world.rank, -1):
        if how == "input":
            raise PipedreamError("plan.json: cannot be read: put it there")
        if how == "bug":
            raise ZeroDivisionError("no samples")
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
    if world.rank % 2:
        world.comm.recv()  # nobody sends: it waits inside MPI
    time.sleep(3600)


if __name__ == "__main__":
    main()
