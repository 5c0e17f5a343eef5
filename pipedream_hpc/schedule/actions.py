"""What a rank can be told to do. A schedule is nothing but a sequence of these.

Five readers share them: the worker, the emulator, the simulator, the verifier and the timeline.
Minibatches are numbered from 0 within one schedule, weight versions likewise: version 0 is what the
stage held when the schedule began, and each Update makes the next one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

Payload = Literal["activation", "gradient"]

#: Ranks of every stage, input stage first; replica r of stage s is layout[s][r].
Layout = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Receive:
    """Wait until `payload` of `minibatch` from rank `peer` is here."""

    minibatch: int
    payload: Payload
    peer: int

    def __str__(self) -> str:
        return f"receive {self.payload} {self.minibatch} from rank {self.peer}"


@dataclass(frozen=True, slots=True)
class Send:
    """Hand `payload` of `minibatch` to the channel to rank `peer`."""

    minibatch: int
    payload: Payload
    peer: int

    def __str__(self) -> str:
        return f"send {self.payload} {self.minibatch} to rank {self.peer}"


@dataclass(frozen=True, slots=True)
class Forward:
    """Run the stage forward for `minibatch` on weight `version` (the newest at this point)."""

    minibatch: int
    version: int

    def __str__(self) -> str:
        return f"forward {self.minibatch} on version {self.version}"


@dataclass(frozen=True, slots=True)
class Backward:
    """Run the stage backward for `minibatch` on weight `version`: the one its forward used."""

    minibatch: int
    version: int

    def __str__(self) -> str:
        return f"backward {self.minibatch} on version {self.version}"


@dataclass(frozen=True, slots=True)
class Reduce:
    """Average the gradients of one round over the stage's replicas.

    Round i holds minibatches i·R to i·R + R - 1 of a stage with R replicas. The last round may be
    short: every replica takes part, and the sum is divided by `minibatches`, the true count.
    """

    round: int
    minibatches: int

    def __str__(self) -> str:
        return f"reduce round {self.round} over {self.minibatches} minibatches"


@dataclass(frozen=True, slots=True)
class Update:
    """Apply the gradient to the newest version, which makes `version`."""

    version: int

    def __str__(self) -> str:
        return f"update to version {self.version}"


Action = Receive | Send | Forward | Backward | Reduce | Update


class Schedule(Protocol):
    """A pure function of layout and number of minibatches: the actions of every rank, in order."""

    @property
    def layout(self) -> Layout: ...

    @property
    def minibatches(self) -> int: ...

    @property
    def training(self) -> bool:
        """Whether there are backwards and updates."""
        ...

    def actions(self, rank: int) -> Iterator[Action]:
        """The actions of `rank`, in the order they are carried out."""
        ...

    def in_flight(self, stage: int) -> int:
        """Most minibatches, and so weight versions, alive at once on a replica of `stage`."""
        ...
