"""Ping-pong: send bytes from rank to rank through channels and check that they arrive unchanged.

::

    python -m pipedream_hpc.runtime.comm.ping_pong device 0      as a child process, on one rank or several

Every rank sends to the next one, and the last to the first. The sizes cover the three protocols of MPI: messages that
it copies at once, messages that it first announces to the receiver, and messages that it splits into chunks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from pipedream_hpc.core import load_comm, load_weights

#: Bytes; the last size is not aligned to anything.
SIZES = (4 << 10, 1 << 20, (32 << 20) + 12)
#: Messages of each size: each of a channel's two slots is used, and one is used again.
ROUNDS = 3


def run_ping_pong(comm: Any, memory: str, *, device: int = -1, limit_s: float = 30.0) -> str | None:
    """Pass bytes around all ranks of `comm` and return what went wrong on this rank, or None. Collective.

    Args:
        comm: an mpi4py communicator.
        memory: the memory of the bytes, as the core names it.
        device: the GPU for the progress thread; -1 for the current one.
        limit_s: seconds that one message may take.
    """
    core = load_comm()
    progress = core.Progress(comm, oversubscribed=True, device=device if memory == "device" else -1)
    following, preceding = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    errors: list[str] = []
    try:
        for tag, nbytes in enumerate(SIZES):
            spec = [("bytes of a ping-pong", "uint8", 1, (nbytes,))]
            receiver = core.RecvChannel(progress, preceding, tag, spec, 2, memory)
            sender = core.SendChannel(progress, following, tag, spec, memory)
            # Go on after an error: the next rank waits for what this one sends.
            errors += _pass_on(sender, receiver, nbytes, memory, comm.rank, preceding, limit_s)
    except core.CoreError as error:
        errors.append(str(error).splitlines()[0])
    finally:
        progress.close()
    return errors[0] if errors else None


def _pass_on(
    sender: Any, receiver: Any, nbytes: int, memory: str, rank: int, preceding: int, limit_s: float
) -> Iterator[str]:
    """Send and receive `ROUNDS` messages; yield a sentence for each that arrived with other bytes."""
    core = load_weights()
    outgoing = [core.Buffer(nbytes, memory) for _ in range(2)]
    host = core.Buffer(nbytes, "host")
    values = np.frombuffer(host.view(), np.uint8)
    for round in range(ROUNDS):
        values[:] = pattern(nbytes, rank, round)
        core.copy(outgoing[round % 2].view(), host.view())
        sender.send(round, [(outgoing[round % 2].view().address, None)], limit_s)
        slot, _ = receiver.receive(round, limit_s)
        core.copy(host.view(), receiver.slot(slot))
        receiver.release(slot)
        n_wrong = int(np.count_nonzero(values != pattern(nbytes, preceding, round)))
        if n_wrong:
            yield f"{n_wrong} of {nbytes} bytes in {memory} memory arrived wrong"
    sender.drain(limit_s)


def pattern(nbytes: int, rank: int, round: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return bytes that are different for every rank, round and position."""
    return np.random.default_rng((rank, round)).integers(0, 256, nbytes, np.uint8)


def main() -> None:
    """Run as a child process: exit status 0 on success, else 1 and one line that begins with `ping-pong:`."""
    memory, device = sys.argv[1], int(sys.argv[2])
    from mpi4py import MPI

    try:
        if memory == "device":
            load_weights().use_device(device)
        error = run_ping_pong(MPI.COMM_WORLD, memory, device=device)
    except (RuntimeError, MemoryError) as raised:  # CUDA's errors among them
        error = str(raised) or "there was not enough memory"
    if error is not None:
        print(f"ping-pong: {error}", flush=True)
        MPI.COMM_WORLD.Abort(1)


if __name__ == "__main__":
    main()
