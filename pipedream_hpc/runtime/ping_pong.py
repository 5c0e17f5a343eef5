"""Ping-pong: bytes go from rank to rank through channels, and come out as they went in, or not.

::

    python -m pipedream_hpc.runtime.ping_pong device 0      as a child process, on one rank or several

Every rank sends to the next one, and the last to the first. Sizes are those at which MPI changes its ways: what
it copies at once, what it asks the receiver about, and what it cuts into pieces.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from pipedream_hpc.core import load_core, load_memory

#: Bytes; the last one is no multiple of anything.
SIZES = (4 << 10, 1 << 20, (32 << 20) + 12)
#: So many messages of each size: both of a channel's slots are used, and used again.
ROUNDS = 3


def play(comm: Any, memory: str, *, device: int = -1, limit_s: float = 30.0) -> str | None:
    """Pass bytes around all ranks of `comm`; what went wrong on this one, or None. Collective.

    Args:
        comm: an mpi4py communicator.
        memory: that the bytes are in, as the core calls it.
        device: the GPU that the progress thread is to use; -1 for the one it finds.
        limit_s: seconds that one message may take.
    """
    core = load_core()
    progress = core.Progress(comm, crowded=True, device=device if memory == "device" else -1)
    following, preceding = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    wrong: list[str] = []
    try:
        for tag, nbytes in enumerate(SIZES):
            part = [("bytes of a ping-pong", "uint8", 1, (nbytes,))]
            receiver = core.ReceiveChannel(progress, preceding, tag, part, 2, memory)
            sender = core.SendChannel(progress, following, tag, part, memory)
            # To the end, whatever comes: the next rank waits for what this one sends.
            wrong += _pass_on(sender, receiver, nbytes, memory, comm.rank, preceding, limit_s)
    except core.CoreError as error:
        wrong.append(str(error).splitlines()[0])
    finally:
        progress.close()
    return wrong[0] if wrong else None


def _pass_on(
    sender: Any, receiver: Any, nbytes: int, memory: str, rank: int, preceding: int, limit_s: float
) -> Iterator[str]:
    """A sentence whenever bytes came out otherwise than they went in."""
    core = load_memory()
    leaving = [core.Buffer(nbytes, memory) for _ in range(2)]
    host = core.Buffer(nbytes, "host")
    seen = np.frombuffer(host.view(), np.uint8)
    for round in range(ROUNDS):
        seen[:] = pattern(nbytes, rank, round)
        core.copy(leaving[round % 2].view(), host.view())
        sender.send(round, [(leaving[round % 2].view().address, None)], limit_s)
        slot, _ = receiver.receive(round, limit_s)
        core.copy(host.view(), receiver.slot(slot))
        receiver.release(slot)
        wrong = int(np.count_nonzero(seen != pattern(nbytes, preceding, round)))
        if wrong:
            yield f"{wrong} of {nbytes} bytes in {memory} memory arrived wrong"
    sender.drain(limit_s)


def pattern(nbytes: int, rank: int, round: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Bytes that tell from which rank and round they are, and where they stood."""
    return np.random.default_rng((rank, round)).integers(0, 256, nbytes, np.uint8)


def main() -> None:
    """As a child process: status 0 if all went well, else 1 and one line that begins with `ping-pong:`."""
    memory, device = sys.argv[1], int(sys.argv[2])
    from mpi4py import MPI

    try:
        if memory == "device":
            load_memory().use_device(device)
        wrong = play(MPI.COMM_WORLD, memory, device=device)
    except (RuntimeError, MemoryError) as error:  # CUDA's words among them
        wrong = str(error) or "there was not enough memory"
    if wrong is not None:
        print(f"ping-pong: {wrong}", flush=True)
        MPI.COMM_WORLD.Abort(1)


if __name__ == "__main__":
    main()
