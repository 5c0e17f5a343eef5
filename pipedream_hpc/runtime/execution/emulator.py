"""Emulator: all ranks of a plan in one process.

The same workers carry out the same actions; only the channels differ. Ranks take turns: each runs
until its next action has to wait for another rank::

    rank 0   F0 F1 F2 .                B0 F3 .        ...
    rank 1   .        F0 F1 .       B0 .       B1     ...
    rank 2   .              F0 B0 F1 .                ...
                                                  time ──►

The order within a rank is the schedule's, so the numbers are those of the run over MPI, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from pipedream_hpc.runtime.execution.worker import Worker
from pipedream_hpc.schedule.actions import Action, Schedule


def emulate(workers: Sequence[Worker], schedule: Schedule) -> Iterator[tuple[Worker, Action]]:
    """Run `schedule` on `workers`, one per rank; yield each action after it ran.

    Raises:
        RuntimeError: every rank waits for another; a verified schedule cannot get there.
    """
    todo = [schedule.actions(worker.rank) for worker in workers]
    upcoming = [next(actions, None) for actions in todo]
    while any(action is not None for action in upcoming):
        moved = False
        for index, worker in enumerate(workers):
            action = upcoming[index]
            while action is not None and worker.ready(action):
                worker.run(action)
                yield worker, action
                action = upcoming[index] = next(todo[index], None)
                moved = True
        if not moved:
            waiting = "; ".join(f"rank {w.rank}: {a}" for w, a in zip(workers, upcoming, strict=True) if a)
            raise RuntimeError(f"every rank waits for another: {waiting}")


def carry_out(
    worker: Worker, schedule: Schedule, *, before_waiting: Callable[[], None] | None = None
) -> Iterator[tuple[Worker, Action]]:
    """Run the actions of one rank; the other ranks are other processes. Yield each action after it ran.

    Args:
        worker: the rank.
        schedule: of all ranks.
        before_waiting: called before an action that has to wait for another rank.
    """
    for action in schedule.actions(worker.rank):
        if before_waiting is not None and not worker.ready(action):
            before_waiting()
        worker.run(action)
        yield worker, action
