"""What a rank can be told to do. A schedule is nothing but a sequence of these.

Five readers share them: the worker, the emulator, the simulator, the verifier and the timeline.

What passes through the pipe is called a minibatch; where a schedule cuts minibatches into m
microbatches, the units that pass are these, and unit k is microbatch k mod m of minibatch k div m.
Units are numbered from 0 within one schedule, weight versions likewise: version 0 is what the
stage held when the schedule began, and each Update makes the next one.

Actions are not frozen, though nobody may change one: a simulation makes millions, and a frozen
dataclass takes four times as long to make.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from pipedream_hpc.errors import PipedreamError

Payload = Literal["activation", "gradient"]

#: Ranks of every stage, input stage first; replica r of stage s is layout[s][r]. A rank may stand in
#: several stages (interleaved 1F1B), then in all its stages at the same place.
Layout = tuple[tuple[int, ...], ...]


class ScheduleError(PipedreamError):
    """A schedule that must not be launched: it would hang, use the wrong weights, or cannot be made."""


@dataclass(slots=True, unsafe_hash=True)
class Receive:
    """Wait until `payload` of `minibatch` from rank `peer` in stage `far` is here, for `stage`."""

    stage: int
    minibatch: int
    payload: Payload
    peer: int
    far: int

    def __str__(self) -> str:
        return f"receive {self.payload} {self.minibatch} from rank {self.peer}"


@dataclass(slots=True, unsafe_hash=True)
class Send:
    """Hand `payload` of `minibatch` from `stage` to the channel to rank `peer` in stage `far`."""

    stage: int
    minibatch: int
    payload: Payload
    peer: int
    far: int

    def __str__(self) -> str:
        return f"send {self.payload} {self.minibatch} to rank {self.peer}"


@dataclass(slots=True, unsafe_hash=True)
class Forward:
    """Run `stage` forward for `minibatch` on weight `version`."""

    stage: int
    minibatch: int
    version: int

    def __str__(self) -> str:
        return f"forward {self.minibatch} on version {self.version}"


@dataclass(slots=True, unsafe_hash=True)
class Backward:
    """Run `stage` backward for `minibatch` on weight `version`: the one its forward used.

    Gradients add up until the next Update of the stage.
    """

    stage: int
    minibatch: int
    version: int

    def __str__(self) -> str:
        return f"backward {self.minibatch} on version {self.version}"


@dataclass(slots=True, unsafe_hash=True)
class WeightGradient:
    """Compute what the Backward of `minibatch` put off: the gradients of the weights of `stage`.

    Upstream waits for the gradient of the stage's input only, so that is computed and sent first (Qi et al., Zero
    Bubble Pipeline Parallelism, ICLR 2024). The unit is done with here after this.
    """

    stage: int
    minibatch: int
    version: int

    def __str__(self) -> str:
        return f"weight gradient {self.minibatch} on version {self.version}"


@dataclass(slots=True, unsafe_hash=True)
class Reduce:
    """Average the gradients of one round over the replicas of `stage`.

    A round is what one Update learns from: units i·n to i·n + n - 1 with n = `per_update(stage)`.
    The last round may be short, and a replica may have no unit in it: every replica takes part, and
    the sum is divided by `minibatches`, the true count of units.
    """

    stage: int
    round: int
    minibatches: int

    def __str__(self) -> str:
        return f"reduce round {self.round} over {self.minibatches} minibatches"


@dataclass(slots=True, unsafe_hash=True)
class Agree:
    """Exchange a few numbers about the round's gradients between all ranks of all stages.

    Their norm, by which all stages clip alike, and whether one overflowed, in which case none updates.
    Only schedules with a synchronous point can have it.
    """

    stage: int
    round: int

    def __str__(self) -> str:
        return f"agree on round {self.round}"


@dataclass(slots=True, unsafe_hash=True)
class Update:
    """Apply the gradient to the newest version of `stage`, which makes `version`."""

    stage: int
    version: int

    def __str__(self) -> str:
        return f"update to version {self.version}"


Action = Receive | Send | Forward | Backward | WeightGradient | Reduce | Agree | Update

#: Pairs of stages, the first before the second, between which activations and gradients travel.
Links = tuple[tuple[int, int], ...]


class Schedule(Protocol):
    """A pure function of layout and number of units: the actions of every rank, in order."""

    @property
    def layout(self) -> Layout: ...

    @property
    def minibatches(self) -> int:
        """How many units pass."""
        ...

    @property
    def training(self) -> bool:
        """Whether there are backwards and updates."""
        ...

    @property
    def newest(self) -> bool:
        """Whether every forward is promised to run on the newest version there is."""
        ...

    @property
    def stashes(self) -> bool:
        """Whether every backward runs on the version of its forward."""
        ...

    def splits(self, stage: int) -> bool:
        """Whether any Backward in `stage` has a WeightGradient that follows it."""
        ...

    def puts_off(self, stage: int, unit: int) -> bool:
        """Whether the Backward of `unit` in `stage` has a WeightGradient that follows it."""
        ...

    def lag(self, stage: int) -> int:
        """Most units of a replica of `stage` whose WeightGradient waits while another's Backward runs."""
        ...

    def waiting(self, stage: int) -> int:
        """Most units of a replica of `stage` that wait for their WeightGradient at once."""
        ...

    def last_of_round(self, stage: int, unit: int) -> bool:
        """Whether a replica of `stage` has all gradients that an update learns from once it has those of `unit`."""
        ...

    def sources(self, stage: int) -> tuple[int, ...]:
        """Stages that send activations to `stage`, nearest first."""
        ...

    def targets(self, stage: int) -> tuple[int, ...]:
        """Stages that `stage` sends activations to, nearest first."""
        ...

    def per_update(self, stage: int) -> int:
        """Units that one update of `stage` learns from, over all its replicas."""
        ...

    def actions(self, rank: int) -> Iterator[Action]:
        """The actions of `rank`, in the order they are carried out."""
        ...

    def in_flight(self, stage: int) -> int:
        """Most units alive at once on a replica of `stage`."""
        ...

    def versions(self, stage: int) -> int:
        """Weight slabs a replica of `stage` needs: so many newest versions are kept."""
        ...
