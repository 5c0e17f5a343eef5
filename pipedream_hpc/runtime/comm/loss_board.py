"""Loss board: any rank may read the loss of any microbatch, whichever rank computed it.

The rank of the output stage publishes every loss in its own memory, which takes less than a microsecond. Nothing is
sent until another rank asks; then the progress thread of the owner answers, whatever its main thread is doing::

    output stage   publish 3 │ publish 4 │ ...            main thread
                                 ▲    │ answer            progress thread
    another rank            ask 3└    ▼ 0.271             main thread, when the user reads step.loss

So reading a loss on one rank only cannot block another rank.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple, Protocol

from pipedream_hpc.core import load_comm
from pipedream_hpc.errors import PipedreamError

if TYPE_CHECKING:
    from pipedream_hpc._comm import Progress

#: Losses that an owner keeps.
CAPACITY = 4096


class Loss(NamedTuple):
    """The loss of a microbatch.

    Attributes:
        mean: the mean.
        weight: what it is a mean over: its samples, or what the loss function counted.
        counted: whether the loss function counted it.
    """

    mean: float
    weight: float
    counted: bool = False


class LossBoard(Protocol):
    """Losses of microbatches, by their number within the run."""

    def publish(self, microbatch: int, loss: Loss) -> None:
        """Keep the loss of a microbatch."""
        ...

    def ask(self, owner: int, microbatch: int) -> Loss:
        """Return the loss of a microbatch whose output stage is on rank `owner`; wait until it is published.

        Raises:
            PipedreamError: the owner has overwritten it with later losses.
        """
        ...


class _LocalLossBoard:
    """All ranks are in this process."""

    def __init__(self) -> None:
        self._kept: OrderedDict[int, Loss] = OrderedDict()

    def publish(self, microbatch: int, loss: Loss) -> None:
        self._kept[microbatch] = loss
        if len(self._kept) > CAPACITY:
            self._kept.popitem(last=False)

    def ask(self, owner: int, microbatch: int) -> Loss:
        if microbatch not in self._kept:
            raise PipedreamError(
                f"the loss of microbatch {microbatch} of the run is no longer kept: read step.loss within the next "
                f"{CAPACITY} microbatches"
            )
        return self._kept[microbatch]


class _MpiLossBoard:
    """The core's board."""

    def __init__(self, progress: Progress, stall_limit_s: float) -> None:
        self._board = load_comm().LossBoard(progress, CAPACITY)
        self._stall_limit_s = stall_limit_s

    def publish(self, microbatch: int, loss: Loss) -> None:
        self._board.publish(microbatch, *loss)

    def ask(self, owner: int, microbatch: int) -> Loss:
        return Loss(*self._board.ask(owner, microbatch, self._stall_limit_s))


def local_loss_board() -> LossBoard:
    """Create the board of a process that runs all ranks."""
    return _LocalLossBoard()


def mpi_loss_board(progress: Progress, stall_limit_s: float) -> LossBoard:
    """Create the board of one rank."""
    return _MpiLossBoard(progress, stall_limit_s)
