"""Rank 0 prints rank, local rank and cores of every rank; exits with a message if there is no MPI."""

import sys

from pipedream_hpc.cluster.world import join
from pipedream_hpc.errors import PipedreamError


def main() -> None:
    try:
        world = join()
    except PipedreamError as error:
        sys.exit(f"pipedream: {error}")
    if world.comm is None:
        print(f"alone {world.rank}/{world.size} mpi4py loaded: {'mpi4py.MPI' in sys.modules}")
        return
    places = world.comm.gather((world.rank, world.size, world.local_rank, world.local_size, world.node_cores))
    if world.is_root:
        print(places)


if __name__ == "__main__":
    main()
